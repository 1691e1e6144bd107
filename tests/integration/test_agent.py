"""The agent with real trainings in real processes: ends, retries, signals, and that nothing is left behind."""

from __future__ import annotations

import io
import json
import os
import queue
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cifar.agent import agent, dashboard, rich_dashboard, worker_process
from cifar.sweeps.local import LocalBackend
from cifar.tracking.run_dir import RunDir
from helpers.agent_processes import create_sweep, list_epochs_of_cell, start_agent
from helpers.processes import find_alive, list_descendants, list_workers, wait_for_exit, wait_until


@pytest.mark.slow
def test_trials_end_as_they_should_and_two_agents_share_them(runs: Path) -> None:
    backend = create_sweep(
        runs, "parameters: {model: {values: [conv4, conv8]}, lr: {values: [0.05, 1.0e+30]}, max_macs: {value: 5.0e5}}"
    )
    second = start_agent(backend, "workers=1")
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    assert (code, wait_for_exit(second)[0]) == (0, 0), output
    assert [cell["state"] for cell in backend.list_cells()] == ["finished", "diverged", "skipped", "skipped"]
    assert backend.list_cells()[0]["value"] == RunDir(runs / backend.run_id(0)).read_json("summary")["val/acc"]
    assert "STAND-IN DATA" in output and "2 skipped" in output
    run = RunDir(runs / backend.run_id(0)).read_json("run")
    assert (run["sweep"], run["cell"], run["swept"]) == (backend.id, 0, ["model", "lr"]) and "lr=0.05" in run["name"]
    config = RunDir(runs / backend.run_id(0)).read_json("config")
    assert config["threads"] == 1 and config["test"] == "never"


@pytest.mark.slow
def test_what_was_chosen_before_is_trained_again_and_scores_the_test_set(runs: Path, tmp_path: Path) -> None:
    """No validation images, two seeds side by side: records and sweep have test accuracies, and nothing is called the best."""
    for name, width in (("small", 4), ("large", 8)):
        (tmp_path / f"{name}.yaml").write_text(f"model: conv{width}\nval_size: 0\ntest: final\n")
    files = ", ".join(str(tmp_path / f"{name}.yaml") for name in ("small", "large"))
    backend = create_sweep(
        runs, f"parameters: {{experiment: {{values: [{files}]}}, seed: {{values: [0, 1]}}}}", test="final", val_size=0
    )
    code, output = wait_for_exit(start_agent(backend, "workers=1", "pack='2'"))
    assert code == 0, output
    accuracies = [RunDir(runs / backend.run_id(cell)).read_json("summary")["test/acc"] for cell in range(4)]
    assert [cell["value"] for cell in LocalBackend(backend.id, runs).list_cells()] == accuracies
    assert all(f"finished: test/acc {100 * value:.2f} %" in output for value in accuracies)
    assert "best" not in output and "val/acc" not in output
    assert not any("val/acc" in row for row in RunDir(runs / backend.run_id(0)).read_rows())


@pytest.mark.slow
def test_interrupted_trials_are_given_back_and_go_on(runs: Path) -> None:
    backend = create_sweep(runs, "parameters: {model: {value: conv4}, epochs: {value: 100}}", epochs=100)
    process = start_agent(backend, "workers=1")
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 3)
    children = list_descendants(process.pid)
    process.send_signal(signal.SIGINT)
    code, output = wait_for_exit(process)
    assert code == 130 and "go on with: python -m cifar agent" in output
    assert not find_alive(children) and backend.count_states() == {"interrupted": 1}
    assert RunDir(runs / backend.run_id(0)).state == "interrupted" and len(list_epochs_of_cell(backend, 0)) < 100
    assert wait_for_exit(start_agent(backend, "workers=1"))[0] == 0
    assert list_epochs_of_cell(backend, 0) == list(range(1, 101)) and backend.count_states() == {"finished": 1}
    assert backend.list_cells()[0]["attempt"] == 2


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_a_killed_agent_leaves_nothing_but_its_lease(runs: Path) -> None:
    backend = create_sweep(
        runs, "parameters: {model: {value: conv4}, seed: {values: [0, 1, 2]}, epochs: {value: 150}}", epochs=150
    )
    process = start_agent(backend, "workers=1")
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 3)
    os.kill(list_workers(process.pid)[0], signal.SIGKILL)
    wait_until(lambda: len(list_epochs_of_cell(backend, 1)) > 3)  # what was killed comes last
    children = list_descendants(process.pid)
    assert len(children) >= 2
    process.kill()
    killed = time.monotonic()
    wait_until(lambda: not find_alive(children), 5)
    assert [cell["state"] for cell in backend.list_cells()] == ["interrupted", "running", "waiting"]
    code, output = wait_for_exit(start_agent(backend))
    assert code == 0, output
    assert time.monotonic() - killed > 4
    assert backend.count_states() == {"finished": 3} and [cell["attempt"] for cell in backend.list_cells()] == [2, 2, 1]
    assert all(list_epochs_of_cell(backend, cell) == list(range(1, 151)) for cell in range(3))


