"""How Triton kernels are launched: their tile sizes, how many programs share the work, and how images lie in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shape = Sequence[int]  # (N, C, H, W)


class LaunchConfig(NamedTuple):
    """How a kernel is launched. All values in this package were found by measurement (LOG.md)."""

    block: int  # strips or pixels that a program works on at once
    warps: int
    stages: int  # of the software pipeline
    per_multiprocessor: float  # programs


def round_up_to_tile(count: int) -> int:
    """The number of rows or columns that `tl.dot` takes: the next power of two, at least 16."""
    return max(16, 1 << (count - 1).bit_length())


@functools.cache
def count_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 for other devices, where Triton's interpreter runs the kernels."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def choose_num_programs(config: LaunchConfig, num_items: int, num_multiprocessors: int) -> int:
    """How many programs share `num_items` strips or pixels."""
    return max(1, min(int(num_multiprocessors * config.per_multiprocessor), -(-num_items // config.block)))


def to_channels_last(x: Tensor) -> Tensor:
    """The same images, with their channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, shape: Shape) -> Tensor:
    """Uninitialised images of this shape, channels last in memory, of the precision and on the device of `like`."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
