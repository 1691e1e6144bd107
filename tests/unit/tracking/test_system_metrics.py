"""system_metrics.jsonl: the first sample at once, the last one at the end, of the process that trains and of no other."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cifar.tracking import system_metrics
from cifar.tracking.run_dir import RunDir
from cifar.tracking.system_metrics import FILE, SystemMetricsRecorder, read_samples


@pytest.fixture
def record(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "run00001", {"name": "one"}, {"epochs": 1})


def set_status(record: RunDir, state: str, pid: int, **about: Any) -> None:
    record.write_json("status", {"state": state, "pid": pid, "time": time.time(), **about})


def test_samples_of_a_run_from_its_start_to_its_end(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = SystemMetricsRecorder(record)
    recorder.poll()  # no status yet
    parent = os.getppid()
    set_status(record, "running", parent)
    recorder.poll()
    assert not (record.path / FILE).exists(), "before environment.json it is not known which GPU is the run's"
    record.write_json("environment", {"pid": parent})
    recorder.poll()
    recorder.poll()
    assert len(list(read_samples(record.path))) == 1, "the first at once, the next one later"
    monkeypatch.setattr(recorder, "_next_time", 0.0)
    recorder.poll()
    set_status(record, "interrupted", parent)
    for _ in range(3):
        recorder.poll()
    assert len(list(read_samples(record.path))) == 3
    set_status(record, "finished", parent)
    for _ in range(3):
        recorder.finish()
    SystemMetricsRecorder(record).finish()  # a later sidecar that follows the same folder
    samples = list(read_samples(record.path))
    assert len(samples) == 4 and [s["_timestamp"] for s in samples] == sorted(s["_timestamp"] for s in samples)
    assert samples[-1]["_timestamp"] >= record.read_json("status")["time"]
    assert json.loads((record.path / "machine.json").read_text())["cpu_count_logical"] == os.cpu_count()
    assert "torch==" in (record.path / "requirements.txt").read_text()


@pytest.mark.parametrize("pid", [1, 0, 2**30, "own"])
def test_a_process_that_is_none_of_ours_is_not_measured(record: RunDir, pid: Any) -> None:
    if os.getppid() == pid:
        pytest.skip("this process's parent is the first one")
    number = subprocess.Popen(["true"]).pid if pid == "own" else pid  # a child, not a sibling; and a zombie
    set_status(record, "running", number)
    record.write_json("environment", {"pid": number})
    SystemMetricsRecorder(record).poll()
    assert not (record.path / FILE).exists() and not (record.path / "machine.json").exists()


def test_a_process_that_dies_is_not_measured_any_more(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(system_metrics, "is_relative", lambda pid: True)
    set_status(record, "running", process.pid)
    record.write_json("environment", {"pid": process.pid})
    recorder = SystemMetricsRecorder(record)
    recorder.poll()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now, and then gone
    for _ in range(2):
        monkeypatch.setattr(recorder, "_next_time", 0.0)
        recorder.poll()
        process.wait()
    assert len(list(read_samples(record.path))) == 1


def test_a_long_run_is_sampled_less_often_and_then_no_more(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "MAX_SAMPLES", 10)
    set_status(record, "running", os.getppid())
    record.write_json("environment", {"pid": os.getppid()})
    recorder, pauses = SystemMetricsRecorder(record), []
    for _ in range(12):
        recorder._next_time = 0.0
        recorder.poll()
        pauses.append(round((recorder._next_time - time.monotonic()) / system_metrics.INTERVAL_SECONDS))
    assert pauses[:10] == [1, 2, 2, 4, 4, 8, 8, 16, 16, 32] and len(list(read_samples(record.path))) == 10


def test_a_damaged_file_ends_the_samples(record: RunDir) -> None:
    path = record.path / FILE
    path.write_bytes(b'{"_timestamp": 1, "system.cpu": 2}\n{"_timestamp": 2}\nbroken\n{"_timestamp": 3}\n')
    assert [s["_timestamp"] for s in read_samples(record.path)] == [1, 2]
    assert [s["_timestamp"] for s in read_samples(record.path, 1)] == [2]
    path.write_bytes(b'{"_timestamp": 1}\n[1]\n')
    assert len(list(read_samples(record.path))) == 1
    path.unlink()
    path.mkdir()
    assert list(read_samples(record.path)) == []
