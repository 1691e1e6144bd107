"""Modules as both counters see them: which is a layer with a rule, and which one a product is counted for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.utils._pytree import tree_leaves

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
KINDS: tuple[tuple[Any, str], ...] = (
    (_ConvNd, "conv"),
    (nn.Linear, "linear"),
    (nn.Bilinear, "bilinear"),
    ((RNNBase, RNNCellBase), "recurrent"),
    (nn.MultiheadAttention, "attention"),
    (NORMS, "norm"),
)


def layer_kind(module: nn.Module) -> str:
    """conv, linear, bilinear, recurrent, attention or norm; empty for any other."""
    return next((kind for types, kind in KINDS if isinstance(module, types)), "")


def find_tensors(values: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def find_functions(*names: str) -> list[Any]:
    """PyTorch's functions and methods of these names."""
    spaces = (torch, torch.Tensor, torch.linalg)
    return [getattr(space, name) for space in spaces for name in names if hasattr(space, name)]


RECURRENT_FUNCTIONS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
RECURRENT_CELL_FUNCTIONS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
# What the forward of a module itself calls: its rule counts that.
OWN_FUNCTIONS: dict[str, set[Any]] = {
    "conv": set(),
    "linear": {F.linear},
    "bilinear": {F.bilinear},
    "recurrent": set(find_functions(*RECURRENT_FUNCTIONS, *RECURRENT_CELL_FUNCTIONS)),
}


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
                pass
            self.output = output

        before = register_module_forward_pre_hook(lambda module, inputs: self.stack.append(module))
        after = register_module_forward_hook(leave, always_call=True)  # also where a forward raises what the network catches
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def find_owner(self) -> nn.Module | None:
        """The module that a product now running is counted for.

        The outermost one whose rule counts all that runs in it, else the innermost layer (a layer of somebody's own may have
        others in it), else the innermost module.
        """
        ruled = (module for module in self.stack if isinstance(module, self._ruled))
        layers = (module for module in reversed(self.stack) if layer_kind(module) in OWN_FUNCTIONS)
        return next(itertools.chain(ruled, layers, reversed(self.stack)), None)

    def is_counted_by_rule(self, function: Any) -> bool:
        """Whether the rule of a module that is running counts a call of `function`."""
        if any(isinstance(module, self._ruled) and module in self._known for module in self.stack):
            return True
        innermost = self.stack[-1] if self.stack else None
        if innermost not in self._known or innermost is None or not has_own_forward(innermost):
            return False
        return function in OWN_FUNCTIONS.get(layer_kind(innermost), ())


def is_tested(module: nn.Module) -> bool:
    """Whether the forward is PyTorch's or of a network of this package, whose tests know what it costs."""
    forward = getattr(module.forward, "__func__", module.forward)
    return str(getattr(forward, "__module__", "")).startswith(("torch.nn.", "cifar.models."))


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward is PyTorch's, so that it computes what the rule of its type counts."""
    forward = getattr(module.forward, "__func__", module.forward)
    return str(getattr(forward, "__module__", "")).startswith("torch.nn.")
