"""The first counter: what the network calls.

A module counts by thop's rule, or by ours where thop has none that fits the convention. Products that are called as functions
(`torch.matmul`, `F.linear`, `einsum`) count by thop's rule for functions, or by ours. This file imports thop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from thop.profile import functional_hooks, profile, register_hooks  # type: ignore[import-untyped, unused-ignore]
from thop.vision.basic_hooks import zero_ops  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from cifar.flops.disguised import ProductTracker
from cifar.flops.modules import (
    RECURRENT_CELL_FUNCTIONS,
    RECURRENT_FUNCTIONS,
    RunningModules,
    find_functions,
    find_tensors,
    has_own_forward,
    layer_kind,
)

Rule = Callable[[Any, Any, Any], None]  # thop's: (module, inputs, output), adds to module.total_ops


def _count_recurrent(module: Any, inputs: Any, output: Any) -> None:
    """The matrix products of an RNN, GRU or LSTM. thop adds biases and pointwise operations, which we count for no layer."""
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    hidden, out = module.hidden_size, module.proj_size or module.hidden_size
    directions = 2 if module.bidirectional else 1
    total = 0
    for layer in range(module.num_layers):
        width = module.input_size if layer == 0 else directions * out
        total += directions * hidden * (gates * (width + out) + module.proj_size)
    sequence = inputs[0]
    packed = isinstance(sequence, nn.utils.rnn.PackedSequence)
    module.total_ops += total * (len(sequence.data) if packed else math.prod(sequence.shape[:-1]))


def _count_recurrent_cell(module: Any, inputs: Any, output: Any) -> None:
    gates = module.weight_ih.shape[0] // module.hidden_size
    batch = math.prod(inputs[0].shape[:-1])
    module.total_ops += batch * gates * module.hidden_size * (module.input_size + module.hidden_size)


OUR_RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _count_recurrent),
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), _count_recurrent_cell),
}

FunctionRule = Callable[[Any, Any, Any], int]  # thop's: (args, kwargs, result) -> multiply-adds


def _argument(args: Any, kwargs: Any, index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs[name]


def _count_product(args: Any, kwargs: Any, result: Tensor) -> int:
    """Of a matrix, vector or dot product: each element of the result is a sum over the first factor's last dimension."""
    first = args[0] if args else next(kwargs[name] for name in ("input", "self", "x") if name in kwargs)
    return int(result.numel() * first.shape[-1])


def _count_added_product(args: Any, kwargs: Any, result: Tensor) -> int:
    """addmm, addmv, baddbmm: the first argument is added."""
    first = args[1] if len(args) > 1 else next(kwargs[name] for name in ("mat1", "mat", "batch1") if name in kwargs)
    return int(result.numel() * first.shape[-1])


def _count_addbmm(args: Any, kwargs: Any, result: Tensor) -> int:
    return int(_argument(args, kwargs, 1, "batch1").numel()) * int(result.shape[-1])


def _count_reflected_product(args: Any, kwargs: Any, result: Tensor) -> int:
    """`x @ w`, called as a method of w."""
    second = args[0]
    return int(result.numel() * second.shape[-2 if second.dim() > 1 else 0])


def _count_tensordot(args: Any, kwargs: Any, result: Tensor) -> int:
    """Both factors have the summed dimensions, the result has none of them."""
    a, b = _argument(args, kwargs, 0, "a"), _argument(args, kwargs, 1, "b")
    return math.isqrt(a.numel() * b.numel() * result.numel())


def _count_einsum(args: Any, kwargs: Any, result: Tensor) -> int:
    """thop's count, but nothing for products that are not summed: those are pointwise."""
    equation = args[0]
    labels, arrow, output = equation.replace(" ", "").partition("->")
    if arrow and not set(labels) - set(output) - {",", "."}:
        return 0
    return int(functional_hooks[torch.einsum](args, kwargs, result))


def _count_bilinear_function(args: Any, kwargs: Any, result: Tensor) -> int:
    weight = _argument(args, kwargs, 2, "weight")
    return int(result.numel() * (weight.shape[1] + 1) * weight.shape[2])


