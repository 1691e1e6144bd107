"""Muon (Jordan et al. 2024): orthogonalized momentum for the hidden filters, SGD with Nesterov momentum for all else.

A filter (out, in, k, k) is treated as the matrix (out, in * k * k). Its update has singular values near 1. `lr` is therefore
relative to the weights, whose norm `normalize_weights` keeps at sqrt(out).

The settings of cifar10-airbench's 94 % network (github.com/KellerJordan/cifar10-airbench: batch 2000, 8 epochs, all lr linear
to zero) assume a loss that is summed over the batch; here it is the mean, so its SGD rates are multiplied by 2000:

    lr: 0.24, momentum: 0.6, ns_steps: 3          # orthogonal updates do not depend on the loss's scale
    bias_lr: 106.0, head_lr: 1340.0               # 0.053 * 2000 and 0.67 * 2000
    aux_momentum: 0.85
    aux_weight_decay: 0.004                       # 2e-6 * 2000: the fraction of a weight that one step at full lr takes
    decay_norm_and_bias: true
    whiten_until: 0.375                           # the whitening bias learns for the first 3 of 8 epochs
    schedule: linear
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cifar.optim import Group, Momentum, Optimizer, Parameters, Rate, Share
from cifar.optim.sgd import sgd_group
from cifar.registry import optimizers

QUINTIC = (
    3.4445,
    -4.7750,
    2.0315,
)  # coefficients of Jordan et al. 2024: steep at 0, so that small singular values reach 1 quickly

Batches = tuple[tuple[int, ...], ...]

# What starting the kernels of one more batch costs in each iteration, as the FLOPs that a GPU does meanwhile: five kernels of
# 4 us, at 150 TFLOP/s. An estimate; what is near the border costs about the same either way.
LAUNCH_FLOPS = 3e9


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Bring every singular value of matrices (..., rows, columns) near 1, by `steps` Newton-Schulz iterations.

    Computes in bfloat16 on CUDA, where tensor cores do the products. Its rounding errors are far below the method's own.
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
    """`orthogonalize` for filters (out, ...) of several shapes, batched over those that flatten to the same matrix shape."""
    indices_by_shape: dict[tuple[int, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        indices_by_shape.setdefault((len(tensor), tensor[0].numel()), []).append(index)
    results = list(tensors)
    for indices in indices_by_shape.values():
        batch = orthogonalize(torch.stack([tensors[index].flatten(1) for index in indices]), steps)  # (n, out, in * k * k)
        for index, matrix in zip(indices, batch.unbind(), strict=True):
            results[index] = matrix.view(tensors[index].shape)
    return results


def orthogonalize_padded(tensors: list[Tensor], steps: int, batches: Batches) -> list[Tensor]:
    """`orthogonalize_all`, where filters of different shapes share a batch: those of each of `batches`, by their indices.

    Each matrix is filled up with zeros to the largest number of rows and columns in its batch. The products then are those of
    the matrix alone, and zeros elsewhere, so this is exact up to rounding. On a GPU the products of a small network take less
    time than starting their kernels does.
    """
    wide = [_flatten_filter(tensor) for tensor in tensors]
    wide = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in wide]
    results = list(tensors)
    for indices in batches:
        rows = max(wide[index].shape[0] for index in indices)
        columns = max(wide[index].shape[1] for index in indices)
        padded = []
        for index in indices:
            height, width = wide[index].shape
            padded.append(F.pad(wide[index], (0, columns - width, 0, rows - height)))
        for index, result in zip(indices, orthogonalize(torch.stack(padded), steps).unbind(), strict=True):
            height, width = wide[index].shape
            is_tall = len(tensors[index]) != height
            matrix = result[:height, :width]
            results[index] = _unflatten_filter(matrix.mT if is_tall else matrix, tensors[index])
    return results


def plan_batches(shapes: Sequence[torch.Size]) -> Batches:
    """Which filters of these shapes share a batch of `orthogonalize_padded`: their indices.

    Begins with a batch for each shape and unites, again and again, the two batches that save most, while any saves something.
    """
    sides = [sorted((shape[0], math.prod(shape[1:]))) for shape in shapes]  # rows <= columns
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(sides):
        by_shape.setdefault(tuple(shape), []).append(index)
    batches = list(by_shape.values())

    def cost(indices: list[int]) -> float:
        """FLOPs of an iteration."""
        rows, columns = (max(sides[index][side] for index in indices) for side in (0, 1))
        return 2 * len(indices) * (2 * rows * rows * columns + rows**3) + LAUNCH_FLOPS

    while len(batches) > 1:
        pairs = itertools.combinations(batches, 2)
        saving, a, b = max(((cost(a) + cost(b) - cost(a + b), a, b) for a, b in pairs), key=lambda pair: pair[0])
        if saving <= 0:
            break
        batches = [batch for batch in batches if batch is not a and batch is not b] + [sorted(a + b)]
    return tuple(sorted(map(tuple, batches)))


def _flatten_filter(tensor: Tensor) -> Tensor:
    """(out, ...) -> (out, numbers of a filter), in the order in which they lie in memory, so that nothing is copied."""
    return (tensor.permute(0, 2, 3, 1) if _is_channels_last(tensor) else tensor).flatten(1)


def _unflatten_filter(matrix: Tensor, like: Tensor) -> Tensor:
    if not _is_channels_last(like):
        return matrix.reshape(like.shape)
    out, inputs, height, width = like.shape
    return matrix.reshape(out, height, width, inputs).permute(0, 3, 1, 2)


def _is_channels_last(tensor: Tensor) -> bool:
    is_filter = tensor.dim() == 4 and not tensor.is_contiguous()
    return is_filter and tensor.is_contiguous(memory_format=torch.channels_last)


def muon_rule(
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    hyper: dict[str, Tensor],
    *,
    nesterov: bool,
    ns_steps: int,
    normalize_weights: bool,
    batches: Batches | None = None,
) -> None:
    """Update `params` in place. hyper: lr, momentum and, if not zero, weight_decay (decoupled). state: velocity.

    `batches`: those of `plan_batches`, for all parameters. Without them only filters of one shape share a batch.
    """
    update = velocity = state["velocity"]
    torch._foreach_mul_(velocity, hyper["momentum"])
    torch._foreach_add_(velocity, grads)
    if nesterov:
        update = list(torch._foreach_mul(velocity, hyper["momentum"]))
        torch._foreach_add_(update, grads)
    if batches and sum(map(len, batches)) == len(update):  # else some parameters have no gradient
        update = orthogonalize_padded(update, ns_steps, batches)
    else:
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
    ns_together: bool = False,
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

    What has no clear role is treated as the head is (`cifar.optim.parameter_roles`).

    ns_together: on a GPU, filters of different shapes share a batch of Newton-Schulz iterations, filled up with zeros. That is
    the same but for rounding. weight_decay is decoupled, for the filters. aux_weight_decay is the fraction of the other weights
    that one step takes.
    """
    filters = parameters.with_roles(["hidden"])
    ends = parameters.with_roles(["stem", "head", "magnitude", "other"])
    whiten = parameters.with_roles(["whiten_bias"])
    remaining = {name: p for name, p in parameters.tensors.items() if name not in filters | ends | whiten}
    hyper = {"lr": lr, "momentum": momentum} | ({"weight_decay": weight_decay} if weight_decay else {})
    options: dict[str, Any] = {"nesterov": nesterov, "ns_steps": ns_steps, "normalize_weights": normalize_weights}
    if ns_together and all(p.is_cuda for p in filters.values()):
        options["batches"] = plan_batches([p.shape for p in filters.values()])
    rule = functools.partial(muon_rule, **options)

    def build_aux_group(tensors: dict[str, Tensor], lr: float, decays: bool, freeze_after: float = 1.0) -> Group:
        decay = aux_weight_decay / lr if decays and lr else 0.0
        momentum = aux_momentum
        return sgd_group(tensors, lr=lr, momentum=momentum, nesterov=True, weight_decay=decay, freeze_after=freeze_after)

    return Optimizer(
        [
            Group(list(filters), list(filters.values()), rule, hyper, ("velocity",)),
            build_aux_group(ends, head_lr, True),
            build_aux_group(remaining, bias_lr, decay_norm_and_bias),
            build_aux_group(whiten, bias_lr, decay_norm_and_bias, whiten_until),
        ]
    )
