"""The wheel, outside the checkout: shipped experiments and sweeps by name, and its sweep under the plain `wandb agent`."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cifar.tracking.run_dir import RunDir
from helpers.paths import ROOT
from helpers.protocol import Server

pytestmark = pytest.mark.slow
TINY = {"epochs": 1, "train_size": 128, "val_size": 100, "max_steps": 2, "threads": 1, "probes": "none"}
PAIRS = [f"{key}={value}" for key, value in TINY.items()]
SETS = [word for pair in PAIRS for word in ("--set", pair)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in. What it depends on is taken from this environment."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cifar/_shipped/experiments/worksheet1.yaml", "cifar/_shipped/sweeps/quickstart.yaml", "cifar/py.typed"} <= set(
        names
    )
    pretrained = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cifar" / "pretrained").rglob("*") if path.is_file()}
    assert pretrained and pretrained <= set(names), "the networks come with it"
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]
    subprocess.run([*pip, "install", *options, "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture
def run_python(installed: Path, runs: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs `python ARGUMENTS` in a folder of its own, where the wheel is the only `cifar`."""

    def run(*arguments: str, folder: str = "empty") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a sweep's command is `python`
        environment = {**os.environ, "PYTHONPATH": str(installed), "PATH": path, "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment, cwd=tmp_path / folder, text=True, timeout=280, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def test_the_wheel_knows_its_experiments(run_python: Callable[..., str], installed: Path, runs: Path) -> None:
    assert run_python("-c", "import cifar; print(cifar.__file__)").strip() == str(installed / "cifar/__init__.py")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run_python("-m", "cifar", "--version") == f"cifar {version}\n"
    run_python("-m", "cifar", "train", "--experiment", "worksheet1", "--dataset", "stand-in", "--wandb", "disabled", *PAIRS)
    (folder,) = runs.glob("*/run.json")
    record = RunDir(folder.parent)
    assert record.state == "finished"
    assert record.read_json("config")["experiment"] == record.read_json("config")["model"] == "worksheet1"


def test_the_installed_command_runs_the_quickstart_by_name(run_python: Callable[..., str], installed: Path, runs: Path) -> None:
    options = ["--dataset", "stand-in", "--wandb", "disabled", "--workers", "1", *SETS]
    output = run_python(str(installed / "bin/cifar"), "sweep", "quickstart", *options)
    assert "7 finished" in output and len(list(runs.glob("*/weights.pt"))) == 7, output
    assert "repeat it: cifar train --from " in output, output
    assert "7 trials" in run_python(str(installed / "bin/cifar"), "sweep", "sweeps/quickstart.yaml", "--dry-run", *options)


def test_its_sweep_runs_under_the_plain_agent(run_python: Callable[..., str], wandb_server: Server, runs: Path) -> None:
    """Of what a sweep on W&B says, `command:` alone is used; `program:` names a file that is in no folder here."""
    run_python("-m", "cifar", "sweep", "quickstart", "--dataset", "stand-in", "--no-agent", *SETS)
    sweep = wandb_server.only_sweep()
    assert yaml.safe_load(sweep.text)["program"] == "cifar/__main__.py"
    output = run_python("-m", "wandb", "agent", "--count", "2", f"me/cifar/{sweep.id}", folder="another")
    assert len(wandb_server.runs) == 2, output
    for run_id, run in wandb_server.runs.items():
        assert run.state == "finished" and run.sweep == sweep.id and RunDir(runs / run_id).state == "finished", output
        assert run.config["train_size"] == 128 and run.config["lr"] == 0.05
