"""Muon (Jordan et al. 2024): momentum, made orthogonal, for the hidden filters; SGD-Nesterov for everything else.

A filter (out, in, k, k) is the matrix (out, in * k * k). Its update has singular values near 1, so `lr` is a step relative
to weights whose norm `normalize_weights` keeps at sqrt(out).

The settings of cifar10-airbench's 94 % network (github.com/KellerJordan/cifar10-airbench: batch 2000, 8 epochs, all lr linear
to zero) assume a loss that is summed over the batch; here it is the mean, so its SGD rates are multiplied by 2000:

    lr: 0.24, momentum: 0.6, ns_steps: 3          # orthogonal updates do not depend on the loss's scale
    bias_lr: 106.0, head_lr: 1340.0               # 0.053 * 2000 and 0.67 * 2000
    aux_momentum: 0.85
    aux_weight_decay: 0.004                       # 2e-6 * 2000: of a weight, a step, at full lr; the same for every lr
    decay_norm_and_bias: true
    whiten_until: 0.375                           # the whitening bias learns for the first 3 of 8 epochs
    schedule: linear
"""

from __future__ import annotations

import functools
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from cifar.optim import Group, Momentum, Optimizer, Parameters, Rate, Share
from cifar.optim.sgd import sgd_group
from cifar.registry import optimizers

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at 0, so that small singular values reach 1 soonest


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """(..., rows, columns) -> the same shape, every singular value brought near 1 by Newton-Schulz steps.

    bfloat16 on CUDA, where the products are tensor-core work and their rounding is far below the method's own spread.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices  # the products below are rows x rows: the short side
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-20)
    x = x.to(torch.bfloat16) if matrices.is_cuda else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if tall else x
    return x.to(matrices.dtype)


def orthogonalize_all(tensors: list[Tensor], steps: int) -> list[Tensor]:
    """The same for filters (out, ...) of many shapes: one batched product for all that flatten to the same matrix."""
    same: dict[tuple[int, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        same.setdefault((len(tensor), tensor[0].numel()), []).append(index)
    results = list(tensors)
    for indices in same.values():
        batch = orthogonalize(torch.stack([tensors[index].flatten(1) for index in indices]), steps)  # (n, out, in * k * k)
        for index, matrix in zip(indices, batch.unbind(), strict=True):
            results[index] = matrix.view(tensors[index].shape)
    return results


def muon_rule(
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    hyper: dict[str, Tensor],
    *,
    nesterov: bool,
    ns_steps: int,
    normalize_weights: bool,
) -> None:
    """hyper: lr, momentum and, where there is any, weight_decay (decoupled). State: velocity."""
    update = velocity = state["velocity"]
    torch._foreach_mul_(velocity, hyper["momentum"])
    torch._foreach_add_(velocity, grads)
    if nesterov:
        update = list(torch._foreach_mul(velocity, hyper["momentum"]))
        torch._foreach_add_(update, grads)
    update = orthogonalize_all(update, ns_steps)
    if "weight_decay" in hyper:
        torch._foreach_sub_(params, torch._foreach_mul(params, hyper["lr"] * hyper["weight_decay"]))
    if normalize_weights:
        norms = torch._foreach_norm(params)
        torch._foreach_clamp_min_(norms, 1e-12)
        torch._foreach_mul_(params, [len(p) ** 0.5 / norm for p, norm in zip(params, norms, strict=True)])
    torch._foreach_sub_(params, torch._foreach_mul(update, hyper["lr"]))


@optimizers.register("muon")
def muon(
    parameters: Parameters,
    *,
    lr: Rate = 0.05,
    momentum: Momentum = 0.9,
    nesterov: bool = True,
    ns_steps: Annotated[int, Field(ge=1)] = 3,
    normalize_weights: bool = True,
    weight_decay: Rate = 0.0,
    head_lr: Rate = 0.1,
    bias_lr: Rate = 0.1,
    aux_momentum: Momentum = 0.9,
    aux_weight_decay: Rate = 5e-5,
    decay_norm_and_bias: bool = False,
    whiten_until: Share = 1.0,
) -> Optimizer:
    """Muon for hidden filters; SGD-Nesterov with head_lr for stem and head, with bias_lr for norms and biases.

    weight_decay is the filters', decoupled; aux_weight_decay is what one step at full lr takes from the others' weights.
    """
    filters = parameters.named(["hidden"])
    ends, whiten = parameters.named(["stem", "head"]), parameters.named(["whiten_bias"])
    rest = {name: p for name, p in parameters.tensors.items() if name not in filters | ends | whiten}
    hyper = {"lr": lr, "momentum": momentum} | ({"weight_decay": weight_decay} if weight_decay else {})
    rule = functools.partial(muon_rule, nesterov=nesterov, ns_steps=ns_steps, normalize_weights=normalize_weights)

    def aux(tensors: dict[str, Tensor], rate: float, decays: bool, until: float = 1.0) -> Group:
        decay = aux_weight_decay / rate if decays and rate else 0.0
        return sgd_group(tensors, lr=rate, momentum=aux_momentum, nesterov=True, weight_decay=decay, until=until)

    return Optimizer(
        [
            Group(list(filters), list(filters.values()), rule, hyper, ("velocity",)),
            aux(ends, head_lr, True),
            aux(rest, bias_lr, decay_norm_and_bias),
            aux(whiten, bias_lr, decay_norm_and_bias, whiten_until),
        ]
    )
