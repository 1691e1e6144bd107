"""Where a run's progress goes while it trains: sinks. The record on disk is always one; a terminal may be another."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

REFRESH_SECONDS = 0.1  # between two looks of a progress bar


class Sink:
    """Hears of a run; does nothing unless it wants to."""

    def start(self, run: Mapping[str, Any], *, epochs: int, steps: int) -> None:
        """`run` is run.json; `steps` a epoch."""

    def say(self, text: str) -> None:
        """Something to know about this run."""

    def step(self, epoch: int, step: int) -> None:
        """After a training step; called often, so it has to be quick."""

    def row(self, row: Mapping[str, Any]) -> None:
        """An epoch's metrics, already on disk."""

    def end(self, state: str, reason: str, summary: Mapping[str, Any]) -> None:
        """The last word."""

    def close(self) -> None:
        """Nothing more comes, whether there was an end or not."""


def line(row: Mapping[str, Any], epochs: int) -> str:
    """An epoch in one line; accuracies in percent."""
    parts = [f"epoch {row['epoch']:>3}/{epochs}"]
    for split in ("train", "val"):
        if f"{split}/acc" in row:
            parts.append(f"{split} {100 * row[f'{split}/acc']:5.2f} % (loss {row[f'{split}/loss']:.3f})")
    parts += [f"lr {row['train/lr']:.2g}", f"{row['system/seconds']:.1f} s", f"{row['system/images_per_second']:,.0f} images/s"]
    return "  ".join(parts)


class Lines(Sink):
    """A line an epoch, for logs and pipes."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout

    def start(self, run: Mapping[str, Any], *, epochs: int, steps: int) -> None:
        self.epochs = epochs

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def row(self, row: Mapping[str, Any]) -> None:
        print(line(row, self.epochs), file=self.out, flush=True)


class Terminal(Sink):
    """A progress bar within the epoch and a line after it."""

    def start(self, run: Mapping[str, Any], *, epochs: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.epochs, self.steps, self.shown = epochs, steps, 0.0
        columns = (
            TextColumn("{task.description}", markup=False),  # a name is anybody's text
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, transient=True)
        self.task = self.progress.add_task(str(run["name"]), total=epochs * steps, visible=True)
        self.progress.start()

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False)

    def step(self, epoch: int, step: int) -> None:
        if step < self.steps and time.monotonic() < self.shown + REFRESH_SECONDS:
            return  # drawing costs more than a step of a small network
        self.shown = time.monotonic()
        self.progress.update(self.task, completed=(epoch - 1) * self.steps + step, description=f"epoch {epoch}/{self.epochs}")

    def row(self, row: Mapping[str, Any]) -> None:
        self.progress.console.print(line(row, self.epochs), highlight=False, markup=False)

    def end(self, state: str, reason: str, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        if progress := getattr(self, "progress", None):  # a run may end before it starts
            progress.stop()
