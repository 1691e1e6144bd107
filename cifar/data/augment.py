"""Augmentation as pure functions on uint8 batches, and the float batch a network takes.

Everything has static shapes, never waits for the device and has no Python branch on data, so it can be captured in a CUDA
graph. Geometry works on uint8, where a pad of 0 is black; `normalize` comes last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cifar.data.policies import POLICIES, Policy
from cifar.errors import UserError, did_you_mean

MEAN = (0.49139968, 0.48215841, 0.44653091)  # of the 50,000 training images, scaled to [0, 1], by channel
STD = (0.24703223, 0.24348513, 0.26158784)
FLIP_MODES = ("none", "random", "alternating")
PADDING_MODES = ("zero", "reflect")
NORMALIZE_KINDS = ("half", "dataset")
ERASED_AREA, ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)  # of random erasing (Zhong et al. 2017); torchvision's bounds
ERASING_ATTEMPTS = 4  # to draw a box that fits: one in 160 does not, so all four fail for 2 of 10^9 images
FusedAugment = Callable[..., Tensor]  # `augment_fused`, or its compiled form


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror left-right the images (B, C, H, W) where `mask` (B,) is true."""
    # On a CPU a row copy out of both versions is four times quicker than torch.where (86 against 350 us for 128 images).
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + mask * len(images))


def crop(images: Tensor, offsets: Tensor, padding: int, mode: str = "zero") -> Tensor:
    """Pad by `padding` pixels and cut the original size out at `offsets` (B, 2) = (row, column) in 0..2*padding."""
    batch, channels, height, width = images.shape
    padded = pad(images, padding, mode)  # (B, C, H, W) -> (B, C, H + 2p, W + 2p)
    row, plane = padded.shape[3], padded.shape[2] * padded.shape[3]
    # A window that starts at every byte, as a view: each row of the result is then one contiguous copy of `width` bytes.
    # For 128 images on a CPU: 113 us, against 308 by gather, 422 by unfold and 2100 by indexing with four tensors.
    windows = padded.view(-1).as_strided((padded.numel() - width + 1, width), (1, 1))
    corner = (torch.arange(batch * channels, device=images.device) * plane).view(batch, channels, 1)
    rows = (offsets[:, :1] + torch.arange(height, device=images.device)) * row + offsets[:, 1:]  # (B, H)
    return windows.index_select(0, (corner + rows[:, None]).view(-1)).view(images.shape)


def pad(images: Tensor, padding: int, mode: str = "zero") -> Tensor:
    """Add a border to images (B, C, H, W): black, or their reflection without the edge pixel."""
    if mode == "zero":
        return F.pad(images, (padding,) * 4)
    p = padding  # F.pad reflects no uint8 tensors on a GPU
    images = torch.cat([images[:, :, 1 : p + 1].flip(2), images, images[:, :, -p - 1 : -1].flip(2)], 2)
    return torch.cat([images[..., 1 : p + 1].flip(3), images, images[..., -p - 1 : -1].flip(3)], 3)


def cutout(images: Tensor, centres: Tensor, size: int) -> Tensor:
    """Blank a square of side `size` around `centres` (B, 2), as far as it lies in the image (DeVries & Taylor 2017).

    Blank is the mean colour, which is near 0 after normalisation.
    """
    inside = [_mask_window(images.shape[2 + axis], centres[:, axis : axis + 1], size) for axis in (0, 1)]
    blank = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (B, 1, H, W)
    return torch.where(blank, _pixel_constants("blank", images.device)[0], images)


