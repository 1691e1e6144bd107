"""Runs as a table that a notebook shows."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from cifar.errors import UserError
from cifar.report.load import Run, show


class Table(list[dict[str, Any]]):
    """Rows for a notebook: a list of dicts that shows itself as a table."""

    banner = ""

    def _repr_html_(self) -> str:
        columns = list(dict.fromkeys(key for row in self for key in row))
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(show(row.get(c)))}</td>" for c in columns) + "</tr>" for row in self)
        note = f"<p><strong>{html.escape(self.banner)}</strong></p>" if self.banner else ""
        return f"{note}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_pandas(self) -> Any:
        """A pandas DataFrame. Raises UserError where pandas is not installed."""
        try:
            import pandas  # type: ignore[import-untyped, unused-ignore]
        except ImportError:
            raise UserError("pandas is not installed; `pip install pandas`, or use the rows as they are") from None
        return pandas.DataFrame(list(self))


def table(runs: Iterable[Run]) -> Table:
    """One row a run, for notebooks. Accuracies are fractions, `macs` per image."""
    runs = list(runs)
    swept = dict.fromkeys(key for run in runs for key in run.swept if key != "model")
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
            "dataset": run.banner or run.dataset,
        }
        for run in runs
    )
    rows.banner = next((run.banner for run in runs if run.banner), "")
    return rows
