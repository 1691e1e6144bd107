"""Where a local sweep's trials come from: an Optuna storage, one Optuna trial for each cell.

A claim happens under a lock (a lock file beside a SQLite file, an advisory lock in PostgreSQL), so that a cell is handed
out once. Who holds a cell beats; when the beat has not moved for a lease, watched by one's own clock, the cell is open
again, with the same run id. Every claim has a number, and who comes back late with an old one is told that it is lost.

    <runs>/sweeps/<id>/   sweep.yaml (word for word) · sweep.json · study.db · logs/
"""

from __future__ import annotations

import contextlib
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
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from cifar import data
from cifar.config.resolve import parse_yaml
from cifar.errors import UserError
from cifar.sweeps import sampler as search
from cifar.sweeps import spec as sweeps
from cifar.sweeps import storage
from cifar.sweeps.backend import RETRIES, STATES, Like, Trial
from cifar.sweeps.objectives import whole
from cifar.sweeps.spec import Sweep
from cifar.tracking.run_dir import new_id, read_json, write_atomic

_SHOWN: dict[str, Any] = {"reason": "", "value": None, "objectives": [], "attempt": 0, "worker": ""}
# what a search learns from an end: values, that it was bad, or nothing
_OPTUNA = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "skipped": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


def lease() -> float:
    """Seconds without a beat after which a cell is offered again."""
    return float(os.environ.get("CIFAR_LEASE", "15"))


def create(
    sweep: Sweep,
    runs: Path,
    *,
    fixed: Mapping[str, Any],
    data_dir: Path | None = None,
    url: str = "",
    sweep_seed: int = 0,
    count: int | None = None,
    threads: int = 0,
) -> str:
    """Check the sweep, settle its dataset, and make it. Returns its id; on failure nothing is left behind."""
    if sweep.scheduler:
        sweep.scheduler.check_here()
    dataset, reason = sweeps.check(sweep, fixed, sweep_seed, count), ""
    if dataset == "auto":
        dataset, reason = data.resolve_auto(data_dir)
    known = sweeps.trials(sweep, sweep_seed, count)
    sweep_id, url = new_id(), url or os.environ.get("CIFAR_STORAGE", "")
    folder = runs / "sweeps" / sweep_id
    info = {
        "id": sweep_id,
        "name": sweep.name,
        "created": time.time(),
        "method": sweep.method,
        "cells": len(known) or sweeps.end(sweep, count),
        "dataset": dataset,
        "dataset_reason": reason,
        "threads": threads,  # 0: the first agent settles it
        "sweep_seed": sweep_seed,
        "fixed": {**fixed, "dataset": dataset},
        "storage": storage.redacted(url),
        "runs": str(runs),
        "versions": {name: version(name) for name in ("optuna", "torch")} | {"python": platform.python_version()},
    }
    try:
        (folder / "logs").mkdir(parents=True)
        write_atomic(folder / "sweep.yaml", sweep.text.encode())
        backend = storage.open(url or storage.default(folder))
        study = backend.create_new_study(search.directions(sweep), sweep_id)
        for cell, values in enumerate(known):
            backend.create_new_trial(study, _waiting(cell, values))
        backend.set_study_user_attr(study, "sweep", {"yaml": sweep.text, "info": info})  # for other machines
        write_atomic(folder / "sweep.json", json.dumps(info, indent=1).encode())  # last: now the sweep is there
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"the sweep folder {folder} cannot be written ({error.strerror}); "
                "free some space or name another place with --runs-dir"
            ) from error
        raise
    return sweep_id


