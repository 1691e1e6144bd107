"""The fast networks that reach 94 % and 96 % in seconds.

Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv:2404.00498): a frozen 2x2 convolution that whitens patches
(both signs of each eigenvector, sec. 3.1), three groups of 3x3 convolutions that start as identities where they can
(sec. 3.2), pooling before the first BatchNorm of a group, GELU, and a small multiple of a linear head. BatchNorm has a bias
but no trainable scale. The 94 % network (64, 256, 256) forgets its statistics fast and starts its head at unit deviation;
the 96 % network (128, 384, 512) has a third, residual convolution a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.models.blocks import DropRate, Width, make_drop_path
from cifar.registry import models

WHITENED = 5000  # images the patches are taken from
SHRINK = 5e-4  # added to the eigenvalues, so that rare directions are not blown up


class Scale(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def make_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """As many filters as there are inputs start as the identity; the others as PyTorch's default."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])
    return conv


def make_norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    layer.weight.requires_grad_(False)
    return layer


class Group(nn.Module):
    """conv, pool, norm, GELU, then depth - 1 times conv, norm, GELU; from depth 3 on with a shortcut around those."""

    def __init__(self, inputs: int, outputs: int, depth: int, momentum: float) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.gelu = nn.GELU()
        self.convs = nn.ModuleList(make_conv(inputs if not i else outputs, outputs) for i in range(depth))
        self.norms = nn.ModuleList(make_norm(outputs, momentum) for _ in range(depth))
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.convs) - 1
        first: Tensor | None = None
        for i, (conv, normalize) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = normalize(conv(x) if i else self.pool(conv(x)))
            if i == last and first is not None and last >= 2:
                x = x + first if self.drop_path is None else self.drop_path(x) + first
            x = self.gelu(x)
            first = x if i == 0 else first
        return x


class AirBench(nn.Module):
    def __init__(
        self,
        *,
        widths: Sequence[int],
        depth: int,
        momentum: float,
        scale: float,
        unit_head: bool,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if drop_path and depth < 3:
            raise UserError(
                f"drop_path = {drop_path}: airbench has shortcuts from depth 3 on; set depth to 3, or drop_path to 0"
            )
        self.whiten = nn.Conv2d(3, 24, 2)  # 32 -> 31; 24 = both signs of 3 * 2 * 2 eigenvectors
        self.whiten.weight.requires_grad_(False)
        if not unit_head:
            nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.gelu = nn.GELU()
        sizes = [24, *widths]
        self.groups = nn.Sequential(*(Group(a, b, depth, momentum) for a, b in itertools.pairwise(sizes)))
        for i, group in enumerate(self.groups):
            assert isinstance(group, Group)
            group.drop_path = make_drop_path(drop_path, i, len(widths))
        self.pool = nn.MaxPool2d(3)
        self.head = nn.Linear(sizes[-1], 10, bias=False)
        if unit_head:
            self.head.weight.data /= self.head.weight.data.std()
        self.scale = Scale(scale)
        # The whitening is the stem, so the first trainable filters are hidden ones.
        self.roles = {"whiten.bias": "whiten_bias", "groups.0.convs.0.weight": "hidden", "head.weight": "head"}

    @torch.no_grad()
    def init_from_data(self, images: Tensor) -> None:
        """Set the whitening filters from the 2x2 patches of the first 5,000 normalised images (N, 3, 32, 32)."""
        weight = self.whiten.weight
        images = images[:WHITENED].to(weight.device, torch.float32)
        patches = torch.cat([images[:, :, y : y + 31, x : x + 31, None] for y in (0, 1) for x in (0, 1)], dim=4)
        patches = patches.permute(0, 2, 3, 1, 4).reshape(-1, 12)  # (N * 31 * 31, 3 * 2 * 2)
        moments = (patches.T @ patches / len(patches)).cpu().double()  # 12 x 12; not every device has eigh
        values, vectors = torch.linalg.eigh(moments)  # columns are eigenvectors
        filters = (vectors / (values + SHRINK).sqrt()).T.reshape(12, 3, 2, 2)
        weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.gelu(self.whiten(x)))  # (B, 3, 32, 32) -> (B, C, 3, 3)
        return self.scale(self.head(self.pool(x).flatten(1)))


@models.register("airbench94", depth=2, drop_path=0.0)
@models.register("airbench")
def airbench(*, width: Width = 64, depth: Annotated[int, Field(ge=1, le=8)] = 2, drop_path: DropRate = 0.0) -> nn.Module:
    """Fast network with whitening: three groups of `depth` convolutions, width, 4 width, 4 width channels."""
    widths = (width, 4 * width, 4 * width)
    scale = 1 / widths[-1]
    return AirBench(widths=widths, depth=depth, momentum=0.4, scale=scale, unit_head=True, drop_path=drop_path)


@models.register("airbench96")
def airbench96(*, width: Width = 128, drop_path: DropRate = 0.0) -> nn.Module:
    """The 96 % network: three residual groups of 3 convolutions, width, 3 width, 4 width channels."""
    widths = (width, 3 * width, 4 * width)
    return AirBench(widths=widths, depth=3, momentum=0.1, scale=1 / 9, unit_head=False, drop_path=drop_path)
