"""`models` and `profile` beside a network that fails, and one that cannot be verified."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from cifar import registry
from cifar.cli.app import main
from cifar.config import resolve  # noqa: F401  it reads registry.models, which these tests replace

PLUGIN = """
    import torch
    from torch import nn
    from cifar.registry import models

    class Wrong(nn.Module):
        def forward(self, x):
            raise RuntimeError("no way\\nthrough here")

    class Doubtful(nn.Sequential):
        def forward(self, x):
            return super().forward(torch.fft.rfft2(x).real)

    @models.register("fails_forward")
    def fails_forward() -> nn.Module:
        return Wrong()

    @models.register("fails_build")
    def fails_build() -> nn.Module:
        raise OSError("no file")

    @models.register("fails_exit")
    def fails_exit() -> nn.Module:
        raise SystemExit(3)

    @models.register("doubtful")
    def doubtful() -> nn.Module:
        return Doubtful(nn.Flatten(), nn.LazyLinear(10))
"""
NAMES = ["fails_forward", "conv4", "fails_build", "doubtful"]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plug-in file. The names that it registers are gone after the test."""
    path = tmp_path / "plugins" / "models" / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text(textwrap.dedent(PLUGIN))
    registry.models.load()
    monkeypatch.setattr(registry.models, "_entries", dict(registry.models._entries))
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "plugins"))
    return path


def test_models_lists_the_others(plugin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "models", [registry.models[name] for name in NAMES])
    assert main(["models", "--no-time", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.split() and line.split()[0] in NAMES}
    assert list(rows) == ["doubtful", "conv4", "fails_build", "fails_forward"], "those that fail come last"
    assert "258,208" in rows["conv4"] and " yes" in rows["conv4"] and " NO" in rows["doubtful"]
    assert "FAILS" in rows["fails_build"] and "FAILS" in rows["fails_forward"]
    text = " ".join(out.split())
    assert "doubtful: no formula counts aten._fft_r2c" in text
    assert "RuntimeError: no way through here" in text and "OSError: no file" in text and "Traceback" not in text


def test_models_as_a_document(plugin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "models", [registry.models[name] for name in NAMES])
    assert main(["models", "--no-time", "--device", "cpu", "--json"]) == 0
    networks = {network["name"]: network for network in json.loads(capsys.readouterr().out)["models"]}
    wrong = networks["fails_forward"]
    assert wrong.keys() == networks["conv4"].keys() and wrong["macs"] is None and wrong["macs_verified"] is False
    assert str(plugin) in wrong["note"] and networks["conv4"]["note"] == ""


@pytest.mark.parametrize("name", ["fails_forward", "fails_build", "fails_exit"])
def test_profile_names_the_file_in_one_sentence(name: str, plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", name]) == 2
    error = capsys.readouterr().err
    assert str(plugin) in error and name in error and len(error.strip().splitlines()) == 1


def test_profile_says_what_is_not_verified(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "doubtful"]) == 0
    assert "UNVERIFIED: no formula counts aten._fft_r2c" in " ".join(capsys.readouterr().out.split())
