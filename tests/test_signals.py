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
from test_agent import ROOT, TINY, alive, ended, family, launched, made, rows, until, workers

from cifar.errors import UserError
from cifar.system.signals import TimeLimit, seconds_of, wish_of
from cifar.tracking.run_dir import Record

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
    backend = made(runs, "parameters: {model: {value: conv4}}", epochs=40, train_size=1024)
    process = launched(backend, "workers=1")
    until(lambda: len(rows(backend, 0)) > 3)
    children = family(process.pid)
    process.send_signal(number)
    if number != INT:
        process.send_signal(number)  # batch systems repeat themselves
    got, output = ended(process)
    record = Record(runs / backend.run_id(0))
    assert got == code and "go on with" in output and not alive(children), output
    assert backend.counts() == {state: 1} and record.state == state
    reason = record.read("status")["reason"]
    assert ("at step 16 of" in reason) == (number == INT) or number != INT, reason  # 16 steps an epoch
    before = rows(backend, 0)
    assert ended(launched(backend, "workers=1"))[0] == 0
    assert rows(backend, 0) == list(range(1, 41)) and len(before) < 40 and backend.cells()[0]["attempt"] == 2


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_a_signal_to_a_worker_gives_its_trial_back(runs: Path) -> None:
    backend = made(runs, "parameters: {model: {value: conv4}, epochs: {values: [500, 501]}}")
    process = launched(backend, "workers=2")
    until(lambda: rows(backend, 0) and rows(backend, 1))
    children = family(process.pid)
    for pid in workers(process.pid):
        os.kill(pid, TERM)
    until(lambda: [cell["attempt"] for cell in backend.cells()] == [2, 2])  # pre-empted, and taken again
    for pid in workers(process.pid):
        os.kill(pid, signal.SIGSTOP)  # only the second signal ends them
    process.send_signal(TERM)
    said(process, "writing checkpoints")  # of two signals at one moment, Python hands over the lower number first
    process.send_signal(INT)
    begun = time.monotonic()
    code, _ = ended(process, 30)
    assert code == 143 and time.monotonic() - begun < 15 and not alive(children)
    assert sum(backend.counts().get(state, 0) for state in ("interrupted", "preempted")) == 2


@pytest.mark.slow
def test_ctrl_c_twice_does_not_wait_for_the_epoch(runs: Path) -> None:
    backend = made(runs, "parameters: {model: {value: conv4}}", epochs=3, train_size=40_000)
    process = launched(backend, "workers=1")
    until(lambda: rows(backend, 0))
    children = family(process.pid)
    process.send_signal(INT)
    said(process, "finishing the epoch")
    process.send_signal(INT)
    code, output = ended(process)
    record = Record(runs / backend.run_id(0))
    assert code == 130 and "go on with" in output and not alive(children), output
    assert backend.counts() == {"interrupted": 1} and record.state == "interrupted"
    assert record.read("status")["reason"] == "ended at once by a second signal"
    assert ended(launched(backend, "workers=1"))[0] == 0
    assert rows(backend, 0) == [1, 2, 3] and backend.cells()[0]["attempt"] == 2


@pytest.mark.slow
def test_what_a_batch_system_repeats_does_not_cut_off_the_pictures(runs: Path) -> None:
    backend = made(runs, "parameters: {model: {value: conv4}}")
    process = launched(backend, "workers=1")
    said(process, "finishing pictures")
    for _ in range(3):
        process.send_signal(TERM)
        time.sleep(0.05)
    code, output = ended(process)
    assert code == 143 and backend.counts() == {"finished": 1}, output
    assert list((runs / backend.run_id(0) / "pictures").glob("curves*.png"))


@pytest.mark.slow
def test_the_time_limit_gives_back_what_runs_and_takes_no_more(runs: Path) -> None:
    backend = made(runs, "parameters: {model: {value: conv4}, epochs: {values: [100000, 3]}}")
    begun = time.monotonic()
    code, output = ended(launched(backend, "workers=1", "time_limit=30.0"))
    assert code == 0 and "the time limit is near" in output and time.monotonic() - begun < 90
    assert backend.counts() == {"waiting": 1, "interrupted": 1} and len(rows(backend, 0)) > 0


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
    until(lambda: [path for path in runs.glob("*/metrics.jsonl") if path.stat().st_size])
    process.send_signal(number)
    process.communicate(timeout=60)
    (record,) = [Record(path.parent) for path in runs.glob("*/run.json")]
    assert (process.returncode, record.state) == (code, state) and (record.path / "checkpoint.pt").exists()


def test_the_more_urgent_wish_wins() -> None:
    def level(*signals: int, **other: Any) -> tuple[int, str] | None:
        wish = wish_of([*signals], other.get("halted", False), other.get("late", False))
        return wish and (wish.level, wish.state)

    assert level() is None and level(INT) == (1, "interrupted") and level(INT, INT) == (3, "interrupted")
    assert level(TERM) == level(USR1) == level(TERM, TERM) == level(USR1, TERM) == level(INT, TERM) == (2, "preempted")
    assert level(TERM, INT) == (3, "interrupted")
    assert level(halted=True) == level(late=True) == level(INT, late=True) == (2, "interrupted")


def test_times_are_read_as_people_write_them() -> None:
    given = {"90s": 90, "50m": 3000, "2h": 7200, "1h30m": 5400, "1:30:00": 5400, "1d2h": 93600}
    assert {text: seconds_of(text) for text in given} == given
    for wrong in ("", "50", "2 h", "m", "0s", "1:99:00"):
        with pytest.raises(UserError, match="50m"):
            seconds_of(wrong)


def test_a_trial_is_taken_only_if_the_longest_so_far_would_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cifar.system.signals.time.monotonic", lambda: now[0])
    limit = TimeLimit(200)  # 20 s of it are kept for the end
    assert limit.takes() and limit.left == 180
    limit.seen(50), limit.seen(30)
    now[0] = 229.0
    assert limit.takes()
    now[0] = 231.0
    assert not limit.takes() and not limit.over()
    now[0] = 280.0
    assert limit.over() and TimeLimit().takes()
