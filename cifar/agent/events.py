"""What workers report, and what follows from it: on the display, in the run folders, and in the sweep's backend."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar.agent.dashboard import Board, Dashboard, Row, find_best_trial, format_metric
from cifar.agent.failures import FailureTracker, exit_code_event
from cifar.agent.gpu_health import GpuHealth
from cifar.agent.packing import Packer
from cifar.agent.worker_process import Assignment, WorkerProcess
from cifar.sidecar import SidecarHandle
from cifar.states import CONCLUSIVE_STATES, FAILURE_STATES, GIVEN_BACK_STATES, pack_failure_reason
from cifar.sweeps.backend import Backend, Trial
from cifar.system.disk import DiskSpaceGate
from cifar.system.ownership import OwnershipError
from cifar.system.signals import TimeLimit
from cifar.tracking.console_log import write_last_words
from cifar.tracking.run_dir import RunDir

MAX_FAILURES_IN_A_ROW = 3
MAX_BEST_SHARE = 0.05  # of an agent's time that it looks for the sweep's best trial


class EventQueue:
    """Events of all workers, in order.

    An event that could not be handled because the disk was full comes again before those behind it: how a trial ended has to
    be handled before the event that its worker is gone.
    """

    def __init__(self) -> None:
        self.queue = queue.SimpleQueue[tuple[WorkerProcess, dict[str, Any]]]()
        self.deferred: tuple[WorkerProcess, dict[str, Any]] | None = None

    @property
    def has_waiting(self) -> bool:
        return self.deferred is not None or not self.queue.empty()

    def next_event(self, seconds: float) -> tuple[WorkerProcess, dict[str, Any]] | None:
        """The next one, waited for up to `seconds`. A deferred one comes after that time."""
        if self.deferred:
            time.sleep(seconds)
            event, self.deferred = self.deferred, None
            return event
        with contextlib.suppress(queue.Empty):
            return self.queue.get(timeout=seconds)
        return None


@dataclass
class AgentState:
    """What the agent's loop and its event handler share."""

    backend: Backend
    packer: Packer
    time_limit: TimeLimit
    dashboard: Dashboard
    board: Board
    sidecar: SidecarHandle | None = None
    events: EventQueue = field(default_factory=EventQueue)
    workers: list[WorkerProcess] = field(default_factory=list)
    failures: FailureTracker = field(default_factory=lambda: FailureTracker(MAX_FAILURES_IN_A_ROW))
    gpus: GpuHealth = field(default_factory=GpuHealth)
    signals: list[int] = field(default_factory=list)  # received up to now
    last_stop_level: int = 0  # of the last stop request that was passed on
    halt_reason: str = ""  # why the agent starts no more trials
    messages: list[str] = field(default_factory=list)  # to print
    next_count_time: float = 0.0  # when to ask the backend for the numbers of trials; inf: not before something changes
    next_best_time: float = 0.0  # when to look for the best trial again: in a sweep of thousands of cells every few seconds
    swept_keys: list[str] = field(default_factory=list)  # by which the sweep's trials are told apart
    disk_gate: DiskSpaceGate = field(init=False)

    def __post_init__(self) -> None:
        self.disk_gate = DiskSpaceGate(self.backend.folder)

    def busy_workers(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.assignments]

    def update_progress(self, cells: Sequence[Mapping[str, Any]]) -> None:
        """Show how far the sweep has come. `cells`: all that are known, also those of other agents."""
        self.swept_keys = self.backend.list_swept_keys(cells)
        self.board.counts = self.backend.count_states(cells)
        self._show_best(cells)

    def refresh_progress(self) -> None:
        """The same, while trials run: with what a database answers without reading every cell."""
        counts = self.backend.count_states()
        if sum(counts.values()) != sum(self.board.counts.values()):  # another process has added cells
            self.update_progress(self.backend.list_cells())
            return
        self.board.counts = counts
        start = time.monotonic()
        if start >= self.next_best_time:
            self._show_best(self.backend.list_cells("finished"))
            self.next_best_time = start + (time.monotonic() - start) / MAX_BEST_SHARE

    def _show_best(self, cells: Sequence[Mapping[str, Any]]) -> None:
        best = find_best_trial(self.backend.sweep, cells, self.swept_keys)
        self.board.best, self.board.best_run = best.describe(), best.run_id


