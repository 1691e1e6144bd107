"""Random histories of a local sweep, and what its database must say: computed from all of Optuna's trials, the long way.

It is the oracle of `cifar.sweeps.trial_table`, which asks the database for the parts.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from cifar.states import TRIAL_STATES
from cifar.sweeps import storage, trial_counts, trial_table, trial_transactions
from cifar.sweeps.local import LocalBackend, Trial
from cifar.tracking.run_dir import RunDir
from helpers.local_sweeps import METRIC, create_local_sweep

ENDS = ("finished", "failed", "killed", "diverged", "pruned", "skipped", "stopped", "interrupted", "preempted")
TEXT = f"method: grid\n{METRIC}parameters:\n  model: {{value: conv}}\n  seed: {{values: [0, 1, 2]}}\n  lr: {{values: [1, 2]}}\n"
LARGER = TEXT.replace("[1, 2]", "[1, 2, 3]")


def list_latest(backend: LocalBackend) -> list[FrozenTrial]:
    """The latest trial of each cell, by cell."""
    trials = sorted(backend._storage.optuna.get_all_trials(backend._study), key=lambda trial: trial.number)
    latest = {trial.user_attrs["cell"]: trial for trial in trials}
    return [latest[cell] for cell in sorted(latest)]


def state_of(trial: FrozenTrial) -> str:
    return "running" if trial.state == OptunaState.RUNNING else trial.user_attrs.get("now", {}).get("state", "waiting")


def order_of_claims(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that can be claimed. Cells that failed come last, else they are handed out by cell."""
    waiting = [trial for trial in trials if trial.state == OptunaState.WAITING]
    return sorted(waiting, key=lambda trial: trial.user_attrs.get("now", {}).get("kills", 0))


def check_answers(backend: LocalBackend) -> None:
    """Compare all that the table answers with what all trials say."""
    trials, table = list_latest(backend), backend._table
    cells = [(t._trial_id, t.number, t.state, t.user_attrs["cell"], t.user_attrs["values"]) for t in trials]
    found = table.list_trials()
    assert [(t.optuna_id, t.number, t.state, t.cell, t.values) for t in found] == cells
    assert [t.now for t in found] == [t.user_attrs.get("now", {}) for t in trials]
    assert [t.optuna_id for t in table.list_running()] == [t._trial_id for t in trials if t.state == OptunaState.RUNNING]
    assert [t.optuna_id for t in table.iterate_waiting()] == [t._trial_id for t in order_of_claims(trials)]
    assert table.count_cells() == len(trials)
    states = Counter(map(state_of, trials))
    assert table.count_states() == states and set(states) <= set(TRIAL_STATES)
    assert backend.count_states() == {state: states[state] for state in TRIAL_STATES if states[state]}
    assert backend.count_states() == backend.count_states(backend.list_cells())
    assert LocalBackend(backend.id, backend.runs_dir, backend._storage_url)._table.count_states() == states  # the first count
    for step in (1, 2):
        reached = [t.intermediate_values[step] for t in trials if step in t.intermediate_values]
        assert sorted(table.list_values_at(step)) == sorted(reached)