class Local:
    """One local sweep, opened. Every method may be called by many processes at once."""

    def __init__(self, sweep_id: str, runs: Path, url: str = "") -> None:
        self.id, self.runs, self.folder = sweep_id, runs, runs / "sweeps" / sweep_id
        url = url or os.environ.get("CIFAR_STORAGE", "")
        if not (self.folder / "sweep.json").exists() and not (url and self._join(url)):
            raise UserError(f"no sweep '{sweep_id}' in {runs}; `python -m cifar sweeps list` shows what there is")
        self.info: dict[str, Any] = read_json(self.folder / "sweep.json")
        text = (self.folder / "sweep.yaml").read_text(encoding="utf-8")
        self.sweep = sweeps.parse(parse_yaml(text, "sweep.yaml"), text, "sweep.yaml", self.info["name"])
        self.place = {"project": self.sweep.project} if self.sweep.project else {}
        known = self.info["storage"]
        if known and "***" in known and not url:
            raise UserError(f"sweep {sweep_id} is kept in {known}; give the whole URL by CIFAR_STORAGE")
        self._url = (url or known) if known else storage.default(self.folder)
        self.afar = not self._url.startswith("sqlite")
        self._storage = storage.open(self._url)
        try:
            self._study = self._storage.get_study_id_from_name(sweep_id)
        except KeyError:
            raise UserError(
                f"{storage.redacted(self._url)} does not hold sweep {sweep_id}; check CIFAR_STORAGE or --storage"
            ) from None
        self._seen: dict[int, tuple[Any, float]] = {}  # cell -> its last beat and when we first saw that
        self._keys: dict[tuple[int, int], int] = {}  # (cell, attempt) that was claimed here -> Optuna's key

    def _join(self, url: str) -> bool:
        """Another machine's sweep: its definition is in the storage too."""
        backend = storage.open(url)
        try:
            kept = backend.get_study_user_attrs(backend.get_study_id_from_name(self.id)).get("sweep")
        except KeyError:
            return False
        if kept:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "sweep.yaml", kept["yaml"].encode())
            write_atomic(self.folder / "sweep.json", json.dumps(kept["info"], indent=1).encode())
        return bool(kept)

    # -- what a worker asks --

    def claim(self, worker: str, most: int = 1, like: Like | None = None) -> Trial | Literal["wait"] | None:
        """An open cell, "wait" while only others' are open, or such that are not `like`; None at the sweep's end."""
        with storage.locked(self._storage, self.id):
            if self.stopped:
                return None
            trials = self._trials()
            lapsed = [trial for trial in trials if trial.state == TrialState.RUNNING and self._lapsed(trial)]
            for trial in lapsed:
                self._give_back(trial, "its agent was lost")
            if lapsed:
                trials = self._trials()
            waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
            if not waiting and len(trials) < self.info["cells"]:
                suggested = search.suggest(self.sweep, trials, self.info["sweep_seed"])
                self._storage.create_new_trial(self._study, _waiting(len(trials), *suggested))
                waiting = [trial for trial in self._trials() if trial.state == TrialState.WAITING]
            if not waiting:
                return "wait" if any(trial.state == TrialState.RUNNING for trial in trials) else None
            waiting = [trial for trial in waiting if like is None or like(trial.user_attrs["values"])]
            if not waiting:
                return "wait"
            chosen = min(waiting, key=lambda trial: _now(trial).get("kills", 0))  # what failed comes last
            attempt = _now(chosen).get("attempt", 0) + 1
            self._set(chosen, attempt=attempt, worker=worker, beat=f"{attempt}.0", state="running", reason="")
            self._storage.set_trial_state_values(chosen._trial_id, TrialState.RUNNING)
            cell = _cell(chosen)
            self._keys[cell, attempt] = chosen._trial_id
            return Trial(cell, chosen.user_attrs["values"], self.run_id(cell), attempt)

    def beat(self, trial: Trial) -> Literal["go", "stop", "lost"]:
        """Hold on to the trial. "stop": the sweep was cancelled; "lost": it is somebody else's by now."""
        with storage.locked(self._storage, self.id):
            held = self._held(trial)
            if held is None:
                return "lost"
            self._set(held, beat=f"{trial.attempt}.{time.time()}")
            return "stop" if self.stopped == "cancel" else "go"

    def report(self, trial: Trial, history: Mapping[int, float], best: float, epochs: int) -> bool:
        """The metric after some epochs (the rungs up to now) -> whether the trial goes on. `best`: of all its epochs.

        Optuna cannot prune trials of several objectives; our own rule looks at validation accuracy there.
        """
        early, metric = self.sweep.early, self.sweep.metric
        band = max(history, default=0)
        if early is None or band not in early.rungs(epochs):
            return True
        with storage.locked(self._storage, self.id):
            held = self._held(trial)
            if held is None:
                return True  # the next beat says so
            for epoch, value in history.items():
                self._storage.set_trial_intermediate_value(held._trial_id, epoch, value)
            peers = [metric.worse(t.intermediate_values[band]) for t in self._trials() if band in t.intermediate_values]
        return early.goes_on(metric.worse(history[band]), metric.worse(best), peers)

    def finish(
        self,
        trial: Trial,
        state: str,
        value: float | None = None,
        reason: str = "",
        *,
        objectives: Sequence[float | None] = (),
        retry: bool | None = None,
    ) -> str:
        """How a trial ended -> the cell's state now: "interrupted" and "preempted" are open again, "lost" is somebody else's.

        `objectives`: one a metric of the file [default: `value` alone]; `retry`: whether another try can help, RETRIES times
        at most [default: if it was killed].
        """
        objectives = list(objectives or [value])
        with storage.locked(self._storage, self.id):
            held = self._held(trial)
            if held is None:
                return "lost"
            given_back, bad = state in ("interrupted", "preempted"), state in ("failed", "killed")
            kills = _now(held).get("kills", 0) + bad
            again = bad and kills <= RETRIES and (state == "killed" if retry is None else retry)
            if (given_back or again) and not self.stopped:
                return self._give_back(held, reason, state=state if given_back else "interrupted", kills=kills)
            state = "stopped" if state in ("interrupted", "preempted") else state
            self._end(held, state, value, reason, objectives)
            if state == "finished" and self.sweep.reached(objectives):
                self._stop("the metric's target was reached")
            return state

    # -- what a person asks --

    @property
    def stopped(self) -> str:
        """ "" while the sweep hands out trials, else "stop" or "cancel"."""
        return str(self._storage.get_study_user_attrs(self._study).get("stopped", ""))

    def stop(self, *, cancel: bool = False) -> None:
        """Hand out nothing more. What runs is let finish, or with `cancel` ends at its agent's next beat."""
        with storage.locked(self._storage, self.id):
            self._stop("cancelled by request" if cancel else "stopped by request", cancel=cancel)

    def cells(self) -> list[dict[str, Any]]:
        """Every cell: cell, run_id, state, reason, values, value, attempt, worker."""
        return [
            {
                "cell": _cell(trial),
                "run_id": self.run_id(_cell(trial)),
                "state": _state(trial),
                "values": trial.user_attrs["values"],
                **{name: _now(trial).get(name, empty) for name, empty in _SHOWN.items()},
            }
            for trial in self._trials()
        ]

    def counts(self) -> dict[str, int]:
        """State -> number of cells; cells that Bayesian search has not made up yet are waiting."""
        trials = self._trials()
        counted = Counter(_state(trial) for trial in trials)
        if not self.stopped:
            counted["waiting"] += max(0, self.info["cells"] - len(trials))  # another process may have extended it
        return {state: counted[state] for state in STATES if counted[state]}

    def offer(self, cell: int, values: Mapping[str, Any], **now: Any) -> None:
        """A new cell, or one that has ended once more. Under the lock."""
        trial = _waiting(cell, values)
        trial.set_user_attr("now", {"state": "waiting", **now})
        self._storage.create_new_trial(self._study, trial)

    def reopen(self) -> None:
        """Hand out trials again, whatever stopped the sweep."""
        self._storage.set_study_user_attr(self._study, "stopped", "")

    def publish(self, text: str) -> None:
        """The sweep's definition for other machines."""
        self._storage.set_study_user_attr(self._study, "sweep", {"yaml": text, "info": self.info})

    def settle_threads(self, threads: int) -> int:
        """The CPU threads of each trial: of the first agent that asks, then the same for all."""
        with storage.locked(self._storage, self.id):
            kept = self._storage.get_study_user_attrs(self._study).get("threads") or self.info["threads"]
            if not kept:
                self._storage.set_study_user_attr(self._study, "threads", threads)
            self.info["threads"] = kept or threads
            write_atomic(self.folder / "sweep.json", json.dumps(self.info, indent=1).encode())
            return int(kept or threads)

    def news(self) -> list[str]:
        return []

    def close(self) -> None: ...

    def run_id(self, cell: int) -> str:
        return f"{self.id}-{cell:03d}"

    # -- inside, under the lock --

    def _trials(self) -> list[FrozenTrial]:
        """One a cell: of a cell that was offered again, the latest."""
        trials = sorted(self._storage.get_all_trials(self._study, deepcopy=False), key=lambda trial: trial.number)
        return sorted({_cell(trial): trial for trial in trials}.values(), key=_cell)

    def _set(self, trial: FrozenTrial, **changes: Any) -> None:
        self._storage.set_trial_user_attr(trial._trial_id, "now", {**_now(trial), **changes})

    def _held(self, trial: Trial) -> FrozenTrial | None:
        """The trial as it is stored, while the claim is still good."""
        key = self._keys.get((trial.cell, trial.attempt))
        if key is None:  # claimed through another object than this one
            key = next(stored._trial_id for stored in self._trials() if _cell(stored) == trial.cell)
        stored = self._storage.get_trial(key)
        return stored if stored.state == TrialState.RUNNING and _now(stored)["attempt"] == trial.attempt else None

    def _lapsed(self, trial: FrozenTrial) -> bool:
        beat, now = _now(trial).get("beat"), time.monotonic()
        if self._keys.get((_cell(trial), _now(trial).get("attempt", 0))) == trial._trial_id:
            return False  # our own: however long we were stopped, nobody else has it
        if self._seen.get(_cell(trial), (None,))[0] != beat:
            self._seen[_cell(trial)] = (beat, now)  # clocks of two machines differ: only one's own is compared
        return now - self._seen[_cell(trial)][1] > lease()

    def _give_back(self, trial: FrozenTrial, reason: str, **changes: Any) -> str:
        state = changes.pop("state", "interrupted")
        self._set(trial, state=state, reason=reason, **changes)
        self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        return str(state)

    def _end(
        self, trial: FrozenTrial, state: str, value: float | None, reason: str, objectives: Sequence[float | None] = ()
    ) -> None:
        if value is not None and not math.isfinite(value):
            value = None
        values = whole(objectives) if state == "finished" else None
        self._set(trial, state=state, reason=reason, value=value, objectives=values or [])
        # Optuna has no finished trial without values; our own `state` says what it is
        optuna_state = _OPTUNA.get(state, TrialState.FAIL) if state != "finished" or values else TrialState.FAIL
        self._storage.set_trial_state_values(trial._trial_id, optuna_state, values)

    def _stop(self, reason: str, *, cancel: bool = False) -> None:
        self._storage.set_study_user_attr(self._study, "stopped", "cancel" if cancel else "stop")
        for trial in self._trials():
            if trial.state == TrialState.WAITING:
                self._end(trial, "stopped", None, reason)


