"""What several families share: convolution + BatchNorm, squeeze-and-excitation, stochastic depth, He initialisation, types."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cifar.errors import UserError

Width = Annotated[int, Field(ge=1)]
Depth = Annotated[int, Field(ge=1)]
Multiplier = Annotated[float, Field(gt=0.0)]
Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]
DropRate = Annotated[float, Field(ge=0.0, lt=1.0)]  # of stochastic depth, in the last block
Squeeze = Annotated[int, Field(ge=0)]  # by which squeeze-and-excitation divides the channels; 0: none


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, and never more than 10 % below: the rule of MobileNet's and EfficientNet's authors."""
    near = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * channels else near


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


class SqueezeExcitation(nn.Module):
    """Each channel times a number in (0, 1) that is computed from the means of all channels.

    Hu et al. 2018 (arXiv:1709.01507), fig. 3: two linear layers, ReLU and sigmoid. Between them are `channels` divided by
    `reduction`, or `inner` channels. Later networks take another `activation` or `gate`.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        inner: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
        gate: Callable[[Tensor], Tensor] = torch.sigmoid,
    ) -> None:
        super().__init__()
        inner = max(1, channels // reduction) if inner is None else inner
        self.squeeze, self.excite = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.activation, self.gate = activation, gate

    def forward(self, x: Tensor) -> Tensor:
        factors = self.gate(self.excite(self.activation(self.squeeze(x.mean((2, 3))))))  # (B, C, H, W) -> (B, C)
        return x * factors.to(x.dtype)[:, :, None, None]


class DropPath(nn.Module):
    """Stochastic depth of a residual branch: in training an image's branch is 0 at `rate`, else divided by 1 - rate.

    Huang et al. 2016 (arXiv:1603.09382), with the scale in training as in torchvision's `StochasticDepth`. `scales` (B,) has
    the factors of this step's images, drawn ahead with the epoch's plan. Where there are none for so many images, they are
    drawn now.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.scales: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        scales = self.scales
        if scales is None or len(scales) != len(x):
            scales = (torch.rand(len(x), device=x.device) >= self.rate) / (1 - self.rate)
        return (x * scales.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def make_drop_path(last: float, block: int, num_blocks: int) -> DropPath | None:
    """Of block 0 to num_blocks - 1, by the paper's linear rule: the last one drops at the rate `last`. None for 0."""
    return DropPath(last * (block + 1) / num_blocks) if last else None


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
