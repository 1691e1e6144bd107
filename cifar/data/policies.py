"""TrivialAugment and RandAugment on uint8 batches: each image gets randomly chosen operations of random strength.

Müller and Hutter 2021 (arXiv:2103.10158, the wide space): one of 14 operations, its level uniform. Cubuk et al. 2020
(arXiv:1909.13719): several operations one after the other, all of one level. Operations, their ranges and their rounding are
torchvision's (`TrivialAugmentWide`, `RandAugment`, nearest pixel, black outside).

An operation runs once for all images that drew it: the images are sorted by operation, so each has a slice. To compute
all operations for all images and choose afterwards would be 14 times the work. The sizes of the slices are read from random
numbers on the CPU, so nothing waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

POLICIES = ("none", "trivialaugment", "randaugment")
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness",
    "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
NUM_LEVELS = 31  # of strength, 0 to 30
_GEOMETRIC = slice(1, 6)  # operations that move pixels: one matrix each, so they run together
_BLENDS = ("brightness", "color", "contrast", "sharpness")
# The largest strength, by policy: shear, translation in pixels of 32, rotation in degrees, blends, bits that posterize drops.
_RANGES = {"trivialaugment": (0.99, 32.0, 135.0, 0.99, 6), "randaugment": (0.3, 150 / 331 * 32, 30.0, 0.9, 4)}


class OperationGroups(NamedTuple):
    """One operation for each of N images, sorted by operation."""

    positions: Tensor  # (N,) int64: where the images of this order lie
    codes: Tensor  # (N,) int64: operation, level and sign of each, in this order
    counts: tuple[int, ...]  # images of each operation, on the host


class _Tables(NamedTuple):
    """What a code means."""

    matrices: Tensor  # (codes, 6) float32: the source of pixel (x, y) is (a x + b y + c, d x + e y + f)
    amounts: Tensor  # (codes, 2) float32: weights of a blend; threshold of solarize; mask of posterize


@dataclass(frozen=True)
class Policy:
    """How operations are drawn. A code is (operation * 31 + level) * 2 + (1 for a negative strength)."""

    kind: str = "trivialaugment"
    num_ops: int = 2  # of RandAugment, one after the other
    magnitude: int = 9  # the level of RandAugment's operations

    def draw(self, count: int, generator: Generator) -> Tensor:
        """(count, operations one after the other) int16: codes, on the generator's device."""

        def draw_below(limit: int, length: int) -> Tensor:
            return torch.randint(limit, (count, length), generator=generator, device=generator.device, dtype=torch.int16)

        if self.kind == "trivialaugment":
            return draw_below(len(OPERATIONS) * NUM_LEVELS * 2, 1)
        drawn = draw_below(len(OPERATIONS) * 2, self.num_ops)
        return ((drawn >> 1) * NUM_LEVELS + self.magnitude) * 2 + (drawn & 1)

    def apply(self, images: Tensor, codes: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the same shape, by the codes (B, operations). Waits for codes that are not on the CPU."""
        groups = group_by_operation(codes.cpu())
        return self.apply_groups(images, [move_groups(group, images.device) for group in groups])

    def apply_groups(self, images: Tensor, groups: Sequence[OperationGroups]) -> Tensor:
        """The same, where `groups` lie on the images' device. Never waits for it."""
        tables = _make_tables(self.kind, images.device)
        for positions, codes, counts in groups:
            done = _apply_sorted(images.index_select(0, positions), codes, counts, tables)
            images = torch.empty_like(images).index_copy_(0, positions, done)
        return images


def group_by_operation(codes: Tensor) -> list[OperationGroups]:
    """Codes (N, operations one after the other) on the CPU -> the groups of each turn."""
    groups = []
    for column in codes.long().unbind(1):
        operations = column // (2 * NUM_LEVELS)
        positions = operations.to(torch.uint8).argsort(stable=True)
        counts = torch.bincount(operations, minlength=len(OPERATIONS))
        groups.append(OperationGroups(positions, column.index_select(0, positions), tuple(counts.tolist())))
    return groups


def move_groups(groups: OperationGroups, device: torch.device) -> OperationGroups:
    """To a device. A copy from pinned memory does not wait."""
    positions, codes = (tensor.to(device, non_blocking=tensor.is_pinned()) for tensor in groups[:2])
    return OperationGroups(positions, codes, groups.counts)


def _apply_sorted(images: Tensor, codes: Tensor, counts: Sequence[int], tables: _Tables) -> Tensor:
    """The operations on images that are sorted by operation."""
    parts, amounts, end = [images[: counts[0]]], tables.amounts.index_select(0, codes), counts[0]
    start, end = end, end + sum(counts[_GEOMETRIC])
    if start < end:
        parts.append(transform(images[start:end], tables.matrices.index_select(0, codes[start:end])))
    for name, count in zip(OPERATIONS[_GEOMETRIC.stop :], counts[_GEOMETRIC.stop :], strict=True):
        start, end = end, end + count
        if count:
            parts.append(_PIXEL_OPERATIONS[name](images[start:end], amounts[start:end].view(-1, 2, 1, 1, 1)))
    return torch.cat(parts)


@functools.cache
def _make_tables(kind: str, device: torch.device) -> _Tables:
    """Cached, because making them for every batch would wait for the device."""
    shear, shift, degrees, blend, bits = _RANGES[kind]
    largest = {"shear_x": shear, "shear_y": shear, "translate_x": shift, "translate_y": shift, "rotate": degrees}
    largest |= dict.fromkeys(_BLENDS, blend)
    matrices, amounts = [], []
    for operation in OPERATIONS:
        strengths = torch.linspace(0.0, largest.get(operation, 0.0), NUM_LEVELS).tolist()
        for level, strength in enumerate(strengths):
            for sign in (1.0, -1.0):
                matrices.append(_make_matrix(operation, sign * strength))
                amounts.append(_make_amounts(operation, sign * strength, level, bits))
    return _Tables(torch.tensor(matrices, device=device), torch.tensor(amounts, device=device))


def _make_matrix(operation: str, strength: float) -> tuple[float, ...]:
    """Where a pixel comes from. Shears keep the image's corner in place, a rotation (counterclockwise) its centre."""
    if operation == "shear_x":
        return 1.0, strength, strength / 2, 0.0, 1.0, 0.0  # from the corner of pixel (0, 0), half a pixel from its centre
    if operation == "shear_y":
        return 1.0, 0.0, 0.0, strength, 1.0, strength / 2
    if operation == "translate_x":
        return 1.0, 0.0, -float(int(strength)), 0.0, 1.0, 0.0
    if operation == "translate_y":
        return 1.0, 0.0, 0.0, 0.0, 1.0, -float(int(strength))
    if operation == "rotate":
        cos, sin, middle = math.cos(math.radians(strength)), math.sin(math.radians(strength)), 15.5
        return cos, -sin, middle - middle * (cos - sin), sin, cos, middle - middle * (sin + cos)
    return 1.0, 0.0, 0.0, 0.0, 1.0, 0.0


def _make_amounts(operation: str, strength: float, level: int, bits: int) -> tuple[float, float]:
    if operation == "posterize":
        dropped = round(level / ((NUM_LEVELS - 1) / bits))
        return float(256 - 2**dropped), 0.0
    if operation == "solarize":
        return torch.linspace(255.0, 0.0, NUM_LEVELS)[level].item(), 0.0
    ratio = 1.0 + strength
    return ratio, 1.0 - ratio


# -- the operations ----------------------------------------------------------------------------------------------------


def transform(images: Tensor, matrices: Tensor) -> Tensor:
    """uint8 (B, C, H, W): each pixel is the nearest one to where its row of `matrices` (B, 6) says; black outside."""
    _, channels, height, width = images.shape
    y = torch.arange(height, device=images.device).view(1, height, 1)
    x = torch.arange(width, device=images.device).view(1, 1, width)
    a, b, c, d, e, f = matrices.view(-1, 6, 1, 1).unbind(1)
    column, row = (a * x + b * y + c).round_(), (d * x + e * y + f).round_()  # (B, H, W)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = row.clamp_(0, height - 1).mul_(width).add_(column.clamp_(0, width - 1)).long()
    flat = source.flatten(1)[:, None].expand(-1, channels, -1)  # (B, C, H * W)
    return images.flatten(2).gather(2, flat).view(images.shape).mul_(inside[:, None])


def _blend(images: Tensor, others: Tensor, amounts: Tensor) -> Tensor:
    return (amounts[:, 0] * images + amounts[:, 1] * others).clamp_(0, 255).to(torch.uint8)


def _to_grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W) uint8, rounded down."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)[:, None]


