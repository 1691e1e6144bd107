"""Two counters of one forward pass.

`CallCounter` counts what the network asks for: a module by thop's rule, or ours where thop has none that fits the convention;
products that are called as functions (`torch.matmul`, `F.linear`, `einsum`) by thop's rule for functions, or ours.
`OperatorCounter` counts what then runs: each operator of PyTorch by the formula in `operators.py`.

Both say for each module what they counted in it, so that a product which one of them misses shows. This file imports thop.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from thop.profile import functional_hooks, profile, register_hooks  # type: ignore[import-untyped, unused-ignore]
from thop.vision.basic_hooks import zero_ops  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar.flops.disguised import ProductTracker, Step
from cifar.flops.operators import aten, find_formula, find_kind, multiplies_weights

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
KINDS: tuple[tuple[Any, str], ...] = (
    (_ConvNd, "conv"),
    (nn.Linear, "linear"),
    (nn.Bilinear, "bilinear"),
    ((RNNBase, RNNCellBase), "recurrent"),
    (nn.MultiheadAttention, "attention"),
    (NORMS, "norm"),
)

Rule = Callable[[Any, Any, Any], None]  # thop's: (module, inputs, output), adds to module.total_ops


def layer_kind(module: nn.Module) -> str:
    """conv, linear, bilinear, recurrent, attention or norm; empty for any other."""
    return next((kind for types, kind in KINDS if isinstance(module, types)), "")


def find_tensors(values: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


# -- rules of ours ------------------------------------------------------------------------------------------------------


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


def _methods(*names: str) -> list[Any]:
    """The functions and methods of these names, in-place ones too."""
    spaces = (torch, torch.Tensor, torch.linalg)
    return [getattr(space, name) for space in spaces for name in names if hasattr(space, name)]


RECURRENT_FUNCTIONS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
RECURRENT_CELL_FUNCTIONS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
FUNCTION_RULES: dict[Any, FunctionRule] = {
    **functional_hooks,
    **dict.fromkeys(_methods("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "__matmul__"), _count_product),
    **dict.fromkeys(_methods("addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_"), _count_added_product),
    **dict.fromkeys(_methods("addbmm", "addbmm_"), _count_addbmm),
    torch.Tensor.__rmatmul__: _count_reflected_product,
    torch.tensordot: _count_tensordot,
    torch.einsum: _count_einsum,
    F.bilinear: _count_bilinear_function,
    **dict.fromkeys(_methods(*RECURRENT_FUNCTIONS), _count_recurrent_function),
    **dict.fromkeys(_methods(*RECURRENT_CELL_FUNCTIONS), _count_cell_function),
}
# What the forward of a module itself calls: its rule counts that.
OWN_FUNCTIONS: dict[str, set[Any]] = {
    "conv": set(),
    "linear": {F.linear},
    "bilinear": {F.bilinear},
    "recurrent": set(
        _methods("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
    ),
}
# Ways by which values leave PyTorch, to be computed with unseen.
EXITS = set(_methods("numpy", "__array__", "__dlpack__", "data_ptr", "tolist", "untyped_storage", "storage"))


# -- where a product belongs --------------------------------------------------------------------------------------------


class RunningModules:
    """The modules whose forward is running, outermost first."""

    def __init__(self, network: nn.Module, ruled: tuple[Any, ...] = ()) -> None:
        """`ruled`: types whose rule counts all that runs in them."""
        self._known = set(network.modules())  # a module that is made in a forward pass has no rule
        self._ruled: tuple[Any, ...] = (nn.MultiheadAttention, *ruled)
        self.stack: list[nn.Module] = []
        self.is_paused = False  # while a rule looks at its module: weights may be computed anew when they are looked at
        self.output: Any = None  # of the network

    @contextmanager
    def watch(self) -> Iterator[None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            while self.stack and self.stack.pop() is not module:
                pass  # a forward that ended with an exception
            self.output = output

        before = register_module_forward_pre_hook(lambda module, inputs: self.stack.append(module))
        after = register_module_forward_hook(leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def find_owner(self) -> nn.Module | None:
        """The module that a product now running is counted for: the outermost layer, else the innermost module."""
        layers = (module for module in self.stack if self.is_layer(module))
        return next(layers, self.stack[-1] if self.stack else None)

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, self._ruled) or layer_kind(module) in OWN_FUNCTIONS

    def is_counted_by_rule(self, function: Any) -> bool:
        """Whether the rule of a module that is running counts a call of `function`."""
        if any(isinstance(module, self._ruled) and module in self._known for module in self.stack):
            return True
        innermost = self.stack[-1] if self.stack else None
        if innermost not in self._known or innermost is None or not has_own_forward(innermost):
            return False
        return function in OWN_FUNCTIONS.get(layer_kind(innermost), ())


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward is PyTorch's, so that it computes what the rule of its type counts."""
    forward = getattr(module.forward, "__func__", module.forward)
    return str(getattr(forward, "__module__", "")).startswith("torch.nn.")


