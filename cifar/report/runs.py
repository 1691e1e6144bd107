"""Old names of `cifar.report.load` and `cifar.report.formatting`, for figure plug-ins."""

from cifar.config.recorded import LATER_SETTINGS as LATER
from cifar.report.formatting import format_macs as macs_text
from cifar.report.formatting import format_value as show
from cifar.report.formatting import parse_macs as amount
from cifar.report.formatting import pluralize as count
from cifar.report.load import SPLIT_NAMES as SPLITS
from cifar.report.load import STAND_IN_BANNER as STAND_IN
from cifar.report.load import UNOFFICIAL_BANNER as UNOFFICIAL
from cifar.report.load import ExcludedRun as Apart
from cifar.report.load import Run
from cifar.report.load import RunCollection as Collection
from cifar.report.load import collect_runs as collect
from cifar.report.load import find_newest_sweep as newest_sweep
from cifar.report.load import find_sweep_id as sweep_of
from cifar.report.load import load_run as load
from cifar.report.load import training_caveats as cuts

__all__ = [
    "LATER", "SPLITS", "STAND_IN", "UNOFFICIAL", "Apart", "Collection", "Run", "amount", "collect", "count", "cuts", "load",
    "macs_text", "newest_sweep", "seconds_text", "show", "sweep_of",
]  # fmt: skip


def seconds_text(seconds: float | None) -> str:
    """Whole seconds, below ten with a decimal; without a unit."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:,.0f}"
