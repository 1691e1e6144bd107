"""What several families share: convolution + BatchNorm, He initialisation, and the types of common keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import nn

from cifar.errors import UserError

Width = Annotated[int, Field(ge=1)]
Depth = Annotated[int, Field(ge=1)]
Multiplier = Annotated[float, Field(gt=0.0)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution without bias (BatchNorm has one), BatchNorm, activation; "same" padding for odd kernels."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs))
    if activation is not None:
        parts["activation"] = activation()
    return nn.Sequential(parts)


def he_init_(model: nn.Module) -> None:
    """He et al. 2015 (arXiv:1502.01852) for convolutions and hidden linear layers' scale; biases start at zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def make_depth_check(family: str, step: int, offset: int) -> Callable[[int], int]:
    """A check that a depth is step * n + offset with n >= 1; it returns the depth or raises UserError."""

    def check_depth(depth: int) -> int:
        if depth < step + offset or (depth - offset) % step:
            known = ", ".join(str(step * n + offset) for n in range(1, 5))
            raise UserError(f"depth = {depth}: {family} has depths {step}n + {offset}; choose one of {known}, ...")
        return depth

    return check_depth
