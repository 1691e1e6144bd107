"""A worker that stays: no trial's state leaks into the next one's losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cifar.tracking.run_dir import RunDir
from helpers.agent_processes import create_sweep, start_agent
from helpers.processes import wait_for_exit

TEN = "{model: {values: [conv4, conv8]}, optimizer: {values: [adam, sgd]}, seed: {values: [0, 1, 2]}, mixup: {value: 0.2}}"
ONE = "{model: {value: conv8}, seed: {values: [2, 3]}, mixup: {value: 0.2}}"  # its first is the ninth


@pytest.mark.slow
def test_a_trial_that_runs_first_and_one_that_runs_late_have_the_same_losses(runs: Path) -> None:
    many = create_sweep(runs, f"parameters: {TEN}", ema=0.9)
    few = create_sweep(runs, f"parameters: {ONE}", ema=0.9, optimizer="adam")
    for backend in (many, few):
        code, output = wait_for_exit(start_agent(backend, "workers=1"))
        assert code == 0, output
    late = next(cell for cell in many.list_cells() if cell["values"] == {**few.list_cells()[0]["values"], "optimizer": "adam"})
    assert late["cell"] == 8
    first, other = (RunDir(runs / run_id) for run_id in (few.run_id(0), late["run_id"]))
    for row, its in zip(first.read_rows(), other.read_rows(), strict=True):
        assert not [key for key in row if row[key] != its[key] and not key.startswith("system/")]
    weights, others = (torch.load(record.path / "weights.pt", weights_only=True) for record in (first, other))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
