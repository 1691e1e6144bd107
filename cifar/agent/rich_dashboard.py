"""A sweep's board in the terminal: a table that is redrawn in place."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cifar.agent.dashboard import Board, Display, Lines, Row, shown

SHOWN = 12  # ended trials; the running ones are always there
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "killed": "red", "diverged": "yellow", "pruned": "yellow"}


def display(console: Console) -> Display:
    """The live table on a terminal, plain lines elsewhere."""
    return LiveTable(console) if console.is_terminal else Lines()


class LiveTable:
    """Redraws at most four times a second; news other than of epochs scroll above it."""

    def __init__(self, console: Console) -> None:
        self.live = Live(console=console, auto_refresh=False, transient=False)
        self.live.start()
        self.last = 0.0
        self.board: Board | None = None

    def say(self, text: str) -> None:
        if " epoch " not in text:  # the table has it
            self.live.console.print(escape(text), highlight=False)

    def show(self, board: Board) -> None:
        self.board = board
        if time.monotonic() - self.last > 0.25:
            self.last = time.monotonic()
            self.live.update(draw(board), refresh=True)

    def end(self) -> None:
        if self.board:
            self.live.update(draw(self.board), refresh=True)
        self.live.stop()


def draw(board: Board) -> Table:
    """The board as a table: running trials, the latest ended ones, and the whole in the caption."""
    table = Table(title=escape(board.title), title_justify="left", caption_justify="left", caption=escape(caption(board)))
    for column in ("trial", "values", "state", "progress", "epoch", board.metric, "images/s", "seconds"):
        table.add_column(escape(column), justify="left" if column in ("values", "state", "progress") else "right")
    running = [row for row in board.rows.values() if row.state in ("running", "starting")]
    ended = [row for row in board.rows.values() if row not in running]
    for row in [*ended[-SHOWN:], *running]:
        table.add_row(*_cells(row, board.metric))
    return table


def _cells(row: Row, metric: str) -> tuple[Text | ProgressBar | str, ...]:
    return (
        f"{row.cell:03d}",
        Text(row.name),
        Text(row.state, style=_STYLES.get(row.state, "")),
        ProgressBar(total=1.0, completed=row.fraction, width=16),
        f"{row.epoch}/{row.epochs}" if row.epochs else "",
        "" if row.value is None else shown(row.value, metric),
        f"{row.images_per_second:,.0f}" if row.images_per_second else "",
        f"{row.seconds:.0f}" if row.seconds else "",
    )


def caption(board: Board) -> str:
    """Counts, best so far and time left."""
    parts = [", ".join(f"{n} {state}" for state, n in board.counts.items())]
    if board.best:
        parts.append(f"best {board.best}")
    left = board.seconds_left()
    if left is not None and left > 0:
        parts.append(f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left")
    return "\n".join(parts)
