"""The first convolution as a matrix product, for compiled steps on a GPU.

With three input channels cuDNN has no quick kernels (LOG.md: a fifth of a step of the first worksheet's network). As patches
(B * H * W, 3 k k) times filters it is two matrix products, and a compiler makes the patches in one pass over the images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLE = 16  # tensor cores take rows of so many values


class AsProduct(nn.Conv2d):
    """The same convolution; in training mode by a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rows, columns = self.kernel_size
        vertical, horizontal = (int(side) for side in self.padding)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical))  # (B, H, W, C)
        height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1
        patches = [x[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
        inner = rows * columns * self.in_channels
        spare = -inner % MULTIPLE
        if spare:
            patches.append(x.new_zeros(()).expand(x.shape[0], height, width, spare))
        weight = self.weight.permute(2, 3, 1, 0).reshape(inner, self.out_channels)
        y = torch.cat(patches, -1).flatten(0, 2) @ F.pad(weight, (0, 0, 0, spare))  # (B * H * W, O)
        y = y.view(-1, height, width, self.out_channels)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.permute(0, 3, 1, 2)  # (B, O, H, W), channels last


def as_product(model: nn.Module) -> None:
    """Take the first convolution of a model so, if it is a plain one on the images themselves. Weights stay where they are."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or type(first) is not nn.Conv2d or isinstance(first.padding, str):
        return
    plain = first.in_channels == 3 and first.groups == 1 and first.padding_mode == "zeros"
    learns = first.weight.requires_grad  # what is won is the gradient of the filters
    if plain and learns and first.stride == first.dilation == (1, 1):
        first.__class__ = AsProduct