# -- the first counter: what is called ----------------------------------------------------------------------------------


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


# -- the second counter: what runs --------------------------------------------------------------------------------------


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts each operator that runs, by its formula, and notes those that it does not know."""

    supports_higher_order_operators = True

    def __init__(self, running: RunningModules, tracker: ProductTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[nn.Module | None] = Counter()  # of the module that they are counted for
        self.contracting: defaultdict[nn.Module | None, set[str]] = defaultdict(set)  # module -> operators counted in it
        self.unknown: dict[str, nn.Module | None] = {}  # operator -> the module in which it first ran
        self.depends_on_values = False  # an operator gave a shape, or a number to the host, that the values decide
        self._running, self._tracker = running, tracker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._running.is_paused:
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            self._note_unknown(str(func))
            return func(*args, **kwargs)
        packet = func._overloadpacket
        kind, formula = find_kind(packet), find_formula(packet)
        if kind is None and formula is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            inputs = find_tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
            outputs = find_tensors(result)
            reason = self._find_reason_not_to_count(func, types, (args, kwargs), [*inputs, *outputs])
            if reason is not None:
                self._note_unknown(f"{packet}{reason}")
            elif formula:
                owner = self._running.find_owner()
                self.macs[owner] += formula(args, kwargs, result)
                self.contracting[owner].add(str(packet))
            self._note_dependence(func, inputs)
            writes = func._schema.is_mutable
            name = str(packet.__name__).removesuffix("_") if writes else str(packet.__name__)
            self._tracker.follow(Step(kind, name, inputs, outputs, writes))
        return result

    def _find_reason_not_to_count(self, func: Any, types: Any, arguments: Any, tensors: list[Tensor]) -> str | None:
        """Why the operator is not known with these arguments. None if it is; empty if it is known with none."""
        packet = func._overloadpacket
        kind, formula = find_kind(packet), find_formula(packet)
        if types:
            return f" of {', '.join(cls.__name__ for cls in types)}"
        if any(tensor.layout is not torch.strided for tensor in tensors):
            return " (sparse)"
        if kind is None and formula is None:
            return ""
        if formula and any(tensor.is_complex() for tensor in tensors):
            return " (complex numbers)"
        return " (with weights)" if multiplies_weights(packet, *arguments) else None

    def _note_unknown(self, name: str) -> None:
        self.unknown.setdefault(name, self._running.find_owner())

    def _note_dependence(self, func: Any, inputs: list[Tensor]) -> None:
        if torch.Tag.data_dependent_output not in func.tags and torch.Tag.dynamic_output_shape not in func.tags:
            return
        if func._overloadpacket is aten.index and not any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs[1:]):
            return
        if any(self._tracker.comes_from_image(tensor) for tensor in inputs):
            self.depends_on_values = True


def spare_dynamo_import() -> None:
    """Keep the counter from importing torch.compile, which takes each process 1 to 3 s.

    torch imports that only to hide a dispatch mode from the compiler, and nothing is compiled while it counts. If another
    version of torch has no such attributes, torch.compile is imported.
    """
    hidden = getattr(OperatorCounter.__torch_dispatch__, "__wrapped__", None)
    if hidden is not None and "torch._dynamo" not in sys.modules:
        hidden.__dynamo_disable = hidden  # where `torch._disable_dynamo` caches the wrapped function