class EventHandler:
    """Acts on the events of workers. The JSON that they send is described in cifar/agent/worker.py."""

    def __init__(self, state: AgentState) -> None:
        self.state = state
        self.backend, self.sweep = state.backend, state.backend.sweep
        self.dashboard, self.board, self.packer = state.dashboard, state.board, state.packer

    def handle_event(self, worker: WorkerProcess, event: dict[str, Any]) -> None:
        """Act on one event. While the disk is full it is put back, and comes again."""
        with self.state.disk_gate.catch_disk_full(self.state.messages):
            return self._dispatch_event(worker, event)
        if self.state.signals:  # nobody waits for space any more; the trial is offered again after its lease
            worker.assignments.clear()
            worker.process.kill()
        else:
            self.state.events.deferred = worker, event

    def end_assignments(self, worker: WorkerProcess, event: Mapping[str, Any]) -> None:
        """The process is gone: its runs end as `event` says, in their folders and in the sweep.

        A run that had come to its own end before, so that only the event of it is missing, keeps that end.
        """
        # kept also for later calls: while the disk is full the runs can be ended one by one only
        worker.exit_event = event = worker.exit_event or event
        for assigned in list(worker.assignments.values()):
            run_event = dict(event)
            if assigned.folder:
                run_dir = RunDir(assigned.folder)
                status = run_dir.read_json("status")
                if status.get("state") in CONCLUSIVE_STATES:
                    run_event = run_dir.read_outcome(self.sweep.metric.name, [metric.name for metric in self.sweep.metrics])
                else:
                    with contextlib.suppress(OSError, OwnershipError), run_dir.own("reset"):
                        progress = {key: status.get(key, 0) for key in ("epoch", "epochs")}
                        write_last_words(run_dir, list(worker.last_words), f"{event['state']}: {event['reason']}")
                        run_dir.set_status(event["state"], reason=event["reason"], **progress)
                if self.state.sidecar:
                    self.state.sidecar.mark_writer_gone(assigned.folder)
            self._end_trial(worker, assigned, run_event)

    def _dispatch_event(self, worker: WorkerProcess, event: dict[str, Any]) -> None:
        if event["event"] == "gone":
            if worker.assignments:
                self._explain_exit(worker, event["code"])
            if worker in self.state.workers:
                self.state.workers.remove(worker)
            return
        assigned = worker.assignments.get(event["run_id"])
        if assigned is None:
            return
        row = self.board.rows[assigned.trial.cell]
        if event["event"] == "started":
            self._show_started(assigned, row, event)
        elif event["event"] == "progress":
            row.fraction = event["fraction"]
        elif event["event"] == "epoch":
            self._show_epoch(assigned.trial, row, event)
            if event["ask"]:
                should_continue = self._should_continue(assigned.trial, event["ask"], row.epochs)
                worker.send_message(go=should_continue, run_id=assigned.trial.run_id)
        else:
            self._end_trial(worker, assigned, event)

    def _show_started(self, assigned: Assignment, row: Row, event: Mapping[str, Any]) -> None:
        trial = assigned.trial
        row.state, row.epochs, assigned.folder = "running", event["epochs"], Path(event["folder"])
        self.dashboard.print_line(f"trial {trial.cell:03d} {row.name}: {event['macs'] / 1e6:.2f} MMACs, run {trial.run_id}")
        if self.state.sidecar:
            self.state.sidecar.follow_run(assigned.folder)

    def _show_epoch(self, trial: Trial, row: Row, event: Mapping[str, Any]) -> None:
        row.epoch, row.value, row.images_per_second = event["epoch"], event["value"], event["images_per_second"]
        row.fraction = row.epoch / row.epochs
        self.dashboard.print_epoch_line(
            f"trial {trial.cell:03d} epoch {row.epoch}/{row.epochs}: "
            + (f"{self._format_value(row.value)}, " if row.value is not None else "")  # test accuracy comes at the end
            + f"{row.images_per_second:,.0f} images/s"
        )

    def _should_continue(self, trial: Trial, ask: dict[str, Any], epochs: int) -> bool:
        """Whether a trial goes on after an epoch at which early stopping judges it."""
        history = {int(epoch): value for epoch, value in ask["history"].items()}
        best = (max if self.sweep.metric.goal == "maximize" else min)(ask["values"])
        return self.backend.report_metric(trial, history, best, epochs)

    def _explain_exit(self, worker: WorkerProcess, code: int) -> None:
        """A worker ended without an event: a signal, the kernel's out-of-memory killer, or our own second Ctrl-C."""
        event, pack_size = exit_code_event(code), len(worker.assignments)
        if self.state.last_stop_level == 3:
            event = {"state": "interrupted", "reason": "ended at once by a second signal"}
        elif pack_size > 1:  # which of them is at fault shows when each is trained alone
            reason = pack_failure_reason(event["reason"], pack_size)
            event = {"state": "interrupted", "reason": reason, "apart": pack_size, "cause": event["cause"]}
        self.end_assignments(worker, event)

    def _end_trial(self, worker: WorkerProcess, assigned: Assignment, event: dict[str, Any]) -> None:
        """A trial has ended as `event` says: write it to the sweep, print it, and decide what follows for the agent."""
        state, trial = self.state, assigned.trial
        if event.get("held"):  # another process has its run: it waits, and this agent keeps it
            worker.retiring = True
            worker.assignments.pop(trial.run_id)
            self.board.rows.pop(trial.cell, None)
            self.packer.set_aside.append(trial)
            self.dashboard.print_line(f"trial {trial.cell:03d} waits: {event['reason']}")
            return
        event = state.gpus.judge_event(worker.slot, worker.process.pid, trial.cell, event)
        value, reason, event_state = event.get("value"), event.get("reason", ""), event["state"]
        is_failure = event_state in FAILURE_STATES
        # its process ends itself
        worker.retiring |= is_failure or bool(event.get("full") or event.get("halt") or event.get("cause"))
        if is_failure and assigned.should_retry is None:
            assigned.should_retry = state.failures.should_retry(trial.cell, worker.slot, event.get("cause", ""))
        objectives = event.get("objectives", [])
        # not what the event says where the trial is offered again, or belongs to another agent by now ("lost")
        trial_state = self.backend.finish_trial(
            trial, event_state, value, reason, objectives=objectives, retry=assigned.should_retry
        )
        row = self.board.rows[trial.cell]
        worker.assignments.pop(trial.run_id)
        row.seconds, row.fraction, row.state = time.monotonic() - assigned.start_time, 1.0, trial_state
        if pack_size := event.get("apart"):
            self.packer.record_pack_failure(trial, pack_size)
            worker.retiring = True
        row.value = value if value is not None else row.value
        if trial_state in GIVEN_BACK_STATES:
            self.packer.num_left += 1
            reason = f"{reason}; it will be tried again" if is_failure else reason
        if (is_failure or event.get("cause")) and (gpu := state.gpus.name_gpu(worker.slot)):
            reason = f"on {gpu}: {reason}"
        suffix = f" ({reason})" if reason else ""
        self.dashboard.print_line(f"trial {trial.cell:03d} {event_state}: {self._format_value(row.value)}{suffix}")
        if trial_state == "finished":
            state.time_limit.record_trial_seconds(row.seconds)
        state.next_count_time = 0.0  # counted once the worker has its next trial, since it waits for that one
        # a trial that failed on one of several GPUs says nothing about the machine before another one has tried it
        has_another_try = trial_state in GIVEN_BACK_STATES and state.gpus.num_usable > 1
        is_counted = is_failure and trial_state != "lost" and not has_another_try
        state.failures.count_trial(trial_state, is_failure=is_counted)
        self._check_machine(worker, trial, event)

    def _check_machine(self, worker: WorkerProcess, trial: Trial, event: Mapping[str, Any]) -> None:
        """Wait for disk space, or start no more trials, if that is what this end of a trial asks for."""
        state = self.state
        if event.get("full"):
            state.messages.append(state.disk_gate.begin_wait() or f"trial {trial.cell:03d} waits for space too")
        else:
            state.disk_gate.reset_requirement()
        state.messages.extend(state.gpus.pop_messages())
        if event.get("halt"):
            state.halt_reason = f"stopped: {event['reason']}"
        elif not state.halt_reason:
            worker.wait_for_log()  # its end is shown
            state.halt_reason = state.gpus.halt_reason() or state.failures.halt_reason(event, worker.log)

    def _format_value(self, value: float | None) -> str:
        return f"{self.board.metric} {format_metric(value, self.board.metric)}"
