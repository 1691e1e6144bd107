"""ResNet of bottleneck blocks in its CIFAR form: ResNet-164 and SE-ResNet-164.

9n + 2 layers (He et al. 2016, arXiv:1603.05027, table 1): three stages of n blocks at 32, 16 and 8 pixels. A block is a 1x1
convolution to the stage's width (16, 32, 64), a 3x3 convolution that may halve the side, and a 1x1 convolution to 4 times the
width. As in the original ResNet, the last ReLU comes after the addition, and a projection stands where the shape changes: the
networks that osmr/imgclsmob measured (96.32 % and, with squeeze-and-excitation, 96.61 %). Initialisation: He et al. 2015.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor, nn

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

EXPANSION = 4  # a block's outputs, in widths
valid_depth = make_depth_check("bottleneck_resnet", 9, 2)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, and a shortcut around them."""

    def __init__(self, inputs: int, width: int, stride: int, se: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.reduce = conv_norm(inputs, width, 1)
        self.conv = conv_norm(width, width, stride=stride)
        self.expand = conv_norm(width, outputs, 1, activation=None)
        self.se = SqueezeExcitation(outputs, se) if se else None
        self.drop_path: nn.Module | None = None
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride=stride, activation=None)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.expand(self.conv(self.reduce(x)))
        branch = branch if self.se is None else self.se(branch)
        branch = branch if self.drop_path is None else self.drop_path(branch)
        return self.relu(branch + self.shortcut(x))


class BottleneckResNet(nn.Module):
    def __init__(self, *, depth: int, width: int, drop_path: float, se: int) -> None:
        super().__init__()
        blocks = (valid_depth(depth) - 2) // 9
        self.stem = conv_norm(3, width)
        stages: list[Bottleneck] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stages.append(Bottleneck(channels, width * 2**stage, 2 if stage and not block else 1, se))
                stages[-1].drop_path = make_drop_path(drop_path, len(stages) - 1, 3 * blocks)
                channels = EXPANSION * width * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, 10)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (B, 3, 32, 32) -> (B, 16 width, 8, 8)
        return self.head(x.mean((2, 3)))


@models.register("resnet164", depth=164)
@models.register("se_resnet164", depth=164, se=16)
@models.register("bottleneck_resnet")
def bottleneck_resnet(
    *,
    depth: Annotated[int, AfterValidator(valid_depth)] = 29,
    width: Width = 16,
    drop_path: DropRate = 0.0,
    se: Squeeze = 0,
) -> nn.Module:
    """ResNet of bottleneck blocks: 9n + 2 layers, outputs of 4 to 16 width channels."""
    return BottleneckResNet(depth=depth, width=width, drop_path=drop_path, se=se)
