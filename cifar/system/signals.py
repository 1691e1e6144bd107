"""What makes training stop: signals and a time limit; and how urgent they are together."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cifar.states import RETRIABLE_STATES, RunState
from cifar.system.variables import read_variable

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM warns by SIGUSR1 (--signal=B:USR1@60)
STOP_SIGNALS = (signal.SIGINT, *PREEMPTION_SIGNALS)
MARGIN_SHARE = 0.1  # of the time limit, kept for checkpoints and uploads
MAX_MARGIN_SECONDS = 30.0  # at most


@dataclass(frozen=True)
class StopRequest:
    """What an agent asks of every running trial. A higher level overrides a lower one."""

    level: int  # 1: at the end of its epoch; 2: after its step, with a checkpoint; 3: now
    state: RunState  # in which the trial ends
    text: str  # to print; may be empty

    @property
    def when(self) -> str:
        return "epoch" if self.level == 1 else "step"


def stop_request(signals: list[int], is_halted: bool, is_late: bool) -> StopRequest | None:
    """What the signals received up to now, a halt of the agent and the time limit ask for together.

    Ctrl-C: stop after the epoch; Ctrl-C again: now. SIGTERM and SIGUSR1: write a checkpoint at once; repeating them changes
    nothing.
    """
    if signal.SIGINT in signals[1:]:
        return StopRequest(3, "interrupted", "")
    if set(PREEMPTION_SIGNALS) & set(signals):
        return StopRequest(2, "preempted", "writing checkpoints and giving the trials back ... (Ctrl-C: at once)")
    if is_halted or is_late:
        return StopRequest(2, "interrupted", "writing checkpoints and giving the trials back ... (Ctrl-C: at once)")
    if signals:
        return StopRequest(1, "interrupted", "finishing the epoch, then giving the trials back ... (Ctrl-C again: at once)")
    return None


@contextlib.contextmanager
def _handle_signals(handler: Callable[[int], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Call `handler` with each of these signals while this is open. Only the main thread can receive them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda n, _: handler(n)) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def capture_signals(
    signals: list[int], numbers: Sequence[signal.Signals] = STOP_SIGNALS
) -> contextlib.AbstractContextManager[None]:
    """Append the signals that arrive to the list while this is open."""
    return _handle_signals(signals.append, numbers)


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 ask one run to stop after its step. A second Ctrl-C raises KeyboardInterrupt at once.

    started_by_wandb: W&B's plain agent has started this process. Its SIGTERM means that a person stopped the run, which is
    then not to be run again, unless CIFAR_PREEMPTIBLE=1 says that here SIGTERM comes from the machine.
    """

    def __init__(self, started_by_wandb: bool = False) -> None:
        self.state: RunState | None = None  # in which the run is asked to end
        self.number = 0  # of the signal that asked
        is_stopped = started_by_wandb and read_variable("CIFAR_PREEMPTIBLE") in ("", "0")
        self._states: dict[int, RunState] = {
            signal.SIGINT: "interrupted",
            signal.SIGUSR1: "preempted",
            signal.SIGTERM: "stopped" if is_stopped else "preempted",
        }
        self._handlers = _handle_signals(self._receive_signal, STOP_SIGNALS)

    def __call__(self) -> RunState | None:
        return self.state

    def __enter__(self) -> StopSignals:
        self._handlers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handlers.__exit__(*error)

    def _receive_signal(self, number: int) -> None:
        if self.state and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.state:
            self.state, self.number = self._states[number], number

    def exit_code(self, state: str) -> int:
        """Of the process: 130, 143 or 138 after a signal that gave the run back; 0 where a person stopped it."""
        if state in RETRIABLE_STATES:
            return 1
        return {"interrupted": 130, "preempted": 128 + self.number}.get(state, 0)


class TimeLimit:
    """The wall time of an agent. It starts no trial that would not end in time if it took as long as the longest one so far."""

    def __init__(self, seconds: float = math.inf) -> None:
        margin = min(MARGIN_SHARE * seconds, MAX_MARGIN_SECONDS) if seconds < math.inf else 0.0
        self.deadline = time.monotonic() + seconds - margin
        self.longest_trial_seconds = 0.0

    def record_trial_seconds(self, seconds: float) -> None:
        """A trial was finished in this time."""
        self.longest_trial_seconds = max(self.longest_trial_seconds, seconds)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time_for_trial(self) -> bool:
        return self.seconds_left > self.longest_trial_seconds

    def is_over(self) -> bool:
        return self.seconds_left <= 0
