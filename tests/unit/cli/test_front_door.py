"""What a newcomer meets: the version, -h, the program's name in help and hints, suggestions, and where a W&B run is."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cifar
from cifar.cli.app import COMMANDS, main
from cifar.errors import name_program, program_name
from helpers.paths import ROOT
from helpers.protocol import Server

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TINY = ["--dataset", "stand-in", "model=conv", "width=4", "epochs=1", "batch_size=32", "train_size=64", "val_size=100"]
TINY += ["threads=1"]


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


# -- version and help --------------------------------------------------------------------------------------------------


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"cifar": "9.8.7"}[name])
    assert main(["--version"]) == 0 and capsys.readouterr().out == "cifar 9.8.7\n"


def test_a_checkout_that_is_not_installed_has_a_version(tmp_path: Path) -> None:
    """-S: no site-packages, so no metadata of an installed package; the checkout is all there is."""
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import cifar; print(cifar.__version__)"
    (tmp_path / "cifar").symlink_to(ROOT / "cifar")
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == VERSION
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = cifar.nothing_of_this_name


@pytest.mark.parametrize("command", ["", *COMMANDS, "sweeps list", "sweeps status", "sweeps retry", "sweeps extend"])
def test_dash_h_is_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([*command.split(), "-h"]) == 0
    assert "Usage: python -m cifar" in capsys.readouterr().out


# -- the program's name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("started_as", "name"),
    [
        ("/usr/bin/cifar", "cifar"),
        ("cifar", "cifar"),
        ("/some/cifar/__main__.py", "python -m cifar"),
        ("/some/pytest", "python -m cifar"),
        ("", "python -m cifar"),
    ],
)
def test_the_program_is_named_as_it_was_started(monkeypatch: pytest.MonkeyPatch, started_as: str, name: str) -> None:
    monkeypatch.setattr(sys, "argv", [started_as])
    assert program_name() == name
    assert name_program("see `python -m cifar gc`") == f"see `{name} gc`"


def test_help_and_hints_of_the_installed_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/bin/cifar"])
    for command in ["", *COMMANDS]:
        assert main([*command.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert "Usage: cifar" in shown and "python -m" not in shown, shown
    assert mistake(capsys, "gc", "--dry").endswith("see `cifar gc --help`\n")
    assert "`cifar sweeps list`" in mistake(capsys, "sweeps", "status", "nosweep")
    assert main(["sweeps", "list"]) == 0 and "`cifar sweep quickstart` makes one" in capsys.readouterr().out


# -- unknown names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["train", "model=resnet2"], ["train", "optimizer=adamm"], ["train", "probes=zero_gradient"], ["train", "schedule=lin"]],
    ids=lambda arguments: arguments[1],
)
def test_an_unknown_part_names_plugins(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    said = mistake(capsys, *arguments)
    assert "did you mean '" in said and "CIFAR_PLUGINS" in said


def test_three_names_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"did you mean '\w+', '\w+' or '\w+'\? \(known: ", mistake(capsys, "train", "model=resnet2"))
    assert "did you mean 'quickstart'?" in mistake(capsys, "sweep", "quickstrt", "--no-agent")


def test_a_shipped_sweep_is_found_by_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("a file of one's own comes first")
    assert "quickstart: a sweep is a mapping" in mistake(capsys, "sweep", "quickstart", "--no-agent")
    (tmp_path / "quickstart").unlink()
    assert main(["sweep", "quickstart", "--dataset", "stand-in", "--no-agent", "--wandb", "disabled"]) == 0
    assert "python -m cifar agent" in capsys.readouterr().out


# -- where the run is on W&B -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_says_where_its_run_is(wandb_server: Server, capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert main(["train", *TINY]) == 0
    run_id = next(path.name for path in runs.iterdir())
    shown = capsys.readouterr().out
    found = re.search(r"^W&B +(http://\S+)$", shown, re.M)
    assert found and found[1].endswith(f"/runs/{run_id}"), shown
    assert "push" not in shown


@pytest.mark.slow
def test_train_says_how_to_send_an_offline_run(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert main(["train", *TINY, "--wandb", "offline"]) == 0
    run_id = next(path.name for path in runs.iterdir())
    shown = capsys.readouterr().out
    found = re.search(rf"^W&B +offline; .*python -m cifar push {run_id} .*wandb sync (\S+)\)$", shown, re.M)
    assert found and list(Path(found[1]).glob(f"run-{run_id}.wandb")), shown


@pytest.mark.slow
def test_train_without_wandb_does_not_speak_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--wandb", "disabled"]) == 0
    assert "W&B" not in capsys.readouterr().out


def test_the_entry_point_says_its_name(tmp_path: Path) -> None:
    """As pip's script does: argv[0] is the script's path."""
    code = "import sys; sys.argv[0] = '/usr/local/bin/cifar'; from cifar.cli.app import run; run()"
    command = [sys.executable, "-c", code, "sweeps", "list", "--runs-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "`cifar sweep quickstart`" in done.stdout, done.stderr