@pytest.mark.slow
def test_early_termination_prunes_in_the_run(runs: Path) -> None:
    early = "early_terminate: {type: hyperband, min_iter: 2, eta: 3}\n"
    text = early + "parameters: {model: {value: conv4}, lr: {values: [0.05, 1.0e-9]}}"
    backend = create_sweep(runs, text, epochs=4, train_size=1024)
    code, output = wait_for_exit(
        start_agent(backend, "workers=1")
    )  # one after the other: who comes second is judged by the first
    assert code == 0 and "after epochs 2\n" in output
    assert [cell["state"] for cell in backend.list_cells()] == ["finished", "pruned"] and list_epochs_of_cell(backend, 1) == [
        1,
        2,
    ]


# -- what is seen ------------------------------------------------------------------------------------------------------


def a_board() -> dashboard.Board:
    shown = dashboard.Board("sweep abc [red]x[/red]", "val/acc", start_time=time.monotonic() - 30)
    shown.rows = {
        0: dashboard.Row(0, "lr=0.1", "finished", 2, 2, 1.0, 0.512, 900.0, 12.0),
        1: dashboard.Row(1, "lr=[1]", "running", 1, 2, 0.5, 0.25, 800.0),
    }
    shown.counts, shown.best = {"waiting": 2, "running": 1, "finished": 1}, "val/acc 51.20 % by abc-000 (lr=0.1)"
    return shown


def test_time_left_is_the_pace_up_to_now() -> None:
    shown = a_board()  # one and a half of four in 30 s
    assert shown.num_cells_done() == 1.5 and shown.seconds_left() == pytest.approx(50, abs=0.5)
    shown.num_done_before = 1  # only half a trial was our doing
    assert shown.seconds_left() == pytest.approx(150, abs=1.5)


def test_the_table_shows_trials_states_best_and_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    display = rich_dashboard.make_dashboard(console)
    display.print_line("news [bold]")
    display.show_board(a_board())
    display.close()
    text = console.file.getvalue()
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
    assert isinstance(rich_dashboard.make_dashboard(Console(file=io.StringIO())), dashboard.LineDashboard)


def test_agent_processes_hand_no_password_on(monkeypatch: Any, tmp_path: Path) -> None:
    import queue

    monkeypatch.setenv("CIFAR_STORAGE", "postgresql://me:hunter2hunter2@host/db")
    worker = agent.WorkerProcess("w", 0, tmp_path / "log", queue.SimpleQueue())
    try:
        assert b"hunter2hunter2" not in Path(f"/proc/{worker.process.pid}/environ").read_bytes()
    finally:
        worker.shut_down()
    assert json.dumps(worker.process.returncode) in ("3", "-9", "-15")


@pytest.mark.slow
def test_a_worker_that_was_started_early_is_the_first_one_and_has_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: queue.SimpleQueue[tuple[worker_process.WorkerProcess, dict[str, Any]]] = queue.SimpleQueue()
    with worker_process.prestart_worker():
        ((_, started),) = worker_process._prestarted
        first = worker_process.WorkerProcess("a", 0, tmp_path / "a.log", events, {"CUDA_VISIBLE_DEVICES": "7"})
        second = worker_process.WorkerProcess("b", 1, tmp_path / "b.log", events)
        assert first.process is started is not second.process
        second.process.kill()
        first.send_message(trials=[])  # nothing to train: it fails, and what it says is in its log
        deadline = time.monotonic() + 60
        while started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        first.wait_for_log()
        assert "IndexError" in (tmp_path / "a.log").read_text() and not (tmp_path / "b.log").read_text()


def test_nobody_takes_a_process_of_another_environment_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: queue.SimpleQueue[tuple[worker_process.WorkerProcess, dict[str, Any]]] = queue.SimpleQueue()
    with worker_process.prestart_worker():
        ((_, started),) = worker_process._prestarted
        monkeypatch.setenv("CIFAR_RUNS", str(tmp_path))
        worker = worker_process.WorkerProcess("a", 0, tmp_path / "a.log", events)
        assert worker.process is not started and started.poll() is not None
        worker.shut_down()
    with worker_process.prestart_worker():
        ((_, started),) = worker_process._prestarted
    assert started.poll() is not None and not worker_process._prestarted