def _waiting(
    cell: int, values: Mapping[str, Any], params: Mapping[str, Any] | None = None, space: Mapping[str, Any] | None = None
) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=TrialState.WAITING,
        params=dict(params or {}),
        distributions=dict(space or {}),
        user_attrs={"cell": cell, "values": dict(values)},
    )


def _cell(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get("cell", trial.number))


def _state(trial: FrozenTrial) -> str:
    return "running" if trial.state == TrialState.RUNNING else str(_now(trial).get("state", "waiting"))


def _now(trial: FrozenTrial) -> dict[str, Any]:
    """What changes of a trial, in one attribute to change at once: attempt, worker, beat, kills, state, reason, value."""
    return dict(trial.user_attrs.get("now", {}))


def listing(runs: Path) -> list[dict[str, Any]]:
    """Every local sweep, oldest first: what is in its sweep.json."""
    found = []
    for path in (runs / "sweeps").glob("*/sweep.json"):
        with contextlib.suppress(UserError):  # a damaged one is named to whoever asks for it
            found.append(read_json(path))
    return sorted((info for info in found if "created" in info), key=lambda info: float(info["created"]))


def resolve(name: str, runs: Path) -> str:
    """A sweep's id from its id, its name or the start of its id, where only one fits."""
    known = listing(runs)
    exact = [info["id"] for info in known if name in (info["id"], info["name"])]
    fits = exact or [info["id"] for info in known if info["id"].startswith(name)]
    if len(fits) > 1:
        raise UserError(f"'{name}' fits {len(fits)} sweeps ({', '.join(fits[:6])}); give the id")
    return fits[0] if fits else name
