"""Signals and limits of time, to the agent and to a single run: what the trials' states, exit codes and resumptions are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cifar.errors import UserError
from cifar.system.durations import parse_duration
from cifar.system.signals import TimeLimit, stop_request
from cifar.tracking.run_dir import RunDir
from helpers.agent_processes import TINY, create_sweep, list_epochs_of_cell, start_agent
from helpers.paths import ROOT
from helpers.processes import find_alive, list_descendants, list_workers, wait_for_exit, wait_until

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


def said(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout
    while words not in process.stdout.readline():
        assert process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "state"), [(INT, 130, "interrupted"), (TERM, 143, "preempted"), (USR1, 138, "preempted")]
)
def test_a_signal_gives_the_trials_back_and_they_go_on(runs: Path, number: int, code: int, state: str) -> None:
    backend = create_sweep(runs, "parameters: {model: {value: conv4}}", epochs=40, train_size=1024)
    process = start_agent(backend, "workers=1")
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 3)
    children = list_descendants(process.pid)
    process.send_signal(number)
    if number != INT:
        process.send_signal(number)  # batch systems repeat themselves
    got, output = wait_for_exit(process)
    record = RunDir(runs / backend.run_id(0))
    assert got == code and "go on with" in output and not find_alive(children), output
    assert backend.count_states() == {state: 1} and record.state == state
    reason = record.read_json("status")["reason"]
    assert ("at step 16 of" in reason) == (number == INT) or number != INT, reason  # 16 steps an epoch
    before = list_epochs_of_cell(backend, 0)
    assert wait_for_exit(start_agent(backend, "workers=1"))[0] == 0
    assert (
        list_epochs_of_cell(backend, 0) == list(range(1, 41)) and len(before) < 40 and backend.list_cells()[0]["attempt"] == 2
    )


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_a_signal_to_a_worker_gives_its_trial_back(runs: Path) -> None:
    backend = create_sweep(runs, "parameters: {model: {value: conv4}, epochs: {values: [500, 501]}}")
    process = start_agent(backend, "workers=2")
    wait_until(lambda: list_epochs_of_cell(backend, 0) and list_epochs_of_cell(backend, 1))
    children = list_descendants(process.pid)
    for pid in list_workers(process.pid):
        os.kill(pid, TERM)
    wait_until(lambda: [cell["attempt"] for cell in backend.list_cells()] == [2, 2])  # pre-empted, and taken again
    for pid in list_workers(process.pid):
        os.kill(pid, signal.SIGSTOP)  # only the second signal ends them
    process.send_signal(TERM)
    said(process, "writing checkpoints")  # of two signals at one moment, Python hands over the lower number first
    process.send_signal(INT)
    begun = time.monotonic()
    code, _ = wait_for_exit(process, 30)
    assert code == 143 and time.monotonic() - begun < 15 and not find_alive(children)
    assert sum(backend.count_states().get(state, 0) for state in ("interrupted", "preempted")) == 2


@pytest.mark.slow
def test_ctrl_c_twice_does_not_wait_for_the_epoch(runs: Path) -> None:
    backend = create_sweep(runs, "parameters: {model: {value: conv4}}", epochs=3, train_size=40_000)
    process = start_agent(backend, "workers=1")
    wait_until(lambda: list_epochs_of_cell(backend, 0))
    children = list_descendants(process.pid)
    process.send_signal(INT)
    said(process, "finishing the epoch")
    process.send_signal(INT)
    code, output = wait_for_exit(process)
    record = RunDir(runs / backend.run_id(0))
    assert code == 130 and "go on with" in output and not find_alive(children), output
    assert backend.count_states() == {"interrupted": 1} and record.state == "interrupted"
    assert record.read_json("status")["reason"] == "ended at once by a second signal"
    assert wait_for_exit(start_agent(backend, "workers=1"))[0] == 0
    assert list_epochs_of_cell(backend, 0) == [1, 2, 3] and backend.list_cells()[0]["attempt"] == 2


@pytest.mark.slow
def test_what_a_batch_system_repeats_does_not_cut_off_the_pictures(runs: Path) -> None:
    backend = create_sweep(runs, "parameters: {model: {value: conv4}}")
    process = start_agent(backend, "workers=1")
    said(process, "finishing pictures")
    for _ in range(3):
        process.send_signal(TERM)
        time.sleep(0.05)
    code, output = wait_for_exit(process)
    assert code == 143 and backend.count_states() == {"finished": 1}, output
    assert list((runs / backend.run_id(0) / "pictures").glob("curves*.png"))


@pytest.mark.slow
def test_the_time_limit_gives_back_what_runs_and_takes_no_more(runs: Path) -> None:
    backend = create_sweep(runs, "parameters: {model: {value: conv4}, epochs: {values: [100000, 3]}}")
    begun = time.monotonic()
    code, output = wait_for_exit(start_agent(backend, "workers=1", "time_limit=30.0"))
    assert code == 0 and "the time limit is near" in output and time.monotonic() - begun < 90
    assert backend.count_states() == {"waiting": 1, "interrupted": 1} and len(list_epochs_of_cell(backend, 0)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "number", "code", "state"),
    [
        ({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}, TERM, 0, "stopped"),
        ({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "CIFAR_PREEMPTIBLE": "1"}, TERM, 143, "preempted"),
        ({}, USR1, 138, "preempted"),
    ],
)
def test_a_single_run_knows_whose_sigterm_it_is(
    runs: Path, tmp_path: Path, environment: dict[str, str], number: int, code: int, state: str
) -> None:
    (tmp_path / "trial.json").write_text(json.dumps({**TINY, "model": "conv4", "epochs": 100_000}))
    command = [sys.executable, "-m", "cifar", "train", "--trial", str(tmp_path / "trial.json"), "--wandb", "disabled"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: [path for path in runs.glob("*/metrics.jsonl") if path.stat().st_size])
    process.send_signal(number)
    process.communicate(timeout=60)
    (record,) = [RunDir(path.parent) for path in runs.glob("*/run.json")]
    assert (process.returncode, record.state) == (code, state) and (record.path / "checkpoint.pt").exists()


def test_the_more_urgent_wish_wins() -> None:
    def level(*signals: int, **other: Any) -> tuple[int, str] | None:
        wish = stop_request([*signals], other.get("halted", False), other.get("late", False))
        return wish and (wish.level, wish.state)

    assert level() is None and level(INT) == (1, "interrupted") and level(INT, INT) == (3, "interrupted")
    assert level(TERM) == level(USR1) == level(TERM, TERM) == level(USR1, TERM) == level(INT, TERM) == (2, "preempted")
    assert level(TERM, INT) == (3, "interrupted")
    assert level(halted=True) == level(late=True) == level(INT, late=True) == (2, "interrupted")


def test_times_are_read_as_people_write_them() -> None:
    given = {"90s": 90, "50m": 3000, "2h": 7200, "1h30m": 5400, "1:30:00": 5400, "1d2h": 93600}
    assert {text: parse_duration(text) for text in given} == given
    for wrong in ("", "50", "2 h", "m", "0s", "1:99:00"):
        with pytest.raises(UserError, match="50m"):
            parse_duration(wrong)


def test_a_trial_is_taken_only_if_the_longest_so_far_would_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cifar.system.signals.time.monotonic", lambda: now[0])
    limit = TimeLimit(200)  # 20 s of it are kept for the end
    assert limit.has_time_for_trial() and limit.seconds_left == 180
    limit.record_trial_seconds(50), limit.record_trial_seconds(30)
    now[0] = 229.0
    assert limit.has_time_for_trial()
    now[0] = 231.0
    assert not limit.has_time_for_trial() and not limit.is_over()
    now[0] = 280.0
    assert limit.is_over() and TimeLimit().has_time_for_trial()
