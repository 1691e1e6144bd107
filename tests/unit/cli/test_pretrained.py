"""Pretrained networks on the command line: the table, the card, and the places where one stands for a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cifar import data, registry
from cifar.cli import inspect
from cifar.cli.app import main
from cifar.tracking.run_dir import RunDir
from cifar.training import onnx_export
from helpers.fake_runs import write
from helpers.pretrained import NAME, write_pretrained

STUDENT = [
    "dataset=stand-in", "model=conv", "width=4", "val_size=0", "train_size=128", "batch_size=64", "epochs=1", "probes=none",
    "device=cpu", "threads=1",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_PRETRAINED", str(tmp_path / "zoo"))
    return write_pretrained(tmp_path / "zoo")


def test_the_table_and_the_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pretrained(folder.parent, "frontier-one", row={"mean": 0.9, "std": None, "n": 1}, macs=2e6)
    assert main(["models", "--pretrained"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("frontier-")]
    ours = {line[0]: line for line in lines if line[0] in (NAME, "frontier-one")}
    assert list(ours) == [NAME, "frontier-one"], "the cheaper one is first"
    assert ours[NAME][1:8] == ["1.00", "1,234", "30.00", "31.00", "±", "1.00", "(3)"]
    assert ours["frontier-one"][1:6] == ["2.00", "1,234", "30.00", "90.00", "(1)"]
    assert main(["models", "--pretrained", NAME]) == 0
    out = capsys.readouterr().out
    sha256 = json.loads((folder / "card.json").read_text())["weights"]["sha256"]
    assert "30.00 % on the 10,000 test images" in out and sha256 in out and "cat" in out and "25.0 %" in out


def test_the_cards_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "weights.pt").unlink()
    assert main(["models", "--pretrained", NAME, "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card == {**json.loads((folder / "card.json").read_text()), "installed": False, "folder": str(folder)}
    assert main(["models", "--json", "--pretrained"]) == 0
    assert card in json.loads(capsys.readouterr().out)["pretrained"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models", "--pretrained", "frontier-tinx"], "no pretrained network 'frontier-tinx'; did you mean 'frontier-tiny'"),
        (["models", "--pretrained", "../x"], "no pretrained network '../x'"),
        (["models", "--pretrained", ""], "is empty"),
        (["models", "resnet20"], "python -m cifar profile resnet20"),
        (["export", NAME], "--onnx"),
        (["export", NAME, "--onnx", "absent/x.onnx"], "absent does not exist"),
        (["export", NAME, "--onnx", "."], "is a folder"),
        (["export", NAME, "--onnx", "/dev/null"], "is no ordinary file"),
        (["export", "frontier-tin", "--onnx", "x.onnx"], "no run 'frontier-tin'"),
        (["export", "", "--onnx", "x.onnx"], "is empty"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1, err


def test_the_list_of_networks_is_not_made_for_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would import PyTorch and count all of them."""
    monkeypatch.setattr(inspect, "group_equal_networks", None)
    assert main(["models", "--pretrained"]) == 0


def test_without_the_extra_export_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_export, "PACKAGES", ("json", "no_such_package"))
    assert main(["export", NAME, "--onnx", str(tmp_path / "x.onnx")]) == 2
    assert "needs the package no_such_package: pip install 'cifar[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()


def test_from_takes_its_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--from", NAME, "--json", "epochs=7"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    recorded = RunDir(folder).read_json("config")
    assert {**config, "epochs": 2} == recorded and config["seed"] == 3


@pytest.mark.slow
def test_evaluate_scores_the_test_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The accuracy is that of the tensors in the file, put into a network by hand."""
    tensors = torch.load(folder / "weights.pt", weights_only=True)
    images = data.load_dataset("stand-in")
    assert main(["evaluate", NAME]) == 0
    out = capsys.readouterr().out
    assert "test: accuracy" in out and "10,000 images" in out and "its card says: accuracy 30.00 %" in out
    network = registry.models["conv"].build(width=8).eval()
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    pixels = data.normalize(torch.from_numpy(images.test_images), "dataset")
    with torch.no_grad():
        logits = torch.cat([network(batch) for batch in pixels.split(500)])
    labels = torch.from_numpy(images.test_labels)
    assert f"test: accuracy {100 * (logits.argmax(1) == labels).double().mean():.2f} %" in out
    assert f"loss {F.cross_entropy(logits, labels):.4f}" in out


@pytest.mark.slow
def test_it_teaches(folder: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    assert main(["train", *STUDENT, f"teacher={NAME}", "--wandb", "disabled"]) == 0, capsys.readouterr().err
    (record,) = (RunDir(file.parent) for file in runs.glob("*/run.json"))
    (teacher,) = record.read_json("run")["teachers"]
    assert teacher["run"] == NAME and teacher["macs"] == 1e6 and teacher["train_flops"] == 1e9
    assert teacher["sha256"] == json.loads((folder / "card.json").read_text())["weights"]["sha256"]
    assert sorted(folder.iterdir()) == before
    capsys.readouterr()
    assert main(["train", *STUDENT, f"teacher={NAME}", "val_size=100", "--wandb", "disabled"]) == 2
    assert "keeps for validation" in capsys.readouterr().err, "it was trained on all images"


@pytest.mark.slow
def test_its_latency_is_measured_and_not_written(folder: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(runs, "other")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert main(["profile", "--latency", NAME, "--batch", "4", "device=cpu", "threads=1"]) == 0
    assert "has it now" not in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
