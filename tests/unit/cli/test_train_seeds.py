"""`train --seeds`: each seed is a run of its own, the same as alone; and what is refused before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cifar.cli.app import main
from cifar.cli.train_seeds import parse_seeds
from cifar.config.resolve import resolve_config
from cifar.errors import UserError
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from helpers.run_configs import TINY

VALUES: dict[str, Any] = {**TINY, "width": 4, "epochs": 1, "max_steps": 2, "probes": "none", "test": "final", "val_size": 0}


def train(*options: str) -> int:
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in VALUES.items()]
    return main(["train", *words, "--wandb", "disabled", *options])


def by_seed(runs: Path) -> dict[int, RunDir]:
    records = [RunDir(path.parent) for path in runs.glob("*/run.json")]
    return {record.read_json("config")["seed"]: record for record in records}


@pytest.mark.parametrize("pack", ["2", pytest.param("off", marks=pytest.mark.slow)])
def test_each_seed_is_a_run_of_its_own(runs: Path, tmp_path: Path, pack: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--seeds", "3,5", "--pack", pack, "--name", "mine") == 0
    out = capsys.readouterr().out
    records = by_seed(runs)
    assert sorted(records) == [3, 5] and all(record.state == "finished" for record in records.values())
    assert {record.name for record in records.values()} == {"stand-in mine seed=3", "stand-in mine seed=5"}
    scores = [100 * records[seed].read_json("summary")["test/acc"] for seed in (3, 5)]
    assert f"test {sum(scores) / 2:.2f} %" in out and "n = 2" in out and "seed 5  epoch" in out
    assert [records[seed].read_json("environment")["step"]["together"] for seed in (3, 5)] == [2 if pack == "2" else 1] * 2
    alone = run.create_run(resolve_config({**VALUES, "seed": 5}), tmp_path)
    assert run.train_run(resolve_config({**VALUES, "seed": 5}), alone) == "finished"
    weights = [torch.load(record.path / "weights.pt", weights_only=True) for record in (records[5], alone)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "1,1"], "stands twice"),
        (["--seeds", "1,x"], "write whole numbers"),
        (["--seeds", "-1"], "write whole numbers"),
        (["--seeds", "0,1", "seed=2"], "give one of them"),
        (["--seeds", "0,1", "--pack", "two"], "write auto, off"),
        (["--pack", "2"], "--pack is for"),
        (["--seeds", "0", "--resume", "abc"], "--seeds is for new runs"),
    ],
)
def test_what_is_refused(runs: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=worksheet1", "dataset=stand-in", *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not list(runs.glob("*"))


@pytest.mark.parametrize("text", ["", "0,", ",", "1.5", "²", "0-3", "9" * 30, ",".join(map(str, range(1001)))])
def test_texts_that_are_no_seeds(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_seeds_are_read() -> None:
    assert parse_seeds("0, 7,12") == [0, 7, 12]
