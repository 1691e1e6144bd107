"""What a sweep says with real trainings: an agent's last words are the sweep's, and a lost folder is trained again once."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from cifar.tracking.run_dir import RunDir
from helpers.agent_processes import create_sweep, list_epochs_of_cell, start_agent
from helpers.local_sweeps import claim_trial
from helpers.processes import wait_for_exit, wait_until


@pytest.mark.slow
def test_the_last_words_of_an_agent_are_the_sweeps(runs: Path) -> None:
    """While this agent trains its trial, another one (this process) ends a better trial and goes on with a third."""
    text = "parameters: {model: {value: conv4}, seed: {values: [0, 1, 2, 3]}, epochs: {value: 40}}"
    backend = create_sweep(runs, text, epochs=40)
    process = start_agent(backend, "workers=1", "count=1")
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 1)
    better, running = claim_trial(backend, "another"), claim_trial(backend, "another")
    assert backend.finish_trial(better, "finished", 0.99) == "finished"
    backend.finish_trial(claim_trial(backend, "another"), "diverged", reason="loss is nan")
    code, output = wait_for_exit(process)
    assert code == 0, output
    assert f"sweep {backend.id}: 1 running elsewhere, 2 finished, 1 diverged" in output
    assert "this agent: 1 trial (1 finished)" in output
    assert f"best val/acc 99.00 % by {better.run_id} (seed=1)" in output and running.cell == 2


@pytest.mark.slow
def test_a_lost_folder_is_trained_again_and_one_that_came_back_is_not(runs: Path, tmp_path: Path) -> None:
    backend = create_sweep(runs, "parameters: {model: {value: conv4}, seed: {values: [0, 1]}}")
    assert wait_for_exit(start_agent(backend, "workers=1"))[0] == 0
    lost, moved = (runs / backend.run_id(cell) for cell in (0, 1))
    weights = {folder.name: (folder / "weights.pt").read_bytes() for folder in (lost, moved)}
    shutil.rmtree(lost)
    moved.rename(tmp_path / "away")
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    assert code == 0 and re.search(r"2 of the trials that have ended have no folder: .*sweeps retry", output), output
    assert backend.retry_cells() == 2
    (tmp_path / "away").rename(moved)
    before = RunDir(moved).read_json("status")
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    assert code == 0 and "2 finished" in output, output
    assert RunDir(moved).read_json("status") == before, "the record that came back counts"
    for cell, folder in enumerate((lost, moved)):
        assert list_epochs_of_cell(backend, cell) == [1, 2]
        assert (folder / "weights.pt").read_bytes() == weights[folder.name], "trained as before, to the bit"
        assert backend.list_cells()[cell]["value"] == RunDir(folder).read_json("summary")["val/acc"]
    assert backend.retry_cells() == 0 and backend.list_cells_without_folder() == []
