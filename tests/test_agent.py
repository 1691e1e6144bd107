"""The agent with real trainings in real processes: ends, retries, signals, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cifar.agent import agent as agents
from cifar.agent import dashboard as board
from cifar.agent import rich_dashboard as live
from cifar.agent import worker_process as crew
from cifar.config.resolve import parse_yaml
from cifar.sweeps import local
from cifar.sweeps import spec as sweeps
from cifar.sweeps.local import Local
from cifar.tracking.run_dir import Record

ROOT = Path(__file__).parent.parent
METRIC = "method: grid\nmetric: {name: val/acc, goal: maximize}\n"
TINY = {
    "dataset": "stand-in", "val_size": 200, "train_size": 256, "batch_size": 64, "probes": "none", "epochs": 2,
    "optimizer": "sgd",
}  # fmt: skip
BROKEN = """
import os, signal
from torch import nn
from cifar.models.conv import ConvNet
from cifar.registry import models

class Broken(ConvNet):
    def __init__(self, kind):
        super().__init__(width=4, depth=1)
        self.kind = kind
    def forward(self, x):
        if self.training and self.kind == "raises":
            raise RuntimeError("a bug in the model")
        if self.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

@models.register("broken", kind="raises")
@models.register("killer", kind="dies")
def broken(*, kind: str = "raises") -> nn.Module:
    return Broken(kind)
"""


def made(runs: Path, text: str, **fixed: Any) -> Local:
    text = METRIC + text
    read = sweeps.parse(parse_yaml(text, "sweep"), text, "sweep", "tiny")
    fixed = {**{k: v for k, v in TINY.items() if k not in read.swept}, **fixed}
    return Local(local.create(read, runs, fixed=fixed, threads=1), runs)


def launched(backend: Local, *options: str, **environment: str) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path; from cifar.agent.agent import agent;"
        f"sys.exit(agent({backend.id!r}, Path({str(backend.runs)!r}), wandb='disabled', {', '.join(options)}))"
    )
    environment = {**os.environ, "CIFAR_LEASE": "4", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process


def ended(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def family(parent: int) -> set[int]:
    """The process ids of all that descend from `parent`."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ProcessLookupError):
            continue
    found, grown = {parent}, True
    while grown:
        more = {child for child, its in parents.items() if its in found} - found
        found, grown = found | more, bool(more)
    return found - {parent}


def workers(parent: int) -> list[int]:
    return [pid for pid in family(parent) if b"cifar.agent.worker" in _of(pid, "cmdline")]


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if (stat := _of(pid, "stat")) and b") Z " not in stat}


def _of(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):  # it may be gone between any two looks
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def rows(backend: Local, cell: int) -> list[int]:
    return [row["epoch"] for row in Record(backend.runs / backend.run_id(cell)).rows()]


def test_trials_end_as_they_should_and_two_agents_share_them(runs: Path) -> None:
    backend = made(
        runs, "parameters: {model: {values: [conv4, conv8]}, lr: {values: [0.05, 1.0e+30]}, max_macs: {value: 5.0e5}}"
    )
    second = launched(backend)
    code, output = ended(launched(backend))
    assert (code, ended(second)[0]) == (0, 0), output
    assert [cell["state"] for cell in backend.cells()] == ["finished", "diverged", "skipped", "skipped"]
    assert backend.cells()[0]["value"] == Record(runs / backend.run_id(0)).read("summary")["val/acc"]
    assert "STAND-IN DATA" in output and "2 skipped" in output
    run = Record(runs / backend.run_id(0)).read("run")
    assert (run["sweep"], run["cell"], run["swept"]) == (backend.id, 0, ["model", "lr"]) and "lr=0.05" in run["name"]
    config = Record(runs / backend.run_id(0)).read("config")
    assert config["threads"] == 1 and config["test"] == "never"


def test_interrupted_trials_are_given_back_and_go_on(runs: Path) -> None:
    backend = made(runs, "parameters: {model: {value: conv4}, epochs: {value: 150}}", epochs=150)
    process = launched(backend)
    until(lambda: len(rows(backend, 0)) > 3)
    children = family(process.pid)
    process.send_signal(signal.SIGINT)
    code, output = ended(process)
    assert code == 130 and "go on with: python -m cifar agent" in output
    assert not alive(children) and backend.counts() == {"interrupted": 1}
    assert Record(runs / backend.run_id(0)).state == "interrupted" and len(rows(backend, 0)) < 150
    assert ended(launched(backend))[0] == 0
    assert rows(backend, 0) == list(range(1, 151)) and backend.counts() == {"finished": 1}
    assert backend.cells()[0]["attempt"] == 2


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_a_killed_agent_leaves_nothing_but_its_lease(runs: Path) -> None:
    backend = made(runs, "parameters: {model: {value: conv4}, seed: {values: [0, 1, 2]}, epochs: {value: 150}}", epochs=150)
    process = launched(backend, "workers=1")
    until(lambda: len(rows(backend, 0)) > 3)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    until(lambda: len(rows(backend, 1)) > 3)  # what was killed comes last
    children = family(process.pid)
    assert len(children) >= 2
    process.kill()
    killed = time.monotonic()
    until(lambda: not alive(children), 5)
    assert [cell["state"] for cell in backend.cells()] == ["interrupted", "running", "waiting"]
    code, output = ended(launched(backend))
    assert code == 0, output
    assert time.monotonic() - killed > 4
    assert backend.counts() == {"finished": 3} and [cell["attempt"] for cell in backend.cells()] == [2, 2, 1]
    assert all(rows(backend, cell) == list(range(1, 151)) for cell in range(3))


