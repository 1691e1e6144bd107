"""The pretrained networks of the package score on the real test images what their cards say, and so do their ONNX files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifar import data, registry
from cifar.cli.app import main
from cifar.tracking.predictions import CLASSES
from helpers.paths import PACKAGE

pytestmark = pytest.mark.slow
FOLDERS = sorted(file.parent for file in (PACKAGE / "pretrained").glob("*/card.json") if (file.parent / "weights.pt").exists())
MODELS = {  # what each is, written once more
    "frontier-3m": ("efficientnet", {"width_multiplier": 0.15, "depth_multiplier": 0.5, "channel_divisor": 4}),
    "frontier-6m": ("efficientnet", {"width_multiplier": 0.25, "depth_multiplier": 0.5, "channel_divisor": 4}),
    "frontier-26m": ("airbench", {"width": 24, "depth": 3}),
    "frontier-28m": ("efficientnet", {"width_multiplier": 0.59, "depth_multiplier": 0.5, "channel_divisor": 4}),
    "frontier-41m": ("efficientnet", {"width_multiplier": 0.74, "depth_multiplier": 0.5, "channel_divisor": 4}),
    "frontier-400m": ("wrn_16_4", {}),
}


FULL_MACS = 3e6  # networks up to this are scored on all test images; larger ones on the first 1,000, as they take minutes


@pytest.fixture(scope="module")
def test_set() -> tuple[np.ndarray, np.ndarray]:
    if data.find_cifar10() is None:
        pytest.skip("CIFAR-10 IS NOT HERE (CIFAR_DATA): the networks are not scored")
    images = data.load_dataset("cifar10")
    return images.test_images, images.test_labels


def choose_images(card: dict[str, Any], test_set: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Images, labels, and how far their accuracy may be from the card's."""
    pixels, labels = test_set
    if card["macs"] <= FULL_MACS:
        return pixels, labels, 2e-4
    share = card["accuracy"]
    return pixels[:1000], labels[:1000], 3.5 * (share * (1 - share) / 1000) ** 0.5


def predict_by_hand(folder: Path, card: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    """Classes by a network whose file is read, and whose images are normalised, without the package's functions for it."""
    name, values = MODELS[folder.name]
    network = registry.models[name].build(**values).eval()
    tensors = torch.load(folder / "weights.pt", weights_only=True)
    network.load_state_dict({key: tensor.float() for key, tensor in tensors.items() if "::" not in key})
    mean, std = (np.array(card["input"][each], dtype=np.float32).reshape(3, 1, 1) for each in ("mean", "std"))
    with torch.no_grad():
        batches = [
            torch.from_numpy((batch / np.float32(255) - mean) / std) for batch in np.array_split(pixels, len(pixels) // 250)
        ]
        return np.concatenate([network(batch).argmax(1).numpy() for batch in batches])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_card_is_true(folder: Path, test_set: tuple[np.ndarray, np.ndarray]) -> None:
    card = json.loads((folder / "card.json").read_text())
    pixels, labels, tolerance = choose_images(card, test_set)
    found = predict_by_hand(folder, card, pixels)
    assert (found == labels).mean() == pytest.approx(card["accuracy"], abs=tolerance)
    if len(labels) == 10_000:
        for number, word in enumerate(CLASSES):
            assert (found[labels == number] == number).mean() == pytest.approx(card["per_class"][word], abs=2e-3)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_onnx_file_scores_the_same(
    folder: Path,
    test_set: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX RUNTIME IS NOT INSTALLED (the extra `onnx`)")
    card, file = json.loads((folder / "card.json").read_text()), tmp_path / "x.onnx"
    pixels, labels, tolerance = choose_images(card, test_set)
    is_full = len(labels) == 10_000
    if not is_full:  # without images `export` does not score all of them twice
        monkeypatch.setenv("CIFAR_DATA", str(tmp_path / "nothing"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["export", folder.name, "--onnx", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["split"] == ("test" if is_full else None)
    if is_full:
        assert report["accuracy"] == pytest.approx(card["accuracy"], abs=2e-4)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = np.concatenate([session.run(None, {"images": batch})[0].argmax(1) for batch in np.split(pixels, 10)])
    assert (found == labels).mean() == pytest.approx(card["accuracy"], abs=tolerance)
    assert (found[:250] == predict_by_hand(folder, card, pixels[:250])).mean() > 0.99
