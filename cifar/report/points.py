"""Old names of `cifar.report.aggregate`, for figure plug-ins."""

from cifar.report.aggregate import Comparison, Point
from cifar.report.aggregate import compare_runs as compare
from cifar.report.aggregate import describe_settings as settings

__all__ = ["Comparison", "Point", "compare", "settings"]
