"""The local backend: a sweep's cells as trials of an Optuna study, in a SQLite file or a PostgreSQL database.

A claim happens under a lock (a lock file beside a SQLite file, an advisory lock in PostgreSQL), so that each cell is handed
out once. The agent that has claimed a cell sends heartbeats. If another agent sees no new heartbeat for the time of a lease,
by its own clock, the cell is open again, with the same run id. Every claim has a number (`attempt`), so an agent that comes
back late with an old claim is told that it has lost the cell.

    <runs>/sweeps/<id>/   sweep.yaml (word for word) · sweep.json · study.db · place.json · logs/

place.json has an id of this runs folder. It is noted with each trial that ends, because with a database elsewhere agents may
write their runs to several runs folders: only in its own can it be said that a run's folder is gone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cifar.config.schema import MAX_THREADS
from cifar.config.yaml_loader import parse_yaml
from cifar.errors import UserError
from cifar.states import (
    CONCLUSIVE_STATES,
    FAILURE_STATES,
    GIVEN_BACK_STATES,
    RETRIABLE_STATES,
    TRIAL_STATES,
    WORST_RESULT_STATES,
)
from cifar.sweeps import spec, storage
from cifar.sweeps.backend import MAX_RETRIES, Trial, TrialFilter
from cifar.sweeps.folder import read_sweep_info, read_sweep_text
from cifar.sweeps.objectives import finite_or_none
from cifar.sweeps.optuna_tables import OptunaState
from cifar.sweeps.spec import Sweep
from cifar.sweeps.storage_errors import redact_url
from cifar.sweeps.trial_table import StoredTrial, TrialTable, parse_trial
from cifar.sweeps.trial_transactions import NUM_OFFERS, TrialTransactions
from cifar.system.files import shorten_repr
from cifar.system.names import check_id, check_name, escape_controls
from cifar.system.ownership import RunOwnedError, lease_seconds
from cifar.system.redact import redact
from cifar.system.variables import read_variable
from cifar.tracking.run_dir import RunDir, generate_id, list_folders, read_json, write_atomic

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

LISTED_METHODS = ("grid", "random")  # whose trials are all in the database from the beginning
MAX_LOOKED_AT = 1000  # waiting trials, for one that goes with others
MAX_KEPT_HEARTBEATS = 100  # of cells that do not run any more
PLACE_FILE = "place.json"  # in the sweep's folder
_CELL_DEFAULTS: dict[str, Any] = {"reason": "", "value": None, "objectives": [], "attempt": 0, "worker": ""}
# what a search learns from an ended trial: its values (COMPLETE), that it was bad (PRUNED), or nothing (FAIL, the default)
_OPTUNA_STATES = {"finished": OptunaState.COMPLETE, **dict.fromkeys(WORST_RESULT_STATES, OptunaState.PRUNED)}


def create_sweep(
    sweep: Sweep,
    runs_dir: Path,
    *,
    fixed: Mapping[str, Any],
    storage_url: str = "",
    sweep_seed: int = 0,
    count: int | None = None,
    threads: int = 0,
) -> str:
    """Check the sweep and make it -> its id. On failure nothing is left behind.

    fixed: values for all trials, which win over the file's; the dataset is known, not "auto". count: the number of trials
    where the file has none. threads: CPU threads of each trial; 0: the first agent decides.
    """
    dataset = spec.check_sweep(sweep, fixed, sweep_seed, count)
    fixed = {**fixed, "dataset": dataset}
    return create_checked_sweep(
        sweep, runs_dir, fixed=fixed, storage_url=storage_url, sweep_seed=sweep_seed, count=count, threads=threads
    )


def create_checked_sweep(
    sweep: Sweep,
    runs_dir: Path,
    *,
    fixed: Mapping[str, Any],
    storage_url: str = "",
    sweep_seed: int = 0,
    count: int | None = None,
    threads: int = 0,
) -> str:
    """`create_sweep` for a sweep whose trials have been checked with the same values. `fixed` names the dataset."""
    from cifar.sweeps.sampler import optuna_directions

    lease_seconds()  # raises UserError for a wrong CIFAR_LEASE now, and not in an agent
    if sweep.scheduler:
        sweep.scheduler.check_runs_locally()
    dataset = fixed["dataset"]
    assert dataset != "auto"
    known_trials = spec.list_known_trials(sweep, sweep_seed, count)
    sweep_id, storage_url = generate_id(), storage_url or read_variable("CIFAR_STORAGE")
    folder = runs_dir / "sweeps" / sweep_id
    info = {
        "id": sweep_id,
        "name": sweep.name,
        "created": time.time(),
        "method": sweep.method,
        "cells": len(known_trials) or spec.num_trials(sweep, count),
        "dataset": dataset,
        "dataset_reason": "",  # read by nothing
        "threads": threads,
        "sweep_seed": sweep_seed,
        "fixed": dict(fixed),
        "storage": redact_url(storage_url),
        "runs": str(runs_dir),
        "versions": {name: version(name) for name in ("optuna", "torch")} | {"python": platform.python_version()},
    }
    try:
        (folder / "logs").mkdir(parents=True)
        write_atomic(folder / "sweep.yaml", sweep.text.encode())
        database = storage.open_storage(storage_url or storage.default_url(folder))
        study = database.optuna.create_new_study(optuna_directions(spec.set_shown_metric(sweep, fixed)), sweep_id)
        table = TrialTable(database, study)
        table.insert_waiting([_attributes_of(cell, values) for cell, values in enumerate(known_trials)])
        table.add_index()
        table.write_study_attribute("sweep", {"yaml": sweep.text, "info": info})  # for other machines
        write_atomic(folder / "sweep.json", json.dumps(info, indent=1).encode())  # last: with this file the sweep exists
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"the sweep folder {folder} cannot be written ({error.strerror}); "
                "free some space or name another place with --runs-dir"
            ) from error
        raise
    return sweep_id


class LocalBackend:
    """One local sweep, opened. Many processes may call its methods at the same time."""

    def __init__(self, sweep_id: str, runs_dir: Path, storage_url: str = "") -> None:
        lease_seconds()  # raises UserError for a wrong CIFAR_LEASE
        self.id, self.runs_dir = check_id(sweep_id, "the sweep"), runs_dir
        self.folder = runs_dir / "sweeps" / sweep_id
        storage_url = storage_url or read_variable("CIFAR_STORAGE")
        if not (self.folder / "sweep.json").exists() and not (storage_url and self._fetch_definition(storage_url)):
            raise UserError(f"no sweep '{sweep_id}' in {runs_dir}; `python -m cifar sweeps list` shows what there is")
        self.info: dict[str, Any] = read_sweep_info(self.folder)
        text = read_sweep_text(self.folder)
        parsed = spec.parse_sweep(parse_yaml(text, "sweep.yaml"), text, "sweep.yaml", self.info["name"])
        self.sweep = spec.set_shown_metric(parsed, self.info["fixed"])
        self.wandb_target = {"project": self.sweep.project} if self.sweep.project else {}
        recorded_url = self.info["storage"]
        if recorded_url and "***" in recorded_url and not storage_url:
            raise UserError(f"sweep {sweep_id} is kept in {recorded_url}; give the whole URL by CIFAR_STORAGE")
        self._has_own_storage = not recorded_url  # in the sweep's folder: then all agents share the runs folder
        self._storage_url = (storage_url or recorded_url) if recorded_url else storage.default_url(self.folder)
        self.shared_storage = not self._storage_url.startswith("sqlite")
        self._storage = storage.open_storage(self._storage_url)
        study = storage.find_study(self._storage, sweep_id)
        if study is None:
            raise UserError(f"{redact_url(self._storage_url)} does not hold sweep {sweep_id}; check CIFAR_STORAGE or --storage")
        self._study = study
        self._table = TrialTable(self._storage, self._study)
        self._transactions = TrialTransactions(self._storage, self._study, sweep_id)
        self._has_claimed = False
        self._last_heartbeats: dict[int, tuple[Any, float]] = {}  # cell -> (its last heartbeat, when we first saw that)
        self._optuna_ids: dict[tuple[int, int], int] = {}  # (cell, attempt) claimed through this object -> Optuna's trial id

    def _fetch_definition(self, storage_url: str) -> bool:
        """Write the files of a sweep that another machine made, from the copy in its storage. False if it is not there."""
        database = storage.open_storage(storage_url)
        study = storage.find_study(database, self.id)
        definition = None if study is None else TrialTable(database, study).read_study_attribute("sweep")
        if definition:
            if not (isinstance(definition, dict) and isinstance(definition.get("yaml"), str)):
                raise UserError(f"what the database says of sweep {self.id} is damaged; restore it from a copy")
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "sweep.yaml", definition["yaml"].encode())
            write_atomic(self.folder / "sweep.json", json.dumps(definition["info"], indent=1).encode())
        return bool(definition)

    # -- for agents ----------------------------------------------------------------------------------------------------

    def claim_trial(
        self, worker: str, max_trials: int = 1, trial_filter: TrialFilter | None = None
    ) -> Trial | Literal["wait"] | None:
        """Claim an open cell.

        "wait": there are open cells, but other agents have them or `trial_filter` refuses them. None: the sweep is over.
        """
        if trial_filter is None and (quickly := self._claim_quickly(worker)):
            return quickly
        if self.sweep.method not in LISTED_METHODS:
            _ = self._storage.optuna  # importing it takes long, so not while others wait for the lock
        while True:
            wanted = [] if trial_filter is None else self._find_wanted(trial_filter, 1)
            with storage.lock_storage(self._storage, self.id):
                if self.stop_mode:
                    return None
                running = self._table.list_running()
                for trial in running:
                    if self._has_lapsed(trial):
                        self._give_back(trial, "its agent was lost")
                if wanted:
                    claimed = self._claim_waiting(wanted, worker)
                    if not claimed:
                        continue  # another agent was faster
                    return claimed[0]
                first = next(self._table.iterate_waiting(), None) or self._suggest_trial()
                if first is None:
                    return "wait" if running else None
                if trial_filter is not None and not trial_filter(first.values):
                    return "wait"
                return self._claim([first], worker)[0]

    def _claim_quickly(self, worker: str) -> Trial | None:
        """Claim the next cell, if nothing else is to be done first. None says nothing about the sweep."""
        offers = self._table.known_offers
        with self._transactions.begin_claim(offers) as (look, transaction):
            is_usual = not look.stop_mode and look.last_id == offers.last_id and not any(map(self._has_lapsed, look.running))
            if not is_usual or not look.open:
                return None
            if len(self._last_heartbeats) > 2 * len(look.running) + MAX_KEPT_HEARTBEATS:
                cells = {trial.cell for trial in look.running}
                self._last_heartbeats = {cell: seen for cell, seen in self._last_heartbeats.items() if cell in cells}
            stored = min(look.open, key=lambda trial: (trial.num_failures, trial.cell))
            if stored.num_failures and len(offers.unclaimed) > NUM_OFFERS:
                return None  # cells that were not tried may be among those that were not looked at
            transaction.write_claim(stored.optuna_id, _describe_claim(stored, worker))
        return self._note_claim(stored)

    def claim_more(self, worker: str, count: int, trial_filter: TrialFilter) -> list[Trial]:
        """Claim up to `count` waiting cells that the filter accepts, in one transaction, after a `claim_trial`.

        Sixteen calls of `claim_trial` take sixteen transactions, while a GPU waits. What a search suggests is not claimed so.
        """
        wanted = self._find_wanted(trial_filter, count)
        if not wanted:
            return []
        with storage.lock_storage(self._storage, self.id):
            return [] if self.stop_mode else self._claim_waiting(wanted, worker)

    def _find_wanted(self, trial_filter: TrialFilter, count: int) -> list[StoredTrial]:
        """The first waiting trials that the filter accepts, among MAX_LOOKED_AT. A filter takes time, so nothing is locked."""
        looked_at = itertools.islice(self._table.iterate_waiting(), MAX_LOOKED_AT)
        return list(itertools.islice((trial for trial in looked_at if trial_filter(trial.values)), count))

    def _claim_waiting(self, wanted: Sequence[StoredTrial], worker: str) -> list[Trial]:
        """Claim those of these trials that still wait."""
        now = self._table.read_trials([trial.optuna_id for trial in wanted])
        still = [now[trial.optuna_id] for trial in wanted if now[trial.optuna_id].state == OptunaState.WAITING]
        return self._claim(still, worker)

    def _claim(self, waiting: Sequence[StoredTrial], worker: str) -> list[Trial]:
        """Write down that this worker has these waiting cells."""
        changes = {stored.optuna_id: _describe_claim(stored, worker) for stored in waiting}
        self._table.update_trials(changes, OptunaState.RUNNING)
        return [self._note_claim(stored) for stored in waiting]

    def _note_claim(self, stored: StoredTrial) -> Trial:
        attempt = stored.attempt + 1
        self._has_claimed = True
        self._optuna_ids[stored.cell, attempt] = stored.optuna_id
        return Trial(stored.cell, stored.values, self.run_id(stored.cell), attempt)

    def peek_values(self, limit: int) -> list[dict[str, Any]] | None:
        """The values of the trials that would be claimed next, in that order, at most `limit`. Nothing is claimed.

        Without the sweep's lock, so it is no promise: another agent may claim them. A search that has not suggested its next
        trial yet has none to show. None: no more are handed out.
        """
        if self.stop_mode:
            return None
        return [trial.values for trial in itertools.islice(self._table.iterate_waiting(), limit)]

    def _suggest_trial(self) -> StoredTrial | None:
        """Add the next trial of a search; None where all are there."""
        if self._table.count_cells() >= self.info["cells"]:
            return None
        from cifar.sweeps import sampler

        trials = self._list_trials()  # the sampler gets them all
        values, params, space = sampler.suggest_trial(self.sweep, trials, self.info["sweep_seed"])
        suggested = _make_waiting_trial(_attributes_of(len(trials), values), params, space)
        self._storage.optuna.create_new_trial(self._study, suggested)
        return next(self._table.iterate_waiting(), None)

    def heartbeat(self, trial: Trial) -> Literal["go", "stop", "lost"]:
        """Renew the claim on a trial. "stop": the sweep was cancelled; "lost": another agent has the trial."""
        return self.heartbeats([trial])[0]

    def heartbeats(self, trials: Sequence[Trial]) -> list[Literal["go", "stop", "lost"]]:
        """`heartbeat` of several trials, in one transaction: eight GPUs may have more than a hundred."""
        if not trials:
            return []
        with storage.lock_storage(self._storage, self.id):
            found = self._find_all_claimed(trials)
            beat = time.time()
            self._table.update_trials(
                {
                    stored.optuna_id: {**stored.now, "beat": f"{trial.attempt}.{beat}"}
                    for trial, stored in zip(trials, found, strict=True)
                    if stored
                }
            )
            answer: Literal["go", "stop"] = "stop" if self.stop_mode == "cancel" else "go"
            return ["lost" if stored is None else answer for stored in found]

    def report_metric(self, trial: Trial, history: Mapping[int, float], best: float, epochs: int) -> bool:
        """Whether the trial goes on, by early stopping.

        history: rung epoch -> the metric there, for the rungs up to now; best: the best value of all epochs up to now.
        Optuna cannot prune trials of several objectives, so with those our rule judges by validation accuracy.
        """
        early_stopping, metric = self.sweep.early_stopping, self.sweep.metric
        rung = max(history, default=0)
        if early_stopping is None or rung not in early_stopping.rung_epochs(epochs):
            return True
        database = self._storage.optuna  # importing it takes long, so not while others wait for the lock
        with storage.lock_storage(self._storage, self.id):
            stored = self._find_claimed(trial)
            if stored is None:
                return True  # the next heartbeat tells the agent
            for epoch, value in history.items():
                database.set_trial_intermediate_value(stored.optuna_id, epoch, value)
            peers = [metric.as_cost(value) for value in self._table.list_values_at(rung)]
        return early_stopping.should_continue(metric.as_cost(history[rung]), metric.as_cost(best), peers)

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
        """Write down how a trial ended -> the cell's state now.

        "interrupted" and "preempted": it is open again; "lost": another agent has it, and nothing was written.
        objectives: one value for each metric of the file [default: `value` alone]; retry: whether another try can help, of
        which there are MAX_RETRIES at most [default: if it was killed].
        """
        objectives, reason = list(objectives or [value]), escape_controls(redact(reason), keeps_lines=True)
        if quickly := self._finish_quickly(trial, state, value, reason, objectives):
            self._optuna_ids.pop((trial.cell, trial.attempt), None)  # else an agent would grow with its sweep
            return quickly
        with storage.lock_storage(self._storage, self.id):
            stored = self._find_claimed(trial)
            if stored is None:
                return "lost"
            is_given_back, is_failure = state in GIVEN_BACK_STATES, state in FAILURE_STATES
            num_failures = stored.num_failures + is_failure
            is_retried = is_failure and num_failures <= MAX_RETRIES and (state == "killed" if retry is None else retry)
            if (is_given_back or is_retried) and not self.stop_mode:
                return self._give_back(stored, reason, state=state if is_given_back else "interrupted", kills=num_failures)
            state = "stopped" if is_given_back else state
            self._end_trial(stored, state, value, reason, objectives)
            if state == "finished" and self.sweep.targets_met(objectives):
                self._stop_claims("the metric's target was reached")
            return state

    def _finish_quickly(
        self, trial: Trial, state: str, value: float | None, reason: str, objectives: Sequence[float | None]
    ) -> str:
        """`finish_trial` where nothing follows from the end but that it is written down; "" where more may follow."""
        optuna_id = self._optuna_ids.get((trial.cell, trial.attempt))
        ends_sweep = state == "finished" and self.sweep.targets_met(objectives)
        if optuna_id is None or ends_sweep or state in GIVEN_BACK_STATES or state in FAILURE_STATES:
            return ""
        now, optuna_state, values = self._describe_end(trial.cell, state, value, reason, objectives)
        with self._transactions.begin_end(optuna_id) as (stored, transaction):
            if not _is_claimed(stored, trial):
                return "lost"
            transaction.write_end(optuna_id, {**stored.now, **now}, optuna_state, values)
        return state

    # -- for people ----------------------------------------------------------------------------------------------------

    @property
    def stop_mode(self) -> str:
        """ "" while the sweep hands out trials, else "stop" or "cancel"."""
        return str(self._table.read_study_attribute("stopped") or "")

    def stop_sweep(self, *, cancel: bool = False) -> None:
        """Hand out no more trials. Running ones may finish; with `cancel` they end at their agent's next heartbeat."""
        with storage.lock_storage(self._storage, self.id):
            self._stop_claims("cancelled by request" if cancel else "stopped by request", cancel=cancel)

    def list_cells(self, state: str = "") -> list[dict[str, Any]]:
        """Every cell: cell, run_id, state, reason, values, value, attempt, worker. `state`: only those of that state."""
        return [self._describe_cell(trial) for trial in self._table.list_trials() if state in ("", trial.trial_state)]

    def list_cells_without_folder(self) -> list[dict[str, Any]]:
        """The cells that came to their own end here and whose run's folder is gone: removed or moved away.

        A run of another runs folder is not among them. Nor is one behind a link whose disk is not there.
        """
        return self.list_cells_and_lost()[1]

    def list_cells_and_lost(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """`list_cells` and `list_cells_without_folder`, of trials that are read once."""
        trials = self._table.list_trials()
        cells = [self._describe_cell(trial) for trial in trials]
        return cells, [cell for trial, cell in zip(trials, cells, strict=True) if self._has_lost_folder(trial)]

    def list_all_cells(self) -> list[dict[str, Any]]:
        """`list_cells`. Other engines know here what they have to ask for."""
        return self.list_cells()

    def list_swept_keys(self, cells: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
        """The keys by which the sweep's trials are told apart: those in which all cells, old and new, differ.

        `cells`: what `list_cells` has just returned, so that they need not be read again.
        """
        cells = self.list_cells() if cells is None else cells
        return spec.list_swept_keys(self.sweep, [cell["values"] for cell in cells], self.info["fixed"])

    def count_states(self, cells: Sequence[Mapping[str, Any]] | None = None) -> dict[str, int]:
        """State -> number of cells. Cells that Bayesian search has not suggested yet are waiting. `cells`: as above."""
        counted = Counter(self._table.count_states() if cells is None else [cell["state"] for cell in cells])
        if self._has_claimed:  # others only look
            self._table.keep_counts()
        if cells is None and not set(counted) <= set(TRIAL_STATES):  # a damaged trial: the list says which
            counted = Counter(cell["state"] for cell in self.list_cells())
        if not self.stop_mode:
            # Negative where another process has extended the sweep.
            counted["waiting"] += max(0, self.info["cells"] - counted.total())
        return {state: counted[state] for state in TRIAL_STATES if counted[state]}

    def retry_cells(self) -> int:
        """Offer the failed, killed and diverged cells once more, and those whose run's folder is gone -> how many.

        They keep their run ids. A run goes on from its checkpoint where there is one. One that diverged starts anew. What the
        database knew of a cell before stays there as history.
        """
        with storage.lock_storage(self._storage, self.id):
            cells = [
                (trial, is_gone)
                for trial in self._table.list_trials()
                if (is_gone := self._has_lost_folder(trial)) or trial.trial_state in RETRIABLE_STATES
            ]
            for trial, is_gone in cells:
                run_dir = RunDir(self.runs_dir / self.run_id(trial.cell))
                if run_dir.path.exists() and not is_gone:  # it is elsewhere if the runs folder is not shared
                    with contextlib.suppress(RunOwnedError), run_dir.own("reset", wait=False):
                        if trial.trial_state == "diverged":
                            run_dir.remove_file("checkpoint.pt")
                            run_dir.truncate_metrics(0)
                        run_dir.set_status("interrupted", reason="to be tried again")
            self._offer_again([trial for trial, _ in cells])
            if cells:
                self._reopen_sweep()
        return len(cells)

    def extend_sweep(self, file: Path) -> int:
        """Add the cells of another grid that are not there yet -> how many. All other cells stay as they are.

        Two cells are the same if their whole configurations are, so a parameter may be added with its default among its values.
        """
        fixed = self.info["fixed"]
        new = spec.set_shown_metric(spec.read_sweep(file), fixed)
        if self.sweep.method != "grid" or new.method != "grid":
            raise UserError(f"a {self.sweep.method} sweep is not extended by a {new.method} one: both have to be method: grid")
        if new.metric != self.sweep.metric:
            raise UserError(f"{file}: metric is {new.metric.name} ({new.metric.goal}); the sweep's is {self.sweep.metric.name}")
        spec.check_sweep(new, fixed, self.info["sweep_seed"])
        with storage.lock_storage(self._storage, self.id):
            known = self.list_cells()
            known_keys = {_configuration_key(cell["values"], fixed) for cell in known}
            added = [values for values in spec.list_grid_cells(new) if _configuration_key(values, fixed) not in known_keys]
            if not added:
                return 0
            if spec.is_final(fixed):
                spec.check_final_cells([*(cell["values"] for cell in known), *added], str(file))
            numbered = enumerate(added, start=len(known))
            self._table.insert_waiting([_attributes_of(cell, values, _make_offer(0)) for cell, values in numbered])
            backup = self.folder / f"sweep-{len(list(self.folder.glob('sweep*.yaml')))}.yaml"
            with contextlib.suppress(FileExistsError):
                backup.hardlink_to(self.folder / "sweep.yaml")
            self.info["cells"] = len(known) + len(added)
            write_atomic(self.folder / "sweep.yaml", new.text.encode())
            write_atomic(self.folder / "sweep.json", json.dumps(self.info, indent=1).encode())
            self._publish_definition(new.text)
            self._reopen_sweep()
        return len(added)

    def agree_on_threads(self, threads: int) -> int:
        """The CPU threads of each trial: as the first agent proposes, then the same for all agents."""
        with storage.lock_storage(self._storage, self.id):
            agreed = self._table.read_study_attribute("threads") or self.info["threads"]
            if agreed and (type(agreed) is not int or not 1 <= agreed <= MAX_THREADS):
                raise UserError(f"the sweep's database says threads: {shorten_repr(agreed)}; restore the database from a copy")
            if not agreed:
                self._table.write_study_attribute("threads", threads)
            self.info["threads"] = agreed or threads
            write_atomic(self.folder / "sweep.json", json.dumps(self.info, indent=1).encode())
            return int(agreed or threads)

    def pop_messages(self) -> list[str]:
        return []

    def close(self) -> None: ...

    def run_id(self, cell: int) -> str:
        return f"{self.id}-{cell:03d}"

    # -- under the lock ------------------------------------------------------------------------------------------------

    def _describe_cell(self, trial: StoredTrial) -> dict[str, Any]:
        return {
            "cell": trial.cell,
            "run_id": self.run_id(trial.cell),
            "state": trial.trial_state,
            "values": trial.values,
            **{name: trial.now.get(name, empty) for name, empty in _CELL_DEFAULTS.items()},
        }

    def _has_lost_folder(self, trial: StoredTrial) -> bool:
        """Whether the cell came to its own end in this runs folder, and the run's folder is gone."""
        if trial.trial_state not in CONCLUSIVE_STATES:
            return False
        folder = f"{self.runs_dir}/{self.run_id(trial.cell)}"
        if os.path.exists(f"{folder}/status.json") or RunDir(Path(folder)).exists():  # the first asks less, of thousands
            return False
        place = trial.now.get("place")
        if self._has_own_storage:
            return place is None or bool(place)  # None: an earlier version has written it; "": there was no folder
        return bool(place) and place == self._read_place()

    def _offer_again(self, ended: Sequence[StoredTrial]) -> None:
        """Offer ended cells again. A search goes on knowing a cell by the parameters of its last trial."""
        offers = [_attributes_of(trial.cell, trial.values, _make_offer(trial.attempt)) for trial in ended]
        if self.sweep.method in LISTED_METHODS:
            self._table.insert_waiting(offers)
            return
        for trial, offer in zip(ended, offers, strict=True):
            before = self._storage.optuna.get_trial(trial.optuna_id)
            waiting = _make_waiting_trial(offer, before.params, before.distributions)
            self._storage.optuna.create_new_trial(self._study, waiting)

    def _read_place(self, *, create: bool = False) -> str:
        """The id of this runs folder, as far as this sweep knows it. "" if there is none, or if its file is damaged."""
        file = self.folder / PLACE_FILE
        with contextlib.suppress(UserError, OSError):
            if place := str(read_json(file).get("id") or ""):
                return place
        with contextlib.suppress(OSError):
            if create:
                place = generate_id()
                write_atomic(file, json.dumps({"id": place}).encode())
                return place
        return ""

    def _reopen_sweep(self) -> None:
        """Hand out trials again, whatever has stopped the sweep."""
        self._table.write_study_attribute("stopped", "")

    def _publish_definition(self, text: str) -> None:
        """Write the sweep's definition to the storage, for other machines."""
        self._table.write_study_attribute("sweep", {"yaml": text, "info": self.info})

    def _list_trials(self) -> list[FrozenTrial]:
        """One trial for each cell, as Optuna's samplers take them. Of a cell that was offered again, the latest."""
        trials = sorted(self._storage.optuna.get_all_trials(self._study, deepcopy=False), key=lambda trial: trial.number)
        latest = {parse_trial(t._trial_id, t.number, OptunaState(t.state), t.user_attrs).cell: t for t in trials}
        return [latest[cell] for cell in sorted(latest)]

    def _update_trial(self, trial: StoredTrial, optuna_state: OptunaState | None = None, **changes: Any) -> None:
        self._table.update_trial(trial.optuna_id, {**trial.now, **changes}, optuna_state)

    def _find_claimed(self, trial: Trial) -> StoredTrial | None:
        """The stored trial, or None if the claim is not valid any more."""
        return self._find_all_claimed([trial])[0]

    def _find_all_claimed(self, trials: Sequence[Trial]) -> list[StoredTrial | None]:
        """The same for several trials."""
        ids = [self._optuna_ids.get((trial.cell, trial.attempt)) for trial in trials]
        known = self._table.read_trials([optuna_id for optuna_id in ids if optuna_id is not None])
        running = {stored.cell: stored for stored in self._table.list_running()} if None in ids else {}
        found: list[StoredTrial | None] = []
        for trial, optuna_id in zip(trials, ids, strict=True):
            stored = running.get(trial.cell) if optuna_id is None else known[optuna_id]  # None: through another LocalBackend
            found.append(stored if stored is not None and _is_claimed(stored, trial) else None)
        return found

    def _has_lapsed(self, trial: StoredTrial) -> bool:
        last_heartbeat, now = trial.now.get("beat"), time.monotonic()
        if self._optuna_ids.get((trial.cell, trial.attempt)) == trial.optuna_id:
            return False  # our own claim: however long this process was suspended, no other agent has the trial
        if trial.cell not in self._last_heartbeats or self._last_heartbeats[trial.cell][0] != last_heartbeat:
            # When we first saw it, by our own clock: the clocks of two machines differ.
            self._last_heartbeats[trial.cell] = (last_heartbeat, now)
        return now - self._last_heartbeats[trial.cell][1] > lease_seconds()

    def _give_back(self, trial: StoredTrial, reason: str, **changes: Any) -> str:
        state = changes.pop("state", "interrupted")
        self._update_trial(trial, OptunaState.WAITING, state=state, reason=reason, **changes)
        return str(state)

    def _end_trial(
        self, trial: StoredTrial, state: str, value: float | None, reason: str, objectives: Sequence[float | None] = ()
    ) -> None:
        now, optuna_state, values = self._describe_end(trial.cell, state, value, reason, objectives)
        self._table.end_trial(trial.optuna_id, {**trial.now, **now}, optuna_state, values)

    def _describe_end(
        self, cell: int, state: str, value: float | None, reason: str, objectives: Sequence[float | None]
    ) -> tuple[dict[str, Any], OptunaState, list[float] | None]:
        """What is written at an end: what changes of the trial, Optuna's state, and its values."""
        if value is not None and not math.isfinite(value):
            value = None
        values = finite_or_none(objectives) if state == "finished" else None
        place = self._note_place(cell)
        now = {"state": state, "reason": reason, "value": value, "objectives": values or [], "place": place}
        # Optuna has no COMPLETE trial without values; our own `state` says what it is
        optuna_state = _OPTUNA_STATES.get(state, OptunaState.FAIL) if state != "finished" or values else OptunaState.FAIL
        return now, optuna_state, values

    def _note_place(self, cell: int) -> str:
        """The id of this runs folder if the cell's run is in it, else ""."""
        has_folder = RunDir(self.runs_dir / self.run_id(cell)).exists()
        return self._read_place(create=True) if has_folder else ""

    def _stop_claims(self, reason: str, *, cancel: bool = False) -> None:
        self._table.write_study_attribute("stopped", "cancel" if cancel else "stop")
        how: dict[str, Any] = {"state": "stopped", "reason": reason, "value": None, "objectives": []}
        waiting = self._table.iterate_waiting()
        ended = {trial.optuna_id: {**trial.now, **how, "place": self._note_place(trial.cell)} for trial in waiting}
        self._table.end_waiting(ended, OptunaState.FAIL)


def _describe_claim(stored: StoredTrial, worker: str) -> dict[str, Any]:
    """What a trial's `now` says when a worker has claimed it."""
    attempt = stored.attempt + 1
    return {**stored.now, "attempt": attempt, "worker": worker, "beat": f"{attempt}.0", "state": "running", "reason": ""}


def _is_claimed(stored: StoredTrial, trial: Trial) -> bool:
    """Whether the claim is the one that counts."""
    return stored.state == OptunaState.RUNNING and stored.attempt == trial.attempt


def _attributes_of(cell: int, values: Mapping[str, Any], now: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The user attributes of a new trial. `now`: what has become of its cell already; None for a new cell."""
    return {"cell": cell, "values": dict(values)} | ({"now": dict(now)} if now is not None else {})


def _make_offer(attempt: int) -> dict[str, Any]:
    """What changes of a trial, at the beginning. `attempt`: of the cell's last claim."""
    return {"state": "waiting", "attempt": attempt}


def _make_waiting_trial(attributes: Mapping[str, Any], params: Mapping[str, Any], space: Mapping[str, Any]) -> FrozenTrial:
    """A trial of a search."""
    from optuna.trial import TrialState, create_trial

    return create_trial(state=TrialState.WAITING, params=dict(params), distributions=dict(space), user_attrs=dict(attributes))


def list_sweeps(runs_dir: Path, damaged: list[tuple[str, str]] | None = None) -> list[dict[str, Any]]:
    """The sweep.json of every local sweep, oldest first. `damaged` gets (id, what is wrong) of those that cannot be read."""
    found = []
    for folder in list_folders(runs_dir / "sweeps"):
        if (folder / "sweep.json").exists():
            try:
                found.append(read_sweep_info(folder))
            except UserError as error:  # it also raises for the command that names it
                if damaged is not None:
                    damaged.append((folder.name, str(error)))
    return sorted(found, key=lambda info: float(info["created"]))


def find_sweep_id(name: str, runs_dir: Path) -> str:
    """The id of the sweep with this id, name or unique start of an id; `name` itself if there is none."""
    check_name(name, "the sweep")
    sweeps = list_sweeps(runs_dir)
    exact = [info["id"] for info in sweeps if name in (info["id"], info["name"])]
    matches = exact or [info["id"] for info in sweeps if info["id"].startswith(name)]
    if len(matches) > 1:
        raise UserError(f"'{name}' fits {len(matches)} sweeps ({', '.join(matches[:6])}); give the id")
    return matches[0] if matches else name


def _configuration_key(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> str:
    """The same text for trials whose whole configurations are the same."""
    return repr(sorted(spec.resolve_trial(values, fixed).to_dict().items(), key=lambda item: item[0]))
