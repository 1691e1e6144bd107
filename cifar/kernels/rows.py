"""Which modules of a network follow each other so that nobody else sees what one hands to the next, and may share work."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Calls = Mapping[nn.Module, Sequence[tuple[Tensor, Tensor]]]  # what went in and what came out, kept so that `is` can tell


@torch.no_grad()
def calls_of(model: nn.Module, images: Tensor, kinds: Sequence[type[nn.Module]]) -> Calls:
    """An evaluation of the images (N, 3, H, W): every call of a module that is exactly of these kinds and has no hooks."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def watch(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if given:
            calls.setdefault(module, []).append((given[0], made))

    watched = [m for m in model.modules() if type(m) in kinds and not (m._forward_hooks or m._forward_pre_hooks)]
    hooks, was = [module.register_forward_hook(watch) for module in watched], model.training
    try:
        model.eval()(images)
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    return calls


def in_a_row(parent: nn.Module, row: Sequence[nn.Module], calls: Calls) -> bool:
    """Whether each of these was called once, by the parent, with what the one before it made: nobody else sees that."""
    if any(len(calls.get(module, ())) != 1 for module in (parent, *row)):
        return False
    return all(calls[a][0][1] is calls[b][0][0] for a, b in itertools.pairwise(row))


def is_half(pool: nn.Module) -> bool:
    """Whether a module is 2 x 2 max-pooling and nothing else."""
    if type(pool) is not nn.MaxPool2d or pool.return_indices or pool.ceil_mode:
        return False
    pairs = ((pool.kernel_size, 2), (pool.stride, 2), (pool.padding, 0), (pool.dilation, 1))
    return all(given in (wanted, (wanted, wanted)) for given, wanted in pairs)
