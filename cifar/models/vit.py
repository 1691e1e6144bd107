"""A small Vision Transformer.

Dosovitskiy et al. 2021 (arXiv:2010.11929) with the simplifications of Beyer et al. 2022 (arXiv:2205.01580): fixed 2-D
sine-cosine positions, mean over tokens instead of a class token, one linear head. Patches of 4 make 64 tokens. `vit_tiny` has
DeiT-Ti's width and depth (Touvron et al. 2021, arXiv:2012.12877) with heads of 32 channels. Initialisation: truncated
normal of 0.02 for linear layers, as DeiT; LeCun normal for the patches, as the original.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from cifar.errors import UserError
from cifar.models.blocks import Depth
from cifar.registry import models

HEAD = 32  # channels of an attention head


def valid_width(width: int) -> int:
    """A positive multiple of a head's channels, or UserError."""
    if width < HEAD or width % HEAD:
        raise UserError(f"width = {width}: vit has widths that are multiples of {HEAD}; choose one")
    return width


def valid_patch(patch_size: int) -> int:
    """A divisor of 32 below it, or UserError."""
    if patch_size not in (1, 2, 4, 8, 16):
        raise UserError(f"patch_size = {patch_size}: vit cuts 32x32 images into patches of 1, 2, 4, 8 or 16; choose one")
    return patch_size


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)  # a bias here would cancel in the softmax
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (-1, HEAD)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, HEAD)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, C)


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos_positions(side: int, width: int) -> Tensor:
    """Sine and cosine of both coordinates at width / 4 frequencies: (side * side, width)."""
    frequencies = 10000.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies  # (side, width / 4)
    rows = angles[:, None].expand(side, side, -1)
    columns = angles[None].expand(side, side, -1)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=2).flatten(0, 1)


class ViT(nn.Module):
    positions: Tensor

    def __init__(self, *, width: int, depth: int, patch_size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, valid_width(width), valid_patch(patch_size), patch_size)
        self.register_buffer("positions", sincos_positions(32 // patch_size, width), persistent=False)
        self.blocks = nn.Sequential(*(Encoder(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        nn.init.trunc_normal_(self.patches.weight, std=self.patches.weight[0].numel() ** -0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, 3, 32, 32) -> (B, T, C)
        x = self.norm(self.blocks(x + self.positions))
        return self.head(x.mean(1))


@models.register("vit_tiny", width=192, depth=12, patch_size=4)
@models.register("vit")
def vit(
    *,
    width: Annotated[int, AfterValidator(valid_width)] = 128,
    depth: Depth = 6,
    patch_size: Annotated[int, AfterValidator(valid_patch)] = 4,
) -> nn.Module:
    """Vision Transformer without class token; width is a multiple of 32."""
    return ViT(width=width, depth=depth, patch_size=patch_size)