def _mask_window(length: int, centres: Tensor, size: int) -> Tensor:
    """(B, 1) centres -> (B, length): true for the `size` positions from centre - size // 2 on."""
    distance = torch.arange(length, device=centres.device) - centres + size // 2
    return (distance >= 0) & (distance < size)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Blank a box of each image (B, C, H, W): `boxes` (B, 4) are top, left, height, width; a height of 0 for none.

    Random erasing (Zhong et al. 2017, arXiv:1708.04896). Blank is the mean colour, as of a cutout.
    """
    boxes = boxes.view(-1, 4, 1, 1, 1)
    y = torch.arange(images.shape[2], device=images.device).view(1, -1, 1)
    x = torch.arange(images.shape[3], device=images.device).view(1, 1, -1)
    blank = _is_inside(y - boxes[:, 0], boxes[:, 2]) & _is_inside(x - boxes[:, 1], boxes[:, 3])  # (B, 1, H, W)
    return torch.where(blank, _pixel_constants("blank", images.device)[0], images)


def _is_inside(distance: Tensor, length: Tensor) -> Tensor:
    return (distance >= 0) & (distance < length)


def draw_boxes(count: int, probability: float, side: int, generator: Generator) -> Tensor:
    """(count, 4) uint8: top, left, height and width of the box that is erased; zeros where none is.

    Its area is uniform in `ERASED_AREA` of the image, its aspect (height / width) log-uniform in `ERASED_ASPECT`, its place
    uniform. A box that does not fit is drawn again.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    chosen, place, sizes = draw(count), draw(count, 2), draw(ERASING_ATTEMPTS, count, 2)
    area = side * side * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * sizes[..., 0])
    low, high = (math.log(bound) for bound in ERASED_ASPECT)
    aspect = (low + (high - low) * sizes[..., 1]).exp()
    size = torch.zeros(count, 2, device=generator.device)
    for candidate in torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 2).round().flip(0):
        size = torch.where((candidate < side).all(1, keepdim=True), candidate, size)  # the first attempt that fits stays
    corner = torch.minimum((place * (side - size + 1)).floor(), side - size)
    boxes = torch.where((chosen < probability)[:, None], torch.cat([corner, size], 1), 0.0)
    return boxes.to(torch.uint8)


