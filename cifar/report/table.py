"""Runs as a table for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from cifar.errors import UserError
from cifar.report.formatting import format_value
from cifar.report.load import Run


class Table(list[dict[str, Any]]):
    """A list of rows (dicts) that a notebook displays as a table."""

    banner = ""

    def _repr_html_(self) -> str:
        columns = list(dict.fromkeys(key for row in self for key in row))
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(format_value(row.get(c)))}</td>" for c in columns) + "</tr>" for row in self
        )
        note = f"<p><strong>{html.escape(self.banner)}</strong></p>" if self.banner else ""
        return f"{note}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_pandas(self) -> Any:
        """A pandas DataFrame. Raises UserError if pandas is not installed."""
        try:
            import pandas  # type: ignore[import-untyped, unused-ignore]
        except ImportError:
            raise UserError("pandas is not installed; `pip install pandas`, or use the rows as they are") from None
        return pandas.DataFrame(list(self))


def runs_table(runs: Iterable[Run]) -> Table:
    """One row for each run. Accuracies are fractions, `macs` are for one image."""
    runs = list(runs)
    swept = dict.fromkeys(key for run in runs for key in run.swept_keys if key != "model")
    costs = [name for name in ("train_flops", "joules", "latency_seconds") if any(run.cost(name) is not None for run in runs)]
    rows = Table(
        {
            "id": run.id,
            "name": run.name,
            "state": run.state,
            "model": run.model,
            **{key: run.config.get(key) for key in swept},
            "macs": run.macs,
            "params": run.params,
            "verified": run.verified,
            "val/acc": run.accuracy("val"),
            "test/acc": run.accuracy("test"),
            "seconds": run.seconds,
            **{name: run.cost(name) for name in costs},
            "dataset": run.banner or run.dataset,
        }
        for run in runs
    )
    rows.banner = next((run.banner for run in runs if run.banner), "")
    return rows
