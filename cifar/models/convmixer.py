"""ConvMixer.

Trockman and Kolter 2022, "Patches are all you need?" (arXiv:2201.09792): patch embedding, then `depth` times a residual
depthwise convolution and a pointwise one, each followed by GELU and BatchNorm. ConvMixer-256/8 with patches of 2 and
kernels of 5 is the small CIFAR-10 form of its appendix. Initialisation: PyTorch's default, as the authors'.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.models.blocks import Depth, Width
from cifar.registry import models


def valid_kernel(kernel_size: int) -> int:
    """A positive odd number, or UserError: an even kernel would shift the maps."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size = {kernel_size}: convmixer has odd kernels; choose one of 3, 5, 7, 9, ...")
    return kernel_size


def conv_gelu_norm(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = 0 if stride > 1 else kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)
    return nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(outputs))


class Mixer(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = conv_gelu_norm(width, width, kernel, groups=width)
        self.pointwise = conv_gelu_norm(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(x + self.depthwise(x))


class ConvMixer(nn.Module):
    def __init__(self, *, width: int, depth: int, patch_size: int, kernel_size: int) -> None:
        super().__init__()
        self.stem = conv_gelu_norm(3, width, patch_size, stride=patch_size)  # 32 -> 32 / patch_size
        self.blocks = nn.Sequential(*(Mixer(width, valid_kernel(kernel_size)) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@models.register("convmixer_256_8", width=256, depth=8, patch_size=2, kernel_size=5)
@models.register("convmixer")
def convmixer(
    *,
    width: Width = 128,
    depth: Depth = 4,
    patch_size: Annotated[int, Field(ge=1, le=16)] = 2,
    kernel_size: Annotated[int, AfterValidator(valid_kernel)] = 5,
) -> nn.Module:
    """ConvMixer: patches, then depthwise and pointwise convolutions at one resolution."""
    return ConvMixer(width=width, depth=depth, patch_size=patch_size, kernel_size=kernel_size)
