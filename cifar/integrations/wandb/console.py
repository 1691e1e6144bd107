"""Sends what a run printed, output.log, to the Logs tab of its W&B run: each line once, in order.

W&B puts the time of sending before each line, so lines that are sent later have a later time there.
"""

from __future__ import annotations

from typing import Any

from cifar.integrations.wandb.arrival import ArrivedRun
from cifar.integrations.wandb.feed import Feed
from cifar.integrations.wandb.settings import Mode
from cifar.system.redact import redact
from cifar.tracking.console_log import ConsoleReader

LINES_AT_ONCE = 1000  # in one message to wandb-core


class ConsoleFeed(Feed):
    """output.log -> `run.write_logs`. W&B counts the lines it has, and gets those after them."""

    def open(self, run: Any, arrived: ArrivedRun | None, mode: Mode) -> None:
        super().open(run, arrived, mode)
        self._reader = ConsoleReader(self.run_dir.path)
        num_there = arrived.num_log_lines if arrived else 0
        while num_there > 0 and (lines := self._reader.read_lines(min(num_there, LINES_AT_ONCE))):
            num_there -= len(lines)

    def send(self) -> None:
        while lines := self._reader.read_lines(LINES_AT_ONCE):
            self.run.write_logs(redact("\n".join(lines)) + "\n")

    def finish(self) -> None:
        self.send()
