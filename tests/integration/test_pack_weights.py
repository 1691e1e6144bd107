"""Finished runs become pretrained networks: which run, which weights, what the card says, and where large ones go."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import cifar
from cifar import data, registry
from cifar.cli.app import main
from cifar.config.resolve import resolve_config
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from helpers.paths import ROOT
from helpers.run_configs import TINY

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "experiments" / "studies" / "frontier" / "pack_weights.py"
VALUES: dict[str, Any] = {
    **TINY, "epochs": 1, "max_steps": 2, "probes": "none", "optimizer": "sgd", "lr": 0.05, "val_size": 0, "train_size": 0,
    "test": "final", "normalize": "dataset",
}  # fmt: skip
ROW = """
model: conv
width: {width}
epochs: 1
max_steps: 2
batch_size: 64
optimizer: sgd
lr: 0.05
val_size: 0
test: final
normalize: dataset
"""


def train(runs: Path, run_id: str, **values: Any) -> RunDir:
    config = resolve_config({**VALUES, **values})
    record = run.create_run(config, runs, run.RunMetadata(run_id=run_id))
    run.train_run(config, record)
    return record


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of two rows, and runs that are of neither; `rows` has the files of the rows."""
    folder = tmp_path_factory.mktemp("study")
    train(folder / "runs", "later", seed=1)
    train(folder / "runs", "first", seed=0)
    train(folder / "runs", "wide", seed=2, width=16)
    train(folder / "runs", "other", seed=0, lr=0.06)
    train(folder / "runs", "chosen-on-validation", seed=5, val_size=100)
    train(folder / "runs", "untested", seed=6, test="never")
    (folder / "rows").mkdir()
    for name, width in (("frontier-a", 8), ("frontier-b", 16), ("frontier-none", 4)):
        (folder / "rows" / f"{name}.yaml").write_text(ROW.format(width=width))
    return folder


def pack(trained: Path, out: Path, *words: str, limits: dict[str, int] | None = None) -> int:
    script = runpy.run_path(str(SCRIPT))
    script["main"].__globals__.update(limits or {})
    options = ["--rows", str(trained / "rows"), "--out", str(out / "zoo"), "--dist", str(out / "dist")]
    code: int = script["main"]([str(trained / "runs"), *options, *words])
    return code


def score(network: torch.nn.Module) -> list[float]:
    """Accuracy of each class on the test images."""
    images = data.load_dataset("stand-in")
    pixels = data.normalize(torch.from_numpy(images.test_images), "dataset")
    with torch.no_grad():
        found = torch.cat([network.eval()(batch).argmax(1) for batch in pixels.split(500)])
    labels = torch.from_numpy(images.test_labels)
    return [float((found[labels == number] == number).double().mean()) for number in range(10)]


