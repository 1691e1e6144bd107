"""VGG with BatchNorm for 32x32 images.

Simonyan and Zisserman 2015 (arXiv:1409.1556), table 1: configurations A, B, D and E. For CIFAR the two hidden linear layers
shrink to 8 width with dropout (Liu and Deng 2015, "Very deep convolutional neural network based image classification
using small training sample size"); BatchNorm after every convolution. Initialisation: He et al. 2015; N(0, 0.01) for linear.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.models.blocks import Dropout, Width, conv_norm, he_init_
from cifar.registry import models

CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # per stage, table 1
WIDTHS = (1, 2, 4, 8, 8)  # of a stage, in units of the first


def valid_depth(depth: int) -> int:
    """One of the paper's, or UserError."""
    if depth not in CONVOLUTIONS:
        raise UserError(f"depth = {depth}: vgg has depths {', '.join(map(str, CONVOLUTIONS))}; choose one")
    return depth


class VGG(nn.Module):
    def __init__(self, *, depth: int, width: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for count, factor in zip(CONVOLUTIONS[valid_depth(depth)], WIDTHS, strict=True):
            for _ in range(count):
                layers.append(conv_norm(channels, factor * width))
                channels = factor * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)  # (B, 3, 32, 32) -> (B, 8 width, 1, 1)
        hidden = 8 * width
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 10),
        )
        he_init_(self)
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)  # sec. 3.1

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


@models.register("vgg11", depth=11)
@models.register("vgg13", depth=13)
@models.register("vgg16", depth=16)
@models.register("vgg19", depth=19)
@models.register("vgg")
def vgg(*, depth: Annotated[int, AfterValidator(valid_depth)] = 11, width: Width = 64, dropout: Dropout = 0.5) -> nn.Module:
    """VGG-BN: five stages of 3x3 convolutions, width to 8 width channels, two hidden linear layers."""
    return VGG(depth=depth, width=width, dropout=dropout)
