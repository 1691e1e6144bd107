"""What a model costs: multiply-adds, parameters, activations, layer by layer. The only file that imports thop.

The convention: `macs` are the multiply-adds of convolutions, linear layers and attention matrix products in one forward pass
of one 3x32x32 image; `flops` = 2 macs. `activations` are the elements that convolutions and linear layers put out (pycls:
Radosavovic et al. 2020, arXiv:2003.13678). thop's operations of normalisation layers are counted separately, as `norm_ops`;
pooling, softmax and element-wise functions are left out.

thop counts by modules, torch's FlopCounterMode checks by the operators that really ran. Where they disagree by more than 0.1 %,
or a module is known to be counted wrongly, the cost is not `verified` and `note` says where to look.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from thop.profile import profile, register_hooks  # type: ignore[import-untyped, unused-ignore]
from thop.vision.basic_hooks import zero_ops  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

TOLERANCE = 1e-3  # of the two counters' totals
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

Rule = Callable[[Any, Any, Any], None]  # thop's: (module, inputs, output), adds to module.total_ops


@dataclass(frozen=True)
class LayerCost:
    """The cost of one module, or of all products that are computed outside of counted modules."""

    name: str
    kind: str  # conv, linear, attention, product, norm
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


def _layer_kind(module: nn.Module) -> str:
    kinds = ((_ConvNd, "conv"), (nn.Linear, "linear"), (nn.MultiheadAttention, "attention"), (NORMS, "norm"))
    return next((kind for types, kind in kinds if isinstance(module, types)), "")


def measure_cost(
    model: nn.Module, input_shape: tuple[int, ...] = (1, 3, 32, 32), rules: Mapping[type[nn.Module], Rule] | None = None
) -> Cost:
    """Count on a copy in evaluation mode on the CPU: `model` and the random state do not change.

    `rules` replace thop's for the given module types. What they count is checked like the rest.
    """
    model = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(True)
    images = torch.zeros(input_shape)
    names = {module: name for name, module in model.named_modules()}
    ops: dict[nn.Module, int] = {}
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def record_ops(rule: Rule) -> Rule:
        def count_ops(module: Any, inputs: Any, output: Any) -> None:
            before = module.total_ops
            rule(module, inputs, output)
            ops[module] = ops.get(module, 0) + round(float(module.total_ops - before))
            shapes[module] = tuple((output[0] if isinstance(output, tuple) else output).shape)

        return count_ops

    custom = {kind: record_ops(rule) for kind, rule in {**register_hooks, **(rules or {})}.items() if rule is not zero_ops}
    total, _ = profile(model, inputs=(images,), custom_ops=custom, verbose=False)

    layers = []
    for module, name in names.items():
        kind = _layer_kind(module)
        if kind and module in ops:
            out = shapes[module]
            macs = 0 if kind == "norm" else ops[module]
            activations = torch.Size(out).numel() if kind in ("conv", "linear") else 0
            params = sum(p.numel() for p in module.parameters())
            layers.append(LayerCost(name, kind, macs, params, activations, out))
    functional = round(total) - sum(ops.values())
    if functional:
        layers.append(LayerCost("(functional products)", "product", functional, 0, 0, ()))

    macs = sum(layer.macs for layer in layers)
    note = _compare_counters(model, images, macs, {layer.name: layer.macs for layer in layers}, names)
    return Cost(
        macs=macs,
        params=sum(p.numel() for p in model.parameters()),
        activations=sum(layer.activations for layer in layers),
        norm_ops=sum(count for module, count in ops.items() if _layer_kind(module) == "norm"),
        layers=tuple(layers),
        verified=not note,
        note=note,
    )


def _compare_counters(model: nn.Module, images: Tensor, macs: int, by_name: dict[str, int], names: dict[nn.Module, str]) -> str:
    """Why `macs` cannot be trusted, because the two counters differ; empty if it can."""
    _skip_dynamo_import()
    # The counter does not see into every fused attention kernel (torch 2.11's for CPUs, say); the plain one is two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    flops_by_module = counter.get_flop_counts()
    reference_macs = counter.get_total_flops() // 2
    notes = []
    for module, name in names.items():
        if isinstance(module, nn.MultiheadAttention):
            notes.append(
                f"{name or 'the model'} is an nn.MultiheadAttention, whose softmax thop counts as products; "
                "use nn.Linear and F.scaled_dot_product_attention"
            )
            break
    if not notes and abs(macs - reference_macs) > TOLERANCE * max(macs, reference_macs):
        # The mode keys modules by the root's class and the dotted name; a parent includes its children.
        root = type(model).__name__
        reference_of = {name: _sum_macs(flops_by_module.get(f"{root}.{name}" if name else root, {})) for name in names.values()}
        reference_by_name = {
            name: reference_of[name] - sum(reference_of[names[child]] for child in set(module.children()) if child in names)
            for module, name in names.items()
        }
        differences = {name: abs(count - by_name.get(name, 0)) for name, count in reference_by_name.items()}
        different = [name for name, difference in differences.items() if difference]
        worst = sorted(different, key=lambda name: -differences[name])[:3]
        where = "".join(
            f", in {name or 'the model itself'} {by_name.get(name, 0):,} and {reference_by_name[name]:,}" for name in worst
        )
        notes.append(
            f"thop counts {macs:,} MACs and FlopCounterMode {reference_macs:,}{where}; "
            "compute in modules that thop knows, or give a rule"
        )
    return "; ".join(notes)


def _skip_dynamo_import() -> None:
    """Keep the counter from importing torch.compile, which takes each process 1 to 3 s.

    It imports that only to hide from the compiler, and nothing is compiled under the counter. If another version of torch has
    no such attributes, torch.compile is imported.
    """
    mode = getattr(flop_counter, "_FlopCounterMode", None)
    hidden = getattr(getattr(mode, "__torch_dispatch__", None), "__wrapped__", None)
    if hidden is not None and "torch._dynamo" not in sys.modules:
        hidden.__dynamo_disable = hidden  # where `torch._disable_dynamo` caches the wrapped function


def _sum_macs(flops_by_operator: Mapping[Any, int]) -> int:
    """MACs of one module by FlopCounterMode, without the products of attention: thop counts those outside of modules."""
    return sum(count for operator, count in flops_by_operator.items() if "bmm" not in str(operator)) // 2


def measure_microseconds_per_image(model: nn.Module, device: torch.device | str = "cpu", batch: int = 64) -> float:
    """Median microseconds of a forward pass in evaluation mode, per image. Uses a copy; the model does not change."""
    device = torch.device(device)
    model = copy.deepcopy(model).to(device).eval()
    dtype = next(model.parameters()).dtype
    images = torch.zeros(batch, 3, 32, 32, device=device, dtype=dtype)
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    seconds: list[float] = []
    with torch.inference_mode():
        model(images)  # allocates memory and chooses kernels
        while len(seconds) < 3 or (len(seconds) < 20 and sum(seconds) < 0.1):
            synchronize()
            start = time.perf_counter()
            model(images)
            synchronize()
            seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds) / batch
