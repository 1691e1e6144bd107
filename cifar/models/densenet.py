"""DenseNet-BC.

Huang et al. 2017 (arXiv:1608.06993), sec. 3 and 4.2: three dense blocks of (depth - 4) / 6 layers, each a 1x1 bottleneck of
4 growth channels and a 3x3 convolution of `growth`, whose output is appended; a stem of 2 growth; transitions that halve
channels and side. Initialisation: He et al. 2015.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from cifar.models.blocks import Width, he_init_, make_depth_check
from cifar.registry import models

valid_depth = make_depth_check("densenet_bc", 6, 4)


def norm_conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bottleneck = norm_conv(inputs, 4 * growth, 1)
        self.conv = norm_conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.bottleneck(x))], dim=1)  # (B, C, H, W) -> (B, C + growth, H, W)


class DenseNet(nn.Module):
    def __init__(self, *, depth: int, growth: int) -> None:
        super().__init__()
        layers = (valid_depth(depth) - 4) // 6
        channels = 2 * growth
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for block in range(3):
            if block:
                blocks.append(nn.Sequential(norm_conv(channels, channels // 2, 1), nn.AvgPool2d(2)))
                channels //= 2
            for _ in range(layers):
                blocks.append(DenseLayer(channels, growth))
                channels += growth
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.head = nn.Linear(channels, 10)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


@models.register("densenet_bc_100_12", depth=100, growth=12)
@models.register("densenet_bc")
def densenet_bc(*, depth: Annotated[int, AfterValidator(valid_depth)] = 40, growth: Width = 12) -> nn.Module:
    """DenseNet-BC: 6n + 4 layers, each adding `growth` channels."""
    return DenseNet(depth=depth, growth=growth)
