"""The base class of feeds: what the mirror sends of a run's record besides its rows. `feeds.py` lists them.

A feed reads the run folder and remembers what it has sent since the W&B run was opened. What W&B had before, W&B says itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cifar.integrations.wandb.arrival import ArrivedRun
from cifar.integrations.wandb.settings import Mode
from cifar.tracking.run_dir import RunDir


class Feed:
    """The base class. The mirror calls `open` each time it has opened the W&B run, and `finish` before it closes it."""

    def __init__(self, run_dir: RunDir, on_message: Callable[[str], None]) -> None:
        self.run_dir, self.on_message = run_dir, on_message
        self.run: Any = None  # wandb's run
        self.mode: Mode = "disabled"

    def open(self, run: Any, arrived: ArrivedRun | None, mode: Mode) -> None:
        """Go on with this W&B run. `arrived`: what W&B had of it before, None for a new one and for an offline file."""
        self.run, self.mode = run, mode

    def send(self) -> None:
        """Send what is new in the record. Called often; may not wait."""

    def add_to_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """What goes into the W&B row of this row of the record besides its numbers. Called just before the row is sent."""
        return {}

    def finish(self) -> None:
        """Send the rest of a run that has ended. Called before the W&B run is closed, and again if it was opened again."""

    def has_arrived(self, patience: float) -> bool:
        """Whether W&B has what `finish` sent. Waits for `patience` seconds; from 1 on, a long upload gets more."""
        return True
