"""The supervisor of a sweep's worker processes: hands them trials, beats for them, and answers signals and deaths.

Ctrl-C once: every worker finishes its epoch, writes a checkpoint, and its trial is given back; twice: at once. SIGTERM and
SIGUSR1: a checkpoint after the next step, and the trial is given back as pre-empted.
If this process is killed, its children see their standard input end and are gone at once; its trials are offered again
after their lease.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cifar.agent import open_backend as engines
from cifar.agent import packing as packs
from cifar.agent.dashboard import OPEN, Best, Board, Display, Lines, Row, greeting, shown
from cifar.agent.worker_process import Events, Failures, Held, Worker, death
from cifar.integrations.wandb.settings import mode_from_environment
from cifar.sidecar import Follower
from cifar.sweeps import local
from cifar.sweeps import spec as sweeps
from cifar.sweeps.backend import Backend, Trial
from cifar.system import devices
from cifar.system import signals as stops
from cifar.system.disk import Pause
from cifar.tracking.run_dir import DONE_STATES, Record

FAILURES_IN_A_ROW = 3
POLL_SECONDS = 1.0  # between two looks for a trial while others hold the open ones
FOLLOWER_SECONDS = 20.0  # for each run whose pictures or upload are left after the last trial


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
    gpus: str = "",
    per_gpu: int = 1,
    time_limit: float = math.inf,
    pack: str = "auto",
) -> int:
    """Run trials of a sweep until none is open. Returns the exit code: 0; 1 after three failures in a row or where the
    machine fails; 130, 143 and 138 after SIGINT, SIGTERM and SIGUSR1. `console`: rich's, for a live table; `gpus`: "all" or
    "0,1", with `per_gpu` workers on each; `time_limit`: seconds; `pack`: how many side by side, "auto" or "off"."""
    pins, said = devices.pins(gpus, per_gpu) if gpus else ([], [])
    size = len(pins) or workers or devices.default_workers()
    backend = engines.opened(sweep_id, runs, url, wandb, size, data_dir)
    if backend.place.get("engine") == "wandb":
        if pack.isdigit():
            said.append("--pack is for local sweeps: W&B hands out trials one by one, and each worker trains one")
        wandb, pack = "online", "off"
    display: Display = Lines()
    if console is not None:
        from cifar.agent import rich_dashboard as live

        display = live.display(console)
    for line in said:
        display.say(line)
    options: dict[str, Any] = {"data_dir": data_dir, "wandb": wandb, "pins": pins, "time_limit": time_limit, "pack": pack}
    try:
        return Agent(backend, count=count, workers=size, display=display, **options).run()
    finally:
        backend.close()


class Agent:
    """One agent's state; `run` is its life."""

    def __init__(
        self,
        backend: Backend,
        *,
        count: int | None,
        workers: int,
        data_dir: Path | None,
        wandb: str,
        display: Display,
        pins: Sequence[Mapping[str, str]] = (),
        time_limit: float = math.inf,
        pack: str = "off",
    ) -> None:
        self.backend, self.sweep, self.display = backend, backend.sweep, display
        self.size, self.data_dir, self.wandb = workers, data_dir, wandb
        self.threads = backend.settle_threads(max(1, devices.cores() // workers))
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.packer = packs.Packer(backend, self.name, pack, math.inf if count is None else count)
        self.events = Events()
        self.workers: list[Worker] = []
        self.follower: Follower | None = None
        self.signals: list[int] = []
        self.told = 0  # the level of the last wish acted upon
        self.limit, self.pins = stops.TimeLimit(time_limit), pins
        self.failures, self.halted = Failures(FAILURES_IN_A_ROW), ""
        self.pause, self.news = Pause(backend.folder), list[str]()  # while the disk is full; what there is to say
        self.next_claim = self.next_beat = self.next_count = 0.0
        self.best = Best(self.sweep.metrics, self.sweep.metric)
        self.board = Board(f"sweep {backend.id} {self.sweep.name}", self.sweep.metric.name)

    # -- life --

    def run(self) -> int:
        self._welcome()
        self.follower = Follower(
            self.wandb, log=self.backend.folder / "logs" / f"{self.name}-follow.log", grace=FOLLOWER_SECONDS
        )
        with stops.heard(self.signals, stops.PREEMPTIONS):  # to the very end: batch systems repeat themselves
            try:
                with stops.heard(self.signals):
                    self._live()
            finally:
                self._end()
            return self._farewell()

    def _live(self) -> None:
        while self._busy() or self._claims():
            self._stop()
            with self.pause.catching(self.news):
                if self._claims():
                    self._hand_out()
                self._beat()
                if time.monotonic() >= self.next_count:
                    self.board.counts, self.next_count = self.backend.counts(), math.inf
            self.news.extend(self.backend.news())
            self._say_news()
            self.display.show(self.board)
            if event := self.events.next(0.25):
                self._hear(*event)

    def _end(self) -> None:
        for worker in self.workers:
            worker.end()
        left = [held.trial for worker in self._busy() for held in worker.held.values()]
        for trial in [*self.packer.aside, *left]:  # the cells are open again for others at once
            with contextlib.suppress(Exception):
                self.backend.finish(trial, "interrupted", reason="its agent ended")
        self.display.end()
        if self.follower:
            self.display.say("finishing pictures and uploads ...")
            if not self.follower.end() and mode_from_environment(self.wandb) == "online":
                self.display.say(f"W&B has not got everything; send the rest with: python -m cifar push {self.backend.id}")

    def _say_news(self) -> None:
        if not self.events.waiting and self.pause.over():  # all that ended for want of space belongs to one pause
            self.news.append("there is space on the disk again: going on")
        while self.news:
            self.display.say(self.news.pop(0))

    def _claims(self) -> bool:
        return not (self.signals or self.halted) and self.packer.more() and self.limit.takes()

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.held]

    def _welcome(self) -> None:
        counts = self.backend.counts()
        self.board.counts, self.board.ended_before = counts, sum(n for state, n in counts.items() if state not in OPEN)
        for cell in self.backend.cells():
            self._best(cell)
        for line in greeting(self.backend, counts, self.size, self.threads):
            self.display.say(line)

    def _farewell(self) -> int:
        self.display.say(f"sweep {self.backend.id}: {', '.join(f'{n} {state}' for state, n in self.backend.counts().items())}")
        if self.board.best:
            self.display.say(f"best {self.board.best}")
        if self.halted:
            self.display.say(self.halted)
        late = self.packer.left > 0 and not self.limit.takes()
        if late:
            self.display.say("the time limit is near, or a trial would not end in it: no more are taken")
        if self.signals or late:
            self.display.say(f"go on with: python -m cifar agent {self.backend.id}")
        return 1 if self.halted else 128 + self.signals[0] if self.signals else 0

    # -- ends --

    def _stop(self) -> None:
        """Ask of every trial that runs what signals, failures and the time limit ask of us."""
        wish = stops.wish_of(self.signals, bool(self.halted), self.limit.over())
        if wish is None or wish.level <= self.told:
            return
        self.told = wish.level
        if self._busy() and wish.text:
            self.display.say(wish.text)
        for worker in self._busy():
            if wish.level == 3:
                worker.process.kill()
            for run_id in worker.held:
                worker.tell(stop=wish.state, when=wish.when, run_id=run_id)

    # -- trials --

    def _hand_out(self) -> None:
        if self.pause.on or time.monotonic() < self.next_claim:
            return
        while self._claims() and len(self._busy()) < self.size:
            trials = self.packer.take(self.size - len(self._busy()), self._values)
            if not isinstance(trials, list):
                self.next_claim = time.monotonic() + POLL_SECONDS
                if trials is None and not self._busy():
                    self.packer.left = 0
                return
            try:
                self._start(trials)
            except Exception:
                self.packer.aside += trials  # claimed, and nobody has them
                raise

    def _values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of a trial, as they are trained."""
        return {"threads": self.threads, **given, **self.backend.info["fixed"], "test": "never"}

    def _start(self, trials: Sequence[Trial]) -> None:
        worker = self._worker(trials[0].cell)
        counts = self.backend.counts()
        ahead = len(trials) + sum(counts.get(state, 0) for state in OPEN if state != "running") // self.size
        for trial in trials:
            worker.held[trial.run_id] = Held(trial, time.monotonic())
            self.board.rows[trial.cell] = Row(trial.cell, self._name(self._values(trial.values)))
        common = {
            "sweep": self.backend.id,
            "place": self.backend.place,
            "runs": str(self.backend.runs),
            "swept": self.sweep.swept,
            "metric": self.sweep.metric.name,
            "objectives": [metric.name for metric in self.sweep.metrics],
            "early": asdict(self.sweep.early) if self.sweep.early else None,
            "data_dir": str(self.data_dir) if self.data_dir else "",
            "ahead": ahead,
        }
        worker.tell(trials=[{"run_id": t.run_id, "cell": t.cell, "values": self._values(t.values), **common} for t in trials])

    def _worker(self, cell: int) -> Worker:
        """A free worker, started where there is none; not in a slot where this cell has failed, if there is another."""
        busy = {worker.slot for worker in self._busy()}
        slot = self.failures.best_slot(cell, [slot for slot in range(self.size) if slot not in busy])
        worker = next((w for w in self.workers if w.slot == slot and not w.spent), None)
        if worker is None:
            name, pin = f"{self.name}-{slot}", self.pins[slot] if self.pins else {}
            worker = Worker(name, slot, self.backend.folder / "logs" / f"{name}.log", self.events.queue, pin)
            self.workers.append(worker)
        return worker

    def _beat(self) -> None:
        if time.monotonic() < self.next_beat:
            return
        self.next_beat = time.monotonic() + local.lease() / 5
        self.packer.beat()
        for worker in self._busy():
            for held in list(worker.held.values()):
                answer = self.backend.beat(held.trial)
                if answer == "stop":
                    worker.tell(stop="stopped", run_id=held.trial.run_id)
                elif answer == "lost":
                    self._lose(worker, held.trial)
                    break
        self.next_count = 0.0

    def _lose(self, worker: Worker, trial: Trial) -> None:
        self.display.say(f"trial {trial.cell:03d} was taken over by another agent: this one was too long silent")
        worker.held.pop(trial.run_id)
        if not any(held.trial.cell == trial.cell for other in self._busy() for held in other.held.values()):
            self.board.rows.pop(trial.cell, None)
        worker.spent = True
        worker.process.kill()
        worker.process.wait()
        self._close(worker, {"state": "interrupted", "reason": "its worker had to end"})  # those are still ours to give back

    # -- news from the workers --

    def _hear(self, worker: Worker, event: dict[str, Any]) -> None:
        with self.pause.catching(self.news):
            return self._take(worker, event)
        if self.signals:  # nobody waits for space any more; the lease gives the cell back
            worker.held.clear()
            worker.process.kill()
        else:
            self.events.refused = worker, event

    def _take(self, worker: Worker, event: dict[str, Any]) -> None:
        if event["event"] == "gone":
            if worker.held:
                self._died(worker, event["code"])
            if worker in self.workers:
                self.workers.remove(worker)
            return
        held = worker.held.get(event["run_id"])
        if held is None:
            return
        trial, row = held.trial, self.board.rows[held.trial.cell]
        if event["event"] == "started":
            row.state, row.epochs, held.folder = "running", event["epochs"], Path(event["folder"])
            self.display.say(f"trial {trial.cell:03d} {row.name}: {event['macs'] / 1e6:.2f} MMACs, run {trial.run_id}")
            if self.follower:
                self.follower.follow(held.folder)
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
                worker.tell(go=self._go_on(trial, event["ask"], row.epochs), run_id=trial.run_id)
        else:
            self._ended(worker, held, event)

    def _go_on(self, trial: Trial, ask: dict[str, Any], epochs: int) -> bool:
        history = {int(epoch): value for epoch, value in ask["history"].items()}
        best = (max if self.sweep.metric.goal == "maximize" else min)(ask["values"])
        return self.backend.report(trial, history, best, epochs)

    def _died(self, worker: Worker, code: int) -> None:
        """A worker ended without a word: a signal, the kernel's out-of-memory killer, or our own second Ctrl-C."""
        event, together = death(code), len(worker.held)
        if self.told == 3:
            event = {"state": "interrupted", "reason": "ended at once by a second signal"}
        elif together > 1:  # which of them is at fault shows when each is alone
            reason = f"side by side with {together - 1} others: {event['reason']}"
            event = {"state": "interrupted", "reason": reason, "apart": together}
        self._close(worker, event)

    def _close(self, worker: Worker, event: Mapping[str, Any]) -> None:
        """The process is gone: its runs end as `event` says, in their records and in the sweep. One that had come to its own
        end before, so that only the word of it is missing, keeps that."""
        worker.fate = event = worker.fate or event  # also where a full disk lets it be written down only later, one by one
        for held in list(worker.held.values()):
            told = dict(event)
            if held.folder:
                record = Record(held.folder)
                status = record.read("status")
                if status.get("state") in DONE_STATES:
                    told = record.outcome(self.sweep.metric.name, [metric.name for metric in self.sweep.metrics])
                else:
                    with contextlib.suppress(OSError):
                        known = {key: status.get(key, 0) for key in ("epoch", "epochs")}
                        record.set_status(event["state"], reason=event["reason"], **known)
                if self.follower:
                    self.follower.close(held.folder)
            self._ended(worker, held, told)

    def _ended(self, worker: Worker, held: Held, event: dict[str, Any]) -> None:
        trial = held.trial
        value, reason, asked = event.get("value"), event.get("reason", ""), event["state"]
        bad = asked in ("failed", "killed")
        worker.spent |= bad or event.get("full", False) or event.get("halt", False)  # it ends itself
        if bad and held.retry is None:
            held.retry = self.failures.retries(trial.cell, worker.slot, event.get("cause", ""))
        objectives = event.get("objectives", [])
        state = self.backend.finish(trial, asked, value, reason, objectives=objectives, retry=held.retry)
        row = self.board.rows[trial.cell]
        worker.held.pop(trial.run_id)
        row.seconds, row.fraction, row.state = time.monotonic() - held.begun, 1.0, state
        if together := event.get("apart"):
            self.packer.failed_together(trial, together)
            worker.spent = True
        row.value = value if value is not None else row.value
        if state in ("interrupted", "preempted"):
            self.packer.left += 1
            reason = f"{reason}; it will be tried again" if bad else reason
        self.display.say(f"trial {trial.cell:03d} {asked}: {self._shown(row.value)}" + (f" ({reason})" if reason else ""))
        if state == "finished":
            self.limit.seen(row.seconds)
        self._best({**trial.__dict__, "state": state, "value": value, "objectives": objectives})
        self.next_count = 0.0  # once the worker has its next trial: it waits for that one
        self.failures.count(state, bad=bad and state != "lost")
        if event.get("full"):
            self.news.append(self.pause.begin() or f"trial {trial.cell:03d} waits for space too")
        else:
            self.pause.ended()
        if event.get("halt"):
            self.halted = f"stopped: {event['reason']}"
        elif not self.halted:
            self.halted = self.failures.verdict(event, worker.log)

    def _best(self, ended: Mapping[str, Any]) -> None:
        """Take an ended trial (run_id, values, state, value, objectives) into account."""
        if ended["state"] == "finished":
            by = f"{ended['run_id']} ({self._name(ended['values'])})"
            self.board.best = self.best.of(ended["value"], ended["objectives"], by)

    def _name(self, values: dict[str, Any]) -> str:
        return sweeps.name_of(values, self.sweep.swept) or str(values.get("model", "default model"))

    def _shown(self, value: float | None) -> str:
        return f"{self.board.metric} {shown(value, self.board.metric)}"
