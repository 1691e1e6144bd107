"""`profile --latency`: what it measures, and that a run's record has it from then on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar.cli.app import main
from cifar.config.resolve import resolve_config
from cifar.report.load import load_run
from cifar.tracking.run_dir import RunDir
from cifar.training import latency, run
from helpers.run_configs import TINY


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.05)
    monkeypatch.setattr(latency, "WARMUP_SECONDS", 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    config = resolve_config({**TINY, "width": 4, "epochs": 1, "max_steps": 1, "probes": "none"})
    record = run.create_run(config, tmp_path_factory.mktemp("trained"), run.RunMetadata(run_id="abc"))
    run.train_run(config, record)
    return record


@pytest.fixture
def record(runs: Path, trained: RunDir) -> RunDir:
    return RunDir(Path(shutil.copytree(trained.path, runs / "abc")))


def read_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


class Sleeper(nn.Module):
    """Takes 3 ms, whatever it gets. In a training it would fail."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[int, ...]] = set()

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.add(tuple(images.shape))
        time.sleep(0.003)
        return images.mean((1, 2, 3))[:, None].expand(-1, 10)


def test_it_is_the_time_of_a_call() -> None:
    model = Sleeper()
    config = resolve_config({"dataset": "stand-in", "device": "cpu", "threads": 1})
    report = latency.measure_latency(model, config, [1, 7])
    assert model.sizes == {(1, 3, 32, 32), (7, 3, 32, 32)} and report.precision == "fp32"
    one, seven = report.latencies
    for each in (one, seven):
        assert each.how == "eager" and each.num_calls >= latency.MIN_CALLS
        assert 0.003 <= each.p5 <= each.median <= each.p95
    assert seven.images_per_second == 7 / seven.median and report.find_fastest(7) is seven


def test_a_network_is_timed_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", "--latency", "conv", "width=4", "device=cpu", "threads=1", "--batch", "2", "--batch", "2", "--json"]
    assert main(command) == 0
    found = read_json(capsys)
    assert (found["model"], found["run"], found["device_name"]) == ("conv", None, "cpu, 1 thread")
    assert [(each["batch_size"], each["how"]) for each in found["latencies"]] == [(2, "eager")]


@pytest.mark.slow
def test_a_runs_record_has_it_from_then_on(record: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = record.read_json("summary")
    assert main(["profile", "--latency", "abc", "device=cpu", "threads=1", "--json"]) == 0
    found = read_json(capsys)
    assert found["run"] == "abc" and {each["batch_size"] for each in found["latencies"]} == {1, 256}
    one = next(each for each in found["latencies"] if each["batch_size"] == 1)
    after = record.read_json("summary")
    assert after["latency_seconds"] == one["median"] and after["latency_n"] == one["n"]
    assert after["latency_device"].endswith(", 1 thread, fp32, eager")
    assert {key: value for key, value in after.items() if not key.startswith("latency_")} == before
    assert load_run(record.path).cost("latency_seconds") == one["median"] and not record.is_owned
    assert main(["profile", "--latency", "abc", "device=cpu", "threads=1", "--batch", "1"]) == 0
    assert "run abc has it now" in capsys.readouterr().out
    assert record.read_json("summary")["latency_seconds"] != one["median"], "a new measurement replaces the old one"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nobody"], "'nobody' is no network"),
        ([], "name a network"),
        (["abc", "width=8"], "'width' cannot be set"),
        (["abc", "device=tpu"], "device 'tpu' cannot be used"),
        (["abc", "precision=fp8"], "precision"),
        (["abc", "--batch", "4"], "add --batch 1"),
        (["conv", "--time"], "ask for one of them"),
        (["unfinished"], "has no weights"),
    ],
)
def test_what_cannot_be_timed_is_said(record: RunDir, words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    run.create_run(resolve_config(TINY), record.path.parent, run.RunMetadata(run_id="unfinished"))
    before = record.read_json("summary")
    assert main(["profile", "--latency", *words]) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert record.read_json("summary") == before
