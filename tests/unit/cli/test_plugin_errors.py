"""Errors of somebody's plug-in on the terminal: one sentence before a run, and their own lines when a run has begun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar.cli.app import main
from cifar.tracking.run_dir import RunDir
from helpers.plugins import keep_registries

MODELS = '''
import torch
from torch import nn
from cifar.registry import models


class Net(nn.Sequential):
    def __init__(self, *, fails_at):
        super().__init__(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
        self.fails_at, self.calls = fails_at, 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == self.fails_at:
            return self.give_up(x)
        return super().forward(x)

    def give_up(self, x):
        return torch.cat([x, x.flatten(1)])  # the line that is shown


class Own(BaseException):
    pass


@models.register("fails")
def fails(*, fails_at: int = 1) -> nn.Module:
    """Fails in its Nth training step."""
    return Net(fails_at=fails_at)


@models.register("pair")
def pair() -> nn.Module:
    """Returns two tensors."""

    class Pair(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y, y

    return Pair(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@models.register("view")
def view() -> nn.Module:
    """Needs contiguous images."""

    class View(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)

    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), View(), nn.Linear(512, 10))
'''
PAIRS = [
    "dataset=stand-in", "train_size=256", "val_size=200", "batch_size=64", "epochs=3", "device=cpu", "threads=1", "probes=none",
]  # fmt: skip
SWEEP = """
method: grid
metric: {name: val/acc, goal: maximize}
parameters:
  model: {values: [conv8, MODEL]}
  dataset: {value: stand-in}
  device: {value: cpu}
  train_size: {value: 256}
  val_size: {value: 200}
"""


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "plugins" / "models" / "mine.py"
    file.parent.mkdir(parents=True)
    file.write_text(MODELS)
    with keep_registries():
        monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "plugins"))
        yield file


def line_of(file: Path, text: str) -> int:
    return next(number for number, line in enumerate(file.read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    "command", [["profile"], ["profile", "--json"], ["train", "--dry-run"], ["train", "--wandb", "disabled"]]
)
@pytest.mark.parametrize("model", ["pair", "fails"])
def test_what_cannot_be_trained_is_one_sentence_from_every_command(
    command: list[str], model: str, plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*command, f"model={model}", *PAIRS])
    said = capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1 and said.err.startswith(f"error: model '{model}' ({plugins}) fails")
    expected = "(B, 10)" if model == "pair" else f"({plugins}:{line_of(plugins, 'the line that is shown')}, in give_up)"
    assert expected in said.err and not said.out
    assert not runs.exists()


@pytest.mark.slow
def test_a_sweep_with_a_network_that_cannot_be_trained_is_not_made(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    for option in ("--dry-run", "--no-agent"):
        file.write_text(SWEEP.replace("MODEL", "pair"))
        assert main(["sweep", str(file), option, "--wandb", "disabled"]) == 2
        said = capsys.readouterr().err
        assert "its output is a tuple" in said and str(file) in said and said.count("\n") == 1
    assert not (runs / "sweeps").exists()
    file.write_text(SWEEP.replace("MODEL", "view"))
    assert main(["sweep", str(file), "--no-agent", "--wandb", "disabled"]) == 0
    assert capsys.readouterr().out.count("model 'view' is trained on contiguous images") == 1


def test_the_fallback_is_said_by_a_dry_run_and_in_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "model=view", *PAIRS]) == 0
    assert "note: model 'view' is trained on contiguous images" in capsys.readouterr().out
    assert main(["profile", "--json", "model=view", *PAIRS]) == 0
    said = capsys.readouterr()
    assert "warning: model 'view' is trained on contiguous images" in said.err
    assert json.loads(said.out)["model"] == "view"


def test_an_error_in_a_run_is_shown_at_the_users_line(plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=fails", "fails_at=9", *PAIRS, "--wandb", "disabled"]) == 1
    said = capsys.readouterr().err
    line = line_of(plugins, "the line that is shown")
    assert said.startswith("Traceback (most recent call last):\n  ... ")
    assert f'File "{plugins}", line {line}, in give_up' in said and "the line that is shown" in said
    assert "lines of cifar and its libraries" in said and "site-packages" not in said and "cifar/training" not in said
    assert said.count("\n") < 15
    (record,) = (RunDir(path) for path in runs.iterdir())
    whole = (record.path / "traceback.txt").read_text()
    assert f"the whole traceback: {record.path / 'traceback.txt'}" in said
    assert "cifar/training/step.py" in whole and "give_up" in whole
    assert record.state == "failed"
    assert record.read_json("status")["reason"].endswith(f"({plugins}:{line}, in give_up)")
    assert [row["epoch"] for row in record.read_rows()] == [1, 2], "what was trained before stays"


OWN_ERRORS = {
    "Own('of my own')": "Own: of my own",
    "SystemExit(0)": "SystemExit: 0",
    "PermissionError(13, 'not mine', '/there')": "PermissionError: [Errno 13] not mine: '/there'",
}


@pytest.mark.parametrize("error", OWN_ERRORS)
def test_whatever_a_plugin_raises_in_a_run_is_its_own_error(
    error: str, plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins.write_text(MODELS.replace("return torch.cat([x, x.flatten(1)])", f"raise {error}"))
    line = line_of(plugins, "the line that is shown")
    assert main(["train", "model=fails", *PAIRS, "--wandb", "disabled"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{OWN_ERRORS[error]} ({plugins}:{line}, in give_up)" in said and not runs.exists()

    assert main(["train", "model=fails", "fails_at=9", *PAIRS, "--wandb", "disabled"]) == 1
    said = capsys.readouterr().err
    assert f'File "{plugins}", line {line}, in give_up' in said and "cifar/training" not in said
    (record,) = (RunDir(path) for path in runs.iterdir())
    assert record.state == "failed"
    assert record.read_json("status")["reason"] == f"{OWN_ERRORS[error]} ({plugins}:{line}, in give_up)"


@pytest.mark.parametrize("command", [["profile"], ["train", "--dry-run"]])
def test_a_builder_that_ends_in_a_class_of_its_own_is_one_sentence(
    command: list[str], plugins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins.write_text(MODELS.replace("return Net(fails_at=fails_at)", "raise Own('built')"))
    assert main([*command, "model=fails", *PAIRS]) == 2
    said, line = capsys.readouterr().err, line_of(plugins, "raise Own")
    assert f"Own: built ({plugins}:{line}, in fails)" in said and said.count("\n") == 1
