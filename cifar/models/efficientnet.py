"""EfficientNet for 32x32 images.

Tan & Le 2019 (arXiv:1905.11946), table 1 (B0): inverted residuals with squeeze-and-excitation and SiLU. The multipliers are
the paper's: channels times `width_multiplier`, rounded to multiples of `channel_divisor` as the authors' code does, and a
stage's blocks times `depth_multiplier`, rounded up. For CIFAR the stem and the second stage keep their side, so that the last
maps are 4x4. `stem_stride=2` halves all of these sides: for networks of a few MMACs. Initialisation: He et al. 2015; U(-r, r)
with r = 1 / sqrt(10) for the head.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cifar.models.blocks import (
    Dropout,
    DropPath,
    DropRate,
    Multiplier,
    SqueezeExcitation,
    conv_norm,
    he_init_,
    make_drop_path,
    round_channels,
)
from cifar.registry import models

# expansion, kernel, channels, blocks: table 1
STAGES = ((1, 3, 16, 1), (6, 3, 24, 2), (6, 5, 40, 2), (6, 3, 80, 3), (6, 5, 112, 3), (6, 5, 192, 4), (6, 3, 320, 1))
IMAGENET_STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the stages' first blocks, after a stem of stride 2
STRIDES = (1, 1, 2, 2, 1, 2, 1)  # for CIFAR, after a stem of stride 1

Stride = Annotated[int, Field(ge=1, le=2)]
Divisor = Annotated[int, Field(ge=1)]


class MBConv(nn.Module):
    """1x1 convolution that expands, depthwise convolution, squeeze-and-excitation, 1x1 convolution without activation."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_norm(inputs, hidden, 1, activation=nn.SiLU) if expansion != 1 else nn.Identity()
        self.depthwise = conv_norm(hidden, hidden, kernel, stride=stride, groups=hidden, activation=nn.SiLU)
        self.se = SqueezeExcitation(hidden, inner=max(1, inputs // 4), activation=F.silu)
        self.project = conv_norm(hidden, outputs, 1, activation=None)
        self.drop_path: DropPath | None = None
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        if not self.residual:
            return branch
        return x + (branch if self.drop_path is None else self.drop_path(branch))


class EfficientNet(nn.Module):
    def __init__(
        self,
        *,
        width_multiplier: float,
        depth_multiplier: float,
        stem_stride: int,
        channel_divisor: int,
        dropout: float,
        drop_path: float,
        strides: tuple[int, ...] = STRIDES,
    ) -> None:
        super().__init__()
        channels = round_channels(32 * width_multiplier, channel_divisor)
        last = round_channels(1280 * width_multiplier, channel_divisor)
        self.stem = conv_norm(3, channels, stride=stem_stride, activation=nn.SiLU)
        blocks: list[MBConv] = []
        for (expansion, kernel, base, count), first_stride in zip(STAGES, strides, strict=True):
            outputs = round_channels(base * width_multiplier, channel_divisor)
            for block in range(math.ceil(count * depth_multiplier)):
                stride = 1 if block else first_stride
                blocks.append(MBConv(channels, outputs, expansion=expansion, kernel=kernel, stride=stride))
                channels = outputs
        for index, mbconv in enumerate(blocks):
            if mbconv.residual:  # a branch without a shortcut cannot be dropped
                mbconv.drop_path = make_drop_path(drop_path, index, len(blocks))
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_norm(channels, last, 1, activation=nn.SiLU)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, 10)
        he_init_(self)
        nn.init.uniform_(self.head.weight, -1 / math.sqrt(10), 1 / math.sqrt(10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))  # (B, 3, 32, 32) -> (B, 1280, 4, 4)
        return self.head(self.dropout(x.mean((2, 3))))


@models.register("efficientnet_b0")
@models.register("efficientnet")
def efficientnet(
    *,
    width_multiplier: Multiplier = 1.0,
    depth_multiplier: Multiplier = 1.0,
    stem_stride: Stride = 1,
    channel_divisor: Divisor = 8,
    dropout: Dropout = 0.2,
    drop_path: DropRate = 0.0,
) -> nn.Module:
    """EfficientNet-B0 with CIFAR's strides; `stem_stride=2` and multipliers below one for a few MMACs."""
    return EfficientNet(
        width_multiplier=width_multiplier,
        depth_multiplier=depth_multiplier,
        stem_stride=stem_stride,
        channel_divisor=channel_divisor,
        dropout=dropout,
        drop_path=drop_path,
    )
