"""ResNet in its CIFAR form.

He et al. 2016, "Deep residual learning for image recognition" (arXiv:1512.03385), sec. 4.2: 6n + 2 layers, three stages of n
basic blocks with 16, 32 and 64 channels at 32, 16 and 8 pixels. Where the shape changes, `shortcut` is a 1x1 projection with
BatchNorm (option B, what most code bases measure) or zero padding without parameters (option A, what the paper measured).
ResNet-8 is MLPerf Tiny's (Banbury et al. 2021, arXiv:2106.07597) but for BatchNorm in its shortcuts.
SE-ResNet has squeeze-and-excitation at the end of each branch (Hu et al. 2018, arXiv:1709.01507).
Initialisation: He et al. 2015.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from cifar.models.blocks import (
    DropRate,
    Squeeze,
    SqueezeExcitation,
    Width,
    conv_norm,
    he_init_,
    make_depth_check,
    make_drop_path,
)
from cifar.registry import models

Shortcut = Literal["projection", "pad"]
valid_depth = make_depth_check("resnet", 6, 2)


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zeros in the new channels."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut, se: int = 0) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, outputs, stride=stride)
        self.conv2 = conv_norm(outputs, outputs, activation=None)
        self.se = SqueezeExcitation(outputs, se) if se else None
        self.drop_path: nn.Module | None = None
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = shortcut == "projection"
            self.shortcut = (
                conv_norm(inputs, outputs, 1, stride=stride, activation=None)
                if projection
                else PadShortcut(stride, outputs - inputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(self.conv1(x))
        branch = branch if self.se is None else self.se(branch)
        branch = branch if self.drop_path is None else self.drop_path(branch)
        return self.relu(branch + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, *, depth: int, width: int, shortcut: Shortcut, drop_path: float = 0.0, se: int = 0) -> None:
        super().__init__()
        blocks = (valid_depth(depth) - 2) // 6
        self.stem = conv_norm(3, width)
        stages: list[Block] = []
        channels = width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(Block(channels, outputs, stride, shortcut, se))
                stages[-1].drop_path = make_drop_path(drop_path, len(stages) - 1, 3 * blocks)
                channels = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, 10)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (B, 3, 32, 32) -> (B, 4 width, 8, 8)
        return self.head(x.mean((2, 3)))


@models.register("resnet8", depth=8)
@models.register("resnet20", depth=20)
@models.register("resnet32", depth=32)
@models.register("resnet44", depth=44)
@models.register("resnet56", depth=56)
@models.register("resnet110", depth=110)
@models.register("se_resnet20", depth=20, se=16)
@models.register("se_resnet56", depth=56, se=16)
@models.register("se_resnet110", depth=110, se=16)
@models.register("resnet")
def resnet(
    *,
    depth: Annotated[int, AfterValidator(valid_depth)] = 20,
    width: Width = 16,
    shortcut: Shortcut = "projection",
    drop_path: DropRate = 0.0,
    se: Squeeze = 0,
) -> nn.Module:
    """ResNet for CIFAR: 6n + 2 layers, width to 4 width channels."""
    return ResNet(depth=depth, width=width, shortcut=shortcut, drop_path=drop_path, se=se)
