"""The old name of cifar.flops, for scripts that import it."""

from cifar.flops import *  # noqa: F403
from cifar.flops import measure_cost as measure  # noqa: F401
from cifar.flops import measure_microseconds_per_image as microseconds_per_image  # noqa: F401
