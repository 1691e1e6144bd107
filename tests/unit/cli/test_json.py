"""--json: one document on stdout and nothing else there; documented keys, numbers as numbers; errors as everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cifar.cli import maintenance
from cifar.cli.app import main
from cifar.cli.console import print_json
from cifar.cli.doctor import Check
from helpers.finished_sweeps import ID, write_finished_sweep
from helpers.local_sweeps import claim_trial, create_local_sweep

Read = Callable[..., Any]


@pytest.fixture
def read_json(capfd: pytest.CaptureFixture[str]) -> Read:
    """Run a command with --json -> its document. Also checks that each process and library leaves stdout alone."""

    def read(*arguments: str, code: int = 0) -> Any:
        assert main([*arguments, "--json"]) == code
        return json.loads(capfd.readouterr().out, parse_constant=pytest.fail)

    return read


def test_config(read_json: Read, tmp_path: Path) -> None:
    document = read_json("config", "--experiment", "worksheet1", "epochs=3")
    assert set(document) == {"config", "origins", "meanings"}
    assert document["config"]["epochs"] == 3 and document["config"]["lr"] == 0.001 and document["config"]["capture"] is True
    assert document["origins"]["epochs"] == "command line" and document["origins"]["seed"] == "default"
    assert document["origins"]["lr"].endswith("worksheet1.yaml") and "seed" in document["meanings"]
    assert document["config"].keys() == document["origins"].keys() == document["meanings"].keys()

    (tmp_path / "trial.json").write_text(json.dumps(document["config"]))
    assert main(["train", "--trial", str(tmp_path / "trial.json"), "--dry-run"]) == 0, "`config` is what --trial reads"


COST = {"params", "macs", "flops", "activations", "macs_verified", "note"}


def test_models(read_json: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifar import registry

    few = [registry.models[name] for name in ("conv16", "conv", "resnet20")]
    monkeypatch.setattr(registry, "models", few)
    document = read_json("models", "--no-time", "--device", "cpu")
    assert set(document) == {"device", "models"} and document["device"] == "cpu"
    networks = {network["name"]: network for network in document["models"]}
    assert set(networks["resnet20"]) == {"name", "aliases", "keys", "microseconds_per_image"} | COST
    assert networks["resnet20"]["macs"] == 40_813_184 and type(networks["resnet20"]["macs"]) is int
    assert networks["resnet20"]["microseconds_per_image"] is None and networks["conv16"]["aliases"] == ["conv"]
    assert networks["conv16"]["macs_verified"] is True and networks["conv16"]["keys"] == list(registry.models[1].keys)


def test_profile(read_json: Read) -> None:
    document = read_json("profile", "resnet20")
    assert set(document) == {"model", "layers"} | COST and document["model"] == "resnet20"
    assert set(document["layers"][0]) == {"name", "kind", "output_shape", "params", "macs", "activations"}
    assert sum(layer["macs"] for layer in document["layers"]) == document["macs"] == document["flops"] // 2 == 40_813_184
    assert all(type(size) is int for layer in document["layers"] for size in layer["output_shape"])


def test_profile_of_time(read_json: Read) -> None:
    small = ["model=conv", "width=4", "dataset=stand-in", "val_size=200", "train_size=256", "batch_size=64", "device=cpu"]
    document = read_json("profile", "--time", *small, "probe_every=2", "--steps", "2")
    assert set(document) == {
        "model", "dataset", "batch_size", "trials", "device", "device_name", "captured", "compiled", "steps_per_epoch",
        "probe_every", "images_per_second", "seconds", "kernels",
    }  # fmt: skip
    seconds = document["seconds"]
    assert set(seconds) == {"step", "graph_replay", "step_with_probes", "epoch_start", "evaluation", "epoch"}
    assert document["steps_per_epoch"] == 4 and seconds["graph_replay"] is None and document["captured"] is False
    assert document["images_per_second"] == pytest.approx(64 / seconds["step"])
    assert seconds["epoch"] > seconds["step"] > 0
    assert set(document["kernels"][0]) == {"name", "calls", "seconds"}


def test_report(read_json: Read, runs: Path) -> None:
    write_finished_sweep(runs)
    document = read_json("report", ID)
    on_disk = json.loads((runs / "sweeps" / ID / "report" / "report.json").read_text())
    assert on_disk.items() <= document.items() and set(document) - set(on_disk) == {"sweep", "files", "published"}
    assert document["sweep"] == ID and document["published"] is None
    assert all(Path(file).exists() for file in document["files"])
    point = document["points"][0]
    assert type(point["macs"]) is int and 0 < point["val/acc"] < 1 and len(point["runs"]) == 2


def test_sweeps(read_json: Read, runs: Path) -> None:
    assert read_json("sweeps", "list") == {"sweeps": []}
    backend = create_local_sweep(runs)
    backend.finish_trial(claim_trial(backend), "finished", 0.5)
    (runs / "sweeps" / "remote12").mkdir()
    (runs / "sweeps" / "remote12" / "wandb.json").write_text('{"id": "remote12", "entity": "me", "project": "p"}')
    local, remote = read_json("sweeps", "list")["sweeps"]
    assert local == {
        "id": backend.id, "name": "a sweep", "method": "grid", "dataset": "stand-in", "engine": "local", "wandb_path": None,
        "trials": {"waiting": 23, "finished": 1}, "error": "",
    }  # fmt: skip
    assert remote.keys() == local.keys() and (remote["engine"], remote["wandb_path"]) == ("wandb", "me/p/remote12")

    document = read_json("sweeps", "status", backend.id)
    assert set(document) == {"id", "name", "method", "counts", "without_folder", "metrics", "trials"}
    assert document["without_folder"] == []
    assert document["counts"] == {"waiting": 23, "finished": 1} and document["metrics"] == ["val/acc"]
    trials = document["trials"]
    assert [trial["cell"] for trial in trials] == list(range(24))
    assert trials[0] == {
        "cell": 0, "run": f"{backend.id}-000", "values": {"seed": 0, "lr": 1}, "state": "finished", "epoch": None,
        "metrics": {"val/acc": 0.5}, "reason": "",
    }  # fmt: skip
    assert trials[1]["metrics"] == {"val/acc": None}


def test_doctor(read_json: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    document = read_json("doctor")
    assert set(document) == {"ok", "checks"} and document["ok"] is True
    assert {"python", "packages", "GPU", "CIFAR-10", "runs folder", "W&B"} <= {check["name"] for check in document["checks"]}
    assert all(set(check) == {"name", "state", "found", "advice"} for check in document["checks"])
    monkeypatch.setattr("cifar.cli.doctor.examine_machine", lambda *_: [Check("disk", "bad", "full", "free some")])
    document = read_json("doctor", code=1)
    assert document == {"ok": False, "checks": [{"name": "disk", "state": "bad", "found": "full", "advice": "free some"}]}
    assert maintenance.doctor() == 1, "the exit code is the table's"


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "lrr=1"],
        ["profile", "resnt20"],
        ["report", "nosweep"],
        ["sweeps", "status", "nosweep"],
        ["models", "--device", "x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_mistake_is_one_sentence_on_stderr(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--json"]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_what_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [math.inf, 1.5], "path": Path("x"), "µ": {1: (True, None, 2)}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "path": "x", "µ": {"1": [True, None, 2]}}