def normalize(images: Tensor, kind: str = "half", *, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """uint8 0..255 -> float. half: x / 127.5 - 1, in [-1, 1]; dataset: (x - mean) / standard deviation."""
    scale, shift = _pixel_constants(kind, images.device)
    result = images.float().mul_(scale).sub_(shift)
    return result.to(dtype=dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@functools.cache
def _pixel_constants(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift of a kind of normalisation. Cached, because making them for every batch would wait for the device."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1), torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    if kind == "blank":
        colour = (mean * 255).round().to(torch.uint8).to(device)
        return colour, colour
    if kind == "half":
        return torch.tensor(1 / 127.5, device=device), torch.tensor(1.0, device=device)
    assert kind == "dataset", kind
    return (1 / (255 * std)).float().to(device), (mean / std).float().to(device)


class PixelConstants(NamedTuple):
    """Normalised pixels are x * scale - shift; `blank` (3, 1, 1) uint8 is the colour of a cutout, the mean of all pixels."""

    scale: Tensor
    shift: Tensor
    blank: Tensor

    @classmethod
    def of_kind(cls, kind: str, device: torch.device) -> PixelConstants:
        """The constants of a kind of normalisation."""
        return cls(*_pixel_constants(kind, device), _pixel_constants("blank", device)[0])


def jitter_colours(images: Tensor, draws: Draws, constants: PixelConstants) -> Tensor:
    """Change contrast and brightness of normalised images (B, ...), each image by its own draws.

    A pixel p in [0, 1] becomes mean + contrast * (p - mean) + brightness, where mean is the mean colour of all training
    images. It is not clipped. `constants` have shapes that fit the images.
    """
    shape = (-1,) + (1,) * (images.dim() - 1)
    if draws.contrast is not None:
        mean = constants.blank.float() * constants.scale - constants.shift
        images = mean + draws.contrast.view(shape) * (images - mean)
    if draws.brightness is not None:
        images = images + draws.brightness.view(shape) * (255 * constants.scale)
    return images


class CropOptions(NamedTuple):
    """How an image is cropped, and the side of its cutout, in pixels."""

    padding: int
    padding_mode: str
    cutout_size: int


def augment_fused(
    images: Tensor, indices: Tensor, draws: Draws, options: CropOptions, constants: PixelConstants, dtype: torch.dtype
) -> Tensor:
    """Flip, crop, cutout, normalisation and jitter of images[indices] at once -> (B, H, W, C), for a compiler.

    Compiled, it is one kernel that reads each byte once. `Augment.apply` and `normalize` do the same step by step, which is
    quicker where nothing is compiled.
    """
    _, channels, height, width = images.shape
    device = images.device
    y = torch.arange(height, device=device).view(1, height, 1, 1)
    x = torch.arange(width, device=device).view(1, 1, width, 1)
    channel = torch.arange(channels, device=device)
    row, column = y, x
    inside = torch.ones((), dtype=torch.bool, device=device)
    if draws.offsets is not None:
        offsets = draws.offsets.long().view(-1, 2, 1, 1, 1) - options.padding
        row, column = y + offsets[:, 0], x + offsets[:, 1]
        if options.padding_mode == "zero":
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
        else:  # -1 -> 1, and height -> height - 2
            row, column = ((length - 1) - ((length - 1) - i.abs()).abs() for i, length in ((row, height), (column, width)))
    if draws.mirrored is not None:
        column = torch.where(draws.mirrored.view(-1, 1, 1, 1) == 1, width - 1 - column, column)
    pixel_index = ((indices.view(-1, 1, 1, 1) * channels + channel) * height + row) * width + column
    pixels = torch.where(inside, images.view(-1)[pixel_index], 0)  # (B, H, W, C) uint8
    if draws.centres is not None:
        centres = draws.centres.long().view(-1, 2, 1, 1, 1) - options.cutout_size // 2
        away = y - centres[:, 0], x - centres[:, 1]
        hidden = (away[0] >= 0) & (away[0] < options.cutout_size) & (away[1] >= 0) & (away[1] < options.cutout_size)
        pixels = torch.where(hidden, constants.blank.view(-1), pixels)
    if draws.boxes is not None:
        boxes = draws.boxes.long().view(-1, 4, 1, 1, 1)
        hidden = _is_inside(y - boxes[:, 0], boxes[:, 2]) & _is_inside(x - boxes[:, 1], boxes[:, 3])
        pixels = torch.where(hidden, constants.blank.view(-1), pixels)
    per_channel = PixelConstants(constants.scale.view(-1), constants.shift.view(-1), constants.blank.view(-1))
    return jitter_colours(pixels.float() * per_channel.scale - per_channel.shift, draws, per_channel).to(dtype)


class Draws(NamedTuple):
    """The random numbers of an augmentation, for each of N images; None for those that it does not need."""

    mirrored: Tensor | None  # (N,) uint8: 1 for left-right mirrored
    offsets: Tensor | None  # (N, 2) uint8: row and column of the crop
    centres: Tensor | None  # (N, 2) uint8: row and column of the cutout's centre
    boxes: Tensor | None = None  # (N, 4) uint8: top, left, height and width of what is erased
    codes: Tensor | None = None  # (N, operations) int16: see `policies.Policy`
    contrast: Tensor | None = None  # (N,) float32: what differences to the mean colour are multiplied by
    brightness: Tensor | None = None  # (N,) float32: what is added, where white less black is 1

    def select(self, slots: slice | Tensor) -> Draws:
        """The draws of some of the images."""
        return Draws(*(None if drawn is None else drawn[slots] for drawn in self))


@dataclass(frozen=True)
class Augment:
    """How training images are augmented. The fields are the configuration keys of the same names; `crop` is its padding."""

    flip: str = "random"
    crop: int = 4
    crop_padding: str = "zero"
    cutout: int = 0
    normalize: str = "half"
    seed: int = 0  # decides which images an alternating flip mirrors first
    random_erasing: float = 0.0
    augment_policy: str = "none"
    randaugment_num_ops: int = 2
    randaugment_magnitude: int = 9
    contrast: float = 0.0
    brightness: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("flip", self.flip, FLIP_MODES),
            ("crop_padding", self.crop_padding, PADDING_MODES),
            ("normalize", self.normalize, NORMALIZE_KINDS),
            ("augment_policy", self.augment_policy, POLICIES),
        ):
            if value not in known:
                raise UserError(f"unknown {name} '{value}': {did_you_mean(value, known)}")

    @classmethod
    def from_keys(cls, config: Any) -> Augment:
        """Of an object that has the configuration keys as attributes."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def policy(self) -> Policy | None:
        """What changes shapes and colours before all else, if anything does."""
        if self.augment_policy == "none":
            return None
        return Policy(self.augment_policy, self.randaugment_num_ops, self.randaugment_magnitude)

    def draw(self, count: int, generator: Generator, side: int = 32) -> Draws:
        """The random numbers for `count` images of `side` pixels, on the generator's device."""
        device = generator.device

        def draw_below(limit: int, *shape: int) -> Tensor:
            return torch.randint(limit, (count, *shape), generator=generator, device=device, dtype=torch.uint8)

        def draw_within(limit: float) -> Tensor:
            return limit * (2 * torch.rand(count, generator=generator, device=device) - 1)

        return Draws(
            draw_below(2) if self.flip == "random" else None,
            draw_below(2 * self.crop + 1, 2) if self.crop else None,
            draw_below(side, 2) if self.cutout else None,
            draw_boxes(count, self.random_erasing, side, generator) if self.random_erasing else None,
            policy.draw(count, generator) if (policy := self.policy) else None,
            1 + draw_within(self.contrast) if self.contrast else None,
            draw_within(self.brightness) if self.brightness else None,
        )

    def apply(self, images: Tensor, indices: Tensor, epoch: int | Tensor, draws: Draws) -> Tensor:
        """uint8 (B, 3, H, W) -> uint8 of the same shape, by the draws of these images. `finish` does the rest.

        `indices` (B,) are those of the images in the training set. The draws lie on the images' device, but for the codes,
        which had better be on the CPU: they say how many images an operation gets, which the host has to know.
        """
        if (policy := self.policy) and draws.codes is not None:
            images = policy.apply(images, draws.codes)
        if draws.mirrored is not None:
            images = flip(images, draws.mirrored.long())
        elif self.flip == "alternating":
            images = flip(images, (initial_flips(indices, self.seed) + epoch) & 1)
        if draws.offsets is not None:
            images = crop(images, draws.offsets.long(), self.crop, self.crop_padding)
        if draws.centres is not None:
            images = cutout(images, draws.centres.long(), self.cutout)
        if draws.boxes is not None:
            images = erase(images, draws.boxes.long())
        return images

    def apply_fused(
        self, images: Tensor, indices: Tensor, epoch: int, draws: Draws, dtype: torch.dtype, fused: FusedAugment
    ) -> Tensor:
        """`images` (N, C, H, W) at `indices`, augmented and normalised by `fused` -> (B, H, W, C). Without the policy."""
        draws = self.resolve_flips(indices, epoch, draws)
        constants = PixelConstants.of_kind(self.normalize, images.device)
        options = CropOptions(self.crop, self.crop_padding, self.cutout)
        return fused(images, indices, draws, options, constants, dtype)

    def resolve_flips(self, indices: Tensor, epoch: int, draws: Draws) -> Draws:
        """The draws with the sides of an alternating flip, which are not drawn."""
        if self.flip != "alternating" or draws.mirrored is not None:
            return draws
        return draws._replace(mirrored=(initial_flips(indices, self.seed) + epoch) & 1)

    def augment_uint8(self, images: Tensor, indices: Tensor, epoch: int, generator: Generator) -> Tensor:
        """`apply` with fresh draws from `generator`, which is on the images' device. Its colours are not jittered."""
        return self.apply(images, indices, epoch, self.draw(len(images), generator, images.shape[2]))

    def finish(self, images: Tensor, draws: Draws, dtype: torch.dtype, channels_last: bool) -> Tensor:
        """uint8 (B, 3, H, W), as `apply` returns them -> normalised and jittered float."""
        if draws.contrast is None and draws.brightness is None:
            return normalize(images, self.normalize, dtype=dtype, channels_last=channels_last)
        images = normalize(images, self.normalize, channels_last=channels_last)
        return jitter_colours(images, draws, PixelConstants.of_kind(self.normalize, images.device)).to(dtype)

    def __call__(
        self,
        images: Tensor,
        indices: Tensor,
        epoch: int,
        generator: Generator,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Tensor:
        """uint8 (B, 3, H, W) -> augmented and normalised float."""
        draws = self.draw(len(images), generator, images.shape[2])
        return self.finish(self.apply(images, indices, epoch, draws), draws, dtype, channels_last)


def initial_flips(indices: Tensor, seed: int) -> Tensor:
    """(B,) indices into the training set -> 0 or 1 for mirrored: pseudo-random but fixed for a seed.

    From there on the sides alternate, so two epochs show both (airbench: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds").
    """
    mixed = (indices + (seed % 2**31) * 1_000_003 + 1) * -7046029254386353131  # odd 64-bit constants: SplitMix64's finaliser
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return (mixed >> 31) & 1


def draw_mixing(steps: int, alpha: float, generator: Generator) -> Tensor:
    """(steps, 3) float32: for each batch a weight from Beta(alpha, alpha), and the row and column of a centre in [0, 1)."""
    # with a small alpha both gammas would underflow in float32
    shape = torch.full((steps, 2), alpha, dtype=torch.float64, device=generator.device)
    gammas = torch._standard_gamma(shape, generator=generator)
    weight = gammas[:, :1] / gammas.sum(1, keepdim=True)  # Beta(a, a) = G / (G + G') of two Gamma(a) draws
    centre = torch.rand((steps, 2), generator=generator, device=generator.device)
    return torch.cat([weight.float(), centre], 1)


def mix(images: Tensor, targets: Tensor, kind: str, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour in the (shuffled) batch, and likewise its target row (B, classes).

    mixup (Zhang et al. 2017) takes a weighted sum; cutmix (Yun et al. 2019) pastes a box. The whole batch has one weight and
    one box: `drawn` (3,) is its row of `draw_mixing`.
    """
    height, width = images.shape[2], images.shape[3]
    weight = drawn[0]
    if kind == "mixup":
        mixed = torch.lerp(images.roll(1, 0).float(), images.float(), weight).to(images.dtype)
    else:
        assert kind == "cutmix", kind
        half = (1 - weight).sqrt() / 2
        rows = _mask_span(height, drawn[1], half)
        columns = _mask_span(width, drawn[2], half)
        box = rows[:, None] & columns  # (H, W)
        mixed = torch.where(box, images.roll(1, 0), images)
        weight = 1 - box.float().mean()  # the box is clipped at the border: what counts is the area left
    mixed = mixed.contiguous(memory_format=torch.channels_last) if is_channels_last(images) else mixed
    return mixed, torch.lerp(targets.roll(1, 0), targets, weight.to(targets.dtype))


def _mask_span(length: int, centre: Tensor, half: Tensor) -> Tensor:
    """(length,): true for the pixels from (centre - half) * length to (centre + half) * length, rounded down."""
    pixel = torch.arange(length, device=centre.device)
    return (pixel >= ((centre - half) * length).floor()) & (pixel < ((centre + half) * length).floor())


def is_channels_last(images: Tensor) -> bool:
    """Whether images are in the channels-last format, and not contiguous as well."""
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
