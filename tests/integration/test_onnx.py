"""ONNX files: the same logits in ONNX Runtime as in PyTorch, of every family; the same accuracy; what cannot be exported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cifar import data, registry
from cifar.cli.app import main
from cifar.config.resolve import resolve_config
from cifar.errors import UserError
from cifar.flops import materialize_lazy_modules
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.onnx_export import compare_logits, export_onnx, open_session
from cifar.training.pixels import PixelNetwork
from helpers.plugins import keep_registries
from helpers.pretrained import NAME, write_pretrained
from helpers.run_configs import TINY
from helpers.zoo import NETWORKS

pytestmark = pytest.mark.slow
onnx = pytest.importorskip("onnx", reason="ONNX IS NOT INSTALLED (the extra `onnx`): its files are not tried")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX RUNTIME IS NOT INSTALLED (the extra `onnx`): no file is tried")
# One network of each family, small where it can be small. CIFAR_ONNX_ALL=1 tries every registered network at its full size.
FAMILIES: dict[str, dict[str, Any]] = {
    "airbench": {"width": 8}, "airbench96": {}, "bottleneck_resnet": {"depth": 20}, "conv": {"width": 8},
    "convmixer": {"width": 16, "depth": 2}, "worksheet1": {}, "darts_v2": {"width": 4, "depth": 4}, "densenet_bc": {},
    "efficientnet": {"stem_stride": 2, "width_multiplier": 0.25},
    "fairdarts_a": {"width": 4, "depth": 4}, "mobilenet_v2_x0_5": {}, "mobilenet_v3_small": {},
    "preact_resnet": {"width": 8}, "resnet8": {"width": 4},
    "se_resnet20": {}, "shufflenet_v2_x0_5": {}, "vgg11": {}, "vit": {"depth": 2}, "worksheet2": {}, "wrn_16_4": {},
}  # fmt: skip
PLUGIN = """
import torch
from torch import nn
from cifar.registry import models

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

class Branching(Net):
    def forward(self, x):
        return super().forward(x) * (2 if float(x.mean()) > 0 else 1)

class Random(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(len(x), 1)

class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))

class Looping(Net):
    def forward(self, x):
        return torch.cat([super(Looping, self).forward(image[None]) for image in x])

KINDS = {"plain_plugin": Net, "branching": Branching, "random_plugin": Random, "sized": Sized, "looping": Looping}
for name, kind in KINDS.items():
    models.register(name)(lambda kind=kind: kind())
"""


def disturb(network: nn.Module) -> nn.Module:
    """A network whose statistics and biases are not those of a fresh one, so that no part of it can be left out unseen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.mul_(1 + 0.2 * torch.rand_like(tensor)).add_(0.02 * torch.rand_like(tensor))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics of the next batch as they are
        network.train()(torch.randn(16, 3, 32, 32))
    return network.eval()


def list_networks() -> list[tuple[str, dict[str, Any]]]:
    every = [(name, {}) for name in registry.models.names()] if os.environ.get("CIFAR_ONNX_ALL") else []
    return every or list(FAMILIES.items())


def test_every_family_is_tried() -> None:
    registry.models.load()
    builders = {registry.models[name].builder for name in FAMILIES}
    missing = [entry.name for entry in registry.models if entry.builder not in builders and not entry.digest]
    assert not missing, "add one network of its family to FAMILIES"


@pytest.mark.parametrize(("name", "values"), list_networks(), ids=lambda value: value if isinstance(value, str) else "")
def test_each_family_gives_the_same_logits(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    """The oracle is the network on images that are normalised here, by hand."""
    network = disturb(registry.models[name].build(**values))
    content = export_onnx(PixelNetwork(network, "dataset").eval(), {"name": name})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert isinstance(given.shape[0], str) and returned.name == "logits" and returned.shape[1] == 10
    mean, std = (np.array(each, dtype=np.float32).reshape(3, 1, 1) for each in (data.MEAN, data.STD))
    for size in (1, 3):
        pixels = np.random.default_rng(size).integers(0, 256, (size, 3, 32, 32), dtype=np.uint8)
        (found,) = session.run(None, {"images": pixels})
        with torch.no_grad():
            wanted = network(torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std)).numpy()
        assert found.shape == wanted.shape == (size, 10) and found.std() > 0
        np.testing.assert_allclose(found, wanted, atol=2e-4 * max(1, np.abs(wanted).max()), rtol=0)


