"""The supervisor of a sweep's worker processes: hands them trials, beats for them, and answers signals and deaths.

Ctrl-C or SIGTERM once: every worker writes a checkpoint after its next step and its trial is given back; twice: at once.
If this process is killed, its children see their standard input end and are gone at once; its trials are offered again
after their lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cifar import engines
from cifar import sweep as sweeps
from cifar.backends import local
from cifar.board import OPEN, Board, Display, Lines, Row, shown
from cifar.claims import Backend, Trial
from cifar.follow import Follower
from cifar.record import Record
from cifar.report.runs import STAND_IN

CPU_WORKERS = 4  # at most; one a core takes less CPU time than one trial of many threads (LOG.md)
FAILURES_IN_A_ROW = 3
POLL_SECONDS = 1.0  # between two looks for a trial while others hold the open ones
FOLLOWER_SECONDS = 20.0  # for pictures and uploads after the last trial
ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """A worker process and the trial it has in hand."""

    def __init__(self, name: str, log: Path, events: queue.SimpleQueue[tuple[Worker, dict[str, Any]]]) -> None:
        self.name, self.log = name, log
        self.trial: Trial | None = None
        self.folder: Path | None = None
        self.begun = 0.0
        environment = {key: value for key, value in os.environ.items() if key != "CIFAR_STORAGE"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cifar.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the supervisor
            )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.SimpleQueue[tuple[Worker, dict[str, Any]]]) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
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


def agent(
    sweep_id: str,
    runs: Path,
    *,
    count: int | None = None,
    workers: int | None = None,
    data_dir: Path | None = None,
    wandb: str = "auto",
    console: Any = None,
    url: str = "",
) -> int:
    """Run trials of a sweep until none is open. Returns the exit code: 0; 1 after three failures in a row or where the
    machine fails (a full disk); 130 and 143 after SIGINT and SIGTERM. `console`: rich's, for a live table."""
    workers = workers or default_workers()
    backend = engines.opened(sweep_id, runs, url, wandb, workers, data_dir)
    if backend.place.get("engine") == "wandb":
        wandb = "online"
    display: Display = Lines()
    if console is not None:
        from cifar import live

        display = live.display(console)
    try:
        return Agent(backend, count=count, workers=workers, data_dir=data_dir, wandb=wandb, display=display).run()
    finally:
        backend.close()


