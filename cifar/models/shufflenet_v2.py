"""ShuffleNetV2 for 32x32 images.

Ma et al. 2018 (arXiv:1807.11164), table 5: half of the channels pass a block untouched, then all are shuffled. For CIFAR the
stem keeps its side and the first pooling is left out. Initialisation: He et al. 2015; N(0, 0.01) for the head.
"""

from __future__ import annotations

import functools
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.models.blocks import conv_norm, he_init_
from cifar.registry import models

BLOCKS = (4, 8, 4)
CHANNELS = {0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024), 2.0: (244, 488, 976, 2048)}


def valid_multiplier(multiplier: float) -> float:
    """One of the paper's four, or UserError."""
    if multiplier not in CHANNELS:
        raise UserError(f"width_multiplier = {multiplier}: shufflenet_v2 has {', '.join(map(str, CHANNELS))}; choose one")
    return multiplier


class ShuffleBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        depthwise = functools.partial(conv_norm, stride=stride, activation=None)
        entering = inputs if stride == 2 else half  # at stride 1 the block sees one half
        self.left: nn.Module | None = None
        if stride == 2:
            self.left = nn.Sequential(depthwise(inputs, inputs, groups=inputs), conv_norm(inputs, half, 1))
        self.right = nn.Sequential(conv_norm(entering, half, 1), depthwise(half, half, groups=half), conv_norm(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.left(x), x) if self.left is not None else x.chunk(2, dim=1)
        both = torch.stack([left, self.right(right)], dim=2)  # stack and flatten interleave: the shuffle
        return both.flatten(1, 2)  # (B, C / 2, 2, H, W) -> (B, C, H, W)


class ShuffleNetV2(nn.Module):
    def __init__(self, *, width_multiplier: float) -> None:
        super().__init__()
        *stages, last = CHANNELS[valid_multiplier(width_multiplier)]
        channels = 24
        self.stem = conv_norm(3, channels)
        blocks: list[nn.Module] = []
        for count, outputs in zip(BLOCKS, stages, strict=True):
            for block in range(count):
                blocks.append(ShuffleBlock(channels, outputs, 1 if block else 2))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_norm(channels, last, 1)
        self.head = nn.Linear(last, 10)
        he_init_(self)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))  # (B, 3, 32, 32) -> (B, 1024, 4, 4)
        return self.head(x.mean((2, 3)))


@models.register("shufflenet_v2_x0_5", width_multiplier=0.5)
@models.register("shufflenet_v2_x1_5", width_multiplier=1.5)
@models.register("shufflenet_v2_x2_0", width_multiplier=2.0)
@models.register("shufflenet_v2")
def shufflenet_v2(*, width_multiplier: Annotated[float, AfterValidator(valid_multiplier)] = 1.0) -> nn.Module:
    """ShuffleNetV2 with CIFAR's strides; multipliers 0.5, 1.0, 1.5, 2.0."""
    return ShuffleNetV2(width_multiplier=width_multiplier)
