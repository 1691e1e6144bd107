"""When and how an agent stops its trials: signals, a limit of time, and how urgent they are together."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cifar.errors import UserError

PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM warns by SIGUSR1 (--signal=B:USR1@60)
SIGNALS = (signal.SIGINT, *PREEMPTIONS)
MARGIN = 0.1  # of the time limit, for checkpoints and uploads
MARGIN_SECONDS = 30.0  # at most


@dataclass(frozen=True)
class Wish:
    """What is asked of every trial that runs. A higher level overrides a lower one."""

    level: int  # 1: at the end of its epoch; 2: after its step, with a checkpoint; 3: now
    state: str
    text: str

    @property
    def when(self) -> str:
        return "epoch" if self.level == 1 else "step"


def wish_of(signals: list[int], halted: bool, late: bool) -> Wish | None:
    """Ctrl-C: after the epoch; again: now. SIGTERM and SIGUSR1: a checkpoint at once, and what they repeat changes nothing."""
    if signal.SIGINT in signals[1:]:
        return Wish(3, "interrupted", "")
    if set(PREEMPTIONS) & set(signals):
        return Wish(2, "preempted", "writing checkpoints and giving the trials back ... (Ctrl-C: at once)")
    if halted or late:
        return Wish(2, "interrupted", "writing checkpoints and giving the trials back ... (Ctrl-C: at once)")
    if signals:
        return Wish(1, "interrupted", "finishing the epoch, then giving the trials back ... (Ctrl-C again: at once)")
    return None


@contextlib.contextmanager
def heard(signals: list[int], numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Signals go into the list while this is open. Only a main thread can hear them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class TimeLimit:
    """The wall time of an agent: no trial is taken that would not end in it, by the longest one seen so far."""

    def __init__(self, seconds: float = math.inf) -> None:
        margin = min(MARGIN * seconds, MARGIN_SECONDS) if seconds < math.inf else 0.0
        self.deadline = time.monotonic() + seconds - margin
        self.longest = 0.0

    def seen(self, seconds: float) -> None:
        """A trial was finished in so much time."""
        self.longest = max(self.longest, seconds)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def takes(self) -> bool:
        return self.left > self.longest

    def over(self) -> bool:
        return self.left <= 0


def seconds_of(text: str) -> float:
    """`90s`, `50m`, `2h`, `1h30m`, `1d` or `H:MM:SS` -> seconds. Raises UserError."""
    clock = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text)
    if clock:
        return float(3600 * int(clock[1]) + 60 * int(clock[2]) + int(clock[3]))
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    found = (
        sum(scale * int(part or 0) for scale, part in zip((86400, 3600, 60, 1), parts.groups(), strict=True)) if parts else 0
    )
    if not found:
        raise UserError(f"--time-limit {text}: write 90s, 50m, 2h, 1h30m or 1:30:00")
    return float(found)
