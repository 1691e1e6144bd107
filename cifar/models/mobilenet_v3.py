"""MobileNetV3 for 32x32 images.

Howard et al. 2019 (arXiv:1905.02244), tables 1 and 2: inverted residuals with squeeze-and-excitation and hard swish. For CIFAR
the stem and the first block with a stride keep their side, as in our MobileNetV2, so that the last maps are 4x4. Channels are
rounded to multiples of 8, as the authors' code does. BatchNorm is PyTorch's; the paper's averages statistics ten times as long.
Initialisation: He et al. 2015; N(0, 0.01) for the last two layers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from cifar.models.blocks import (
    Dropout,
    DropRate,
    Multiplier,
    SqueezeExcitation,
    conv_norm,
    he_init_,
    make_drop_path,
    round_channels,
)
from cifar.registry import models

Size = Literal["large", "small"]
EARLY = 0  # the stride of the stem and of the first block with one: 2 in the paper, 1 here


class Row(NamedTuple):
    """A block of the paper's tables."""

    kernel: int
    expansion: int  # channels of the depthwise convolution
    outputs: int
    se: bool
    swish: bool
    stride: int


TABLES = {
    "large": (  # table 1
        Row(3, 16, 16, False, False, 1),
        Row(3, 64, 24, False, False, EARLY),
        Row(3, 72, 24, False, False, 1),
        Row(5, 72, 40, True, False, 2),
        Row(5, 120, 40, True, False, 1),
        Row(5, 120, 40, True, False, 1),
        Row(3, 240, 80, False, True, 2),
        Row(3, 200, 80, False, True, 1),
        Row(3, 184, 80, False, True, 1),
        Row(3, 184, 80, False, True, 1),
        Row(3, 480, 112, True, True, 1),
        Row(3, 672, 112, True, True, 1),
        Row(5, 672, 160, True, True, 2),
        Row(5, 960, 160, True, True, 1),
        Row(5, 960, 160, True, True, 1),
    ),
    "small": (  # table 2
        Row(3, 16, 16, True, False, EARLY),
        Row(3, 72, 24, False, False, 2),
        Row(3, 88, 24, False, False, 1),
        Row(5, 96, 40, True, True, 2),
        Row(5, 240, 40, True, True, 1),
        Row(5, 240, 40, True, True, 1),
        Row(5, 120, 48, True, True, 1),
        Row(5, 144, 48, True, True, 1),
        Row(5, 288, 96, True, True, 2),
        Row(5, 576, 96, True, True, 1),
        Row(5, 576, 96, True, True, 1),
    ),
}
LAST_CHANNELS = {"large": 1280, "small": 1024}


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, row: Row) -> None:
        super().__init__()
        hidden, outputs = row.expansion, row.outputs
        activation = nn.Hardswish if row.swish else nn.ReLU
        self.expand = conv_norm(inputs, hidden, 1, activation=activation) if hidden != inputs else nn.Identity()
        self.depthwise = conv_norm(hidden, hidden, row.kernel, stride=row.stride, groups=hidden, activation=activation)
        inner = round_channels(hidden // 4)  # sec. 5.3
        self.se = SqueezeExcitation(hidden, inner=inner, gate=F.hardsigmoid) if row.se else nn.Identity()
        self.project = conv_norm(hidden, outputs, 1, activation=None)
        self.residual = row.stride == 1 and inputs == outputs
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        if not self.residual:
            return out
        return x + (out if self.drop_path is None else self.drop_path(out))


class MobileNetV3(nn.Module):
    """`early_stride` 2 gives the paper's network for 224x224 images."""

    def __init__(self, *, size: Size, width_multiplier: float, dropout: float, drop_path: float, early_stride: int = 1) -> None:
        super().__init__()
        channels = round_channels(16 * width_multiplier)
        self.stem = conv_norm(3, channels, stride=early_stride, activation=nn.Hardswish)
        blocks: list[InvertedResidual] = []
        for row in TABLES[size]:
            row = row._replace(
                expansion=round_channels(row.expansion * width_multiplier),
                outputs=round_channels(row.outputs * width_multiplier),
                stride=early_stride if row.stride == EARLY else row.stride,
            )
            blocks.append(InvertedResidual(channels, row))
            if blocks[-1].residual:
                blocks[-1].drop_path = make_drop_path(drop_path, len(blocks) - 1, len(TABLES[size]))
            channels = row.outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_norm(channels, 6 * channels, 1, activation=nn.Hardswish)
        self.hidden = nn.Linear(6 * channels, round_channels(LAST_CHANNELS[size] * width_multiplier))
        self.activation, self.dropout = nn.Hardswish(), nn.Dropout(dropout)
        self.head = nn.Linear(self.hidden.out_features, 10)
        he_init_(self)
        nn.init.normal_(self.hidden.weight, std=0.01)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))  # (B, 3, 32, 32) -> (B, 960 or 576, 4, 4)
        return self.head(self.dropout(self.activation(self.hidden(x.mean((2, 3))))))


@models.register("mobilenet_v3_small", size="small")
@models.register("mobilenet_v3_large", size="large")
@models.register("mobilenet_v3")
def mobilenet_v3(
    *, size: Size = "small", width_multiplier: Multiplier = 1.0, dropout: Dropout = 0.2, drop_path: DropRate = 0.0
) -> nn.Module:
    """MobileNetV3 with CIFAR's strides."""
    return MobileNetV3(size=size, width_multiplier=width_multiplier, dropout=dropout, drop_path=drop_path)
