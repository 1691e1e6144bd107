"""What commands print: text, tables, JSON documents, spinners, progress bars, and the warning of stand-in data."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment, Segments

from cifar.errors import name_program
from cifar.system.names import escape_controls, escape_in_json
from cifar.system.redact import mask_secrets, redact
from cifar.system.terminal import Column, fit_table, format_shared, wrap_text

# Rich wraps tables at 80 columns where there is no terminal; a log or a pipe has no such edge.
console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=not sys.stdout.isatty())
STAND_IN_WARNING = "STAND-IN DATA: generated images, not CIFAR-10. These accuracies compare with nothing else."


def print_table(title: str, columns: Sequence[str | Column], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table that fits the terminal; in a pipe it is whole. What does not stand in it is said below."""
    described = [Column(column) if isinstance(column, str) else column for column in columns]
    table = fit_table(described, rows, console.width if console.is_terminal else None)
    if title:
        console.print(clean_text(title), style="italic", markup=False)
    console.print(table.header, style="bold", markup=False, soft_wrap=True)
    if len(table.lines) > 1:  # at once and as they are: rich takes a tenth of a millisecond for each call, and time to wrap
        text = "\n".join(table.lines[1:]).expandtabs()
        console.print(Segments([Segment(text), Segment.line()]), crop=False, soft_wrap=True)
    if table.shared:
        console.print(format_shared(table.shared), markup=False)
    if table.dropped:
        console.print(f"no room for: {', '.join(table.dropped)}", style="dim", markup=False)


def clean_text(text: str) -> str:
    """Text as it may be printed: without secrets, and without what a terminal would obey. Lines stay."""
    return escape_controls(redact(text), keeps_lines=True)


def echo(text: str = "") -> None:
    """Print text as it is: names of runs may hold what rich takes for markup."""
    console.print(clean_text(name_program(text)), markup=False, soft_wrap=True)


def print_sentence(text: str) -> None:
    """Print text that is wrapped at words where the terminal is narrow. What has to be copied in one piece is for `echo`."""
    text = clean_text(name_program(text))
    lines = wrap_text(text, console.width, breaks_words=False) if console.is_terminal else [text]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def redirect_messages(is_redirected: bool) -> contextlib.AbstractContextManager[object]:
    """While this is open, all output but `print_json` goes to stderr, if `is_redirected`: stdout is for one document."""
    return contextlib.redirect_stdout(sys.stderr) if is_redirected else contextlib.nullcontext()


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one document of a command with --json. Paths become text; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_to_json(mask_secrets(document, mask_keys=False)), indent=2, ensure_ascii=False, allow_nan=False)
    print(escape_in_json(text))


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def warn_of_stand_in(text: str = STAND_IN_WARNING) -> None:
    console.print(f" {text} ", style="bold black on yellow", markup=False, soft_wrap=not console.is_terminal)


def warn(text: str) -> None:
    """Print a warning to stderr: stdout may be read by a program."""
    if not console.quiet:
        print(f"warning: {name_program(text)}", file=sys.stderr)


def set_quiet(quiet: bool) -> None:
    """Print nothing more in this process but errors: of several ranks, only one prints."""
    console.quiet = quiet


def spinner(text: str) -> Any:
    """A spinner with `text` on a terminal; nothing elsewhere."""
    return console.status(text)


@contextlib.contextmanager
def progress_bar(text: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal. It appears with the first call of the function that it yields: (done, total)."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(text, total=None, visible=False)

    def show(done: int, total: int) -> None:
        bar.start()  # not before: its thread would keep a report from using other cores
        bar.update(task, completed=done, total=total, visible=True)

    try:
        yield show
    finally:
        bar.stop()


def ensure_dataset(data_dir: Path | None, mirrors: Sequence[str]) -> Path:
    """Find CIFAR-10, or download it with a progress bar -> where it is."""
    from cifar import data

    columns = (TextColumn("CIFAR-10"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("CIFAR-10", total=None)
        return data.find_or_download(
            data_dir, mirrors=mirrors, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
