"""Every file in experiments/ and sweeps/ resolves and trains two steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cifar.config.resolve import resolve_config
from cifar.config.schema import Settings
from cifar.config.shipped import shipped_names
from cifar.sweeps import spec
from cifar.training import run
from helpers.paths import ROOT

TWO_STEPS: dict[str, Any] = {
    "dataset": "stand-in", "epochs": 1, "max_steps": 2, "batch_size": 8, "train_size": 64, "val_size": 100, "test": "never",
    "threads": 1, "probe_every": 1, "max_macs": 0.0,
}  # fmt: skip


def two_steps(settings: Settings, runs: Path) -> None:
    record = run.create_run(settings, runs)
    assert run.train_run(settings, record) == "finished"
    row = next(record.read_rows())
    assert row["step"] == 2 and 0 <= row["val/acc"] <= 1 and any(key.startswith("gradient_norm/") for key in row)


BIG_EXPERIMENTS = (  # seconds each
    "airbench95", "airbench96", "convmixer", "densenet", "efficientnet", "fairdarts_a", "mobilenet_v2", "mobilenet_v3",
    "preact_resnet18", "resnet164", "resnet56", "shufflenet_v2", "vgg", "wrn",
)  # fmt: skip


def experiment_files() -> list[Any]:
    files = sorted((ROOT / "experiments").glob("*.yaml"))
    return [pytest.param(file, id=file.stem, marks=[pytest.mark.slow] * (file.stem in BIG_EXPERIMENTS)) for file in files]


@pytest.mark.parametrize("path", experiment_files())
def test_experiments_train(path: Path, runs: Path) -> None:
    two_steps(resolve_config({"experiment": path.stem}, TWO_STEPS), runs)


@pytest.mark.parametrize("name", shipped_names("experiments"))
def test_experiments_resolve(name: str) -> None:
    assert resolve_config({"experiment": name}).experiment == name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_names("experiments") if name.startswith("frontier/")])
def test_a_row_of_the_frontier_is_trained_on_all_images_and_scored_once(name: str) -> None:
    config = resolve_config({"experiment": name})
    assert (config.val_size, config.train_size, config.test, config.tta) == (0, 0, "final", "none")
    text = (ROOT / "experiments" / f"{name}.yaml").read_text("utf-8")
    budget = float(re.search(r"at ([\d.]+) MMACs", text)[1])  # type: ignore[index]
    cost = run.measure_cost(config)
    assert round(cost.macs / 1e6, 2) <= budget and f"# Cost: {cost.macs:,} MACs, {cost.params:,} parameters." in text
    assert f"python -m cifar train --experiment {name} --seeds 0,1,2" in text


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
    read = spec.read_sweep(path)
    assert path.read_text().startswith("#"), "a sweep opens with its question"
    assert spec.check_sweep(read, {}, count=20) in ("cifar10", "auto")


BIG_SWEEPS = ("accuracy_and_macs", "architectures", "lr_by_architecture")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in BIG_SWEEPS)) for path in sweep_files()],
)
def test_sweeps_train(path: Path, runs: Path) -> None:
    """The cheapest trial and the dearest one below a GMAC: every kind of part of the file has been built by then."""
    read = spec.read_sweep(path)
    trials = spec.list_known_trials(read, count=6) or [spec.sample_trial(read, k, 0) for k in range(6)]
    bound = [spec.resolve_trial(values, TWO_STEPS) for values in trials]
    bound = sorted((b for b in bound if run.measure_cost(b).macs < 1e9), key=lambda b: run.measure_cost(b).macs)
    for settings in (bound[0], bound[-1]):
        two_steps(settings, runs)
