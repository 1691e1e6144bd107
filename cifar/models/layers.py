"""The old name of blocks.py, for plug-ins that import it. It registers nothing."""

from cifar.models.blocks import (  # noqa: F401
    Depth,
    Dropout,
    Multiplier,
    Width,
    conv_norm,
    he_init_,
)
from cifar.models.blocks import make_depth_check as depth_rule  # noqa: F401
