"""Pre-activation ResNet.

He et al. 2016, "Identity mappings in deep residual networks" (arXiv:1603.05027): BatchNorm and ReLU come before each
convolution and once more before the head; a shortcut that changes shape is a 1x1 convolution of the activated input.
PreActResNet-18 is the four-stage form (64 to 512 channels) with a 3x3 stem for CIFAR. Initialisation: He et al. 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor, nn

from cifar.models.blocks import (
    DropRate,
    Squeeze,
    SqueezeExcitation,
    Width,
    he_init_,
    make_depth_check,
    make_drop_path,
)
from cifar.registry import models

valid_depth = make_depth_check("preact_resnet", 8, 2)


class PreActBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0, se: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.relu = nn.ReLU()
        self.se = SqueezeExcitation(outputs, se) if se else None
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.norm1(x))
        around = x if self.shortcut is None else self.shortcut(active)
        x = self.conv1(active)
        x = self.conv2(self.dropout(self.relu(self.norm2(x))))
        x = x if self.se is None else self.se(x)
        x = x if self.drop_path is None else self.drop_path(x)
        return x + around


class PreActResNet(nn.Module):
    """`blocks` blocks in each stage; the side halves between stages."""

    def __init__(
        self, *, stem: int, widths: Sequence[int], blocks: int, dropout: float = 0.0, drop_path: float = 0.0, se: int = 0
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        stages: list[PreActBlock] = []
        channels = stem
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stages.append(PreActBlock(channels, outputs, 2 if stage and not block else 1, dropout, se))
                stages[-1].drop_path = make_drop_path(drop_path, len(stages) - 1, len(widths) * blocks)
                channels = outputs
        self.blocks = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.head = nn.Linear(channels, 10)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


@models.register("preact_resnet18", depth=18)
@models.register("preact_resnet")
def preact_resnet(
    *,
    depth: Annotated[int, AfterValidator(valid_depth)] = 18,
    width: Width = 64,
    drop_path: DropRate = 0.0,
    se: Squeeze = 0,
) -> nn.Module:
    """Pre-activation ResNet: 8n + 2 layers in four stages, width to 8 width channels."""
    blocks, widths = (valid_depth(depth) - 2) // 8, [width * 2**stage for stage in range(4)]
    return PreActResNet(stem=width, widths=widths, blocks=blocks, drop_path=drop_path, se=se)
