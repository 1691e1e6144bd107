"""A worker process as its supervisor sees it, and the policy for what goes wrong in one."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cifar.sweeps.backend import Trial

ROOT = Path(__file__).resolve().parents[2]
TAIL = 15  # lines of a traceback that are shown


@dataclass
class Held:
    """A trial that a worker has in hand."""

    trial: Trial
    begun: float
    folder: Path | None = None  # its record, once it is there
    retry: bool | None = None  # whether another try can help; asked once, however often its end has to be written down


class Worker:
    """A worker process and the trials it has in hand, by run. `pin` is what its environment has beyond ours."""

    def __init__(
        self,
        name: str,
        slot: int,
        log: Path,
        events: queue.SimpleQueue[tuple[Worker, dict[str, Any]]],
        pin: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.slot, self.log = name, slot, log
        self.held: dict[str, Held] = {}
        self.spent = False  # it ends, or is dead, and takes no trial any more
        self.fate: Mapping[str, Any] | None = None  # how what it had in hand ended with it
        with open(log, "ab") as errors:
            waiting = _ready()
            self.process = waiting or _start({**_environment(), **(pin or {})}, errors)
        if waiting:
            self.tell(environment=dict(pin or {}), log=str(log))
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.SimpleQueue[tuple[Worker, dict[str, Any]]]) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # killed in the middle of a line
                    events.put((self, json.loads(line)))
        events.put((self, {"event": "gone", "code": self.process.wait()}))

    def tell(self, **message: Any) -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it has just died; its listener says so
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """It ends as its standard input does."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _environment() -> dict[str, str]:
    """What every worker has."""
    environment = {key: value for key, value in os.environ.items() if key != "CIFAR_STORAGE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    if "GOMP_SPINCOUNT" not in environment:
        # Threads that spin while they wait for each other keep each other from the cores when anything else runs there.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    return environment


def _start(environment: Mapping[str, str], errors: IO[bytes] | int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cifar.agent.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=dict(environment),
        start_new_session=True,  # Ctrl-C is for the supervisor
    )


_waiting: list[tuple[dict[str, str], subprocess.Popen[bytes]]] = []  # a process that no worker has taken yet


@contextlib.contextmanager
def early() -> Iterator[None]:
    """Start the first worker's process now: it imports PyTorch while its supervisor reads the sweep and claims trials."""
    if not _waiting:
        environment = _environment()
        _waiting.append((environment, _start(environment, subprocess.DEVNULL)))
    try:
        yield
    finally:
        _forget()


def _ready() -> subprocess.Popen[bytes] | None:
    """The process that was started early, if it is still as a new one would be."""
    for environment, process in _waiting:
        if environment == _environment() and process.poll() is None:
            _waiting.clear()
            return process
    _forget()
    return None


def _forget() -> None:
    for _, process in _waiting:
        process.kill()
        process.wait()
    _waiting.clear()


def death(code: int) -> dict[str, Any]:
    """What it means that a worker's process ended, without a word, with this code."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as the kernel does where memory runs out" if name == "SIGKILL" else ""
        return {"state": "killed", "cause": name, "reason": f"its process was killed by {name}{hint}"}
    return {"state": "failed", "cause": f"exit code {code}", "reason": f"its process ended with code {code}"}


class Events:
    """What workers tell, in order. What a full disk has refused is heard again before those behind it: a worker's last word
    comes before the news that it is gone."""

    def __init__(self) -> None:
        self.queue = queue.SimpleQueue[tuple[Worker, dict[str, Any]]]()
        self.refused: tuple[Worker, dict[str, Any]] | None = None

    @property
    def waiting(self) -> bool:
        return self.refused is not None or not self.queue.empty()

    def next(self, seconds: float) -> tuple[Worker, dict[str, Any]] | None:
        """The next one, waited for; what was refused comes after that time."""
        if self.refused:
            time.sleep(seconds)
            found, self.refused = self.refused, None
            return found
        with contextlib.suppress(queue.Empty):
            return self.queue.get(timeout=seconds)
        return None


class Failures:
    """What went wrong in this agent: which worker slot met which cause in which cell, and how often in a row."""

    def __init__(self, most: int) -> None:
        self.most, self.row = most, 0
        self._met: Counter[tuple[int, int, str]] = Counter()  # (cell, slot, cause)
        self._slots: dict[int, set[int]] = {}  # cell -> the slots it failed in

    def retries(self, cell: int, slot: int, cause: str) -> bool:
        """Whether another try can help, asked once a failure: not where the same slot meets the same cause again.

        `cause` is a signal, "memory", "device", or "" for a fault of the trial's own that no other try mends.
        """
        self._met[cell, slot, cause] += 1
        self._slots.setdefault(cell, set()).add(slot)
        return bool(cause) and self._met[cell, slot, cause] == 1

    def best_slot(self, cell: int, free: list[int]) -> int:
        """Of the free slots the first where this cell has not failed."""
        return next((slot for slot in free if slot not in self._slots.get(cell, ())), free[0])

    def count(self, state: str, *, bad: bool) -> None:
        """Another trial ended. What was given back says nothing about this machine."""
        if bad:
            self.row += 1
        elif state not in ("interrupted", "preempted", "lost"):
            self.row = 0

    def verdict(self, event: Mapping[str, Any], log: Path) -> str:
        """Empty, or that the agent stops, with the last traceback."""
        if self.row < self.most:
            return ""
        whole = Path(event.get("whole") or log)
        lines: deque[str] = deque(maxlen=TAIL)
        with contextlib.suppress(OSError), open(whole, errors="replace") as file:
            lines.extend(file)
        return (
            f"stopped after {self.row} failures in a row, the last one: {event['reason']} (the whole of it: {whole})\n"
            + "".join(lines)
        ).rstrip()
