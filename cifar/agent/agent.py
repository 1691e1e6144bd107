"""The supervisor of a sweep's worker processes: hands them trials, sends heartbeats, and answers signals and deaths.

Ctrl-C once: every worker finishes its epoch, writes a checkpoint, and its trial is given back. Twice: workers are killed at
once. SIGTERM and SIGUSR1: a checkpoint after the next step, and the trial is given back as preempted.
If this process is killed, its children see the end of their standard input and end at once. Its trials are offered again
after their lease.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar import data
from cifar.agent.compile_ahead import CompileAhead
from cifar.agent.dashboard import (
    Board,
    Dashboard,
    LineDashboard,
    Row,
    describe_counts,
    greeting_lines,
    name_trial,
)
from cifar.agent.events import AgentState, EventHandler
from cifar.agent.gpu_health import GpuHealth, list_gpus
from cifar.agent.options import AgentOptions, PathOptions
from cifar.agent.packing import Packer
from cifar.agent.worker_process import Assignment, WorkerProcess
from cifar.errors import name_program
from cifar.integrations.wandb.settings import mode_from_environment
from cifar.sidecar import SidecarHandle
from cifar.states import CLAIMABLE_STATES, ENDED_STATES, OPEN_TRIAL_STATES, TRIAL_STATES
from cifar.sweeps import local, spec
from cifar.sweeps.backend import Backend, Trial
from cifar.sweeps.local import LocalBackend
from cifar.system import devices
from cifar.system.open_files import require_open_files
from cifar.system.ownership import lease_seconds
from cifar.system.signals import PREEMPTION_SIGNALS, TimeLimit, capture_signals, stop_request
from cifar.system.variables import read_variable
from cifar.tracking.run_dir import format_repeat_command

POLL_SECONDS = 1.0  # between two claims while other agents hold all open trials
SIDECAR_SECONDS = 20.0  # for each run whose pictures or upload are left after the last trial


def run_agent(sweep_id: str, options: AgentOptions, paths: PathOptions, console: Any = None) -> int:
    """Run trials of a sweep until none is open -> the exit code. `console`: rich's, for a live table.

    Exit codes: 0; 1 after three failures in a row or where the machine fails; 130, 143 and 138 after SIGINT, SIGTERM and
    SIGUSR1.
    """
    environments, messages = devices.assign_gpus(options.gpus, options.per_gpu) if options.gpus else ([], [])
    environments = environments or [{}] * (options.workers or devices.default_num_workers())
    require_open_files(len(environments))
    backend = open_backend(sweep_id, options, paths, len(environments))
    if backend.wandb_target.get("engine") == "wandb":
        if options.pack.isdigit():
            messages.append("--pack is for local sweeps: W&B hands out trials one by one, and each worker trains one")
        options = dataclasses.replace(options, wandb="online", pack="off")
    dashboard: Dashboard = LineDashboard()
    if console is not None:
        from cifar.agent import rich_dashboard

        dashboard = rich_dashboard.make_dashboard(console)
    for message in messages:
        dashboard.print_line(message)
    try:
        return Agent(backend, options, environments, data_dir=paths.data_dir, dashboard=dashboard).run()
    finally:
        backend.close()


def open_backend(name: str, options: AgentOptions, paths: PathOptions, num_workers: int) -> Backend:
    """The sweep of that name. It is on W&B if the name has a '/' in it, or if it is not known here and W&B is online."""
    runs_dir = paths.resolve_runs_dir()
    sweep_id = local.find_sweep_id(name, runs_dir)
    is_known = bool(
        options.storage or read_variable("CIFAR_STORAGE") or (runs_dir / "sweeps" / sweep_id / "sweep.json").exists()
    )
    if "/" not in name and (is_known or mode_from_environment(options.wandb) != "online"):
        return LocalBackend(sweep_id, runs_dir, options.storage)
    from cifar.integrations.wandb.backend import WandbBackend

    mode_from_environment("online")  # raises UserError with what is missing
    backend = WandbBackend(name, runs_dir, slots=num_workers)
    if not backend.info["dataset"]:
        dataset = spec.check_sweep(backend.sweep, {}, count=backend.sweep.run_cap or 20)
        backend.settle_dataset(data.resolve_auto(paths.data_dir)[0] if dataset == "auto" else dataset)
    return backend


class Agent:
    """Claims trials and hands them to worker processes. What the workers answer is for the `EventHandler`.

    environments: what each worker's environment has beyond ours; there are as many workers.
    """

    def __init__(
        self,
        backend: Backend,
        options: AgentOptions,
        environments: Sequence[Mapping[str, str]],
        *,
        data_dir: Path | None,
        dashboard: Dashboard,
    ) -> None:
        self.backend, self.sweep, self.dashboard = backend, backend.sweep, dashboard
        self.options, self.environments, self.data_dir = options, environments, data_dir
        self.num_workers = len(environments)
        self.threads = backend.agree_on_threads(max(1, devices.num_cores() // self.num_workers))
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.packer = Packer(backend, self.name, options.pack, math.inf if options.count is None else options.count)
        self.compile_ahead = CompileAhead(
            backend, options.compile_ahead, environments, data_dir=data_dir, training_values=self._training_values
        )
        self.time_limit = TimeLimit(options.time_limit)
        self.board = Board(f"sweep {backend.id} {self.sweep.name}", self.sweep.metric.name)
        self.state = AgentState(backend, self.packer, self.time_limit, dashboard, self.board)
        self.state.gpus = GpuHealth(list_gpus(environments, options.gpus))
        self.packer.can_start = lambda trial: bool(self.state.gpus.slots_for(trial.cell, self._free_slots()))
        self.event_handler = EventHandler(self.state)
        self.next_claim_time = self.next_heartbeat_time = 0.0

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run trials until none is open, or until something asks for an end -> the exit code."""
        state = self.state
        self._print_greeting()
        log = self.backend.folder / "logs" / f"{self.name}-follow.log"
        state.sidecar = SidecarHandle(self.options.wandb, log=log, grace=SIDECAR_SECONDS)
        with capture_signals(state.signals, PREEMPTION_SIGNALS):  # to the very end: batch systems repeat their signals
            try:
                with capture_signals(state.signals):
                    self._start_gpu_workers()
                    self._supervise_workers()
            finally:
                self._shut_down()
            return self._print_summary()

    def _supervise_workers(self) -> None:
        state = self.state
        while state.busy_workers() or self._can_claim():
            self._request_stops()
            with state.disk_gate.catch_disk_full(state.messages):
                if self._can_claim():
                    self._hand_out_trials()
                self.compile_ahead.update(self.packer.num_left if self._can_claim() else 0, self._claimed_values())
                self._send_heartbeats()
                if time.monotonic() >= state.next_count_time and not state.events.has_waiting:
                    state.refresh_progress()
                    state.next_count_time = math.inf
            state.messages.extend([*self.backend.pop_messages(), *self.packer.messages, *self.compile_ahead.messages])
            self.packer.messages.clear()
            self.compile_ahead.messages.clear()
            self._print_messages()
            self.dashboard.show_board(self.board)
            if event := state.events.next_event(0.25):
                self.event_handler.handle_event(*event)

    def _shut_down(self) -> None:
        """End the workers, give back what they had, and let the sidecar finish."""
        state = self.state
        self.compile_ahead.shut_down()
        for worker in state.workers:
            worker.shut_down()
        unfinished = [assigned.trial for worker in state.busy_workers() for assigned in worker.assignments.values()]
        for trial in [*self.packer.set_aside, *unfinished]:  # so that others can claim these cells at once
            with contextlib.suppress(Exception):
                self.backend.finish_trial(trial, "interrupted", reason="its agent ended")
        self.dashboard.close()
        if state.sidecar:
            self.dashboard.print_line("finishing pictures and uploads ...")
            if not state.sidecar.shut_down() and mode_from_environment(self.options.wandb) == "online":
                self.dashboard.print_line(
                    name_program(f"W&B has not got everything; send the rest with: python -m cifar push {self.backend.id}")
                )

    def _can_claim(self) -> bool:
        state = self.state
        return not (state.signals or state.halt_reason) and self.packer.has_more() and self.time_limit.has_time_for_trial()

    def _request_stops(self) -> None:
        """Ask every running trial for the end that signals, failures and the time limit call for."""
        state = self.state
        request = stop_request(state.signals, bool(state.halt_reason), self.time_limit.is_over())
        if request is None or request.level <= state.last_stop_level:
            return
        state.last_stop_level = request.level
        if state.busy_workers() and request.text:
            self.dashboard.print_line(request.text)
        for worker in state.busy_workers():
            if request.level == 3:
                worker.process.kill()
            for run_id in worker.assignments:
                worker.send_message(stop=request.state, when=request.when, run_id=run_id)

    # -- trials --------------------------------------------------------------------------------------------------------

    def _hand_out_trials(self) -> None:
        if self.state.disk_gate.is_waiting or time.monotonic() < self.next_claim_time:
            return
        while self._can_claim() and (num_free := len(self._free_slots())) > 0:
            preferred = self.compile_ahead.prefer(self._claimed_values(), num_free)
            if preferred == "wait":
                return
            trials = self.packer.claim_group(num_free, self._training_values, preferred)
            if not isinstance(trials, list):
                self.next_claim_time = time.monotonic() + POLL_SECONDS
                if trials is None and not self.state.busy_workers():
                    self.packer.num_left = 0
                return
            try:
                self._start_trials(trials)
            except Exception:
                self.packer.set_aside += trials  # claimed, but no worker has them
                raise

    def _training_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's values as its worker trains them."""
        fixed = self.backend.info["fixed"]
        return {"threads": self.threads, **values, **fixed, "test": fixed.get("test", "never")}

    def _claimed_values(self) -> list[dict[str, Any]]:
        """The values of the trials that workers have."""
        return [assigned.trial.values for worker in self.state.busy_workers() for assigned in worker.assignments.values()]

    def _start_trials(self, trials: Sequence[Trial]) -> None:
        worker = self._free_worker(trials[0].cell)
        worker.last_words.clear()  # those of earlier trials
        counts = self.backend.count_states()
        ahead = len(trials) + sum(counts.get(state, 0) for state in CLAIMABLE_STATES) // self._num_usable()
        for trial in trials:
            worker.assignments[trial.run_id] = Assignment(trial, time.monotonic())
            values = self._training_values(trial.values)
            texts = spec.format_values(values, self.state.swept_keys)
            self.board.rows[trial.cell] = Row(trial.cell, name_trial(values, self.state.swept_keys), values=texts)
        early_stopping = self.sweep.early_stopping
        common = {
            "sweep": self.backend.id,
            "place": self.backend.wandb_target,
            "runs": str(self.backend.runs_dir),
            "swept": self.state.swept_keys,
            "description": self.sweep.description,
            "metric": self.sweep.metric.name,
            "objectives": [metric.name for metric in self.sweep.metrics],
            "early": dataclasses.asdict(early_stopping) if early_stopping else None,
            "data_dir": str(self.data_dir) if self.data_dir else "",
            "ahead": ahead,
            "gpu": self.state.gpus.name_gpu(worker.slot),
        }
        worker.send_message(
            trials=[{"run_id": t.run_id, "cell": t.cell, "values": self._training_values(t.values), **common} for t in trials]
        )

    def _free_slots(self) -> list[int]:
        """The slots without a trial, but for those of GPUs that were set aside."""
        busy = {worker.slot for worker in self.state.busy_workers()}
        return [slot for slot in self.state.gpus.usable_slots(range(self.num_workers)) if slot not in busy]

    def _num_usable(self) -> int:
        """Worker slots that get trials."""
        return max(1, len(self.state.gpus.usable_slots(range(self.num_workers))))

    def _free_worker(self, cell: int) -> WorkerProcess:
        """A free worker, started if there is none. Not in a slot where this cell has failed, if there is another slot."""
        state, free = self.state, self._free_slots()
        slot = state.failures.best_slot(cell, state.gpus.slots_for(cell, free) or free)
        worker = next((w for w in state.workers if w.slot == slot and not w.retiring), None)
        return worker or self._start_worker(slot)

    def _start_worker(self, slot: int) -> WorkerProcess:
        name = f"{self.name}-{slot}"
        log = self.backend.folder / "logs" / f"{name}.log"
        worker = WorkerProcess(name, slot, log, self.state.events.queue, self.environments[slot])
        self.state.workers.append(worker)
        return worker

    def _start_gpu_workers(self) -> None:
        """Start the workers of all GPUs now. Each loads PyTorch for seconds, meanwhile this process claims their trials."""
        if not self.options.gpus or not self._can_claim():
            return
        num_ended = sum(number for state, number in self.board.counts.items() if state not in OPEN_TRIAL_STATES)
        cells = self.backend.info["cells"]  # a sweep on W&B may not know
        num_open = min(cells - num_ended if isinstance(cells, int) else math.inf, self.packer.num_left)
        for slot in range(int(min(self.num_workers, num_open))):
            self._start_worker(slot)

    def _send_heartbeats(self) -> None:
        if time.monotonic() < self.next_heartbeat_time:
            return
        self.next_heartbeat_time = time.monotonic() + lease_seconds() / 5
        self.packer.send_heartbeats()
        held = [(worker, assigned.trial) for worker in self.state.busy_workers() for assigned in worker.assignments.values()]
        for (worker, trial), answer in zip(held, self.backend.heartbeats([trial for _, trial in held]), strict=True):
            if trial.run_id not in worker.assignments:  # its worker was ended because of another trial
                continue
            if answer == "stop":
                worker.send_message(stop="stopped", run_id=trial.run_id)
            elif answer == "lost":
                self._lose_trial(worker, trial)
        self.state.next_count_time = 0.0

    def _lose_trial(self, worker: WorkerProcess, trial: Trial) -> None:
        """Another agent has claimed this trial meanwhile: kill its worker, and give back what else that worker had."""
        self.dashboard.print_line(f"trial {trial.cell:03d} was taken over by another agent: this one was too long silent")
        worker.assignments.pop(trial.run_id)
        assigned = [held.trial.cell for other in self.state.busy_workers() for held in other.assignments.values()]
        if trial.cell not in assigned:
            self.board.rows.pop(trial.cell, None)
        worker.retiring = True
        worker.process.kill()
        worker.process.wait()
        self.event_handler.end_assignments(worker, {"state": "interrupted", "reason": "its worker had to end"})

    # -- what is printed -----------------------------------------------------------------------------------------------

    def _print_messages(self) -> None:
        state = self.state
        # trials that ended for want of space, and are not handled yet, belong to the same wait
        if not state.events.has_waiting and state.disk_gate.has_recovered():
            state.messages.append("there is space on the disk again: going on")
        while state.messages:
            self.dashboard.print_line(state.messages.pop(0))

    def _print_greeting(self) -> None:
        self.state.update_progress(self.backend.list_cells())
        counts = self.board.counts
        self.board.num_done_before = sum(n for state, n in counts.items() if state not in OPEN_TRIAL_STATES)
        for line in greeting_lines(self.backend, counts, self.num_workers, self.threads):
            self.dashboard.print_line(line)

    def _print_summary(self) -> int:
        """Print how it ended -> the exit code."""
        state = self.state
        state.update_progress(self.backend.list_all_cells())  # other agents have gone on meanwhile
        for message in self.backend.pop_messages():
            self.dashboard.print_line(message)
        self.dashboard.print_line(f"sweep {self.backend.id}: {describe_counts(self.board.counts)}")
        self.dashboard.print_line(f"this agent: {self._describe_own_trials()}")
        if self.board.best:
            self.dashboard.print_line(f"best {self.board.best}")
        if (folder := self.backend.runs_dir / self.board.best_run) != self.backend.runs_dir and folder.is_dir():
            self.dashboard.print_line(f"repeat it: {format_repeat_command(folder, self.backend.runs_dir)}")
        for line in state.gpus.describe():
            self.dashboard.print_line(line)
        if state.halt_reason:
            self.dashboard.print_line(state.halt_reason)
        is_late = self.packer.num_left > 0 and not self.time_limit.has_time_for_trial()
        if is_late:
            self.dashboard.print_line("the time limit is near, or a trial would not end in it: no more are taken")
        if state.signals or is_late:
            self.dashboard.print_line(name_program(f"go on with: python -m cifar agent {self.backend.id}"))
        return 1 if state.halt_reason else 128 + state.signals[0] if state.signals else 0

    def _describe_own_trials(self) -> str:
        """How the trials of this agent ended: "3 trials (2 finished, 1 failed)"."""
        counts = Counter(row.state if row.state in ENDED_STATES else "interrupted" for row in self.board.rows.values())
        ends = ", ".join(f"{counts[state]} {state}" for state in TRIAL_STATES if counts[state])
        return f"{len(self.board.rows)} trial{'s' * (len(self.board.rows) != 1)}" + (f" ({ends})" if ends else "")
