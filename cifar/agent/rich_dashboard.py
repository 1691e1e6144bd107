"""A sweep's board in the terminal: a table that is redrawn in place and always fits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from cifar.agent.dashboard import Board, Dashboard, LineDashboard, Row, clean_line, format_metric
from cifar.system.durations import format_duration
from cifar.system.names import escape_controls
from cifar.system.terminal import Column, fit_table, shorten_text, text_width, wrap_text

BAR_WIDTH = 12
MESSAGE_LINES = 2  # of the terminal that are left to what is printed above the table
MIN_ROWS = 2  # of the table, however low the terminal is
_BUSY_STATES = ("starting", "running")  # a worker has it
_ROW_STYLES = {"running": "cyan", "failed": "red", "killed": "red", "diverged": "yellow", "pruned": "yellow"}


def make_dashboard(console: Console) -> Dashboard:
    """The live table on a terminal, plain lines elsewhere."""
    return RichDashboard(console) if console.is_terminal else LineDashboard()


class RichDashboard:
    """A table that is redrawn at most four times a second. Lines scroll above it, except those about epochs."""

    def __init__(self, console: Console) -> None:
        self.live = Live(console=console, auto_refresh=False, transient=False, vertical_overflow="crop")
        self.live.start()
        self.last_draw_time = 0.0
        self.board: Board | None = None

    def print_line(self, text: str) -> None:
        self.live.console.print(escape(clean_line(text)), highlight=False)

    def print_epoch_line(self, text: str) -> None:
        pass  # the table shows it

    def show_board(self, board: Board) -> None:
        self.board = board
        if time.monotonic() - self.last_draw_time > 0.25:
            self.last_draw_time = time.monotonic()
            self.live.update(BoardView(board), refresh=True)

    def close(self) -> None:
        if self.board:
            self.live.update(BoardView(self.board, has_footer=False), refresh=True)  # the agent's last words say it
        self.live.stop()


class BoardView:
    """The board, drawn for the terminal as large as it is at that moment."""

    def __init__(self, board: Board, has_footer: bool = True) -> None:
        self.board, self.has_footer = board, has_footer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from draw_board(self.board, options.max_width, options.size.height, self.has_footer)


def draw_board(board: Board, width: int, height: int, has_footer: bool = True) -> list[Text]:
    """The lines of the table: the running trials, then those that ended last, as many as fit; the whole sweep in the footer."""
    footer = format_footer(board, width) if has_footer else []
    room = max(MIN_ROWS, height - MESSAGE_LINES - len(footer) - 2)  # 2: title and header
    running = sorted((row for row in board.rows.values() if row.state in _BUSY_STATES), key=lambda row: row.cell)
    ended = [row for row in reversed(board.rows.values()) if row.state not in _BUSY_STATES]
    rows = [*running, *ended]
    shown, folded = (rows, []) if len(rows) <= room else (rows[: room - 1], rows[room - 1 :])
    keys, common = _split_keys(list(board.rows.values()))
    table = fit_table(_make_columns(keys, board.metric), [_format_row(row, keys, board.metric) for row in shown], width)
    hidden = [key for key in keys if key in table.dropped]
    title = board.title + (f" · all: {common}" if common else "") + (f" · no room for {', '.join(hidden)}" if hidden else "")
    lines = [Text(shorten_text(title, width), style="italic"), Text(shorten_text(table.header, width), style="bold")]
    for row, texts in zip(shown, table.rows, strict=True):
        lines.append(Text(shorten_text(texts[0], width), style=_ROW_STYLES.get(row.state, "")))
    if folded:
        counts = ", ".join(f"{n} {state}" for state, n in Counter(row.state for row in folded).items())
        lines.append(Text(shorten_text(f"and {counts}", width), style="dim"))
    for line in lines:
        line.no_wrap = True
    return [*lines, *(Text(line, no_wrap=True) for line in footer)]


def format_footer(board: Board, width: int) -> list[str]:
    """Counts, time left and the best so far, in at most four lines of the terminal."""
    counts = ", ".join(f"{n} {state}" for state, n in board.counts.items())
    seconds = board.seconds_left()
    time_left = f"about {format_duration(seconds)} left" if seconds is not None and seconds > 0 else ""
    first = " · ".join(part for part in (counts, time_left) if part)
    lines = [first] if text_width(first) <= width else [shorten_text(counts, width), time_left]
    best = wrap_text(f"best {board.best}", width) if board.best else []
    if len(best) > 2:
        best = [best[0], shorten_text(" ".join(best[1:]), width)]
    return [escape_controls(line) for line in (*lines, *best) if line]


def _split_keys(rows: Sequence[Row]) -> tuple[list[str], str]:
    """The swept keys in which these trials differ, and the others in words. One trial differs from none: all of its keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    differing = [key for key in keys if len(rows) < 2 or len({row.values.get(key) for row in rows}) > 1]
    return differing, " ".join(f"{key}={rows[0].values[key]}" for key in keys if key not in differing)


def _make_columns(keys: Sequence[str], metric: str) -> list[Column]:
    values = [Column(key, min_width=6, drop_order=1) for key in keys] or [Column("values", min_width=8)]
    return [
        Column("trial", is_number=True),
        *values,
        Column("state"),
        Column("progress", drop_order=4, is_extra=True),
        Column("epoch", is_number=True),
        Column(metric, is_number=True),
        Column("images/s", is_number=True, drop_order=3, is_extra=True),
        Column("time", is_number=True, drop_order=2),
    ]


def _format_row(row: Row, keys: Sequence[str], metric: str) -> list[str]:
    num_done = round(BAR_WIDTH * row.fraction)
    return [
        f"{row.cell:03d}",
        *([row.values.get(key, "") for key in keys] or [row.name]),
        row.state,
        "━" * num_done + "─" * (BAR_WIDTH - num_done),
        f"{row.epoch}/{row.epochs}" if row.epochs else "",
        "" if row.value is None else format_metric(row.value, metric),
        f"{row.images_per_second:,.0f}" if row.images_per_second else "",
        format_duration(row.seconds) if row.seconds else "",
    ]