def test_the_first_seed_is_rounded_scored_and_described(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zoo").mkdir()
    assert pack(trained, tmp_path) == 0
    output = capsys.readouterr()
    assert "frontier-none: no finished run" in output.err and not (tmp_path / "dist").exists()
    folder, runs = tmp_path / "zoo" / "frontier-a", trained / "runs"
    card, content = json.loads((folder / "card.json").read_text()), (folder / "weights.pt").read_bytes()
    accuracies = [RunDir(runs / name).read_json("summary")["test/acc"] for name in ("first", "later")]
    assert card["row"]["values"] == accuracies and card["row"]["seeds"] == [0, 1] and card["row"]["n"] == 2
    assert card["row"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert card["row"]["std"] == pytest.approx(statistics.stdev(accuracies))
    assert card["training"]["run"] == "first" and card["accuracy_before_rounding"] == accuracies[0]
    assert card["weights"] == {
        "file": "weights.pt", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "format": "float16",
    }  # fmt: skip
    original = torch.load(runs / "first" / "weights.pt", weights_only=True)
    packed = torch.load(folder / "weights.pt", weights_only=True)
    for name, tensor in original.items():
        assert torch.equal(packed[name], tensor.half() if tensor.ndim > 1 else tensor), name
    network = registry.models["conv"].build(width=8)
    network.load_state_dict({name: tensor.float() for name, tensor in packed.items()})
    classes = score(network)
    assert list(card["per_class"].values()) == pytest.approx(classes)
    assert card["accuracy"] == pytest.approx(sum(classes) / 10), "the stand-in has as many images of each class"
    assert card["data"]["fingerprint"] == RunDir(runs / "first").read_json("environment")["data_fingerprint"]
    assert card["macs"] == RunDir(runs / "first").read_json("run")["cost"]["macs"] and card["training"]["images"] == 50_000
    monkeypatch.setenv("CIFAR_PRETRAINED", str(tmp_path / "zoo"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(cifar.load("frontier-a").state_dict().values(), network.state_dict().values(), strict=True)
    )
    assert main(["evaluate", "frontier-a"]) == 0
    out = capsys.readouterr().out
    assert (
        f"test: accuracy {100 * card['accuracy']:.2f} %" in out and f"card says: accuracy {100 * card['accuracy']:.2f}" in out
    )
    environment = RunDir(runs / "first").read_json("environment")
    text = "".join(file.read_text() for file in folder.glob("*.json"))
    for word in (str(tmp_path), str(trained), environment["host"], environment["cwd"], environment["executable"]):
        assert word not in text, "a card names no machine"


def test_what_is_packed_again_is_not_scored_again(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zoo").mkdir()
    assert pack(trained, tmp_path, "--only", "frontier-a") == 0
    assert not (tmp_path / "zoo" / "frontier-b").exists()
    card = json.loads((tmp_path / "zoo" / "frontier-a" / "card.json").read_text())
    (tmp_path / "zoo" / "frontier-a" / "card.json").write_text(json.dumps({**card, "accuracy": 0.123}))
    assert pack(trained, tmp_path, "--only", "frontier-a") == 0
    assert json.loads((tmp_path / "zoo" / "frontier-a" / "card.json").read_text()) == {**card, "accuracy": 0.123}
    assert pack(trained, tmp_path, "--only", "frontier-x") == 2
    assert "no file frontier-x.yaml" in capsys.readouterr().err


def test_large_networks_have_8_bits_and_a_wheel_of_their_own(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bounds of kilobytes stand in for those of megabytes: the smaller network stays, the larger one does not fit."""
    (tmp_path / "zoo").mkdir()
    sizes = {name: (trained / "runs" / name / "weights.pt").stat().st_size for name in ("first", "wide")}
    limits = {"MAX_HALF_BYTES": sizes["wide"] // 4, "MAX_TRACKED_BYTES": sizes["first"]}
    assert pack(trained, tmp_path, limits=limits) == 0, capsys.readouterr().err
    assert "in a wheel of their own: frontier-b" in capsys.readouterr().out
    zoo, rest = tmp_path / "zoo", tmp_path / "dist" / "frontier_weights"
    assert (zoo / "frontier-a" / "weights.pt").exists() and not (zoo / "frontier-b" / "weights.pt").exists()
    packed = torch.load(rest / "frontier-b" / "weights.pt", weights_only=True)
    original = torch.load(trained / "runs" / "wide" / "weights.pt", weights_only=True)
    for name, tensor in original.items():
        if tensor.ndim > 1:
            scale = tensor.abs().flatten(1).amax(1).view(-1, *[1] * (tensor.ndim - 1)) / 127
            assert packed[name].dtype == torch.int8
            assert bool(((packed[name] * scale - tensor).abs() <= scale * 0.5001).all())
    (wheel,) = (tmp_path / "dist").glob("cifar_frontier_weights-*.whl")
    monkeypatch.setenv("CIFAR_PRETRAINED", str(zoo))
    assert main(["evaluate", "frontier-b"]) == 2
    assert "frontier-b are not installed" in capsys.readouterr().err
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")  # what installing it does
    code = "import cifar, sys; print(sum(t.double().sum().item() for t in cifar.load('frontier-b').state_dict().values()))"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, text=True, capture_output=True, check=True
    )
    wanted = 0.0
    for name, tensor in packed.items():
        if not name.endswith("::scale"):
            scale = packed.get(f"{name}::scale")
            tensor = tensor.float() if scale is None else tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
            wanted += tensor.double().sum().item()
    assert float(done.stdout) == pytest.approx(wanted)


def test_weights_that_were_rounded_on_their_way_change_no_more(trained: Path, tmp_path: Path) -> None:
    """The runs folder may hold half-precision weights and no metrics, as it comes from another machine."""
    (tmp_path / "zoo").mkdir()
    assert pack(trained, tmp_path, "--only", "frontier-a") == 0
    content = (tmp_path / "zoo" / "frontier-a" / "weights.pt").read_bytes()
    for name in ("first", "later"):
        (tmp_path / "study" / "runs" / name).mkdir(parents=True)
        for file in ("run", "config", "environment", "summary", "status"):
            shutil.copy(trained / "runs" / name / f"{file}.json", tmp_path / "study" / "runs" / name)
    (tmp_path / "study" / "runs" / "first" / "weights.pt").write_bytes(content)
    shutil.copytree(trained / "rows", tmp_path / "study" / "rows")
    (tmp_path / "again" / "zoo").mkdir(parents=True)
    assert pack(tmp_path / "study", tmp_path / "again", "--only", "frontier-a") == 0
    assert torch.load(tmp_path / "again" / "zoo" / "frontier-a" / "weights.pt", weights_only=True).keys()
    a, b = (json.loads((tmp_path / each / "zoo/frontier-a/card.json").read_text()) for each in (".", "again"))
    assert a == b
