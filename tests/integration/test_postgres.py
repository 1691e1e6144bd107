"""One sweep for many machines: the local backend on a real PostgreSQL server (its agents: test_eight_agents.py)."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from cifar.sweeps.local import LocalBackend, Trial
from helpers.local_sweeps import GRID, claim_trial, create_local_sweep
from helpers.sweep_histories import check_rows, create_history_sweep, play_history, play_wrong_clocks

pytestmark = pytest.mark.slow
NUM_HISTORIES = int(os.environ.get("CIFAR_TEST_HISTORIES", "6"))


def test_the_same_rows_are_written_as_by_optuna(postgres_url: str) -> None:
    check_rows(postgres_url)


def test_every_answer_is_what_all_trials_say(
    runs: Path, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(NUM_HISTORIES):
        play_history(create_history_sweep(runs, postgres_url), 1000 + seed, 30, tmp_path, monkeypatch)


def test_counts_do_not_depend_on_clocks(runs: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        play_wrong_clocks(create_history_sweep(runs, postgres_url), 1000 + seed, monkeypatch)


def test_leases_retries_and_extensions_as_on_a_file(
    runs: Path, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_LEASE", "1.0")
    mine = create_local_sweep(runs, url=postgres_url, text=GRID + "\nrun_cap: 2")
    theirs = LocalBackend(mine.id, tmp_path / "another machine", postgres_url)
    trial, other = claim_trial(mine), claim_trial(theirs, "they")
    assert (trial.cell, other.cell) == (0, 1) and mine.finish_trial(other, "killed") == "interrupted"
    assert theirs.claim_trial("they") is not None and theirs.claim_trial("they") == "wait"
    time.sleep(1.2)
    again = claim_trial(theirs, "they")
    assert (again.run_id, again.attempt) == (trial.run_id, 2) and mine.heartbeat(trial) == "lost"
    assert theirs.finish_trial(again, "failed", reason="because") == "failed" and mine.retry_cells() == 1
    assert claim_trial(mine).attempt == 3
    larger = tmp_path / "larger.yaml"
    larger.write_text(GRID + "\nrun_cap: 5\n")
    assert mine.extend_sweep(larger) == 3 and isinstance(theirs.claim_trial("they"), Trial)


def test_claims_do_not_depend_on_the_databases_isolation(runs: Path, postgres_url: str) -> None:
    """With `repeatable read` a transaction would see the cells as they were before it waited for the sweep's lock."""
    seeds = ", ".join(map(str, range(60)))
    text = f"method: grid\nmetric: {{name: val/acc, goal: maximize}}\nparameters: {{seed: {{values: [{seeds}]}}}}"
    isolation = "-c default_transaction_isolation=repeatable\\ read"  # of these connections only
    url = f"{postgres_url}{'&' if '?' in postgres_url else '?'}options={quote(isolation)}"
    sweep = create_local_sweep(runs, url=url, text=text)

    def claim_some(worker: int) -> list[int]:
        backend = LocalBackend(sweep.id, runs, url)
        return [claim_trial(backend, f"worker {worker}").cell for _ in range(15)]

    with ThreadPoolExecutor(4) as workers:
        claimed = [cell for cells in workers.map(claim_some, range(4)) for cell in cells]
    assert sorted(claimed) == list(range(60))


def test_any_postgresql_url_is_opened_by_the_driver_that_claims_are_written_for(runs: Path, postgres_url: str) -> None:
    sweep = create_local_sweep(runs, url=postgres_url.replace("postgresql", "postgresql+psycopg", 1), text=GRID)
    assert claim_trial(sweep).cell == 0
