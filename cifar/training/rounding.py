"""Weights in fewer bits, for networks that are given away: half precision, or 8 bits with a scale for each output.

What has fewer than two dimensions (biases, the statistics of norms) and what is no floating-point number stays as it is: it is
small, and a variance can lie outside of half precision's range.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = "::scale"  # what a scale's name has behind the weight's
MAX_LEVEL = 127  # of 8 bits, symmetric: -127 to 127


def round_weights(state: Mapping[str, Tensor], *, eight_bit: bool = False) -> dict[str, Tensor]:
    """A state dict -> one with float16 weights, or with int8 weights and `NAME::scale` (w.shape[0],) float32 beside each.

    With 8 bits, w[i] is about scale[i] * level, where scale[i] = max |w[i]| / 127: no weight moves by more than half a scale.
    Raises ValueError where a weight is not finite, or too large for half precision.
    """
    rounded: dict[str, Tensor] = {}
    for name, weight in state.items():
        if not weight.is_floating_point():
            rounded[name] = weight
            continue
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} has values that are not finite")
        if weight.ndim < 2:
            rounded[name] = weight
        elif eight_bit:
            rounded[name], rounded[name + SCALE] = quantize(weight)
        else:
            rounded[name] = weight.half()
            if not bool(torch.isfinite(rounded[name]).all()):
                raise ValueError(f"{name} has values that are too large for half precision")
    return rounded


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(levels like `weight`, int8; scales (weight.shape[0],), float32)."""
    weight = weight.float()
    scale = weight.flatten(1).abs().amax(1) / MAX_LEVEL
    divisor = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays one
    levels = (weight / _as_column(divisor, weight)).round().clamp(-MAX_LEVEL, MAX_LEVEL)
    return levels.to(torch.int8), scale


def restore_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that `round_weights` has rounded; half precision stays, as loading it into a network converts it.

    A state dict of an ordinary run comes back as it is.
    """
    scaled = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8 and name + SCALE in tensors}
    scales = {name + SCALE for name in scaled}
    return {
        name: tensor.float() * _as_column(tensors[name + SCALE], tensor) if name in scaled else tensor
        for name, tensor in tensors.items()
        if name not in scales
    }


def count_bytes(state: Mapping[str, Tensor]) -> int:
    """Of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _as_column(scale: Tensor, weight: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, ...), for a weight (N, ...)."""
    if scale.shape != weight.shape[:1]:
        raise ValueError(f"a scale of shape {tuple(scale.shape)} for a weight of shape {tuple(weight.shape)}")
    return scale.view(-1, *[1] * (weight.ndim - 1))