class Agent:
    """One agent's state; `run` is its life."""

    def __init__(
        self, backend: Backend, *, count: int | None, workers: int, data_dir: Path | None, wandb: str, display: Display
    ) -> None:
        self.backend, self.sweep, self.display = backend, backend.sweep, display
        self.left = float("inf") if count is None else count  # trials that may still be taken
        self.size, self.data_dir, self.wandb = workers, data_dir, wandb
        self.threads = backend.settle_threads(max(1, cores() // workers))
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.events: queue.SimpleQueue[tuple[Worker, dict[str, Any]]] = queue.SimpleQueue()
        self.workers: list[Worker] = []
        self.follower: Follower | None = None
        self.signals: list[int] = []
        self.told = 0  # signals acted upon
        self.failures, self.halted = 0, ""
        self.next_claim = self.next_beat = 0.0
        self.best: float | None = None
        self.board = Board(f"sweep {backend.id} {self.sweep.name}", self.sweep.metric.name)

    # -- life --

    def run(self) -> int:
        self._welcome()
        self.follower = Follower(
            self.wandb, log=self.backend.folder / "logs" / f"{self.name}-follow.log", grace=FOLLOWER_SECONDS
        )
        try:
            with self._signals():
                while self._busy() or self._claims():
                    self._answer_signals()
                    if self._claims():
                        self._hand_out()
                    self._beat()
                    for line in self.backend.news():
                        self.display.say(line)
                    self.display.show(self.board)
                    with contextlib.suppress(queue.Empty):
                        self._hear(*self.events.get(timeout=0.25))
        finally:
            for worker in self.workers:
                worker.end()
            for worker in self._busy():  # something above went wrong: the cells are open again for others at once
                with contextlib.suppress(Exception):
                    self.backend.finish(worker.trial, "interrupted", reason="its agent ended")  # type: ignore[arg-type]
            self.display.end()
            if self.follower:
                self.display.say("finishing pictures and uploads ...")
                self.follower.end()
        return self._farewell()

    def _claims(self) -> bool:
        return not (self.signals or self.halted) and self.left > 0

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.trial]

    def _welcome(self) -> None:
        info, counts = self.backend.info, self.backend.counts()
        self.board.counts = counts
        self.board.ended_before = sum(n for state, n in counts.items() if state not in OPEN)
        for cell in self.backend.cells():
            self._best(cell["value"] if cell["state"] == "finished" else None, cell["run_id"], cell["values"])
        waiting = sum(counts.get(state, 0) for state in OPEN)
        self.display.say(
            f"sweep {self.backend.id} ({self.sweep.name}): {info['cells']} trials, {waiting} open; dataset {info['dataset']}; "
            f"{self.size} worker{'s' * (self.size > 1)}, {self.threads} CPU thread{'s' * (self.threads > 1)} a trial"
        )
        if info["dataset"] == "stand-in":
            self.display.say(STAND_IN)
        if self.sweep.early:
            # a search has no cells yet: what it may suggest first stands for all of them
            planned = [cell["values"] for cell in self.backend.cells()] or [sweeps.suggest(self.sweep, 0, info["sweep_seed"])]
            rungs = self.sweep.early.rungs(max(sweeps.bind(values, info["fixed"]).epochs for values in planned))
            shown = ", ".join(map(str, rungs)) or "none: its runs are too short"
            self.display.say(f"early termination (hyperband, eta {self.sweep.early.eta:g}): after epochs {shown}")

    def _farewell(self) -> int:
        self.display.say(f"sweep {self.backend.id}: {', '.join(f'{n} {state}' for state, n in self.backend.counts().items())}")
        if self.board.best:
            self.display.say(f"best {self.board.best}")
        if self.halted:
            self.display.say(self.halted)
        elif self.signals:
            self.display.say(f"go on with: python -m cifar agent {self.backend.id}")
        return 1 if self.halted else 128 + self.signals[0] if self.signals else 0

    # -- signals --

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, lambda n, _: self.signals.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _answer_signals(self) -> None:
        if self.told == 0 and (self.signals or self.halted):
            self.told = 1
            if self._busy():
                self.display.say("writing checkpoints and giving the trials back ... (again: at once)")
            for worker in self._busy():
                worker.tell(stop="interrupted", run_id=worker.trial.run_id)  # type: ignore[union-attr]
        if self.told == 1 and len(self.signals) > 1:
            self.told = 2
            for worker in self._busy():
                worker.process.kill()

    # -- trials --

    def _hand_out(self) -> None:
        if time.monotonic() < self.next_claim:
            return
        while self.left > 0 and len(self._busy()) < self.size:
            trial = self.backend.claim(self.name, int(min(self.left, self.size - len(self._busy()))))
            if not isinstance(trial, Trial):
                self.next_claim = time.monotonic() + POLL_SECONDS
                if trial is None and not self._busy():
                    self.left = 0
                return
            self.left -= 1
            self._start(trial)

    def _start(self, trial: Trial) -> None:
        worker = next((w for w in self.workers if not w.trial), None)
        if worker is None:
            slot = next(i for i in range(self.size) if all(not w.name.endswith(f"-{i}") for w in self.workers))
            name = f"{self.name}-{slot}"
            worker = Worker(name, self.backend.folder / "logs" / f"{name}.log", self.events)
            self.workers.append(worker)
        info = self.backend.info
        values = {**trial.values, **info["fixed"], "test": "never"}
        worker.trial, worker.begun, worker.folder = trial, time.monotonic(), None
        self.board.rows[trial.cell] = Row(trial.cell, self._name(values))
        worker.tell(
            trial={
                "run_id": trial.run_id,
                "cell": trial.cell,
                "values": {"threads": self.threads, **values},
                "sweep": self.backend.id,
                "place": self.backend.place,
                "runs": str(self.backend.runs),
                "swept": self.sweep.swept,
                "metric": self.sweep.metric.name,
                "early": asdict(self.sweep.early) if self.sweep.early else None,
                "data_dir": str(self.data_dir) if self.data_dir else "",
            }
        )

    def _beat(self) -> None:
        if time.monotonic() < self.next_beat:
            return
        self.next_beat = time.monotonic() + local.lease() / 5
        for worker in self._busy():
            trial = worker.trial
            assert trial
            answer = self.backend.beat(trial)
            if answer == "stop":
                worker.tell(stop="stopped", run_id=trial.run_id)
            elif answer == "lost":
                self._lose(worker)
        self.board.counts = self.backend.counts()

    def _lose(self, worker: Worker) -> None:
        assert worker.trial
        self.display.say(f"trial {worker.trial.cell:03d} was taken over by another agent: this one was too long silent")
        self.board.rows.pop(worker.trial.cell, None)
        worker.trial = None
        worker.process.kill()

    # -- news from the workers --

    def _hear(self, worker: Worker, event: dict[str, Any]) -> None:
        if event["event"] == "gone":
            self.workers.remove(worker)
            if worker.trial:
                self._died(worker, event["code"])
            return
        trial = worker.trial
        if trial is None or event["run_id"] != trial.run_id:
            return
        row = self.board.rows[trial.cell]
        if event["event"] == "started":
            row.state, row.epochs, worker.folder = "running", event["epochs"], Path(event["folder"])
            self.display.say(f"trial {trial.cell:03d} {row.name}: {event['macs'] / 1e6:.2f} MMACs, run {trial.run_id}")
            if self.follower:
                self.follower.follow(worker.folder)
        elif event["event"] == "progress":
            row.fraction = event["fraction"]
        elif event["event"] == "epoch":
            row.epoch, row.value, row.images_per_second = event["epoch"], event["value"], event["images_per_second"]
            row.fraction = row.epoch / row.epochs
            self.display.say(
                f"trial {trial.cell:03d} epoch {row.epoch}/{row.epochs}: {self._shown(row.value)}, "
                f"{row.images_per_second:,.0f} images/s"
            )
            if event["ask"]:
                worker.tell(go=self._go_on(trial, event["ask"], row.epochs))
        else:
            self._ended(worker, trial, event)

    def _go_on(self, trial: Trial, ask: dict[str, Any], epochs: int) -> bool:
        history = {int(epoch): value for epoch, value in ask["history"].items()}
        best = (max if self.sweep.metric.goal == "maximize" else min)(ask["values"])
        return self.backend.report(trial, history, best, epochs)

    def _died(self, worker: Worker, code: int) -> None:
        """A worker ended without a word: a signal, the kernel's out-of-memory killer, or our own second Ctrl-C."""
        assert worker.trial
        if self.told == 2:
            state, reason = "interrupted", "ended at once by a second signal"
        elif code < 0:
            state, reason = "killed", f"its process was killed by {signal.Signals(-code).name}"
        else:
            state, reason = "failed", f"its process ended with code {code}"
        if worker.folder:
            record = Record(worker.folder)
            status = record.read("status")
            with contextlib.suppress(OSError):
                record.set_status(state, reason=reason, epoch=status.get("epoch", 0), epochs=status.get("epochs", 0))
            if self.follower:
                self.follower.close(worker.folder)
        self._ended(worker, worker.trial, {"state": state, "reason": reason, "value": None})

    def _ended(self, worker: Worker, trial: Trial, event: dict[str, Any]) -> None:
        row, worker.trial = self.board.rows[trial.cell], None
        row.seconds, row.fraction = time.monotonic() - worker.begun, 1.0
        value, reason, asked = event.get("value"), event.get("reason", ""), event["state"]
        row.value = value if value is not None else row.value
        row.state = self.backend.finish(trial, asked, value, reason)
        if row.state == "interrupted":
            self.left += 1
            reason = f"{reason}; it will be tried again" if asked == "killed" else reason
        self.display.say(f"trial {trial.cell:03d} {asked}: {self._shown(row.value)}" + (f" ({reason})" if reason else ""))
        self._best(value if row.state == "finished" else None, trial.run_id, trial.values)
        self.board.counts = self.backend.counts()
        self.failures = (
            self.failures + 1 if row.state in ("failed", "killed") else 0 if row.state != "interrupted" else self.failures
        )
        if event.get("halt"):
            self.halted = f"stopped: {event['reason']}"
        elif self.failures >= FAILURES_IN_A_ROW:
            self.halted = (
                f"stopped after {self.failures} failures in a row, the last one: {event['reason']} "
                f"(the whole of it: {event.get('whole') or worker.log})"
            )

    def _best(self, value: float | None, run_id: str, values: dict[str, Any]) -> None:
        worse = self.sweep.metric.worse
        if value is not None and (self.best is None or worse(value) < worse(self.best)):
            self.best = value
            self.board.best = f"{self._shown(value)} by {run_id} ({self._name(values)})"

    def _name(self, values: dict[str, Any]) -> str:
        return sweeps.name_of(values, self.sweep.swept) or str(values.get("model", "default model"))

    def _shown(self, value: float | None) -> str:
        return f"{self.board.metric} {shown(value, self.board.metric)}"


def default_workers() -> int:
    """Trials at a time: one where there is a GPU to share, else one a core, up to CPU_WORKERS."""
    gpu = sys.platform == "darwin" or Path("/dev/nvidia0").exists()  # asked without importing PyTorch
    return 1 if gpu else min(CPU_WORKERS, cores())


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
