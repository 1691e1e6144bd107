"""The cost of a network: one forward pass, two counters, and what is said where they cannot be believed."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cifar.flops.calls import CallCounter, Rule
from cifar.flops.disguised import MAX_SHARE, ProductTracker
from cifar.flops.dispatch import OperatorCounter, PlainCounter, spare_dynamo_import
from cifar.flops.modules import RunningModules, find_tensors, is_tested, layer_kind
from cifar.flops.networks import (
    INPUT_SHAPE,
    borrow,
    keep_random_state,
    materialize_lazy_modules,
    read_random_state,
    widen_weights,
)

MAX_READ = 64  # values of the image that a network may read one by one, to decide what it does


@dataclass(frozen=True)
class LayerCost:
    """The cost of one module, or of all products that are computed outside of counted modules."""

    name: str
    kind: str  # conv, linear, bilinear, recurrent, attention, product, norm
    macs: int
    params: int
    activations: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """A model's cost for one input. `note` is empty if `verified`."""

    macs: int
    params: int
    activations: int
    norm_ops: int
    layers: tuple[LayerCost, ...]
    verified: bool
    note: str

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply-add is two."""
        return 2 * self.macs

    def as_dict(self, *, layers: bool = False) -> dict[str, Any]:
        """For JSON; with the layers only if `layers`."""
        values = asdict(self) | {"flops": self.flops}
        if not layers:
            del values["layers"]
        return values


@dataclass(frozen=True)
class Count:
    """What both counters saw in one forward pass."""

    calls: CallCounter
    operators: OperatorCounter
    tracker: ProductTracker
    output: Any
    used_chance: bool  # random numbers were drawn

    @property
    def totals(self) -> tuple[int, int]:
        return sum(self.calls.macs.values()), sum(self.operators.macs.values())

    @property
    def may_vary(self) -> bool:
        """Whether another image could cost something else."""
        return self.used_chance or self.operators.depends_on_values


def measure_cost(
    model: nn.Module, input_shape: tuple[int, ...] = INPUT_SHAPE, rules: Mapping[type[nn.Module], Rule] | None = None
) -> Cost:
    """Count on a copy in evaluation mode on the CPU: `model` and the random state do not change.

    `rules` replace thop's for the given module types, and count their submodules too. What they count is checked like the rest.
    Raises what the network's forward raises.
    """
    spare_dynamo_import()
    with borrow(model) as network, _plain_pytorch(), keep_random_state(0):
        materialize_lazy_modules(network, input_shape=input_shape)
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        names = {module: name for name, module in network.named_modules()}
        image = torch.rand(input_shape, generator=torch.Generator().manual_seed(0)).to(device)
        widen_weights(network, image)
        count = _count(network, image, rules or {}, seed=0)
        notes = [*_find_unknown(count, names), *_find_differences(count, names), *_find_disguised_products(count)]
        if count.may_vary and (other := _find_other_total(network, image, rules or {}, count)) is not None:
            cause = "chance" if count.used_chance else "the image"
            notes.append(f"the cost depends on {cause}: {count.totals[1]:,} MACs once and {other:,} another time")
        if not notes and not all(map(is_tested, network.modules())):
            notes += _find_dependence_on_calls(network, image, count.totals[1])
        return _describe(network, count, names, "; ".join(notes))


@contextlib.contextmanager
def _plain_pytorch() -> Iterator[None]:
    """Nothing fused or compiled, no warnings. Attention is two products, as torch 2.11's fused kernel for CPUs hides them."""
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network's own are shown when it is trained
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _count(network: nn.Module, image: Tensor, rules: Mapping[type[nn.Module], Rule], seed: int) -> Count:
    running, tracker = RunningModules(network, tuple(rules)), ProductTracker(image, [*network.parameters(), *network.buffers()])
    calls, operators = CallCounter(rules, running, tracker), OperatorCounter(running, tracker)
    with keep_random_state(seed):
        before = read_random_state()
        with running.watch(), operators:
            calls.run(network, image)
        used_chance = before != read_random_state()
    return Count(calls, operators, tracker, running.output, used_chance)


def _find_other_total(network: nn.Module, image: Tensor, rules: Mapping[type[nn.Module], Rule], count: Count) -> int | None:
    """The MACs that ran in another pass, if they are not the same: of another image, with other random numbers or weights.

    Weights grow in a training, and then a network that looks at its own values decides otherwise.
    """
    others = torch.zeros_like(image), torch.ones_like(image), image, -image
    for seed, (other, scale) in enumerate([*((each, 1.0) for each in others), (image, 0.1), (image, 10.0), (-image, 100.0)], 1):
        with _scaled_weights(network, scale), contextlib.suppress(*() if scale == 1.0 else (Exception,)):
            again = _count(network, other, rules, seed)
            if again.totals != count.totals:
                return again.totals[1]
    return None


