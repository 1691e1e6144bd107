"""Old name of `cifar.report.table`, for notebooks."""

from cifar.report.table import Table
from cifar.report.table import runs_table as table

__all__ = ["Table", "table"]
