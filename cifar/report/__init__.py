"""Reports: runs -> a table, figures and a page. Importing this package imports neither torch nor matplotlib."""

from cifar.report.build import ReportResult, draw_pictures, write_report
from cifar.report.table import Table

report, pictures, Result = write_report, draw_pictures, ReportResult  # old names, for notebooks and plug-ins

__all__ = ["ReportResult", "Table", "draw_pictures", "write_report"]
