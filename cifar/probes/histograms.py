"""Histograms of the gradients and of the weight updates of each layer, counted on the device.

The bin of a value is read off its bits: sign, exponent and first bit of the mantissa of a 32-bit float. So no range has to be
chosen before the values are known, the counts of several steps can be added, and no step waits for the host. At the end of the
epoch the host keeps the 64 bins around zero that reach to the largest value (tracking/histograms.py has their edges).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cifar.probes.base import collect_gradients, weight_layers
from cifar.tracking.histograms import KINDS, MAX_TOP, MIN_TOP, NUM_BINS

MAX_LAYERS = 128  # with histograms: so many of a deeper network, evenly apart. They bound what a row on W&B holds
_NUM_CODES = 1024  # of a value: 1 bit of sign, 8 of exponent, 1 of mantissa
_SHIFT = 22  # bits of the mantissa that no bin looks at
_GROUP = 8  # layers that one kernel counts: their bins fit into a GPU's shared memory


class HistogramRecorder:
    """Counts in the steps that the probes look at. Changes nothing.

    On a GPU its calls are part of the captured step, so it counts in all epochs; `read_and_reset` drops what is not wanted.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        layers = choose_layers(list(weight_layers(parameters)))
        self.layers, self._names = layers, [weight_layers(parameters)[layer] for layer in layers]
        device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        self._counts = torch.zeros(len(KINDS), len(layers), _NUM_CODES, dtype=torch.int64, device=device)
        self._num_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._always_counts = device.type == "cuda"
        self._groups = [self._names[begin : begin + _GROUP] for begin in range(0, len(layers), _GROUP)]
        sizes = [[_num_values(parameters[name]) for name in group] for group in self._groups]
        self._offsets = [_make_offsets(group_sizes, device) for group_sizes in sizes]
        self._before: list[Tensor] = []
        self.is_active = True  # whether this epoch is looked at

    def after_backward(self, parameters: Mapping[str, Tensor]) -> None:
        """Count the gradients."""
        if self._is_counting():
            self._count(0, [_join(collect_gradients(parameters, group)) for group in self._groups])
            self._num_steps.add_(1)

    def before_update(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep the weights as they are before the update."""
        self._before = self._join_weights(parameters) if self._is_counting() else []

    def after_update(self, parameters: Mapping[str, Tensor]) -> None:
        """Count the changes of the weights."""
        before, self._before = self._before, []  # freed at once: the copy of the weights lives for one step only
        if before:
            after = self._join_weights(parameters)
            self._count(1, [new.sub_(old) for new, old in zip(after, before, strict=True)])

    def _is_counting(self) -> bool:
        return bool(self.layers) and (self.is_active or self._always_counts)

    def _join_weights(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        return [_join([parameters[name].detach() for name in group]) for group in self._groups]

    def _count(self, kind: int, values: Sequence[Tensor]) -> None:
        """`values`: of each group of layers, one after the other in one row. They are overwritten."""
        for index, (row, offsets) in enumerate(zip(values, self._offsets, strict=True)):
            size = len(self._groups[index])
            self._counts[kind, index * _GROUP : index * _GROUP + size].add_(_count_codes(row, offsets, size))

    def read_and_reset(self) -> dict[str, Any] | None:
        """The epoch's histograms, as a line of histograms.jsonl has them; None if it is not looked at, or no step was counted.

        Waits for the device where the epoch is looked at.
        """
        line = None
        if self.layers and self.is_active and (steps := int(self._num_steps)):
            counts = self._counts.cpu().numpy()
            line = {"steps": steps} | {
                kind: {layer: summarize_counts(counts[k, i]) for i, layer in enumerate(self.layers)}
                for k, kind in enumerate(KINDS)
            }
        self.load_state_dict({})
        return line

    def state_dict(self) -> dict[str, Tensor]:
        """The counts of the epoch so far, for a checkpoint. These are live tensors: clone what has to stay."""
        return {"counts": self._counts, "steps": self._num_steps}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict()`. An empty one is the start of an epoch."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(saved[name]) if name in saved else tensor.zero_()


def choose_layers(layers: Sequence[str]) -> list[str]:
    """At most MAX_LAYERS of them, evenly apart, the first and the last among them."""
    last, gaps = len(layers) - 1, MAX_LAYERS - 1
    return list(layers) if last <= gaps else [layers[round(k * last / gaps)] for k in range(MAX_LAYERS)]


def _num_values(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _flatten(tensor: Tensor) -> Tensor:
    """All values in one row, as 32-bit floats, in any order; no copy of what lies in memory without gaps."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1).float()


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all values in one row. One kernel: in the step of a small network each one counts."""
    return torch.cat([_flatten(tensor) for tensor in tensors])


def _make_offsets(sizes: Sequence[int], device: torch.device) -> Tensor:
    """What is added to the code of each value of a row, so that each tensor has bins of its own: (values,) whole numbers."""
    first = _NUM_CODES // 2  # codes begin at -512
    rows = [torch.full((size,), first + _NUM_CODES * i, dtype=torch.int32, device=device) for i, size in enumerate(sizes)]
    return torch.cat(rows)


def _count_codes(values: Tensor, offsets: Tensor, num_tensors: int) -> Tensor:
    """How often each code occurs in each tensor of a row, (tensors, 1024) whole numbers: first of negative values, then others.

    The row is overwritten.
    """
    codes = values.view(torch.int32)
    codes.bitwise_right_shift_(_SHIFT).add_(offsets)  # -512 to 511, by the sign, before the offsets
    size = _NUM_CODES * num_tensors
    if codes.device.type == "cuda":  # bincount would wait for the host; histc does not, and is exact for whole numbers
        return torch.histc(codes, size, 0, size).view(-1, _NUM_CODES)
    return torch.bincount(codes, minlength=size).view(-1, _NUM_CODES)


def summarize_counts(counts: np.ndarray) -> dict[str, Any]:
    """Counts by code (1024,) -> {"top", "counts"} of the 64 bins around zero. Values that are not finite are left out."""
    half, last = NUM_BINS // 2, _NUM_CODES // 2 - 3  # after `last`, the codes of infinities and of NaN
    sides = counts[: last + 1], counts[_NUM_CODES // 2 : _NUM_CODES // 2 + last + 1]  # of negative values, of the others
    used = np.flatnonzero(sides[0] + sides[1])
    largest = int(used[-1]) if len(used) and used[-1] else _encode(1.0) - 1  # all zero: the bins reach to 1
    top = min(max(largest + 1, _encode(MIN_TOP)), _encode(MAX_TOP))
    below = top - half  # the bin in the middle goes up to and with this code
    bins = []
    for side in sides:
        upper = side[below + 1 : top].copy()
        upper[-1] += side[top:].sum()
        bins.append([int(side[: below + 1].sum()), *upper.tolist()])
    negative_zeros = int(counts[0])  # they count as zeros; negative values too small for a normal float share their code
    bins[0][0], bins[1][0] = bins[0][0] - negative_zeros, bins[1][0] + negative_zeros
    return {"top": float(np.array(top << _SHIFT, np.uint32).view(np.float32)), "counts": [*reversed(bins[0]), *bins[1]]}


def _encode(value: float) -> int:
    return int(np.array(value, np.float32).view(np.uint32)) >> _SHIFT
