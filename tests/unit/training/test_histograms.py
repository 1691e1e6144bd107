"""Histograms of a run: in which epochs and steps they are counted, and what a resume leaves of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar.config import resolve as configuration
from cifar.tracking import histograms
from cifar.tracking.histograms import read_histograms
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.loop import RunHooks
from helpers.run_configs import TINY


def trained(runs: Path, hooks: RunHooks | None = None, **values: Any) -> RunDir:
    config = configuration.resolve_config({**TINY, **values})
    record = run.create_run(config, runs)
    run.train_run(config, record, hooks=hooks)
    return record


def test_a_run_counts_every_weight_in_each_measured_step(runs: Path) -> None:
    record = trained(runs)  # 8 steps an epoch, of which 0, 3 and 6 are measured
    weights = torch.load(record.path / "weights.pt", weights_only=True)
    sizes = {layer: weights[f"{layer}.weight"].numel() for layer in record.read_json("labels")["layers"]}
    lines = list(read_histograms(record))
    assert [(line["epoch"], line["steps"]) for line in lines] == [(1, 3), (2, 3)]
    for line in lines:
        for kind in ("gradients", "updates"):
            assert {layer: sum(each["counts"]) for layer, each in line[kind].items()} == {k: 3 * n for k, n in sizes.items()}
            assert all(max(each["counts"][:31]) and max(each["counts"][33:]) for each in line[kind].values())
    row = next(iter(record.read_rows()))
    for layer, histogram in lines[0]["gradients"].items():  # the largest gradient of the epoch is in an outermost bin
        assert histogram["counts"][0] or histogram["counts"][-1]
        assert histograms.bin_edges(histogram["top"])[-2] <= row[f"gradient_max/{layer}"] < histogram["top"]


@pytest.mark.parametrize(
    ("values", "epochs"),
    [
        ({}, [1, 3, 5]),
        ({"histograms": True}, [1, 3, 5]),
        ({"histograms": "every"}, [1, 2, 3, 4, 5]),
        ({"histograms": "off"}, []),
        ({"histograms": False}, []),
        ({"probes": "none"}, []),
    ],
    ids=str,
)
def test_which_epochs_have_them(runs: Path, values: dict[str, Any], epochs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "NUM_LOOKED_AT", 3)
    record = trained(runs, epochs=5, max_steps=1, **values)
    assert [line["epoch"] for line in read_histograms(record)] == epochs
    assert (record.path / "histograms.jsonl").exists() == bool(epochs)


def test_a_checkpoint_of_a_version_without_them_goes_on(runs: Path) -> None:
    """What it counted of the interrupted epoch is unknown; the next epochs are whole."""
    steps = iter([None] * 3 + ["interrupted"])
    record = trained(runs, RunHooks(poll_stop=lambda: next(steps)))
    path = record.path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert state.pop("histograms")["steps"] == 2
    torch.save(state, path)
    run.train_run(configuration.resolve_config(record.read_json("config")), record)
    assert record.state == "finished"
    assert [(line["epoch"], line["steps"]) for line in read_histograms(record)] == [(1, 1), (2, 3)]


def test_a_run_started_over_writes_them_once(runs: Path) -> None:
    """Its checkpoint is gone, so it starts at its beginning: what it had is cut off."""
    whole = trained(runs)
    again = RunDir(runs / "again")
    shutil.copytree(whole.path, again.path)
    again.set_status("interrupted", epoch=2, epochs=2)
    run.train_run(configuration.resolve_config(again.read_json("config")), again)
    assert (again.path / "histograms.jsonl").read_bytes() == (whole.path / "histograms.jsonl").read_bytes()
