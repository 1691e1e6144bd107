"""What commands print on a terminal of 80 columns: whole words and numbers, fewer columns; and all of it in a pipe."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cifar import registry
from cifar.cli import console
from cifar.cli.app import main
from cifar.system.terminal import text_width
from cifar.tracking import run_dir
from helpers import fake_runs
from helpers.local_sweeps import claim_trial, create_local_sweep


class Screen:
    """What commands print on a terminal of `width` columns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def run(self, *arguments: str, width: int = 80) -> str:
        terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)
        self.monkeypatch.setattr(console, "console", terminal)
        assert main(list(arguments)) == 0
        text = re.sub(r"\x1b\[[\d?;]*[A-Za-z]|\r", "", terminal.file.getvalue())
        return str(text)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch)


def find_table(text: str, first_word: str) -> list[str]:
    """The lines of a table, from its header to the next empty line."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(first_word))
    return [line for line in lines[start : [*lines, ""].index("", start)] if line]


def assert_fits(lines: list[str], width: int = 80) -> None:
    assert max(map(text_width, lines)) <= width, "\n".join(lines)


@pytest.mark.slow
def test_models_have_whole_names_and_short_numbers(screen: Screen) -> None:
    lines = find_table(screen.run("models", "--no-time"), "model ")
    assert_fits(lines)
    assert lines[0].split() == ["model", "parameters", "MACs", "keys"]
    text = "\n".join(lines)
    shown = {line.split()[0] for line in lines[1:] if not line.startswith(" ")}
    assert {"resnet20", "shufflenet_v2_x0_5", "densenet_bc_100_12"} <= shown & set(registry.models.names())
    assert "272 k" in text and "40.8 M" in text and lines[-2:] == ["in all: MACs verified yes", "no room for: FLOPs"]
    wide = screen.run("models", "--no-time", width=200)
    assert "40,813,184" in wide and "81,626,368" in wide


@pytest.mark.slow
def test_a_pipe_gets_whole_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--no-time"]) == 0
    lines = find_table(capsys.readouterr().out, "model ")
    assert "MACs verified" in lines[0] and "µs an image" in lines[0]
    assert any("40,813,184" in line and "resnet20 (= resnet)" in line for line in lines)


@pytest.fixture
def reported(runs: Path) -> Path:
    """Runs of two networks with three seeds and three learning rates each."""
    for model in ("resnet20", "preact_resnet18"):
        for lr in (0.1, 0.05, 0.025):
            for seed in (0, 1, 2):
                swept = ("model", "lr", "label_smoothing", "weight_decay", "seed")
                values: dict[str, Any] = {"lr": lr, "label_smoothing": lr / 10, "weight_decay": lr / 1000}
                fake_runs.write(runs, f"{model[:4]}{lr}s{seed}", model=model, seed=seed, swept=swept, **values)
    return runs


@pytest.mark.slow
def test_report_fits_and_says_what_all_have_in_common(screen: Screen, reported: Path) -> None:
    text = screen.run("report")
    lines = find_table(text, "network ")
    assert_fits(lines)
    assert "n 3" in next(line for line in lines if line.startswith("in all: ")) and " n " not in lines[0]
    assert "val acc %" in lines[0] and "time a run" in lines[0] and "params M" not in lines[0]
    assert all(re.search(r"(40\.81|557) +\d\d\.\d +64 s", line) for line in lines[1:7]), text
    assert "± 95 % 2.7" in text and "preact_resnet18 " in lines[-3]
    assert "no room for: params M" in lines


def test_report_names_the_best_run_and_how_to_repeat_it(
    screen: Screen, reported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = screen.run("report", width=200).splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("Best: "))
    found = re.fullmatch(r" +run (\S+), the first of 3 seeds; repeat it: python -m cifar train --from (\S+)", lines[place + 1])
    assert found and found[1] == found[2] and (reported / found[1]).is_dir(), lines[place + 1]
    monkeypatch.delenv("CIFAR_RUNS")
    text = screen.run("report", "--runs-dir", str(reported), width=200)
    assert f"--from {found[1]} --runs-dir {reported}" in text


def test_the_command_that_repeats_a_run_works_from_where_it_is_printed(tmp_path: Path, runs: Path) -> None:
    assert run_dir.format_repeat_command(runs / "abc", runs) == "python -m cifar train --from abc"
    other = tmp_path / "other runs"
    assert run_dir.format_repeat_command(other / "abc", other) == f"python -m cifar train --from abc --runs-dir '{other}'"
    assert run_dir.format_repeat_command(other / "abc", runs) == f"python -m cifar train --from '{other}/abc'"


def test_sweeps_status_and_list(screen: Screen, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = create_local_sweep(runs)
    trial = claim_trial(backend)
    backend.finish_trial(trial, "failed", reason="CUDA ran out of memory while it tried to allocate 512 MiB", retry=False)
    lines = find_table(screen.run("sweeps", "status", backend.id), "cell ")
    assert_fits(lines)
    assert lines[0].split() == ["cell", "run", "seed", "lr", "state", "reason"], "what is empty in all rows is no column"
    assert "failed" in lines[1] and lines[2].startswith(" ") and "MiB" in " ".join(lines[1:4])
    assert_fits(find_table(screen.run("sweeps", "list"), "sweep "))
    assert main(["sweeps", "list"]) == 0


def test_doctor_wraps_at_words(screen: Screen) -> None:
    text = screen.run("doctor")
    lines = find_table(text, "what ")
    assert_fits(lines)
    packages = lines[next(n for n, line in enumerate(lines) if line.startswith("packages")) :][:6]
    assert "matplotlib" in " ".join(packages), "no name is broken"


@pytest.mark.parametrize("command", [["profile", "resnet20"], ["config", "-e", "worksheet1"], ["config"]])
def test_other_tables_fit(screen: Screen, command: list[str]) -> None:
    text = screen.run(*command)
    assert_fits(find_table(text, "layer " if command[0] == "profile" else "key "))
    for word in ("272,474", "blocks.3.shortcut.conv", "16×32×32") if command[0] == "profile" else ("decay_norm_and_bias",):
        assert word in text


def test_a_dry_run_fits_and_has_times_with_units(screen: Screen) -> None:
    text = screen.run("sweep", "quickstart", "--dry-run", "--dataset", "stand-in", "--set", "max_macs=1.0e+7")
    lines = find_table(text, "cell ")
    assert_fits(lines)
    assert lines[0].split() == ["cell", "model", "width", "depth", "MMACs", "parameters", "time"]
    assert lines[-1] == "in all: epochs 2" and "skipped" in lines[7]
    assert re.search(r"^7 trials, very roughly \d+(\.\d)? (ms|s|min|h) of training", text, re.M)
    assert all(re.search(r"\d (ms|s|min|h)$", line) for line in lines[1:6])
