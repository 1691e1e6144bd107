"""A backend whose trials come from a sweep on W&B. `sweeps.local.LocalBackend` is the other one.

    url = create_sweep(sweep, runs, fixed={})      # the file becomes a sweep on W&B
    backend = WandbBackend(url, runs, slots=2)     # one registered W&B agent for each worker slot
    trial = backend.claim_trial("me")              # a Trial, "wait" (none yet, or the sweep is paused), or None (W&B said exit)

Each slot has a thread that sends heartbeats, so that a slow or dead server delays only that thread. The backend tells W&B who
runs which trial; the metrics of a run reach W&B through its mirror.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cifar.config.resolve import flatten_values
from cifar.config.yaml_loader import parse_yaml
from cifar.errors import UserError
from cifar.integrations.wandb import final_states
from cifar.integrations.wandb.agent_slot import AgentSlot
from cifar.integrations.wandb.api import CREATE_SWEEP, GraphqlClient, to_user_error
from cifar.integrations.wandb.mirror_process import stop_core
from cifar.integrations.wandb.notes import read_notes, write_notes
from cifar.integrations.wandb.paths import parse_sweep_path
from cifar.integrations.wandb.scheduler import SchedulerProcess
from cifar.integrations.wandb.sweep_runs import fetch_sweep_cells
from cifar.states import FAILURE_STATES, TRIAL_STATES
from cifar.sweeps import spec
from cifar.sweeps.backend import MAX_RETRIES, Trial, TrialFilter
from cifar.sweeps.spec import Sweep
from cifar.system.names import check_id, is_id
from cifar.system.redact import redact, reject_secrets
from cifar.tracking.run_dir import write_atomic

MAX_SILENT_SECONDS = 600.0  # how long an idle agent waits for a server that does not answer
CLAIM_WAIT_SECONDS = 0.25  # how long `claim_trial` waits for an answer that is under way
DEFAULT_PROJECT = "cifar"
NOTES_FILE = "wandb.json"  # in the sweep's folder; its keys: see `read_sweep_notes`


def create_sweep(sweep: Sweep, runs: Path, *, fixed: Mapping[str, Any]) -> str:
    """Create the sweep on W&B -> the URL of its page. `fixed` becomes parameters, so that every agent gets it."""
    if sweep.scheduler and sweep.early_stopping:
        raise UserError("W&B takes no early_terminate beside a scheduler; remove the block, or use --wandb offline")
    client = GraphqlClient()
    entity = sweep.entity or client.entity
    project = sweep.project or str(client.settings["project"] or DEFAULT_PROJECT)
    text = format_sweep_yaml(sweep, fixed)
    try:
        created = client.execute_graphql(CREATE_SWEEP, config=text, entityName=entity or None, projectName=project)
    except Exception as error:
        raise to_user_error(error) from error
    finally:
        stop_core()
    created_sweep = created["upsertSweep"]["sweep"]
    created_project = created_sweep.get("project") or {}
    notes = {
        "id": check_id(str(created_sweep["name"]), "the sweep's id from W&B"),
        "project": created_project.get("name", project),
    }
    notes["entity"] = (created_project.get("entity") or {}).get("name", entity)
    _write_sweep_folder(runs / "sweeps" / notes["id"], text, {**notes, "made": True})
    return f"{client.app_url}{notes['entity']}/{notes['project']}/sweeps/{notes['id']}"


def format_sweep_yaml(sweep: Sweep, fixed: Mapping[str, Any]) -> str:
    """The file for W&B: word for word, unless W&B's YAML parser would read other values (1e-5 is text to PyYAML)."""
    import yaml

    reject_secrets({"the sweep file": sweep.text, **fixed})
    content = parse_yaml(sweep.text, "the sweep file")
    # W&B accepts either a scheduler or early_terminate, not both.
    has_both = sweep.scheduler is not None and content.pop("early_terminate", None) is not None
    if not fixed and not has_both and yaml.safe_load(sweep.text) == content:
        return sweep.text
    fixed_parameters = {key: {"value": value} for key, value in fixed.items()}
    return yaml.safe_dump({**content, "parameters": {**content["parameters"], **fixed_parameters}}, sort_keys=False)


