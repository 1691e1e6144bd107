"""Old names of `cifar.report.load` and `cifar.report.formatting`, for figure plug-ins."""

from cifar.report.formatting import format_macs as macs_text
from cifar.report.formatting import format_value as show
from cifar.report.formatting import pluralize as count
from cifar.report.load import Run
from cifar.report.load import collect_runs as collect
from cifar.report.load import load_run as load

__all__ = ["Run", "collect", "count", "load", "macs_text", "seconds_text", "show"]


def seconds_text(seconds: float | None) -> str:
    """Whole seconds, below ten with a decimal; without a unit."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:,.0f}"
