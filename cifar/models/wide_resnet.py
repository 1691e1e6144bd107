"""Wide ResNet.

Zagoruyko and Komodakis 2016 (arXiv:1605.07146): pre-activation blocks, depth 6n + 4, a stem of 16 channels and three stages
of 16k, 32k and 64k. `width` is the first stage's channels: WRN-28-10 is depth 28, width 160. Dropout, if any, lies
between a block's convolutions (sec. 2.4). Initialisation: He et al. 2015.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from torch import nn

from cifar.models.blocks import Dropout, DropRate, Squeeze, Width, make_depth_check
from cifar.models.preact_resnet import PreActResNet
from cifar.registry import models

valid_depth = make_depth_check("wrn", 6, 4)


@models.register("wrn_16_4", depth=16, width=64)
@models.register("wrn_28_10", depth=28, width=160)
@models.register("wrn")
def wrn(
    *,
    depth: Annotated[int, AfterValidator(valid_depth)] = 16,
    width: Width = 64,
    dropout: Dropout = 0.0,
    drop_path: DropRate = 0.0,
    se: Squeeze = 0,
) -> nn.Module:
    """Wide ResNet: 6n + 4 layers, width to 4 width channels."""
    blocks, widths = (valid_depth(depth) - 4) // 6, (width, 2 * width, 4 * width)
    return PreActResNet(stem=16, widths=widths, blocks=blocks, dropout=dropout, drop_path=drop_path, se=se)