def _write_sweep_folder(folder: Path, text: str, notes: Mapping[str, Any]) -> None:
    """Write what later commands with this runs folder need to know about the sweep."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "sweep.yaml", text.encode())
    write_notes(folder / NOTES_FILE, notes)


def read_sweep_notes(sweep_id: str, runs: Path) -> dict[str, Any]:
    """What this runs folder knows about a sweep on W&B: id, project, entity, threads, dataset, `made` (created from here)."""
    return read_notes(runs / "sweeps" / sweep_id / NOTES_FILE)


class WandbBackend:
    """One sweep on W&B, opened for an agent with `slots` workers. The agent calls it from one thread. No call waits for W&B."""

    def __init__(self, name: str, runs: Path, *, slots: int = 1) -> None:
        entity, project, self.id = parse_sweep_path(name)
        check_id(self.id, "the sweep")
        self.runs_dir, self.folder = runs, runs / "sweeps" / self.id
        self.client, notes = GraphqlClient(restarts_core=True), read_sweep_notes(self.id, runs)
        entity = entity or notes.get("entity") or self.client.entity
        project = project or notes.get("project") or str(self.client.settings["project"] or DEFAULT_PROJECT)
        self.wandb_target, self.shared_storage = {"project": project, "entity": entity, "engine": "wandb"}, True
        try:
            found = self.client.fetch_sweep(entity, project, self.id)
        except Exception as error:
            raise to_user_error(error) from error
        if not found:
            raise UserError(f"W&B has no sweep {entity}/{project}/{self.id}; name it as ENTITY/PROJECT/ID, or by its URL")
        text = found["config"]
        parsed = spec.parse_sweep(parse_yaml(text, "sweep.yaml"), text, f"sweep {self.id}", self.id)
        self.sweep = replace(parsed, early_stopping=None)  # W&B decides which runs end early
        _write_sweep_folder(self.folder, text, {**notes, "id": self.id, "project": project, "entity": entity})
        self.info: dict[str, Any] = {"cells": "any number of", "dataset": "", "fixed": {}}
        if notes.get("dataset"):
            self.settle_dataset(notes["dataset"])
        self.lock = threading.RLock()
        self.is_closed = False
        self._trial_arrived = threading.Condition(self.lock)
        self._cells: dict[str, dict[str, Any]] = {}  # run id -> as `list_cells` returns it
        self._cell_indices: dict[str, int] = {}  # run id -> its number in this agent, in the order of the claims
        self._num_failures: Counter[str] = Counter()
        self._has_all_cells = False  # whether W&B has answered `list_all_cells`
        self._messages: deque[str] = deque()
        self._sweep_state, self._silent_since = str(found["state"]), 0.0  # 0.0: W&B answers
        self._update_run_counts(found)
        self._slots = [AgentSlot(self, number) for number in range(slots)]
        for slot in self._slots:
            slot.start()
        self._scheduler: SchedulerProcess | None = None
        if parsed.scheduler:
            self._start_scheduler(is_created_here=bool(notes.get("made")))

    def _start_scheduler(self, *, is_created_here: bool) -> None:
        """Start W&B's scheduler if the sweep was created with this runs folder; else say where it must run."""
        if is_created_here:
            runs_ahead = 2 * len(self._slots)  # for each worker one that runs and one that waits, so that no worker idles
            self._scheduler = SchedulerProcess(
                self.wandb_target, self.id, self.folder, runs_ahead=runs_ahead, run_cap=self.sweep.run_cap
            )
            self._messages.append("W&B's sweep scheduler, which suggests the trials, runs beside this agent")
        else:
            path = "/".join((self.wandb_target["entity"], self.wandb_target["project"], self.id))
            self._messages.append(
                "this sweep's trials are suggested by W&B's scheduler, which runs beside the agents of the runs folder where "
                f"the sweep was made; where there is none, run one, and one only: wandb sweep-scheduler {path}"
            )

    # -- called by the agent --

    def agree_on_threads(self, threads: int) -> int:
        """The CPU threads of each trial: what the first agent of this runs folder chose, then the same for all agents."""
        notes = read_sweep_notes(self.id, self.runs_dir)
        notes["threads"] = notes.get("threads") or threads
        _write_sweep_folder(self.folder, self.sweep.text, notes)
        return int(notes["threads"])

    def settle_dataset(self, dataset: str) -> None:
        """Decide what `auto` means for every trial of this runs folder."""
        self.info.update(dataset=dataset, fixed={"dataset": dataset})
        _write_sweep_folder(self.folder, self.sweep.text, {**read_sweep_notes(self.id, self.runs_dir), "dataset": dataset})

    def claim_trial(
        self, worker: str, max_trials: int = 1, trial_filter: TrialFilter | None = None
    ) -> Trial | Literal["wait"] | None:
        """A trial, "wait" if W&B has not given one yet, or None if it has no more for us.

        Slots ask W&B for trials in advance, `max_trials` at most.
        """
        with self.lock:
            for slot in self._slots:
                if slot.retry_trial:
                    trial, slot.retry_trial = slot.retry_trial, None
                    return self._record_claim(slot, trial)
            free = [slot for slot in self._slots if slot.is_free and not slot.has_exited]
            ready = [slot for slot in self._slots if slot.offered_trial]
            for slot in free[: max(0, max_trials - len(ready))]:
                slot.wants_trial = True
                slot.wake_event.set()
            if not ready and free:
                self._trial_arrived.wait(CLAIM_WAIT_SECONDS)
            for slot in self._slots:
                if slot.offered_trial:
                    trial, slot.offered_trial = slot.offered_trial, None
                    slot.run_id, slot.is_run_announced, slot.stop_requested = trial.run_id, False, False
                    slot.wake_event.set()
                    return self._record_claim(slot, trial)
            if self._scheduler and (message := self._scheduler.poll()):
                self._messages.append(message)
            if self._scheduler and self._scheduler.failure and all(slot.is_free for slot in self._slots):
                raise UserError(self._scheduler.failure)
            if self._silent_since and all(slot.is_free for slot in self._slots) and not self._may_have_trials():
                return None
            return "wait" if any(not slot.has_exited for slot in self._slots if slot.is_free) else None

    def peek_values(self, limit: int) -> list[dict[str, Any]] | None:
        """Nothing: W&B hands out a trial when it is asked for one, and says nothing of the next."""
        return []

    def heartbeat(self, trial: Trial) -> Literal["go", "stop", "lost"]:
        """ "stop" if somebody stopped the run on W&B, or if W&B has ended the sweep or this run."""
        with self.lock:
            return "stop" if self._find_slot(trial).stop_requested else "go"

    def heartbeats(self, trials: Sequence[Trial]) -> list[Literal["go", "stop", "lost"]]:
        return [self.heartbeat(trial) for trial in trials]

    def claim_more(self, worker: str, count: int, trial_filter: TrialFilter) -> list[Trial]:
        """None: W&B hands out trials one by one."""
        return []

    def report_metric(self, trial: Trial, history: Mapping[int, float], best: float, epochs: int) -> bool:
        return True

    def finish_trial(
        self,
        trial: Trial,
        state: str,
        value: float | None = None,
        reason: str = "",
        *,
        objectives: Sequence[float | None] = (),
        retry: bool | None = None,
    ) -> str:
        """Report how a trial ended -> its state now. "interrupted": it is open, here (its process was killed) or elsewhere."""
        with self.lock:
            slot = self._find_slot(trial)
            self._num_failures[trial.run_id] += state in FAILURE_STATES
            should_retry = state == "killed" if retry is None else retry
            if should_retry and self._num_failures[trial.run_id] <= MAX_RETRIES and not slot.stop_requested:
                slot.retry_trial, state = replace(trial, attempt=trial.attempt + 1), "interrupted"
            else:
                slot.run_id, slot.stop_requested = "", False
                state = "interrupted" if state == "preempted" else state
            self._cells[trial.run_id].update(state=state, value=value, reason=reason, objectives=list(objectives))
            return state

    def list_cells(self, state: str = "") -> list[dict[str, Any]]:
        """This agent's own trials. `state`: only those of that state."""
        with self.lock:
            return [cell for cell in self._cells.values() if state in ("", cell["state"])]

    def list_all_cells(self) -> list[dict[str, Any]]:
        """The trials of all agents, as far as W&B has them. Waits for W&B some seconds. What is ours is as it ended here."""
        names = [self.sweep.metric.name, *(metric.name for metric in self.sweep.metrics)]
        own = {cell["run_id"]: cell for cell in self.list_cells()}
        found = fetch_sweep_cells(self.client.execute_graphql, self.wandb_target, self.id, names)
        with self.lock:
            if found is None:
                self._messages.append("W&B does not answer: what follows is of this agent's trials only")
            self._has_all_cells = found is not None
        listed = [own.pop(cell["run_id"], cell) for cell in found or []]
        return [*listed, *own.values()]

    def list_cells_without_folder(self) -> list[dict[str, Any]]:
        """None: the record of a trial is on W&B, too, and W&B alone offers a cell again."""
        return []

    def list_swept_keys(self, cells: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
        """The keys by which trials are told apart. The cells of a whole grid are known here too."""
        is_whole_grid = self.sweep.method == "grid" and not self.sweep.run_cap
        known = spec.list_grid_cells(self.sweep) if is_whole_grid else []
        return spec.list_swept_keys(self.sweep, known, self.info["fixed"]) if known else self.sweep.swept_keys

    def count_states(self, cells: Sequence[Mapping[str, Any]] | None = None) -> dict[str, int]:
        """State -> number of trials, of those in `cells` [default: this agent's]. `waiting`: trials of a grid to come.

        `elsewhere`: trials of other agents that are not in `cells`.
        """
        with self.lock:
            cells = list(self._cells.values()) if cells is None else cells
            counted = Counter(cell["state"] for cell in cells)
            num_runs = len(cells) if self._has_all_cells else max(self._num_runs, len(cells))
            counted["waiting"] += max(0, (self._num_expected_runs or 0) - num_runs)
            counted["elsewhere"] = num_runs - len(cells)
        return {state: counted[state] for state in (*TRIAL_STATES, "elsewhere") if counted[state]}

    def pop_messages(self) -> list[str]:
        """The messages for the user since the last call."""
        with self.lock:
            messages = list(self._messages)
            self._messages.clear()
        return messages

    def close(self) -> None:
        """Stop the heartbeats. Waits some seconds: to send final states that no mirror has sent, and for our scheduler."""
        self.is_closed = True
        for slot in self._slots:
            slot.wake_event.set()
        if self._scheduler:
            self._scheduler.close(is_sweep_over=all(slot.has_exited for slot in self._slots))
        if not self._silent_since:
            final_states.send_final_states(
                self.client.execute_graphql,
                self.wandb_target,
                self.id,
                {cell["run_id"]: cell["state"] for cell in self.list_cells()},
            )
        stop_core()

    # -- called by the slots --

    def apply_command(self, slot: AgentSlot, command: dict[str, Any]) -> None:
        with self.lock:
            kind, run_id = command["type"], command.get("run_id", "")
            if kind in ("run", "resume") and not is_id(str(run_id)):
                self._messages.append(f"W&B gave a run whose id cannot be a folder's name, which is left out: {run_id!r}")
            elif kind in ("run", "resume"):
                values = flatten_values({name: given["value"] for name, given in command["args"].items()})
                cell = self._cell_indices.setdefault(run_id, len(self._cell_indices))
                slot.offered_trial, slot.wants_trial = Trial(cell, values, run_id, 1), False
                self._num_runs += kind == "run"
                self._trial_arrived.notify_all()
            elif kind == "stop":
                slot.stop_requested = slot.stop_requested or run_id == slot.run_id
            elif kind == "exit":
                slot.has_exited = slot.stop_requested = True
                self._trial_arrived.notify_all()
            else:
                self._messages.append(f"W&B says '{kind}', which this agent does not know")

    def refresh_state(self) -> None:
        """Ask W&B whether the sweep is paused or over; for a slot that got no trial."""
        found = self.client.fetch_sweep(self.wandb_target["entity"], self.wandb_target["project"], self.id)
        with self.lock:
            old_state, self._sweep_state = self._sweep_state, str(found.get("state", "gone"))
            self._update_run_counts(found)
            if self._sweep_state != old_state:
                waiting = "; waiting until it is resumed" if self._sweep_state == "PAUSED" else ""
                self._messages.append(f"the sweep is {self._sweep_state.lower()} on W&B{waiting}")
            for slot in self._slots if not found else ():
                slot.has_exited = True

    def mark_server_reachable(self) -> None:
        with self.lock:
            if self._silent_since:
                self._messages.append("W&B answers again")
            self._silent_since = 0.0

    def mark_server_silent(self, error: Exception) -> None:
        with self.lock:
            if not self._silent_since and not self.is_closed:
                self._messages.append(redact(f"W&B does not answer ({type(error).__name__}); trials go on".replace("\n", " ")))
            self._silent_since = self._silent_since or time.monotonic()

    # -- private; the caller holds the lock --

    def _may_have_trials(self) -> bool:
        """Whether a server that does not answer may still have a trial for us."""
        has_given_all = bool(self._num_expected_runs) and self._num_runs >= (self._num_expected_runs or 0)
        return not has_given_all and time.monotonic() - self._silent_since < MAX_SILENT_SECONDS

    def _update_run_counts(self, found: Mapping[str, Any]) -> None:
        self._num_runs, self._num_expected_runs = int(found.get("runCount") or 0), found.get("runCountExpected")
        if self._num_expected_runs:
            self.info["cells"] = self._num_expected_runs

    def _record_claim(self, slot: AgentSlot, trial: Trial) -> Trial:
        self._cells[trial.run_id] = {
            "cell": trial.cell,
            "run_id": trial.run_id,
            "values": trial.values,
            "attempt": trial.attempt,
            "state": "running",
            "value": None,
            "objectives": [],
            "reason": "",
            "worker": slot.name,
        }
        return trial

    def _find_slot(self, trial: Trial) -> AgentSlot:
        return next(slot for slot in self._slots if slot.run_id == trial.run_id)
