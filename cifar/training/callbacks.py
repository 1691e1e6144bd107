"""Callbacks: they are told about a run while it trains. The two here print its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from cifar.system.durations import format_duration
from cifar.system.names import escape_controls
from cifar.system.redacted_streams import hide_from_listeners
from cifar.system.terminal import shorten_text

REFRESH_SECONDS = 0.1  # between two updates of a progress bar


class RunCallback:
    """Is told about a run. Every method does nothing unless a subclass overrides it."""

    def on_run_start(self, run: Mapping[str, Any], *, epochs: int, steps: int) -> None:
        """`run` is the content of run.json, `steps` the number of steps per epoch."""

    def on_message(self, text: str) -> None:
        """A sentence about this run, for the user."""

    def on_step_end(self, epoch: int, step: int) -> None:
        """Called after every training step, so it has to be fast. `step` counts from 1."""

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Called with an epoch's metrics, once they are on disk."""

    def on_run_end(self, state: str, reason: str, summary: Mapping[str, Any]) -> None:
        """Called when the run has ended in `state`."""

    def close(self) -> None:
        """Called last, also after an exception."""


def format_epoch_line(row: Mapping[str, Any], epochs: int, width: int | None = None) -> str:
    """An epoch in one line, accuracies in percent. Where the terminal is narrower, its end is left out."""
    parts = [f"epoch {row['epoch']:>3}/{epochs}"]
    for split in ("train", "val"):
        if f"{split}/acc" in row:
            parts.append(f"{split} {100 * row[f'{split}/acc']:5.2f} % (loss {row[f'{split}/loss']:.3f})")
    num_always = len(parts)
    parts += [
        f"lr {row['train/lr']:.2g}",
        format_duration(row["system/seconds"]),
        f"{row['system/images_per_second']:,.0f} images/s",
    ]
    while width is not None and len(parts) > num_always and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def format_scores(row: Mapping[str, Any]) -> str:
    """Training loss and validation accuracy of an epoch, for the progress bar. Without validation, training accuracy."""
    split = "val" if "val/acc" in row else "train"
    return f"  loss {row['train/loss']:.3f}  {split} {100 * row[f'{split}/acc']:.2f} %"


class LineCallback(RunCallback):
    """Prints a line for each epoch. For logs and pipes. prefix: of each line of an epoch."""

    def __init__(self, out: TextIO | None = None, prefix: str = "") -> None:
        self.out, self.prefix = out or sys.stdout, prefix

    def on_run_start(self, run: Mapping[str, Any], *, epochs: int, steps: int) -> None:
        self.epochs = epochs

    def on_message(self, text: str) -> None:
        self._print_line(escape_controls(text, keeps_lines=True))

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        self._print_line(self.prefix + format_epoch_line(row, self.epochs))

    def _print_line(self, text: str) -> None:
        with hide_from_listeners():  # the run writes these lines into its output.log itself
            print(text, file=self.out, flush=True)


class ProgressBarCallback(RunCallback):
    """Shows a progress bar, and prints a line for each epoch. For terminals."""

    def on_run_start(self, run: Mapping[str, Any], *, epochs: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.epochs, self.steps, self.shown, self.scores = epochs, steps, 0.0, ""
        columns = (
            TextColumn("{task.description}", markup=False),  # a user's name may contain brackets
            BarColumn(bar_width=None),  # as wide as the rest leaves room for
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, transient=True, expand=True)
        self.task = self.progress.add_task(shorten_text(str(run["name"]), 30), total=epochs * steps, visible=True)
        self.progress.start()

    def on_message(self, text: str) -> None:
        self._print_line(escape_controls(text, keeps_lines=True))

    def on_step_end(self, epoch: int, step: int) -> None:
        if step < self.steps and time.monotonic() < self.shown + REFRESH_SECONDS:
            return  # drawing costs more than a step of a small network
        self.shown = time.monotonic()
        description = f"epoch {epoch}/{self.epochs}{self.scores}"
        self.progress.update(self.task, completed=(epoch - 1) * self.steps + step, description=description)

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        self.scores = format_scores(row)
        self._print_line(format_epoch_line(row, self.epochs, self.progress.console.width))

    def _print_line(self, text: str) -> None:
        with hide_from_listeners():  # as above
            self.progress.console.print(text, highlight=False, markup=False)

    def on_run_end(self, state: str, reason: str, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        if progress := getattr(self, "progress", None):  # a run may end before it starts
            progress.stop()
