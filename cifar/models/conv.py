"""Small convolutional networks with BatchNorm that learn in an epoch or two on a CPU: the bottom of the MACs axis.

Not from a paper. Pooling comes before normalisation, as in the fast networks of Jordan 2024 (arXiv:2404.00498), because
on a CPU the element-wise work on large maps costs more than the multiplications. Initialisation: He et al. 2015.
For depth d and width w: 27,648 w + (9,216 + 4,608 (d - 1)) w^2 + 40 w MACs.
"""

from __future__ import annotations

from torch import Tensor, nn

from cifar.models.blocks import Depth, Width, conv_norm, he_init_
from cifar.registry import models


class PooledConv(nn.Module):
    """3x3 convolution, 2x2 max-pooling, BatchNorm, ReLU: half the side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.pool(self.conv(x))))


class ConvNet(nn.Module):
    def __init__(self, *, width: int, depth: int) -> None:
        super().__init__()
        self.stem = PooledConv(3, width)  # 32 -> 16
        self.stage1 = self._make_stage(width, 2 * width, depth)  # 16 -> 8
        self.stage2 = self._make_stage(2 * width, 4 * width, depth)  # 8 -> 4
        self.head = nn.Linear(4 * width, 10)
        he_init_(self)

    @staticmethod
    def _make_stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
        return nn.Sequential(PooledConv(inputs, outputs), *(conv_norm(outputs, outputs) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        return self.head(x.mean((2, 3)))  # (B, 4 width, 4, 4) -> (B, 10)


@models.register("conv4", width=4, depth=1)
@models.register("conv8", width=8, depth=1)
@models.register("conv16", width=16, depth=1)
@models.register("conv32", width=32, depth=1)
@models.register("conv")
def conv(*, width: Width = 16, depth: Depth = 1) -> nn.Module:
    """Small CPU network: stem and two stages of `depth` 3x3 convolutions, width to 4 width channels."""
    return ConvNet(width=width, depth=depth)
