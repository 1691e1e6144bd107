"""Shell completion: the installed command completes names, quickly; `python -m cifar` says that it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar import registry
from cifar.cli.app import main
from cifar.cli.completion import list_registered_names
from cifar.config.shipped import shipped_names
from helpers.fake_runs import write
from helpers.finished_sweeps import ID, write_finished_sweep
from helpers.paths import ROOT

PLUGIN = '@models.register("mine")\ndef mine(*, width: int = 1): ...\n'


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """(words, shell) -> what the shell is offered for the last word."""
    monkeypatch.setattr(sys, "argv", ["/some/bin/cifar"])
    monkeypatch.chdir(tmp_path)

    def ask(words: list[str], shell: str = "fish") -> list[str]:
        monkeypatch.setenv("_CIFAR_COMPLETE", f"complete_{shell}")
        if shell == "bash":
            monkeypatch.setenv("COMP_WORDS", " ".join(words))
            monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(words))
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        with pytest.raises(SystemExit) as end:
            main([])
        assert end.value.code == 0
        offered = capsys.readouterr().out
        if shell == "zsh":  # _arguments '*: :(("a"
            return re.findall(r'"([^"]+)"', offered)
        return [line.partition("\t")[0] for line in offered.splitlines() if line]

    return ask


def test_commands_and_options_are_completed(complete) -> None:
    assert {"train", "sweep", "agent", "report"} <= set(complete(["cifar", ""]))
    assert complete(["cifar", "tra"]) == ["train"]
    assert "--experiment" in complete(["cifar", "train", "--ex"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_experiments_and_sweep_files_are_completed(complete, shell: str) -> None:
    assert complete(["cifar", "train", "--experiment", "worksheet"], shell) == ["worksheet1", "worksheet2"]
    assert complete(["cifar", "sweep", "quick"], shell) == ["quickstart"]
    assert set(complete(["cifar", "config", "-e", ""], shell)) >= set(shipped_names("experiments"))


def test_files_of_ones_own_are_completed(complete, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rates.yaml").touch()
    (tmp_path / "mine" / "notes.txt").touch()
    assert complete(["cifar", "sweep", "mi"]) == ["mine/"]
    assert complete(["cifar", "sweep", "mine/"]) == ["mine/rates.yaml"]
    assert complete(["cifar", "sweep", "absent/"]) == []


def test_names_of_parts_are_completed(complete) -> None:
    assert "model=resnet20" in complete(["cifar", "train", "model=resnet"])
    assert "model=resnet20" in complete(["cifar", "sweep", "quickstart", "--set", "model=resnet2"])
    assert complete(["cifar", "train", "optimizer=mu"]) == ["optimizer=muon"]
    assert complete(["cifar", "train", "schedule=cos"]) == ["schedule=cosine"]
    assert complete(["cifar", "train", "mod"]) == ["model="]
    assert complete(["cifar", "train", "lr=0"]) == []
    assert "resnet20" in complete(["cifar", "profile", "resnet2"])


def test_bash_takes_the_equals_sign_for_a_word(complete) -> None:
    assert complete(["cifar", "train", "model", "=", "resnet2"], "bash") == ["resnet20"]
    assert "resnet20" in complete(["cifar", "train", "model", "="], "bash")


def test_runs_and_sweeps_are_completed(complete, runs: Path, tmp_path: Path) -> None:
    write_finished_sweep(runs, 2)
    write(runs, "alone123")
    assert complete(["cifar", "agent", "ab"]) == [ID]
    assert complete(["cifar", "sweeps", "status", ""]) == [ID]
    assert complete(["cifar", "train", "--resume", "al"]) == ["alone123"]
    assert complete(["cifar", "evaluate", "abcd1234-0"]) == [f"{ID}-000", f"{ID}-001"]
    assert set(complete(["cifar", "report", ""])) == {ID, f"{ID}-000", f"{ID}-001", "alone123"}
    assert complete(["cifar", "train", "--runs-dir", str(tmp_path / "none"), "--resume", ""]) == []


def test_pretrained_networks_are_completed_where_they_stand_for_runs(
    complete, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_PRETRAINED", str(tmp_path / "zoo"))
    for name in ("frontier-tiny", "frontier-small"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        (tmp_path / "zoo" / name / "card.json").touch()
    write(runs, "frontier-t9")
    for words in (["evaluate"], ["export"], ["train", "--from"], ["config", "--from"]):
        assert complete(["cifar", *words, "frontier-t"]) == ["frontier-t9", "frontier-tiny"]
    assert complete(["cifar", "models", "--pretrained", "frontier-ti"]) == ["frontier-tiny"]
    assert complete(["cifar", "train", "--resume", "frontier-t"]) == ["frontier-t9"]


@pytest.mark.parametrize(
    ("part", "known"),
    [
        ("model", registry.models),
        ("optimizer", registry.optimizers),
        ("schedule", registry.schedules),
        ("probes", registry.probes),
    ],
)
def test_names_read_from_source_are_those_of_the_registry(
    part: str, known: registry.Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert list_registered_names(part) == known.names()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.py").write_text(PLUGIN)
    monkeypatch.setenv("CIFAR_PLUGINS", f"{tmp_path}{os.pathsep}{tmp_path / 'absent'}")
    assert ("mine" in list_registered_names(part)) == (part == "model")


def test_completion_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['cifar']; from cifar.cli.app import run; run()"
    environment = {
        **os.environ, "_CIFAR_COMPLETE": "complete_bash", "COMP_WORDS": "cifar train model=res", "COMP_CWORD": "2",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "model=resnet20" in done.stdout.split()
    # not pydantic: Typer itself imports it to parse a command's words
    assert not modules & {"torch", "wandb", "numpy", "matplotlib", "optuna", "yaml"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(shell: str, tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'cifar'; from cifar.cli.app import run; run()"
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "--show-completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "_CIFAR_COMPLETE=complete_" in done.stdout, done.stderr


def test_python_dash_m_says_that_it_is_not_completed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--install-completion"]) == 2
    assert "give this option to `cifar`" in capsys.readouterr().err