@pytest.mark.slow
def test_early_termination_prunes_in_the_run(runs: Path) -> None:
    early = "early_terminate: {type: hyperband, min_iter: 2, eta: 3}\n"
    text = early + "parameters: {model: {value: conv4}, lr: {values: [0.05, 1.0e-9]}}"
    backend = made(runs, text, epochs=4, train_size=1024)
    code, output = ended(launched(backend, "workers=1"))  # one after the other: who comes second is judged by the first
    assert code == 0 and "after epochs 2\n" in output
    assert [cell["state"] for cell in backend.cells()] == ["finished", "pruned"] and rows(backend, 1) == [1, 2]


# -- what is seen ------------------------------------------------------------------------------------------------------


def a_board() -> board.Board:
    shown = board.Board("sweep abc [red]x[/red]", "val/acc", begun=time.monotonic() - 30)
    shown.rows = {
        0: board.Row(0, "lr=0.1", "finished", 2, 2, 1.0, 0.512, 900.0, 12.0),
        1: board.Row(1, "lr=[1]", "running", 1, 2, 0.5, 0.25, 800.0),
    }
    shown.counts, shown.best = {"waiting": 2, "running": 1, "finished": 1}, "val/acc 51.20 % by abc-000 (lr=0.1)"
    return shown


def test_time_left_is_the_pace_up_to_now() -> None:
    shown = a_board()  # one and a half of four in 30 s
    assert shown.progress() == 1.5 and shown.seconds_left() == pytest.approx(50, abs=0.5)
    shown.ended_before = 1  # only half a trial was our doing
    assert shown.seconds_left() == pytest.approx(150, abs=1.5)


def test_the_table_shows_trials_states_best_and_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    display = live.display(console)
    display.say("news [bold]")
    display.show(a_board())
    display.end()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "news [bold]",
        "[red]x[/red]",
        "lr=[1]",
        "51.20 %",
        "25.00 %",
        "800",
        "1/2",
        "2 waiting",
        "by abc-000",
        "about 50 s left",
    ):
        assert words in text, words
    assert isinstance(live.display(Console(file=io.StringIO())), board.Lines)


def test_agent_processes_hand_no_password_on(monkeypatch: Any, tmp_path: Path) -> None:
    import queue

    monkeypatch.setenv("CIFAR_STORAGE", "postgresql://me:hunter2hunter2@host/db")
    worker = agents.Worker("w", 0, tmp_path / "log", queue.SimpleQueue())
    try:
        assert b"hunter2hunter2" not in Path(f"/proc/{worker.process.pid}/environ").read_bytes()
    finally:
        worker.end()
    assert json.dumps(worker.process.returncode) in ("3", "-9", "-15")


def test_a_worker_that_was_started_early_is_the_first_one_and_has_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: queue.SimpleQueue[tuple[crew.Worker, dict[str, Any]]] = queue.SimpleQueue()
    with crew.early():
        ((_, started),) = crew._waiting
        first = crew.Worker("a", 0, tmp_path / "a.log", events, {"CUDA_VISIBLE_DEVICES": "7"})
        second = crew.Worker("b", 1, tmp_path / "b.log", events)
        assert first.process is started is not second.process
        second.process.kill()
        first.tell(trials=[])  # nothing to train: it fails, and what it says is in its log
        deadline = time.monotonic() + 60
        while started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "IndexError" in (tmp_path / "a.log").read_text() and not (tmp_path / "b.log").read_text()


def test_nobody_takes_a_process_of_another_environment_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: queue.SimpleQueue[tuple[crew.Worker, dict[str, Any]]] = queue.SimpleQueue()
    with crew.early():
        ((_, started),) = crew._waiting
        monkeypatch.setenv("CIFAR_RUNS", str(tmp_path))
        worker = crew.Worker("a", 0, tmp_path / "a.log", events)
        assert worker.process is not started and started.poll() is not None
        worker.end()
    with crew.early():
        ((_, started),) = crew._waiting
    assert started.poll() is not None and not crew._waiting
