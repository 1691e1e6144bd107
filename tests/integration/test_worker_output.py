"""What trials of a sweep leave in their output.log: also what goes past Python, and how those ended that could not say so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar.sweeps.local import LocalBackend
from helpers.agent_processes import create_sweep, start_agent
from helpers.plugins import keep_registries
from helpers.processes import wait_for_exit

TALKER = """
import os, signal, sys
from torch import nn
from cifar.models.conv import ConvNet
from cifar.registry import models

class Talker(ConvNet):
    def __init__(self, kind):
        super().__init__(width=4, depth=1)
        self.kind, self.calls = kind, 0
    def forward(self, x):
        self.calls += self.training
        if self.calls == 4 and self.training:  # later than where parts are tried
            print("through Python, password=abcdefgh1234")
            os.write(2, b"past Python, password=abcdefgh1234\\n")
        if self.calls == 8 and self.kind == "raises":
            raise RuntimeError("a bug in the model")
        if self.calls == 8 and self.kind == "aborts":
            os.write(1, b"last words\\n")
            os.abort()
        return super().forward(x)

@models.register("talker", kind="talks")
@models.register("raiser", kind="raises")
@models.register("aborter", kind="aborts")
def talker(*, kind: str = "talks") -> nn.Module:
    return Talker(kind)
"""


@pytest.fixture
def _registries() -> Iterator[None]:
    """What the plug-ins register is forgotten."""
    with keep_registries():
        yield


def lines_of(backend: LocalBackend, cell: int) -> list[str]:
    return (backend.runs_dir / backend.run_id(cell) / "output.log").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.usefixtures("_registries")
def test_each_trial_has_its_own_lines(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin" / "models").mkdir(parents=True)
    (tmp_path / "plugin" / "models" / "talker.py").write_text(TALKER)
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "plugin"))
    models = "parameters: {model: {values: [talker, raiser, aborter]}, epochs: {value: 3}}"
    backend = create_sweep(runs, models, epochs=3, train_size=512)
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    assert code in (0, 1) and [cell["state"] for cell in backend.list_cells()] == ["finished", "failed", "killed"], output
    talks, raises, aborts = (lines_of(backend, cell) for cell in range(3))
    for lines, tries in ((talks, 1), (raises, 1), (aborts, 2)):  # who was killed is tried again, and adds its lines
        assert lines.count("through Python, password=***") == tries, lines
        assert lines.count("past Python, password=***") <= tries, "0: the run ended before the agent had passed it on"
        assert lines[0].startswith("run ")
    assert sum(line.startswith("epoch") for line in talks) == 3 and talks[-1].startswith("finished: ")
    assert "Traceback (most recent call last):" in raises and raises[-1].startswith("failed: ")
    assert any("a bug in the model" in line for line in raises)
    assert {"past Python, password=***", "last words"} <= set(aborts), "by the agent, where the worker could not"
    assert aborts[-1] == "killed: its process was killed by SIGABRT"
    assert sum(line.startswith("-- run") for line in aborts) == 1
    log = next((backend.folder / "logs").glob("*-0.log")).read_text()
    assert "\x02" not in log and "past Python, password=***" in log and "through Python, password=***" in log
    environment = json.loads((backend.runs_dir / backend.run_id(0) / "environment.json").read_text())
    assert (environment["program"], environment["args"]) == ("-m cifar", ["train", "--from", backend.run_id(0)])
    metrics = backend.runs_dir / backend.run_id(0) / "system_metrics.jsonl"
    samples = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert samples and samples[-1]["system.proc.memory.rssMB"] > 100, "the worker is measured by the agent's sidecar"
