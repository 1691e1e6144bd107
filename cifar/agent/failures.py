"""What went wrong in an agent's workers, and what to do about it: try again, elsewhere, or start no more trials."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar.states import GIVEN_BACK_STATES
from cifar.system.files import is_regular_file

NUM_TRACEBACK_LINES = 15  # that are shown


def exit_code_event(code: int) -> dict[str, Any]:
    """The event that stands for a worker process which ended with this code and sent no event itself."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the kernel does where memory runs out" if name == "SIGKILL" else ""
        return {"state": "killed", "cause": name, "reason": f"its process was killed by {name}{hint}"}
    return {"state": "failed", "cause": f"exit code {code}", "reason": f"its process ended with code {code}"}


class FailureTracker:
    """Failures of this agent: which worker slot met which cause in which cell, and how many came in a row."""

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row, self.num_in_a_row = max_in_a_row, 0
        self._counts: Counter[tuple[int, int, str]] = Counter()  # (cell, slot, cause) -> failures
        self._failed_slots: dict[int, set[int]] = {}  # cell -> the slots it failed in

    def should_retry(self, cell: int, slot: int, cause: str) -> bool:
        """Whether another try can help: not where the same slot meets the same cause again. Asked once for each failure.

        `cause` is a signal, "memory", "device", or "" for a fault of the trial itself, which no other try mends.
        """
        self._counts[cell, slot, cause] += 1
        self._failed_slots.setdefault(cell, set()).add(slot)
        return bool(cause) and self._counts[cell, slot, cause] == 1

    def best_slot(self, cell: int, free: list[int]) -> int:
        """The first of the free slots where this cell has not failed, else the first of all."""
        return next((slot for slot in free if slot not in self._failed_slots.get(cell, ())), free[0])

    def count_trial(self, state: str, *, is_failure: bool) -> None:
        """Another trial ended. One that was given back says nothing about this machine."""
        if is_failure:
            self.num_in_a_row += 1
        elif state not in (*GIVEN_BACK_STATES, "lost"):
            self.num_in_a_row = 0

    def halt_reason(self, event: Mapping[str, Any], log: Path) -> str:
        """Why the agent has to stop, with the last traceback; "" while it may go on."""
        if self.num_in_a_row < self.max_in_a_row:
            return ""
        traceback_path = Path(event.get("whole") or log)
        lines: deque[str] = deque(maxlen=NUM_TRACEBACK_LINES)
        if is_regular_file(traceback_path):
            with contextlib.suppress(OSError), open(traceback_path, errors="replace") as file:
                lines.extend(file)
        return (
            f"stopped after {self.num_in_a_row} failures in a row, the last one: {event['reason']} "
            f"(the whole of it: {traceback_path})\n" + "".join(lines)
        ).rstrip()
