"""MobileNetV2 for 32x32 images.

Sandler et al. 2018 (arXiv:1801.04381), table 2: inverted residuals with linear bottlenecks, ReLU6. For CIFAR the stem and
the second stage keep their side, so that the last maps are 4x4. Channels are rounded to multiples of 8, as
the authors' code does. Initialisation: He et al. 2015; N(0, 0.01) for the head.
"""

from __future__ import annotations

from torch import Tensor, nn

from cifar.models.blocks import Dropout, Multiplier, conv_norm, he_init_, round_channels
from cifar.registry import models

# expansion, channels, blocks, first stride: table 2 with CIFAR's strides
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_norm(inputs, hidden, 1, activation=nn.ReLU6) if expansion != 1 else nn.Identity()
        self.depthwise = conv_norm(hidden, hidden, stride=stride, groups=hidden, activation=nn.ReLU6)
        self.project = conv_norm(hidden, outputs, 1, activation=None)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    def __init__(self, *, width_multiplier: float, dropout: float) -> None:
        super().__init__()
        channels = round_channels(32 * width_multiplier)
        last = round_channels(1280 * max(1.0, width_multiplier))  # sec. 6.1: multipliers below one leave the last layer alone
        self.stem = conv_norm(3, channels, activation=nn.ReLU6)
        blocks: list[nn.Module] = []
        for expansion, base, count, first_stride in STAGES:
            outputs = round_channels(base * width_multiplier)
            for block in range(count):
                blocks.append(InvertedResidual(channels, outputs, 1 if block else first_stride, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_norm(channels, last, 1, activation=nn.ReLU6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, 10)
        he_init_(self)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))  # (B, 3, 32, 32) -> (B, 1280, 4, 4)
        return self.head(self.dropout(x.mean((2, 3))))


@models.register("mobilenet_v2_x0_5", width_multiplier=0.5)
@models.register("mobilenet_v2_x1_4", width_multiplier=1.4)
@models.register("mobilenet_v2")
def mobilenet_v2(*, width_multiplier: Multiplier = 1.0, dropout: Dropout = 0.2) -> nn.Module:
    """MobileNetV2 with CIFAR's strides."""
    return MobileNetV2(width_multiplier=width_multiplier, dropout=dropout)
