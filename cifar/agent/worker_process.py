"""A worker process as the agent sees it: starting it, sending it messages, and receiving its events."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cifar.sweeps.backend import Trial
from cifar.system.open_files import require_open_files
from cifar.system.redacted_streams import FrameSplitter, LogRedactor

LOG_SECONDS = 1.0  # that the end of a log is waited for
MAX_FOREIGN_LINES = 100  # printed past Python, of one piece of a log
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Assignment:
    """A trial that a worker has."""

    trial: Trial
    start_time: float  # time.monotonic()
    folder: Path | None = None  # the run's folder, once it exists
    should_retry: bool | None = None  # whether another try can help; decided once, although its end may be handled repeatedly


class WorkerProcess:
    """A worker process and the trials it has, by run id.

    slot: its number among the agent's workers; environment: what its environment has beyond ours.
    """

    def __init__(
        self,
        name: str,
        slot: int,
        log: Path,
        events: queue.SimpleQueue[tuple[WorkerProcess, dict[str, Any]]],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.slot, self.log = name, slot, log
        self.assignments: dict[str, Assignment] = {}
        self.retiring = False  # it is ending, or dead, and gets no more trials
        self.last_words: deque[str] = deque(maxlen=MAX_FOREIGN_LINES)  # printed past Python
        self.exit_event: Mapping[str, Any] | None = None  # how the trials that it had ended when its process did
        file = open(log, "ab", buffering=0)  # noqa: SIM115 (`_write_log` closes it)
        prestarted = _take_prestarted()
        self.process = prestarted or _start_process({**worker_environment(), **(environment or {})})
        if prestarted:
            self.send_message(environment=dict(environment or {}))
        self._is_log_behind = threading.Event()
        self._log_writer = threading.Thread(target=self._write_log, args=(file,), daemon=True)
        self._log_writer.start()
        threading.Thread(target=self._read_events, args=(events,), daemon=True).start()

    def _read_events(self, events: queue.SimpleQueue[tuple[WorkerProcess, dict[str, Any]]]) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # killed in the middle of a line
                    events.put((self, json.loads(line)))
        code = self.process.wait()
        self._log_writer.join(LOG_SECONDS)  # a process that the worker has started may hold the pipe open for ever
        events.put((self, {"event": "gone", "code": code}))

    def _write_log(self, file: IO[bytes]) -> None:
        """Write what the worker prints to its log, without secrets; also what its libraries print past Python."""
        assert self.process.stderr
        splitter, redactor, foreign_redactor = FrameSplitter(), LogRedactor(), LogRedactor()
        with self.process.stderr as pipe, file:
            while piece := os.read(pipe.fileno(), 2**16):
                self._is_log_behind.set()
                whole, foreign = splitter.push(piece)
                with contextlib.suppress(OSError):  # the disk is full; what comes later may find space
                    file.write(redactor.push(whole))
                self._pass_on(foreign_redactor.push(foreign))
                self._is_log_behind.clear()
            with contextlib.suppress(OSError):
                file.write(redactor.finish())

    def _pass_on(self, foreign: bytes) -> None:
        """Give the worker what was printed past Python, for the logs of its runs: it owns them, and has not seen it."""
        if lines := foreign.decode("utf-8", "replace").splitlines()[-MAX_FOREIGN_LINES:]:
            self.last_words.extend(lines)
            self.send_message(printed=lines)

    def wait_for_log(self) -> None:
        """Wait until the log has what the worker has printed by now, for a second at most."""
        deadline = time.monotonic() + LOG_SECONDS
        pipe = self.process.stderr
        assert pipe
        with contextlib.suppress(OSError, ValueError):  # the pipe is closed: all is written
            while time.monotonic() < deadline and (select.select([pipe], [], [], 0)[0] or self._is_log_behind.is_set()):
                time.sleep(0.01)

    def send_message(self, **message: Any) -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it has just died; `_read_events` reports that
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def shut_down(self) -> None:
        """Close its standard input, which ends it; kill it after five seconds."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def worker_environment() -> dict[str, str]:
    """The environment of every worker."""
    environment = {key: value for key, value in os.environ.items() if key != "CIFAR_STORAGE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    if "GOMP_SPINCOUNT" not in environment:
        # Threads that spin while they wait take the cores from each other whenever another program runs.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    return environment


def _start_process(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cifar.agent.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(environment),
        start_new_session=True,  # Ctrl-C is for the agent
    )


# (environment, process): started early, and not taken by a `WorkerProcess` yet
_prestarted: list[tuple[dict[str, str], subprocess.Popen[bytes]]] = []


@contextlib.contextmanager
def prestart_worker() -> Iterator[None]:
    """Start the first worker's process now: it imports PyTorch while the agent reads the sweep and claims trials."""
    if not _prestarted:
        require_open_files(1)
        environment = worker_environment()
        _prestarted.append((environment, _start_process(environment)))
    try:
        yield
    finally:
        _kill_prestarted()


def _take_prestarted() -> subprocess.Popen[bytes] | None:
    """The process that was started early, if it lives and has the environment that a new one would get."""
    for environment, process in _prestarted:
        if environment == worker_environment() and process.poll() is None:
            _prestarted.clear()
            return process
    _kill_prestarted()
    return None


def _kill_prestarted() -> None:
    for _, process in _prestarted:
        process.kill()
        process.communicate()  # which closes the pipes
    _prestarted.clear()