def play_history(
    backend: LocalBackend, seed: int, num_events: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """A random history with a check after each event -> how often each kind of event was."""
    draw, running, events = random.Random(seed), list[tuple[LocalBackend, Trial]](), Counter[str]()
    monkeypatch.setattr(trial_table, "_CHUNK_SIZE", draw.choice((1, 2, 32)))
    monkeypatch.setattr(trial_table, "_MAX_IDS", draw.choice((1, 3, 500)))
    monkeypatch.setattr(trial_table, "_NUM_UNKEPT", draw.choice((1, 3)))
    monkeypatch.setattr(trial_counts, "SETTLE_SECONDS", draw.choice((0.0, 0.02)))
    agents = [backend, LocalBackend(backend.id, backend.runs_dir, backend._storage_url)]
    larger = folder / f"larger-{seed}.yaml"
    larger.write_text(LARGER)
    if draw.random() < 0.5:  # as of an earlier version
        with backend._storage.engine.begin() as connection:
            connection.execute(sqlalchemy.text("drop index if exists cifar_trials_by_state"))
    for _ in range(num_events):
        kind = draw.choices(("claim", "end", "rung", "lapse", "retry", "extend", "stop"), (9, 7, 3, 1, 1, 0.3, 0.3))[0]
        events[kind] += 1
        if kind == "claim":
            wanted: Any = draw.choice((None, None, 1, 2, 9))
            agent, before = draw.choice(agents), list_latest(backend)
            expected = [t for t in order_of_claims(before) if wanted in (None, t.user_attrs["values"]["lr"])]
            lr = wanted
            trial = agent.claim_trial("me", 1, None if lr is None else (lambda values, lr=lr: values["lr"] == lr))
            if backend.stop_mode:
                assert trial is None
            elif expected:
                last = expected[0].user_attrs.get("now", {}).get("attempt", 0)
                assert isinstance(trial, Trial)
                assert (trial.cell, trial.attempt) == (expected[0].user_attrs["cell"], last + 1)
                running.append((agent, trial))
            else:
                is_open = any(t.state in (OptunaState.WAITING, OptunaState.RUNNING) for t in before)
                assert trial == ("wait" if is_open else None)
        elif kind == "end" and running:
            agent, trial = running.pop(draw.randrange(len(running)))
            if draw.random() < 0.5:
                RunDir.create(backend.runs_dir, trial.run_id, {}, {}) if trial.attempt == 1 else None
            agent.finish_trial(trial, draw.choice(ENDS), draw.random(), "because", retry=draw.choice((None, True, False)))
        elif kind == "rung" and running:
            agent, trial = draw.choice(running)
            agent.report_metric(trial, {step: draw.random() for step in range(1, draw.choice((2, 3)))}, 0.5, 9)
        elif kind == "lapse":
            lost = draw.sample(running, min(len(running), 2))
            running = [each for each in running if each not in lost]
            with monkeypatch.context() as patched:
                patched.setenv("CIFAR_LEASE", "0.001")
                other = LocalBackend(backend.id, backend.runs_dir, backend._storage_url)
                kept = {trial.cell for _, trial in running}
                held = [t for t in other._table.list_running() if t.cell in kept]  # as if they were its own: they do not lapse
                patched.setattr(other, "_optuna_ids", {(t.cell, t.attempt): t.optuna_id for t in held})
                for _ in range(2):
                    claimed = other.claim_trial("another", trial_filter=lambda values: False)
                    assert not isinstance(claimed, Trial)
                    time.sleep(0.01)
            for agent, trial in lost:
                assert agent.heartbeat(trial) == ("go" if backend.stop_mode else "lost")
            if backend.stop_mode:
                running += lost
        elif kind == "retry":
            backend.retry_cells()
        elif kind == "extend":
            backend.extend_sweep(larger)
        elif kind == "stop":
            backend.stop_sweep()
        agents[1].info["cells"] = backend.info["cells"]
        check_answers(backend)
    return events


def play_wrong_clocks(backend: LocalBackend, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare counts with what all trials say, while trials end by clocks that are wrong by up to an hour, or by none."""
    draw = random.Random(seed)
    monkeypatch.setattr(trial_counts, "SETTLE_SECONDS", (0.0, 0.02, 4000.0)[seed % 3])
    monkeypatch.setattr(trial_table, "_NUM_UNKEPT", draw.choice((1, 3)))
    watcher = LocalBackend(backend.id, backend.runs_dir, backend._storage_url)
    set_time = sqlalchemy.text(
        "update trials set datetime_complete = :time where trial_id = :id and datetime_complete is not null"
    )
    for _ in range(2):
        while isinstance(trial := backend.claim_trial("me"), Trial):
            optuna_id = backend._optuna_ids[trial.cell, trial.attempt]
            backend.finish_trial(trial, draw.choice(ENDS), draw.random(), "because", retry=draw.choice((None, False)))
            time = draw.choice((trial_counts._utc_text(draw.choice((-3600.0, -1.0, 0.0, 3600.0))), None))
            with backend._storage.engine.begin() as connection:
                connection.execute(set_time, {"time": time, "id": optuna_id})
            for each in (backend, watcher, LocalBackend(backend.id, backend.runs_dir, backend._storage_url)):
                if draw.random() < 0.6:
                    assert each.count_states() == each.count_states(backend.list_cells())
                    assert each._table.count_states() == Counter(map(state_of, list_latest(backend)))
        backend.retry_cells()


def create_history_sweep(runs: Path, url: str = "") -> LocalBackend:
    early = "early_terminate: {type: hyperband, max_iter: 8, s: 3, eta: 2}\n"
    return create_local_sweep(runs, TEXT + early, url=url)


# -- rows --------------------------------------------------------------------------------------------------------------

_TIMES = ("datetime_start", "datetime_complete")


def read_rows(database: storage.Storage, study: int) -> dict[str, list[dict[str, Any]]]:
    """All rows of Optuna's tables about a study's trials. Ids become positions, and a time whether there is one."""
    with database.engine.connect() as connection:
        rows = connection.execute(sqlalchemy.text("select * from trials where study_id = :s order by trial_id"), {"s": study})
        trials = [dict(row._mapping) for row in rows]
        positions = {trial["trial_id"]: n for n, trial in enumerate(trials)}
        found = {"trials": trials}
        for table in ("user_attributes", "system_attributes", "params", "values", "intermediate_values", "heartbeats"):
            each = [dict(row._mapping) for row in connection.execute(sqlalchemy.text(f"select * from trial_{table}"))]
            found[table] = sorted(
                (row for row in each if row["trial_id"] in positions), key=lambda row: next(iter(row.values()))
            )
    for table in found.values():
        for row in table:
            row["trial_id"] = positions[row["trial_id"]]
            row.pop("study_id", None)
            row.pop("trial_user_attribute_id", None)
            row.pop("trial_value_id", None)
            row.update({name: row[name] is not None for name in _TIMES if name in row})
    return found


def check_rows(url: str) -> None:
    """Compare what `TrialTable` writes, row for row, with what Optuna's own methods write for the same trials."""
    opened = storage.open_storage(url)
    database = opened.optuna
    ours, theirs = (database.create_new_study([StudyDirection.MAXIMIZE], f"rows of {who}") for who in ("us", "Optuna"))
    table = trial_table.TrialTable(opened, ours)
    values = [{"lr": 0.1, "model": "conv"}, {"optimizer": "sgd", "nested": [1, None, "ü\u2028"]}, {}]
    new = [{"cell": n, "values": each} for n, each in enumerate(values)]
    offered = [{"cell": 1, "values": values[1], "now": {"state": "waiting", "attempt": 2}}]
    for group in (new, offered, []):
        table.insert_waiting(group)
        for about in group:
            trial = optuna.trial.create_trial(state=OptunaState.WAITING, user_attrs=about)
            database.create_new_trial(theirs, trial)
    assert read_rows(opened, ours) == read_rows(opened, theirs)
    first, last = ([t._trial_id for t in database.get_all_trials(study)] for study in (ours, theirs))
    now: dict[str, Any] = {"state": "running", "attempt": 1}
    for state in (OptunaState.RUNNING, None, OptunaState.WAITING):
        now = {**now, "beat": str(state)}
        table.update_trial(first[0], now, state)
        database.set_trial_user_attr(last[0], "now", now)
        if state is not None:
            database.set_trial_state_values(last[0], state)
        assert read_rows(opened, ours) == read_rows(opened, theirs)
    table.end_waiting({first[n]: {"state": "stopped", "n": n} for n in (0, 1, 3)}, OptunaState.FAIL)
    for n in (0, 1, 3):
        database.set_trial_user_attr(last[n], "now", {"state": "stopped", "n": n})
        database.set_trial_state_values(last[n], OptunaState.FAIL)
    found, expected = read_rows(opened, ours), read_rows(opened, theirs)
    for rows in (found, expected):  # an attribute that was written again has a new place
        rows["user_attributes"].sort(key=lambda row: (row["trial_id"], row["key"]))
    assert found == expected and [t["state"] for t in found["trials"]] == ["FAIL", "FAIL", "WAITING", "FAIL"]
    transactions = trial_transactions.TrialTransactions(opened, ours, "rows")
    table.count_cells()  # it reads which cells were offered again
    with transactions.begin_claim(table.known_offers) as (look, transaction):
        assert [(t.optuna_id, t.cell, t.values, t.now) for t in look.open] == [(first[2], 2, values[2], {})]
        assert look.last_id == first[3] == table.known_offers.last_id and not look.running and not look.stop_mode
        transaction.write_claim(first[2], {"state": "running", "text": "ü % :name 'quoted'"})
    with transactions.begin_end(first[2]) as (stored, transaction):
        assert stored == table.read_trial(first[2]) and stored.state == OptunaState.RUNNING
        transaction.write_end(first[2], {**stored.now, "state": "finished"}, OptunaState.COMPLETE, [0.1 + 0.2])
    database.set_trial_user_attr(last[2], "now", {"state": "finished", "text": "ü % :name 'quoted'"})
    database.set_trial_state_values(last[2], OptunaState.RUNNING)
    database.set_trial_state_values(last[2], OptunaState.COMPLETE, [0.1 + 0.2])
    found, expected = read_rows(opened, ours), read_rows(opened, theirs)
    for rows in (found, expected):
        rows["user_attributes"].sort(key=lambda row: (row["trial_id"], row["key"]))
    assert found == expected and found["values"][0]["value"] == 0.1 + 0.2
    with pytest.raises(RuntimeError), transactions.begin_end(first[2]) as (_, transaction):
        transaction.write_end(first[2], {}, OptunaState.FAIL)
        raise RuntimeError("nothing of it is written")
    assert read_rows(opened, ours)["trials"] == found["trials"]
    with transactions.begin_end(first[2]) as (stored, _):  # and the lock is free
        assert stored.state == OptunaState.COMPLETE