def _brighten(images: Tensor, amounts: Tensor) -> Tensor:
    return (amounts[:, 0] * images).clamp_(0, 255).to(torch.uint8)


def _saturate(images: Tensor, amounts: Tensor) -> Tensor:
    return _blend(images, _to_grey(images), amounts)


def _change_contrast(images: Tensor, amounts: Tensor) -> Tensor:
    return _blend(images, _to_grey(images).float().mean((1, 2, 3), keepdim=True), amounts)


def _sharpen(images: Tensor, amounts: Tensor) -> Tensor:
    """Blend with the image smoothed by 3x3 (centre 5, others 1, over 13); the border stays."""
    wide = images.to(torch.int16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (sums / 13).round_().to(torch.uint8)  # a half never occurs in thirteenths
    return _blend(images, smooth, amounts)


def _posterize(images: Tensor, amounts: Tensor) -> Tensor:
    return images & amounts[:, 0].to(torch.uint8)


def _solarize(images: Tensor, amounts: Tensor) -> Tensor:
    return torch.where(images >= amounts[:, 0], 255 - images, images)


def _stretch_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel from 0 to 255; a channel of one value stays."""
    low, high = (bound.float() for bound in (images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)))
    is_flat = low == high
    low, scale = torch.where(is_flat, 0.0, low), torch.where(is_flat, 1.0, 255 / (high - low))
    return ((images - low) * scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Each channel's grey levels as evenly spread as a table can make them."""
    pixels = images.flatten(2).flatten(0, 1).long()  # (B * C, H * W)
    first = torch.arange(len(pixels), device=images.device)[:, None] * 256
    ones = torch.ones((), dtype=torch.int64, device=images.device).expand(pixels.numel())
    counts = torch.zeros(len(pixels) * 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add_(0, (pixels + first).view(-1), ones).view(-1, 256)
    of_brightest = counts.gather(1, pixels.amax(1, keepdim=True))
    step = (pixels.shape[1] - of_brightest) // 255  # (B * C, 1)
    darker = counts.cumsum(1) - counts  # pixels below each level
    table = ((darker + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table[:, 0] = 0
    done = torch.where(step == 0, pixels, table.gather(1, pixels))
    return done.to(torch.uint8).view(images.shape)


_PIXEL_OPERATIONS = {
    "brightness": _brighten,
    "color": _saturate,
    "contrast": _change_contrast,
    "sharpness": _sharpen,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _stretch_contrast,
    "equalize": _equalize,
}
