"""How commands speak: tables, spinners, progress bars, and the loud word about stand-in data."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

# Rich wraps tables at 80 columns where there is no terminal; a log or a pipe has no such edge.
console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=not sys.stdout.isatty())
STAND_IN = "STAND-IN DATA: generated images, not CIFAR-10. These accuracies compare with nothing else."


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()) -> None:
    """Print a table; columns named in `right` hold numbers."""
    drawn = Table(
        title=escape(title) or None, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        drawn.add_column(escape(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(_literal(cell) for cell in row))
    console.print(drawn)


def say(text: str = "") -> None:
    """Print text as it is: names of runs may hold what rich takes for markup."""
    console.print(text, markup=False, soft_wrap=True)


def warn_of_stand_in(text: str = STAND_IN) -> None:
    console.print(f" {text} ", style="bold black on yellow", markup=False, soft_wrap=True)


def hush(quiet: bool) -> None:
    """Nothing more is printed here, errors aside: one of several processes speaks for all."""
    console.quiet = quiet


def waiting(text: str) -> Any:
    """A spinner with `text` on a terminal; nothing elsewhere."""
    return console.status(text)


@contextlib.contextmanager
def counting(text: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, which appears with the first call of what is handed out: (done, total)."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _literal(cell: Any) -> str:
    return escape("" if cell is None else str(cell))


def obtain(data_dir: Path | None, mirrors: Sequence[str]) -> Path:
    """CIFAR-10, found or downloaded with a progress bar."""
    from cifar import data

    columns = (TextColumn("CIFAR-10"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("CIFAR-10", total=None)
        return data.obtain(
            data_dir, mirrors=mirrors, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
