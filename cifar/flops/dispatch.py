"""The second counter: what runs. Each operator of PyTorch counts by its formula (operators.py); unknown ones are noted."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from cifar.flops.disguised import ProductTracker, Step
from cifar.flops.modules import RunningModules, find_tensors
from cifar.flops.operators import aten, find_formula, find_kind, multiplies_weights


class OperatorCounter(TorchDispatchMode):
    """Counts each operator that runs, by its formula, and notes those that it does not know."""

    supports_higher_order_operators = True

    def __init__(self, running: RunningModules, tracker: ProductTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[nn.Module | None] = Counter()  # of the module that they are counted for
        self.contracting: defaultdict[nn.Module | None, set[str]] = defaultdict(set)  # module -> operators counted in it
        self.unknown: dict[str, nn.Module | None] = {}  # operator -> the module in which it first ran
        self.depends_on_values = False  # an operator gave a shape, or a number to the host, that the values decide
        self.num_read = 0  # values of the image that went to the host one by one
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
            self.num_read += func._overloadpacket is aten._local_scalar_dense


class PlainCounter(TorchDispatchMode):
    """The multiply-adds of a pass by the operators' formulas, and nothing else: it takes little longer than the pass."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        formula = find_formula(func._overloadpacket)
        if formula is None and find_kind(func._overloadpacket) is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula:
            with torch._C.DisableTorchFunction():
                self.macs += formula(args, kwargs, result)
        return result


def spare_dynamo_import() -> None:
    """Keep the counters from importing torch.compile, which takes each process 1 to 3 s.

    torch imports that only to hide a dispatch mode from the compiler, and nothing is compiled while it counts. If another
    version of torch has no such attributes, torch.compile is imported.
    """
    for counter in (OperatorCounter, PlainCounter):
        hidden = getattr(counter.__torch_dispatch__, "__wrapped__", None)
        if hidden is not None and "torch._dynamo" not in sys.modules:
            hidden.__dynamo_disable = hidden  # where `torch._disable_dynamo` caches the wrapped function
