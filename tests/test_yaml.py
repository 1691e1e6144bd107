"""Every file in experiments/ and sweeps/ resolves and trains two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifar.config import resolve as config
from cifar.sweeps import spec as sweeps
from cifar.training import run

ROOT = Path(__file__).resolve().parent.parent
TWO_STEPS: dict[str, Any] = {
    "dataset": "stand-in", "epochs": 1, "max_steps": 2, "batch_size": 8, "train_size": 64, "val_size": 100, "test": "never",
    "threads": 1, "probe_every": 1, "max_macs": 0.0,
}  # fmt: skip


def two_steps(settings: config.Settings, runs: Path) -> None:
    record = run.create(settings, runs)
    assert run.train(settings, record) == "finished"
    row = next(record.rows())
    assert row["step"] == 2 and 0 <= row["val/acc"] <= 1 and any(key.startswith("gradient_norm/") for key in row)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_train(path: Path, runs: Path) -> None:
    two_steps(config.resolve({"experiment": path.stem}, TWO_STEPS), runs)


def sweep_files() -> list[Path]:
    return sorted((ROOT / "sweeps").glob("*.yaml"))


def test_there_are_sweeps() -> None:
    known = {
        "quickstart",
        "architectures",
        "lr_by_architecture",
        "worksheet1_tuning",
        "scaling_width_depth",
        "accuracy_and_macs",
    }
    assert known <= {path.stem for path in sweep_files()}


@pytest.mark.parametrize("path", sweep_files(), ids=lambda path: path.stem)
def test_sweeps_bind_every_value(path: Path) -> None:
    read = sweeps.read(path)
    assert path.read_text().startswith("#"), "a sweep opens with its question"
    assert sweeps.check(read, {}, count=20) in ("cifar10", "auto")


@pytest.mark.parametrize("path", sweep_files(), ids=lambda path: path.stem)
def test_sweeps_train(path: Path, runs: Path) -> None:
    """The cheapest trial and the dearest one below a GMAC: every kind of part of the file has been built by then."""
    read = sweeps.read(path)
    trials = sweeps.trials(read, count=6) or [sweeps.suggest(read, k, 0) for k in range(6)]
    bound = [sweeps.bind(values, TWO_STEPS) for values in trials]
    bound = sorted((b for b in bound if run.cost_of(b).macs < 1e9), key=lambda b: run.cost_of(b).macs)
    for settings in (bound[0], bound[-1]):
        two_steps(settings, runs)
