"""Stochastic gradient descent with momentum, as torch.optim.SGD: the decay is added to the gradient (coupled L2)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cifar.optim import Group, Momentum, Optimizer, Parameters, Rate
from cifar.registry import optimizers


def add_weight_decay(params: list[Tensor], grads: list[Tensor], weight_decay: Tensor) -> list[Tensor]:
    """gradient + weight_decay * weight, in new tensors: probes and clipping may still need the gradients."""
    decayed = list(torch._foreach_mul(params, weight_decay))
    torch._foreach_add_(decayed, grads)
    return decayed


decayed_gradients = add_weight_decay  # old name, for plug-ins


def sgd_rule(
    params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], hyper: dict[str, Tensor], *, nesterov: bool
) -> None:
    """Update `params` in place. hyper: lr, momentum and, where the group decays, weight_decay. state: velocity."""
    if "weight_decay" in hyper:
        grads = add_weight_decay(params, grads, hyper["weight_decay"])
    velocity = state["velocity"]
    torch._foreach_mul_(velocity, hyper["momentum"])
    torch._foreach_add_(velocity, grads)
    if nesterov:  # look ahead along the velocity (Sutskever et al. 2013)
        update = torch._foreach_mul(velocity, hyper["momentum"])
        torch._foreach_add_(update, grads)
        torch._foreach_mul_(update, hyper["lr"])
    else:
        update = torch._foreach_mul(velocity, hyper["lr"])
    torch._foreach_sub_(params, update)


def sgd_group(
    tensors: dict[str, Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    freeze_after: float = 1.0,
    until: float | None = None,
) -> Group:
    """A group with `sgd_rule`. A weight decay of 0 costs nothing. `until` is the old name of `freeze_after`, for plug-ins."""
    hyper = {"lr": lr, "momentum": momentum} | ({"weight_decay": weight_decay} if weight_decay else {})
    rule = functools.partial(sgd_rule, nesterov=nesterov)
    return Group(list(tensors), list(tensors.values()), rule, hyper, ("velocity",), freeze_after, until=until)


@optimizers.register("sgd")
def sgd(
    parameters: Parameters,
    *,
    lr: Rate = 0.1,
    momentum: Momentum = 0.9,
    nesterov: bool = True,
    weight_decay: Rate = 5e-4,
    decay_norm_and_bias: bool = False,
) -> Optimizer:
    """SGD with (Nesterov) momentum; coupled weight decay."""
    decayed, others = parameters.split_by_decay(decay_norm_and_bias)
    return Optimizer(
        sgd_group(tensors, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
        for tensors, decay in ((decayed, weight_decay), (others, 0.0))
    )
