"""A run stays loadable when a probe or another plug-in is gone, and says which file changed when its own has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cifar
from cifar.cli.app import main
from cifar.config.resolve import resolve_config, resolve_for_evaluation, resolve_resumed
from cifar.errors import UserError
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.loop import RunHooks
from helpers.plugins import forget_plugins, keep_registries
from helpers.run_configs import TINY

PROBE = """
import torch
from cifar.probes import weight_layers
from cifar.registry import probes

@probes.register("near_zero")
class NearZero:
    labels = {"near_zero": ("weights near zero", "share")}

    def __init__(self, *, closeness: float = 1e-3):
        self.closeness = closeness

    def start(self, parameters):
        self.names = weight_layers(parameters)
        self.layers = list(self.names)

    def after_update(self, parameters):
        return {"near_zero": torch.stack([(parameters[n].abs() < self.closeness).float().mean() for n in self.names.values()])}
"""
MODEL = """
from torch import nn
from cifar.registry import models
WIDE = 8
@models.register("edited")
def edited(*, slope: float = 0.1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, WIDE, 3, stride=4), nn.LeakyReLU(slope), nn.Flatten(), nn.Linear(WIDE * 64, 10))
"""
SCHEDULE = """
from cifar.registry import schedules
schedules.register("halves")(lambda: lambda progress: 0.5)
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a network, a schedule and a probe."""
    folder = tmp_path / "plugins"
    for name, text in (("models/w.py", MODEL), ("schedules/s.py", SCHEDULE), ("probes/near_zero.py", PROBE)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    with keep_registries():
        monkeypatch.setenv("CIFAR_PLUGINS", str(folder))
        yield folder


def train(runs: Path, *, stop_after: int = 0, **values: Any) -> RunDir:
    small = {key: value for key, value in TINY.items() if key not in ("model", "width")}
    config = resolve_config({**small, "epochs": 2, "max_steps": 3, "probe_every": 1, "checkpoint_every": 1, **values})
    record = run.create_run(config, runs)
    left = iter(range(stop_after - 1, -2, -1))
    hooks = RunHooks(poll_stop=lambda: "interrupted" if next(left) == 0 else None) if stop_after else None
    run.train_run(config, record, hooks=hooks)
    return record


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    forget_plugins()


def test_a_run_says_which_plugins_it_used(plugins: Path, runs: Path) -> None:
    record = train(runs, model="edited", schedule="halves", probes="gradient_flow,near_zero")
    used = record.read_json("run")["plugins"]
    assert {part: about["name"] for part, about in used.items()} == {
        "model": "edited",
        "schedule": "halves",
        "probe near_zero": "near_zero",
    }
    assert used["model"]["file"] == str(plugins / "models" / "w.py") and len(used["model"]["sha256"]) == 64
    assert "plugins" not in train(runs, model="conv8", probes="none").read_json("run")


@pytest.mark.slow
@pytest.mark.parametrize("probes", ["all", "near_zero", "gradient_flow,near_zero"])
@pytest.mark.parametrize("how", ["file", "folder", "variable"])
def test_a_run_is_read_scored_and_resumed_when_its_probe_is_gone(
    probes: str, how: str, plugins: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if how != "file" and probes != "all":
        pytest.skip("one way of each is enough")
    whole = train(runs, model="conv8", probes=probes)
    half = train(runs, model="conv8", probes=probes, stop_after=4)
    assert half.state == "interrupted" and any(key.startswith("near_zero/") for row in whole.read_rows() for key in row)
    forget_plugins()
    if how == "file":
        (plugins / "probes" / "near_zero.py").unlink()
    elif how == "folder":
        plugins.rename(plugins.parent / "elsewhere")
        monkeypatch.delenv("CIFAR_PLUGINS")
    else:
        monkeypatch.delenv("CIFAR_PLUGINS")
    assert cifar.load(whole.path)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert main(["evaluate", whole.id, "--runs-dir", str(runs)]) == 0
    assert main(["train", "--resume", half.id, "--runs-dir", str(runs), "--wandb", "disabled"]) == 0
    said = capsys.readouterr().out
    assert half.state == "finished" and [row["epoch"] for row in half.read_rows()] == [1, 2]
    assert ("near_zero' is not here" in said) is (probes != "all")
    assert "takes 'closeness' of the run any more" in said
    assert half.read_json("config")["closeness"] == 1e-3, "the record stays as it was"
    assert main(["train", "--from", whole.id, "--dry-run", "--runs-dir", str(runs)]) == 0
    assert main(["report", whole.id, half.id, "--runs-dir", str(runs)]) == 0


def test_the_weights_of_a_resumed_run_are_those_of_one_that_kept_its_probe(plugins: Path, runs: Path) -> None:
    whole = train(runs, model="conv8", probes="near_zero")
    half = train(runs, model="conv8", probes="near_zero", stop_after=4)
    (plugins / "probes" / "near_zero.py").unlink()
    forget_plugins()
    config, notes = resolve_resumed(half.read_json("config"))
    assert len(notes) == 2 and config.probes == "none"
    run.train_run(config, half)
    for name, tensor in cifar.load(whole.path).state_dict().items():
        assert torch.equal(tensor, cifar.load(half.path).state_dict()[name])


def test_an_optimizer_or_a_broken_file_beside_it_does_not_keep_a_run_from_being_scored(
    plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = train(runs, model="edited", schedule="halves", probes="none")
    forget_plugins()
    (plugins / "schedules" / "s.py").unlink()
    (plugins / "models" / "a_broken_one.py").write_text("1 / 0\n")
    (plugins / "probes" / "near_zero.py").write_text("import nothing_of_this_name\n")
    assert main(["evaluate", record.id, "--runs-dir", str(runs)]) == 0
    assert cifar.load(record.path)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    settings = resolve_for_evaluation(record.read_json("config"))
    assert (settings.model, settings.probes, settings.schedule) == ("edited", "none", "constant")
    capsys.readouterr()
    assert main(["train", "--from", record.id, "--runs-dir", str(runs)]) == 2, "a new run has to be whole"
    assert "error: " in capsys.readouterr().err


def test_weights_that_do_not_fit_the_network_as_it_is_now(
    plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = train(runs, model="edited", probes="none")
    file = plugins / "models" / "w.py"
    edit(file, "WIDE = 8", "WIDE = 16")
    expected = f"the weights of run {record.id} do not fit model 'edited' as {file} has it, which has changed since the run"
    with pytest.raises(UserError) as caught:
        cifar.load(record.path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    capsys.readouterr()
    assert main(["evaluate", record.id, "--runs-dir", str(runs)]) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1
    edit(file, "WIDE = 16", "WIDE = 8")
    assert main(["evaluate", record.id, "--runs-dir", str(runs)]) == 0, "made what it was"
    assert "has changed" not in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_the_network_as_it_is_now(
    plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = train(runs, model="edited", probes="none", stop_after=4)
    file = plugins / "models" / "w.py"
    edit(file, "WIDE = 8", "WIDE = 16")
    assert main(["train", "--resume", half.id, "--runs-dir", str(runs), "--wandb", "disabled"]) == 2
    said = capsys.readouterr().err
    assert f"the checkpoint of run {half.id} does not fit its model as {file} has it, which has changed" in said
    assert half.state == "interrupted"
    edit(file, "WIDE = 16", "WIDE = 8")
    run.train_run(resolve_resumed(half.read_json("config"))[0], half)
    assert half.state == "finished" and [row["epoch"] for row in half.read_rows()] == [1, 2]


def test_an_edit_that_keeps_the_shapes_is_said(plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = train(runs, model="edited", probes="none")
    edit(plugins / "models" / "w.py", "nn.LeakyReLU(slope)", "nn.ELU(slope)")
    capsys.readouterr()
    assert main(["evaluate", record.id, "--runs-dir", str(runs)]) == 0
    changed = f"{plugins / 'models' / 'w.py'} has changed since run {record.id} was made (model)"
    assert f"warning: {changed}" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="has changed since run"):
        cifar.load(record.path)


@pytest.mark.slow
def test_a_resumed_run_keeps_on_record_which_files_had_changed(
    plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = train(runs, model="edited", schedule="halves", probes="none", stop_after=4)
    edit(plugins / "models" / "w.py", "nn.LeakyReLU(slope)", "nn.ELU(slope)")
    edit(plugins / "schedules" / "s.py", "0.5", "0.25")
    assert main(["train", "--resume", half.id, "--runs-dir", str(runs), "--wandb", "disabled"]) == 0
    said = capsys.readouterr().out
    for part, name in (("model", "models/w.py"), ("schedule", "schedules/s.py")):
        assert f"note: {plugins / name} has changed since run {half.id} was made ({part})" in said
    assert len(half.read_json("run")["notes"]) == 2, "and stays on record"


def test_older_runs_have_no_digest_and_nothing_is_claimed(
    plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = train(runs, model="edited", probes="none")
    about = record.read_json("run")
    del about["plugins"]
    record.write_json("run", about)
    edit(plugins / "models" / "w.py", "nn.LeakyReLU(slope)", "nn.ELU(slope)")
    capsys.readouterr()
    assert main(["evaluate", record.id, "--runs-dir", str(runs)]) == 0
    assert "changed" not in capsys.readouterr().err
    edit(plugins / "models" / "w.py", "WIDE = 8", "WIDE = 16")
    with pytest.raises(UserError, match=r"do not fit model 'edited' as .*w\.py has it now; make the file what it was"):
        cifar.load(record.path)


def test_a_network_that_is_gone_is_named(plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = train(runs, model="edited", probes="none")
    file = plugins / "models" / "w.py"
    file.unlink()
    forget_plugins()
    gone = (
        f"unknown model 'edited': run {record.id} had it from {file}, which is gone; restore it; set CIFAR_PLUGINS to {plugins}"
    )
    with pytest.raises(UserError) as caught:
        cifar.load(record.path)
    assert str(caught.value) == gone
    for command in (["config", "--from", record.id], ["train", "--from", record.id, "--dry-run"], ["evaluate", record.id]):
        assert main([*command, "--runs-dir", str(runs)]) == 2 and capsys.readouterr().err == f"error: {gone}\n"
    edited = plugins / "models" / "w.py"
    edited.write_text(MODEL.replace("def edited(*, slope", "def edited(*, width: int = 3, slope").replace("WIDE, 3", "None, 3"))
    forget_plugins()
    with pytest.raises(UserError, match=rf"cannot be built as {edited} has it now: TypeError.*{edited}:\d+, in edited"):
        cifar.load(record.path)


def test_a_contiguous_run_is_scored_on_contiguous_images(plugins: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = "class View(nn.Module):\n    def forward(self, x): return x.view(len(x), -1)\n"
    edit(plugins / "models" / "w.py", "nn.Flatten()", "View()")
    edit(plugins / "models" / "w.py", "WIDE = 8", f"{view}WIDE = 8")
    record = train(runs, model="edited", probes="none")
    assert record.read_json("environment")["step"]["channels_last"] is False
    accuracy = record.read_json("summary")["val/acc"]
    assert main(["evaluate", record.id, "--runs-dir", str(runs)]) == 0
    assert f"accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out