@contextlib.contextmanager
def _scaled_weights(network: nn.Module, scale: float) -> Iterator[None]:
    tensors = [tensor for tensor in network.parameters() if tensor.is_floating_point() and scale != 1.0]
    values = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def _count_pair(network: nn.Module, image: Tensor) -> int | None:
    """The MACs of a second pass, of two images. None where the network takes only one: a check of the training says that."""
    counter = PlainCounter()
    network.eval()
    with contextlib.suppress(Exception), keep_random_state(0), torch.no_grad():
        with counter:
            network(torch.cat([image, image]))
        return counter.macs
    return None


# -- why a count is not verified -----------------------------------------------------------------------------------------


def _find_unknown(count: Count, names: Mapping[nn.Module, str]) -> Iterator[str]:
    calls, operators = count.calls, count.operators
    for rule in calls.failed_rules[:1]:
        yield f"the rule for {rule} fails"
    if operators.unknown:
        places = [f"{name} (in {_name(module, names)})" for name, module in operators.unknown.items()]
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        yield f"no formula counts {', '.join(places[:4])}{more}"
        return
    if calls.exits:
        yield f"what is computed after {', '.join(sorted(calls.exits))}, outside of PyTorch, is not counted"
    elif operators.num_read > MAX_READ:
        yield f"what is computed from {operators.num_read:,} values of the image in Python (.item(), float()) is not counted"
    elif count.tracker.met_stranger and not any(map(count.tracker.comes_from_image, find_tensors(count.output))):
        yield "no operator of PyTorch leads from the image to the output, so that what is computed between them is not counted"


def _find_differences(count: Count, names: Mapping[nn.Module, str]) -> Iterator[str]:
    called, ran = count.calls.macs, count.operators.macs
    for module, name in names.items():
        if isinstance(module, nn.MultiheadAttention):
            yield (
                f"{name or 'the model'} is an nn.MultiheadAttention, whose softmax thop counts as products; "
                "use nn.Linear and F.scaled_dot_product_attention"
            )
            return
    different = [module for module in {**called, **ran} if called[module] != ran[module]]
    if different and not count.operators.unknown:
        worst = sorted(different, key=lambda module: -abs(called[module] - ran[module]))[:3]
        where = "".join(
            f", in {_name(module, names)} {called[module]:,} and {ran[module]:,}"
            f"{_list_operators(count.operators.contracting[module])}"
            for module in worst
        )
        total, reference = count.totals
        yield (
            f"thop counts {total:,} MACs and the operators that ran {reference:,}{where}; "
            "compute in modules that thop knows, or give a rule"
        )


def _find_disguised_products(count: Count) -> Iterator[str]:
    tracker, macs = count.tracker, max(count.totals)
    if tracker.expanded_product:
        yield (
            f"a pointwise product ({tracker.expanded_product}) is summed up, which is a matrix product; "
            "write it as one (F.linear, torch.matmul)"
        )
    elif tracker.num_summed_products > MAX_SHARE * macs:
        yield (
            f"pointwise products that are summed up need {tracker.num_summed_products:,} multiply-adds, which are not in the "
            f"{macs:,}; write them as matrix products (F.linear, torch.matmul)"
        )
    elif tracker.num_summed_products + tracker.num_reduced_pairs > MAX_SHARE * macs:
        num = tracker.num_summed_products + tracker.num_reduced_pairs
        yield (
            f"pairs of values that are combined one by one and then reduced (as in distances) need {num:,} operations, which "
            f"are not in the {macs:,} multiply-adds"
        )


def _find_dependence_on_calls(network: nn.Module, image: Tensor, macs: int) -> Iterator[str]:
    pair = _count_pair(network, image)
    if pair is not None and not macs <= pair <= 2 * macs:
        yield (
            "the cost of an image depends on how many there are, or on how often the network was called: "
            f"{macs:,} MACs for one image, then {pair:,} for two"
        )


def _list_operators(operators: set[str]) -> str:
    return f" ({', '.join(sorted(operators))})" if operators else ""


def _name(module: nn.Module | None, names: Mapping[nn.Module, str]) -> str:
    if module is None:
        return "the model itself"
    return names.get(module, type(module).__name__) or "the model itself"


# -- layer by layer -----------------------------------------------------------------------------------------------------


def _describe(network: nn.Module, count: Count, names: Mapping[nn.Module, str], note: str) -> Cost:
    calls = count.calls
    layers = []
    for module, name in names.items():
        kind = layer_kind(module)
        if kind and module in calls.shapes:
            shape = calls.shapes[module]
            activations = torch.Size(shape).numel() if kind in ("conv", "linear") else 0
            params = sum(p.numel() for p in module.parameters())
            layers.append(LayerCost(name, kind, calls.macs[module], params, activations, shape))
    macs = count.totals[0]
    if functional := macs - sum(layer.macs for layer in layers):
        layers.append(LayerCost("(functional products)", "product", functional, 0, 0, ()))
    return Cost(
        macs=macs,
        params=sum(p.numel() for p in network.parameters()),
        activations=sum(layer.activations for layer in layers),
        norm_ops=calls.norm_ops,
        layers=tuple(layers),
        verified=not note,
        note=note,
    )