def test_the_file_says_what_it_is_and_names_no_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFAR_PRETRAINED", str(tmp_path / "zoo"))
    folder, file = write_pretrained(tmp_path / "zoo", classes=["cat", "dog"]), tmp_path / "a b.onnx"
    before = sorted(folder.iterdir())
    assert main(["export", NAME, "--onnx", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["split"] == "test" and report["images"] == 10_000 and report["largest_difference"] < 1e-5
    model = onnx.load(file)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["name"] == NAME and facts["test_accuracy"] == "0.3000" and facts["classes"] == "cat,dog"
    content = file.read_bytes()
    assert report["bytes"] == len(content)
    for secret in (str(Path(data.__file__).parents[2]), os.path.dirname(torch.__file__), str(tmp_path), "stack_trace"):
        assert secret.encode() not in content
    assert sorted(folder.iterdir()) == before
    images = data.load_dataset("stand-in")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.test_images})
    assert report["accuracy"] == pytest.approx((logits.argmax(1) == images.test_labels).mean())
    assert report["torch_accuracy"] == pytest.approx(report["accuracy"], abs=2e-4)


def train(runs: Path, run_id: str, **values: Any) -> RunDir:
    config = resolve_config({**TINY, "epochs": 1, "max_steps": 2, "probes": "none", **values})
    record = run.create_run(config, runs, run.RunMetadata(run_id=run_id))
    run.train_run(config, record)
    return record


def test_a_run_is_compared_on_its_validation_images(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The test images are scored only where one asks for them, or where they have been scored before."""
    record = train(runs, "one")
    (record.path / "environment.json").unlink()  # as a run of an earlier version may lack it
    assert main(["export", "one", "--onnx", str(tmp_path / "x.onnx")]) == 0
    out = capsys.readouterr().out
    assert "val         accuracy" in out and "\ntest " not in out
    accuracy = record.read_json("summary")["val/acc"]
    assert f"accuracy {100 * accuracy:.2f} % in ONNX Runtime, {100 * accuracy:.2f} % in PyTorch" in out
    whole = train(runs, "whole", val_size=0)
    for words, said in (([], "not compared"), (["--split", "test"], "test        accuracy")):
        assert main(["export", whole.id, "--onnx", str(tmp_path / "x.onnx"), *words]) == 0
        assert said in capsys.readouterr().out
    assert main(["export", whole.id, "--onnx", str(tmp_path / "y.onnx"), "--split", "val"]) == 2
    assert not (tmp_path / "y.onnx").exists()


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "plugins" / "models").mkdir(parents=True)
    (tmp_path / "plugins" / "models" / "three.py").write_text(PLUGIN)
    with keep_registries():
        monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "plugins"))
        yield


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("plain_plugin", ""),
        ("sized", ""),
        ("branching", "cannot be exported"),
        ("random_plugin", "random in evaluation mode"),
        ("looping", "fixes the size of the batch"),
    ],
)
def test_a_plugin_is_exported_or_refused_in_a_sentence(
    model: str, said: str, plugins: None, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {key: value for key, value in TINY.items() if key not in ("model", "width")}
    config = resolve_config({**small, "model": model, "epochs": 1, "max_steps": 1, "probes": "none"})
    record = run.create_run(config, runs)
    run.train_run(config, record)
    file = tmp_path / "x.onnx"
    file.write_text("what was there before")
    assert main(["export", record.id, "--onnx", str(file)]) == (2 if said else 0)
    err = capsys.readouterr().err
    if said:
        assert said in err and model in err and len(err.strip().splitlines()) == 1 and len(err) < 1000, err
        assert file.read_text() == "what was there before"
    else:
        onnx.checker.check_model(onnx.load(file))


@pytest.mark.parametrize("name", NETWORKS if os.environ.get("CIFAR_ONNX_ALL") else ["lstm", "shared", "deformable"])
def test_networks_of_all_kinds_are_right_or_refused_in_a_sentence(name: str) -> None:
    """No wrong file is given away: `compare_logits` is the network's own answer."""
    network = PixelNetwork(NETWORKS[name].build(), "half")
    materialize_lazy_modules(network)
    try:
        content = export_onnx(network.eval(), {})
        assert compare_logits(network, open_session(content)) < 1e-4
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 700, error


def test_a_wrong_file_is_noticed() -> None:
    """The ONNX file of other weights."""
    torch.manual_seed(0)
    network, other = (PixelNetwork(registry.models["resnet8"].build(width=2), "half").eval() for _ in range(2))
    predict = open_session(export_onnx(network, {}))
    assert compare_logits(network, predict) < 1e-5
    with pytest.raises(UserError, match="gives other logits"):
        compare_logits(other, predict)