def _count_recurrent_function(args: Any, kwargs: Any, result: Any) -> int:
    """torch.lstm and others: (sequence, state, weights, ...), or (packed, batch_sizes, state, weights, ...)."""
    is_packed = isinstance(args[3], (list, tuple))
    weights = args[3] if is_packed else args[2]
    places = len(args[0]) if is_packed else math.prod(args[0].shape[:-1])
    return int(places * sum(weight.numel() for weight in weights if weight.dim() == 2))


def _count_cell_function(args: Any, kwargs: Any, result: Any) -> int:
    """torch.lstm_cell and others: (input, state, input weight, hidden weight, ...)."""
    return int(math.prod(args[0].shape[:-1]) * (args[2].numel() + args[3].numel()))


FUNCTION_RULES: dict[Any, FunctionRule] = {
    **functional_hooks,
    **dict.fromkeys(find_functions("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "__matmul__"), _count_product),
    **dict.fromkeys(find_functions("addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_"), _count_added_product),
    **dict.fromkeys(find_functions("addbmm", "addbmm_"), _count_addbmm),
    torch.Tensor.__rmatmul__: _count_reflected_product,
    torch.tensordot: _count_tensordot,
    torch.einsum: _count_einsum,
    F.bilinear: _count_bilinear_function,
    **dict.fromkeys(find_functions(*RECURRENT_FUNCTIONS), _count_recurrent_function),
    **dict.fromkeys(find_functions(*RECURRENT_CELL_FUNCTIONS), _count_cell_function),
}
# Ways by which values leave PyTorch, to be computed with unseen.
EXITS = set(find_functions("numpy", "__array__", "__dlpack__", "data_ptr", "tolist", "untyped_storage", "storage"))


class CallCounter(TorchFunctionMode):
    """Counts by modules and functions. `run` makes the forward pass."""

    def __init__(self, rules: Mapping[type[nn.Module], Rule], running: RunningModules, tracker: ProductTracker) -> None:
        super().__init__()
        self.macs: Counter[nn.Module | None] = Counter()  # of the module that they are counted for
        self.norm_ops = 0
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}  # of the last output
        self.exits: set[str] = set()  # functions by which values of the image left PyTorch
        self.failed_rules: list[str] = []
        self._rules = {**_thop_rules(), **OUR_RULES, **rules}
        self._running, self._tracker = running, tracker
        self._rule_types = tuple(rules)

    def run(self, model: nn.Module, image: Tensor) -> None:
        """One forward pass in evaluation mode, without gradients."""
        custom = {kind: self._record(rule) for kind, rule in self._rules.items()}
        with self:
            profile(model, inputs=(image,), custom_ops=custom, verbose=False)

    def _record(self, rule: Rule) -> Rule:
        def count(module: Any, inputs: Any, output: Any) -> None:
            kind = layer_kind(module)
            if tensors := find_tensors(output):
                self.shapes[module] = tuple(tensors[0].shape)
            is_ruled = isinstance(module, self._rule_types)
            if any(isinstance(parent, self._rule_types) for parent in self._running.stack):
                return  # counted by the rule of a module that it is in
            if kind in ("linear", "bilinear", "recurrent") and not is_ruled and not has_own_forward(module):
                return  # somebody's subclass, which is counted by the functions that it calls
            before = module.total_ops
            self._running.is_paused = True
            try:
                rule(module, inputs, output)
            except Exception as error:
                self.failed_rules.append(f"{type(module).__name__} ({type(error).__name__}: {error})")
            finally:
                self._running.is_paused = False
            counted = round(float(module.total_ops - before))
            if kind == "norm":
                self.norm_ops += counted
            elif kind or is_ruled:
                self.macs[module] += counted

        return count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        rule = FUNCTION_RULES.get(func)
        if self._running.is_paused:
            return result
        if rule is not None and not self._running.is_counted_by_rule(func):
            self.macs[self._running.find_owner()] += int(rule(args, kwargs, result))
        elif func in EXITS and args and isinstance(args[0], Tensor) and self._is_exit(args[0]):
            self.exits.add(resolve_name(func) or str(func))
        return result

    def _is_exit(self, tensor: Tensor) -> bool:
        return tensor.numel() > 1 and self._tracker.comes_from_image(tensor)


def _thop_rules() -> dict[type[nn.Module], Rule]:
    return {kind: rule for kind, rule in register_hooks.items() if rule is not zero_ops}
