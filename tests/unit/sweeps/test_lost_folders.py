"""A trial that has ended and whose run folder is gone: it is said, it is offered again, and it never runs twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sqlalchemy

from cifar.cli.app import main
from cifar.sweeps.local import LocalBackend, Trial
from cifar.tracking.run_dir import RunDir
from helpers.local_sweeps import GRID, claim_trial, create_local_sweep

TWO = GRID.replace("[0, 1, 2, 3, 4, 5]", "[0, 1]").replace("[1, 2, 3, 4]", "[1]")


def end_trial(backend: LocalBackend, state: str = "finished", value: float = 0.5) -> Trial:
    """Claim a trial, write its folder as a worker does, and end it."""
    trial = claim_trial(backend)
    folder = RunDir.create(backend.runs_dir, trial.run_id, {"sweep": backend.id}, {})
    folder.set_status(state)
    assert backend.finish_trial(trial, state, value) == state
    return trial


def list_lost(backend: LocalBackend) -> list[str]:
    return [cell["run_id"] for cell in backend.list_cells_without_folder()]


def test_a_finished_cell_without_a_folder_is_offered_once(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = create_local_sweep(runs, TWO)
    first, second = end_trial(backend), end_trial(backend, value=0.7)
    assert list_lost(backend) == [] and backend.retry_cells() == 0
    shutil.rmtree(runs / second.run_id)
    assert main(["sweeps", "status", backend.id]) == 0
    said = capsys.readouterr().out
    assert f"{backend.id}: 2 finished, 1 of them has no folder: {second.run_id}" in said and "sweeps retry" in said
    assert main(["sweeps", "status", backend.id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_folder"] == [second.run_id]
    assert main(["sweeps", "retry", backend.id]) == 0
    assert "1 cell to be tried again" in capsys.readouterr().out
    assert backend.count_states() == {"waiting": 1, "finished": 1} and LocalBackend(backend.id, runs).retry_cells() == 0
    again = claim_trial(backend)
    assert (again.cell, again.run_id, again.attempt) == (second.cell, second.run_id, 2) and backend.claim_trial("me") == "wait"
    assert backend.finish_trial(again, "finished", 0.6) == "finished" and backend.claim_trial("me") is None
    assert [cell["value"] for cell in backend.list_cells()] == [0.5, 0.6] and first.cell == 0
    history = [trial.values for trial in backend._storage.optuna.get_all_trials(backend._study) if trial.values]
    assert history == [[0.5], [0.7], [0.6]], "the database keeps what it knew"


@pytest.mark.parametrize("state", ["finished", "pruned", "skipped"])
def test_every_end_that_is_never_resumed_is_offered(runs: Path, state: str) -> None:
    backend = create_local_sweep(runs, TWO)
    trial = end_trial(backend, state)
    shutil.rmtree(runs / trial.run_id)
    assert list_lost(backend) == [trial.run_id] and backend.retry_cells() == 1 and list_lost(backend) == []
    assert {claim_trial(backend).cell, claim_trial(backend).cell} == {0, 1}


def test_a_folder_that_comes_back_is_no_loss(runs: Path, tmp_path: Path) -> None:
    backend = create_local_sweep(runs, TWO)
    trial = end_trial(backend)
    (runs / trial.run_id).rename(tmp_path / "away")
    assert list_lost(backend) == [trial.run_id]
    (tmp_path / "away").rename(runs / trial.run_id)
    assert list_lost(backend) == [] and backend.retry_cells() == 0
    assert backend.count_states() == {"waiting": 1, "finished": 1}


def test_what_is_out_of_reach_or_damaged_is_not_gone(runs: Path, tmp_path: Path) -> None:
    backend = create_local_sweep(runs, TWO)
    linked, damaged = end_trial(backend), end_trial(backend)
    (runs / linked.run_id).rename(tmp_path / "disk")
    (runs / linked.run_id).symlink_to(tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (runs / damaged.run_id / "run.json").unlink()
    assert list_lost(backend) == [] and backend.retry_cells() == 0
    for file in (runs / damaged.run_id).iterdir():
        file.unlink()
    assert list_lost(backend) == [damaged.run_id], "an empty folder has nothing"


def test_extend_adds_no_second_cell_for_it(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = create_local_sweep(runs, TWO)
    trial = end_trial(backend)
    shutil.rmtree(runs / trial.run_id)
    (tmp_path / "same.yaml").write_text(TWO)
    assert main(["sweeps", "extend", backend.id, str(tmp_path / "same.yaml")]) == 0
    said = capsys.readouterr().out
    assert "0 cells added" in said and f"1 of its cells has no folder: {trial.run_id}" in said
    assert len(backend.list_cells()) == 2 and backend.count_states() == {"waiting": 1, "finished": 1}


def test_runs_of_another_runs_folder_are_not_gone(runs: Path, tmp_path: Path) -> None:
    """Two machines share a database and have a runs folder each."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    here = create_local_sweep(runs, TWO, url=url)
    there = LocalBackend(here.id, tmp_path / "other machine", url)
    mine, theirs = end_trial(here), end_trial(there)
    assert list_lost(here) == list_lost(there) == []
    assert here.retry_cells() == there.retry_cells() == 0
    shutil.rmtree(runs / mine.run_id)
    assert list_lost(here) == [mine.run_id] and list_lost(there) == []
    shutil.rmtree(tmp_path / "other machine" / theirs.run_id)
    assert list_lost(here) == [mine.run_id] and list_lost(there) == [theirs.run_id]
    assert here.retry_cells() == 1 and there.retry_cells() == 1


def test_a_moved_runs_folder_has_lost_nothing(runs: Path, tmp_path: Path) -> None:
    backend = create_local_sweep(runs, TWO)
    end_trial(backend)
    runs.rename(tmp_path / "elsewhere")
    assert list_lost(LocalBackend(backend.id, tmp_path / "elsewhere")) == []


def test_a_sweep_of_an_earlier_version_is_read_too(runs: Path) -> None:
    """Its database does not say where runs are. With a database of its own they can be in its runs folder only."""
    backend = create_local_sweep(runs, TWO)
    trial = end_trial(backend)
    stored = backend._list_trials()[0]
    now = {key: value for key, value in stored.user_attrs["now"].items() if key != "place"}
    with backend._storage.engine.begin() as connection:
        update = sqlalchemy.text("update trial_user_attributes set value_json = :now where key = 'now' and trial_id = :trial")
        connection.execute(update, {"now": json.dumps(now), "trial": stored._trial_id})
    opened = LocalBackend(backend.id, runs)
    assert list_lost(opened) == []
    shutil.rmtree(runs / trial.run_id)
    assert list_lost(opened) == [trial.run_id]


def test_a_damaged_place_file_says_nothing_wrong(runs: Path, tmp_path: Path) -> None:
    backend = create_local_sweep(runs, TWO, url=f"sqlite:///{tmp_path / 'elsewhere.db'}")
    trial = end_trial(backend)
    (backend.folder / "place.json").write_text("{")
    shutil.rmtree(runs / trial.run_id)
    assert list_lost(backend) == [] and backend.retry_cells() == 0
    other = end_trial(backend)
    shutil.rmtree(runs / other.run_id)
    assert list_lost(backend) == [other.run_id]
