"""Adam (Kingma & Ba 2015; weight decay in the gradient) and AdamW (Loshchilov & Hutter 2019; decay of the weights by lr)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cifar.optim import Group, Momentum, Optimizer, Parameters, Rate
from cifar.optim.sgd import add_weight_decay
from cifar.registry import optimizers


def adam_rule(
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    hyper: dict[str, Tensor],
    *,
    decoupled: bool,
    eps: float,
) -> None:
    """Update `params` in place.

    hyper: lr, rate1 = 1 - beta1, rate2 = 1 - beta2 and, where the group decays, weight_decay. The rates are passed and not
    the betas, because float32 holds 0.001 to seven digits, but 1 - 0.999 only to four.
    state: `first` and `second`, the decaying sums of gradients and of their squares. The paper's moments are rate * sum; the
    sums need fewer passes over memory.
    eps is a plain number, because torch reads a 0-d tensor on the host to add it to a list.
    """
    if "weight_decay" in hyper and decoupled:
        torch._foreach_sub_(params, torch._foreach_mul(params, hyper["lr"] * hyper["weight_decay"]))
    elif "weight_decay" in hyper:
        grads = add_weight_decay(params, grads, hyper["weight_decay"])
    first, second, (steps,) = state["first"], state["second"], state["steps"]
    steps += 1
    torch._foreach_mul_(first, 1 - hyper["rate1"])
    torch._foreach_add_(first, grads)
    torch._foreach_mul_(second, 1 - hyper["rate2"])
    torch._foreach_addcmul_(second, grads, grads)

    # A moment's bias is 1 - beta ** steps, so a sum times rate / bias is an unbiased moment.
    unbias1, unbias2 = (hyper[r] / -torch.expm1(steps * torch.log1p(-hyper[r])) for r in ("rate1", "rate2"))
    scale = torch._foreach_sqrt(second)
    torch._foreach_mul_(scale, unbias2.sqrt())
    torch._foreach_add_(scale, eps)
    torch._foreach_div_(scale, hyper["lr"] * unbias1)
    torch._foreach_addcdiv_(params, first, scale, value=-1)


def _build_optimizer(
    parameters: Parameters,
    decoupled: bool,
    lr: float,
    rates: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_norm_and_bias: bool,
) -> Optimizer:
    hyper = {"lr": lr, "rate1": rates[0], "rate2": rates[1]}
    decayed, others = parameters.split_by_decay(decay_norm_and_bias)
    rule = functools.partial(adam_rule, decoupled=decoupled, eps=eps)
    return Optimizer(
        Group(list(tensors), list(tensors.values()), rule, scalars, ("first", "second"), counters=("steps",))
        for tensors, scalars in ((decayed, hyper | ({"weight_decay": weight_decay} if weight_decay else {})), (others, hyper))
    )


@optimizers.register("adam")
def adam(
    parameters: Parameters,
    *,
    lr: Rate = 1e-3,
    beta1: Momentum = 0.9,
    beta2: Momentum = 0.999,
    eps: Rate = 1e-8,
    weight_decay: Rate = 0.0,
    decay_norm_and_bias: bool = True,
) -> Optimizer:
    """Adam with torch's defaults. Weight decay is coupled, zero by default, and applies to all parameters."""
    return _build_optimizer(parameters, False, lr, (1 - beta1, 1 - beta2), eps, weight_decay, decay_norm_and_bias)


@optimizers.register("adamw")
def adamw(
    parameters: Parameters,
    *,
    lr: Rate = 1e-3,
    beta1: Momentum = 0.9,
    beta2: Momentum = 0.999,
    eps: Rate = 1e-8,
    weight_decay: Rate = 0.01,
    decay_norm_and_bias: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay (lr * weight_decay of a weight a step)."""
    return _build_optimizer(parameters, True, lr, (1 - beta1, 1 - beta2), eps, weight_decay, decay_norm_and_bias)
