"""The SQL of local sweeps against Optuna itself: the same rows are written, and the same answers are read."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from cifar.errors import UserError
from cifar.sweeps import storage, trial_counts, trial_table
from cifar.sweeps.local import LocalBackend, Trial
from helpers.local_sweeps import METRIC, claim_trial, create_local_sweep
from helpers.sweep_histories import check_answers, check_rows, create_history_sweep, play_history, play_wrong_clocks

NUM_HISTORIES = int(os.environ.get("CIFAR_TEST_HISTORIES", "8"))  # of the slow test


def test_the_same_rows_are_written_as_by_optuna(tmp_path: Path) -> None:
    check_rows(f"sqlite:///{tmp_path / 'study.db'}")


def test_every_answer_is_what_all_trials_say(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a random history of claims, ends, lapses, retries, extensions and stops."""
    play_history(create_history_sweep(runs), 0, 24, tmp_path, monkeypatch)


@pytest.mark.slow
def test_every_answer_is_what_all_trials_say_over_many_histories(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Counter[str]()
    for seed in range(1, 1 + NUM_HISTORIES):
        events += play_history(create_history_sweep(runs), seed, 40, tmp_path, monkeypatch)
    assert {"claim", "end", "rung", "lapse", "retry", "extend", "stop"} <= set(events)


@pytest.mark.parametrize("seed", range(3))
def test_counts_do_not_depend_on_clocks(runs: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    play_wrong_clocks(create_history_sweep(runs), seed, monkeypatch)


def test_how_trials_ended_is_read_once_and_kept_for_other_processes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_counts, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(trial_table, "_NUM_UNKEPT", 3)
    backend = create_local_sweep(runs)

    def fail(number: int) -> None:
        for _ in range(number):
            backend.finish_trial(claim_trial(backend), "failed", retry=False)

    def write(statement: str) -> None:
        with backend._storage.engine.begin() as connection:
            connection.execute(sqlalchemy.text(statement))

    def count_first() -> dict[str, int]:
        return LocalBackend(backend.id, runs).count_states()

    kept = "from study_user_attributes where key = 'ended'"
    fail(2)
    assert backend.count_states()["failed"] == count_first()["failed"] == 2
    with backend._storage.engine.connect() as connection:
        assert connection.execute(sqlalchemy.text(f"select count(*) {kept}")).scalar() == 0  # too few to write it down
    fail(2)
    assert backend.count_states()["failed"] == 4
    write("""update trial_user_attributes set value_json = '{"state": "pruned"}' where key = 'now'""")
    assert backend.count_states()["failed"] == count_first()["failed"] == 4, "no text was read again"
    fail(1)
    assert backend.count_states()["failed"] == count_first()["failed"] == 5, "only the new one's"
    for damaged in ("{", "null", "[1]", '{"until": 5, "states": {}}', '{"until": "2026-01-01", "states": 7}', '{"until": "x"}'):
        write(f"update study_user_attributes set value_json = '{damaged.replace(':', chr(92) + ':')}' where key = 'ended'")
        assert {"pruned": 4, "failed": 1}.items() <= count_first().items(), "all are read"


def test_a_search_is_handed_out_and_tried_again(runs: Path) -> None:
    text = f"method: bayes\n{METRIC}parameters:\n  model: {{value: conv}}\n  lr: {{min: 0.1, max: 0.2}}\n"
    backend = create_local_sweep(runs, text, count=4)
    for state in ("failed", "finished", "diverged"):
        backend.finish_trial(claim_trial(backend), state, 0.5, retry=False)
        assert backend.count_states()["waiting"] == 4 - len(backend.list_cells())
    assert backend.retry_cells() == 2
    assert [claim_trial(backend).cell for _ in range(3)] == [0, 2, 3]
    check_answers(backend)
    assert backend.claim_trial("me") == "wait" and backend.count_states() == {"running": 3, "finished": 1}


def test_a_filter_is_asked_about_waiting_trials_in_order_until_it_accepts(runs: Path) -> None:
    backend, asked = create_local_sweep(runs), list[tuple[int, int]]()

    def wants_seed_2(values: object) -> bool:
        assert isinstance(values, dict)
        asked.append((values["seed"], values["lr"]))
        return bool(values["seed"] == 2)

    trial = backend.claim_trial("me", 1, wants_seed_2)
    assert isinstance(trial, Trial) and trial.cell == 8
    assert asked == [(seed, lr) for seed in (0, 1) for lr in (1, 2, 3, 4)] + [(2, 1)]
    assert backend.claim_trial("me", 1, lambda values: False) == "wait"


def test_the_lock_of_a_file_that_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has removed the file between our opening and locking it: a third one would lock a new file."""
    path, lock = tmp_path / "study.db.lock", fcntl.flock

    def remove_and_lock(descriptor: int, operation: int) -> None:
        path.unlink()
        lock(descriptor, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", remove_and_lock)
        assert storage._try_lock(str(path)) is None
    descriptor = storage._try_lock(str(path))
    assert descriptor is not None and storage._try_lock(str(path)) is None
    storage._unlock_file(descriptor)


def test_a_lock_that_is_held_too_long_is_said(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = create_local_sweep(runs)
    monkeypatch.setattr(storage, "LOCK_TIMEOUT_SECONDS", 0.05)
    with storage.lock_storage(backend._storage, backend.id), pytest.raises(UserError, match=r"study.db.lock for 0 s; find the"):
        backend.claim_trial("me")
    assert claim_trial(backend).cell == 0


def test_a_trial_that_changes_while_states_are_counted_is_counted_once(runs: Path) -> None:
    """Another agent gives a trial back and fails another one, after each statement of the count."""
    backend = create_local_sweep(runs)
    second = LocalBackend(backend.id, backend.runs_dir)
    trials = [claim_trial(second) for _ in range(6)]
    total = sum(backend.count_states().values())

    def change(*_: object) -> None:
        if trials:
            second.finish_trial(trials.pop(), ("interrupted", "failed")[len(trials) % 2], retry=False)

    engine = backend._storage.engine
    sqlalchemy.event.listen(engine, "after_cursor_execute", change)
    try:
        while trials:
            assert sum(backend._table.count_states().values()) == total
    finally:
        sqlalchemy.event.remove(engine, "after_cursor_execute", change)


def test_optuna_opens_what_was_made_and_goes_on_with_it(runs: Path) -> None:
    backend = create_local_sweep(runs)
    backend.finish_trial(claim_trial(backend), "finished", 0.5)
    study = optuna.load_study(study_name=backend.id, storage=f"sqlite:///{backend.folder / 'study.db'}")
    assert len(study.trials) == 24 and study.best_value == 0.5
    asked = study.ask()  # a trial that waits: the next cell
    assert (asked.number, asked.user_attrs["cell"]) == (1, 1)
    assert backend.count_states() == {"waiting": 22, "running": 1, "finished": 1}
    assert claim_trial(LocalBackend(backend.id, runs)).cell == 2
