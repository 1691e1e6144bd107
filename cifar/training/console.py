"""What a run writes into its output.log: its epochs, its end, a traceback, and what its code prints meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cifar.config.schema import Settings
from cifar.system.durations import format_duration
from cifar.system.redacted_streams import flush_output, listen_to_output
from cifar.system.terminal_lines import TerminalLines
from cifar.tracking.console_log import ConsoleLog
from cifar.tracking.run_dir import RunDir
from cifar.training.callbacks import RunCallback, format_epoch_line


class RunConsole(RunCallback):
    """The output.log of one run, as a callback of it. `write_end` closes it, before the run's status says that it has ended."""

    def __init__(self, config: Settings, run_dir: RunDir, pack_size: int) -> None:
        self.log, self._run_dir, self._epochs, self._pack_size = ConsoleLog(run_dir), run_dir, config.epochs, pack_size
        self.finish_lines: Callable[[], None] = lambda: None  # writes the lines that were printed without an end

    def on_run_start(self, run: Mapping[str, Any], *, epochs: int, steps: int) -> None:
        cost = run.get("cost") or {}
        name = f"{self._run_dir.id}: {run.get('name', '')}"
        if self.log.has_lines:
            epoch = self._run_dir.read_json("status").get("epoch", 0)
            self.log.write_lines(f"-- run {name} goes on after epoch {epoch}, in process {os.getpid()} --")
        else:
            self.log.write_lines(f"run {name}, {cost.get('macs', 0) / 1e6:.2f} MMACs, {cost.get('params', 0):,} parameters")
        if self._pack_size > 1:
            self.log.write_lines(
                f"-- {self._pack_size - 1} other run(s) trained side by side with this one, in the same process: "
                "what their code prints stands here too --"
            )

    def on_message(self, text: str) -> None:
        self.log.write_lines(text)

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        self.log.write_lines(format_epoch_line(row, self._epochs))

    def write_end(self, state: str, reason: str, summary: Mapping[str, Any]) -> None:
        """The last line of this attempt."""
        self.finish_lines()
        self.log.write_lines(describe_end(state, reason, summary))
        self.log.close()


def describe_end(state: str, reason: str, summary: Mapping[str, Any]) -> str:
    """How a run ended, in one line: its accuracies, or why."""
    if state != "finished" or not summary:
        return f"{state}: {reason}" if reason else state
    scores = [
        f"{key.split('/')[0]} {100 * summary[key]:.2f} %" for key in ("train/acc", "val/acc", "test/acc") if key in summary
    ]
    time = format_duration(summary["seconds"])
    return f"finished: {', '.join(scores)} after {summary['epochs']} epochs, {time} of training"


_active: list[RunConsole] = []  # of the runs that this process trains now


def write_foreign_output(lines: list[str]) -> None:
    """Add what was printed past Python's streams in this process, and was found by another one."""
    for console in list(_active):
        console.log.write_output(lines)


@contextlib.contextmanager
def record_output(consoles: Sequence[RunConsole]) -> Iterator[None]:
    """While this is open, what this process prints goes into the logs of these runs too."""
    streams = {"stdout": TerminalLines(), "stderr": TerminalLines()}

    def write_all(lines: list[str]) -> None:
        if lines:
            for console in consoles:
                console.log.write_output(lines)

    def finish_lines() -> None:
        flush_output()
        for stream in streams.values():
            write_all(stream.finish())

    for console in consoles:
        console.finish_lines = finish_lines
    _active.extend(consoles)
    try:
        with listen_to_output(lambda name, text: write_all(streams[name].push(text))):
            yield
    finally:
        finish_lines()
        for console in consoles:
            _active.remove(console)
            console.log.close()
