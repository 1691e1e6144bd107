"""Logs, system metrics and W&B's own fields: in the record first, and the same on the server however they are sent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cifar.config.resolve import resolve_config
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.mirror_process import stop_core
from cifar.integrations.wandb.upload import push_runs
from cifar.tracking.run_dir import RunDir
from cifar.training.callbacks import RunCallback
from cifar.training.loop import RunHooks
from cifar.training.run import RunMetadata, create_run, train_run
from helpers.leet import end_record, make_record, row, write_checkpoint
from helpers.protocol import Server
from helpers.run_configs import TINY
from helpers.system_fields import assert_shown_as_recorded, shown_environment, shown_lines, shown_samples

SAMPLE = {"system.cpu": 51.25, "system.memory_percent": 40, "system.disk./.usageGB": 12.5, "system.gpu.0.powerWatts": 350.5}
ENVIRONMENT = {
    "versions": {"python": "3.11.7"}, "device": "NVIDIA H200", "device_type": "cuda", "cores": 16, "platform": "Linux-6.1",
    "git": {"commit": "a" * 40, "dirty": False}, "started": 1795000000.5, "host": "node-7", "user": "me", "cwd": "/home/me",
    "executable": "/usr/bin/python3", "program": "-m cifar", "args": ["train", "lr=0.1"],
}  # fmt: skip
MACHINE = {
    "cpu_count": 8, "cpu_count_logical": 16, "memory_total": 2**35, "disk": {"/": {"total": 2**40, "used": 2**39}},
    "gpus": [{"name": "NVIDIA H200", "memory_total": 2**37, "cuda_cores": 16896, "uuid": "GPU-1"}], "cuda_version": "13.2",
    "git_remote": "https://***@github.com/me/mine.git", "slurm": {"job_id": "4711"},
}  # fmt: skip


def add_lines(record: RunDir, *lines: str) -> None:
    with open(record.path / "output.log", "a") as file:
        file.writelines(f"{line}\n" for line in lines)


def add_sample(record: RunDir, number: int) -> None:
    with open(record.path / "system_metrics.jsonl", "a") as file:
        file.write(json.dumps({"_timestamp": 1795000001.123456 + 15 * number, **SAMPLE, "system.cpu": number}) + "\n")


def begin(runs: Path, run_id: str) -> RunDir:
    record = make_record(runs, run_id, epochs=2)
    record.write_json("run", {**record.read_json("run"), "created": 1795000000.25})
    record.write_json("environment", ENVIRONMENT)
    record.write_json("machine", MACHINE)
    record.write_file("requirements.txt", b"numpy==2.4.6\ntorch==2.15.0\n")
    return record


def end(record: RunDir, state: str = "finished") -> None:
    for epoch in (1, 2):
        record.append_row(row(epoch))
        add_lines(record, f"epoch {epoch}/2", "")
        add_sample(record, 2 + epoch)
    add_lines(record, f"{state}: é ✓ <b>")
    end_record(record, state)


def shown(server: Server, run_id: str) -> dict[str, Any]:
    run = server.runs[run_id]
    events = [json.loads(line) for line in run.event_lines]
    for event in events:
        event["_runtime"] = round(event["_runtime"], 4)
    kept = {name: run.files[name] for name in ("requirements.txt", "wandb-metadata.json")}
    return {"lines": shown_lines(run), "events": events, "host": run.host, "commit": run.commit, "from": run.repository} | {
        "files": {name: json.loads(text) if name.endswith("json") else text for name, text in kept.items()}
    }


@pytest.mark.slow
def test_live_pushed_and_synced_later_are_the_same(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = begin(tmp_path, "sameagain")
    mirror = Mirror(record, "online", pytest.fail)
    for number in range(3):
        add_lines(record, f"line {number}")
        add_sample(record, number)
        mirror.sync()
    end(record)
    shutil.copytree(record.path, tmp_path / "later" / record.id, ignore=shutil.ignore_patterns("wandb"))
    shutil.copytree(record.path, tmp_path / "synced" / record.id, ignore=shutil.ignore_patterns("wandb"))
    assert mirror.finish()
    live = shown(server, record.id)
    assert_shown_as_recorded(server.runs[record.id], record.path)
    assert live["host"] == "node-7" and live["commit"] == "a" * 40 and live["events"][0]["_runtime"] == 0.8735
    assert live["files"]["wandb-metadata.json"]["gpu"] == "NVIDIA H200"
    assert live["files"]["wandb-metadata.json"]["slurm"] == {"job_id": "4711"}
    stop_core()
    with Server() as second:  # another server: nothing depends on when and from where it is sent
        for name, value in second.environment().items():
            monkeypatch.setenv(name, value)
        push_runs([RunDir(tmp_path / "later" / record.id)], entity="me", project="cifar", on_message=pytest.fail)
        assert shown(second, record.id) == live
        second.assert_understood()
        stop_core()
    with Server() as third:
        offline = RunDir(tmp_path / "synced" / record.id)
        assert Mirror(offline, "offline", pytest.fail).finish()
        (folder,) = offline.path.glob("wandb/offline-run-*")
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(folder)], check=True, capture_output=True, timeout=100,
            env={**os.environ, **third.environment()},
        )  # fmt: skip
        assert shown(third, record.id) == live
        third.assert_understood()


@pytest.mark.slow
def test_a_second_push_adds_nothing_and_a_resumed_run_adds_its_lines(server: Server, tmp_path: Path) -> None:
    record = begin(tmp_path, "resumes1")
    record.append_row(row(1))
    write_checkpoint(record)
    add_lines(record, "epoch 1", "Traceback ...", "failed: a reason")
    add_sample(record, 0)
    record.set_status("failed", reason="a reason")
    assert Mirror(record, "online", pytest.fail).finish()
    run = server.runs[record.id]
    assert shown_lines(run)[-1] == "failed: a reason" and run.summary["state"] == "failed"
    record.set_status("running")
    add_lines(record, "-- goes on --")
    add_sample(record, 1)
    mirror = Mirror(record, "online", pytest.fail)
    mirror.sync()
    end_record(record)
    record.append_row(row(2))
    assert mirror.finish()
    assert push_runs([record], entity="me", project="cifar") == 0
    assert_shown_as_recorded(run, record.path)


@pytest.mark.slow
def test_what_is_missing_is_found_and_sent(server: Server, tmp_path: Path) -> None:
    record = begin(tmp_path, "missing1")
    add_lines(record, *(f"line {number}" for number in range(2500)))
    end(record)
    assert Mirror(record, "online", pytest.fail).finish()
    run = server.runs[record.id]
    assert_shown_as_recorded(run, record.path)
    assert push_runs([record], entity="me", project="cifar") == 0
    del run.log_lines[1000:], run.event_lines[1:]  # as a server that was set back
    messages: list[str] = []
    assert push_runs([record], entity="me", project="cifar", on_message=messages.append) == 1
    assert "W&B has 1000 of 2505 console lines" in messages[0]
    assert_shown_as_recorded(run, record.path)


@pytest.mark.slow
def test_rows_that_are_taken_back_leave_the_lines_as_they_are(server: Server, tmp_path: Path) -> None:
    record = begin(tmp_path, "rewound1")
    record.append_row(row(1))
    record.append_row({**row(2), "val/acc": 0.9})
    add_lines(record, "one", "two")
    add_sample(record, 0)
    record.set_status("failed", reason="a reason")
    assert Mirror(record, "online", pytest.fail).finish()
    record.truncate_metrics(0)
    end(record)
    assert Mirror(record, "online", pytest.fail).finish()
    run = server.runs[record.id]
    assert run.rows == list(record.read_rows())
    assert_shown_as_recorded(run, record.path)


@pytest.mark.slow
def test_an_old_record_has_no_lines_and_what_it_knows_of_its_environment(server: Server, tmp_path: Path) -> None:
    record = make_record(tmp_path, "old00001", epochs=1)
    old = {name: ENVIRONMENT[name] for name in ("versions", "device", "device_type", "cores", "platform", "git", "started")}
    record.write_json("environment", old)
    record.append_row(row(1))
    end_record(record)
    assert Mirror(record, "online", pytest.fail).finish()
    run = server.runs[record.id]
    assert run.log_lines == run.event_lines == [] and run.commit == "a" * 40 and run.host == ""
    seen = shown_environment(run)
    assert seen["gpu"] == "NVIDIA H200" and "host" not in seen and seen["args"] == ["train", "--from", "old00001"]
    assert push_runs([record], entity="me", project="cifar") == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["live", "disabled", "offline"])
def test_a_run_of_the_command_line(server: Server, tmp_path: Path, way: str) -> None:
    """From the command to the server, by the sidecar, by `push` after no W&B at all, and by `wandb sync`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, "-m", "cifar"]
    options = ["--dataset", "stand-in", "--runs-dir", str(tmp_path / "runs"), "--wandb", "online" if way == "live" else way]
    pairs = ["model=conv4", "epochs=2", "train_size=512", "val_size=200", "batch_size=64"]
    subprocess.run([*command, "train", *pairs, *options], env=environment, check=True, capture_output=True)
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    if way == "disabled":
        push = [*command, "push", folder.name, "--runs-dir", str(tmp_path / "runs")]
        subprocess.run(push, env=environment, check=True, capture_output=True)
    if way == "offline":
        (offline,) = folder.glob("wandb/offline-run-*")
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(offline)], env=environment, check=True, capture_output=True)
    run = server.runs[folder.name]
    assert_shown_as_recorded(run, folder)
    lines, samples = shown_lines(run), shown_samples(run)
    assert lines[0].startswith(f"run {folder.name}: ") and lines[-1].startswith("finished: ") and len(lines) == 4
    assert len(samples) >= 1 and samples[-1]["_timestamp"] >= json.loads((folder / "status.json").read_text())["time"] - 0.01
    assert abs(samples[-1]["_timestamp"] - time.time()) < 300 and samples[-1]["system.proc.memory.rssMB"] > 100
    assert shown_environment(run)["args"][:2] == ["train", "model=conv4"]


ENDS = {  # how a run ends -> (the hooks and values that end it so, W&B's word, our word, the beginning of the reason)
    "finished": ({}, "finished", "finished", ""),
    "failed": ({"fails": True}, "failed", "failed", "RuntimeError"),
    "diverged": ({"lr": 1e30}, "failed", "diverged", "the loss became"),
    "stopped": ({"stop": "stopped"}, "failed", "stopped", "asked to end at step 1 of epoch 1"),
    "preempted": ({"stop": "preempted"}, "failed", "preempted", "asked to end at step 1 of epoch 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENDS)
def test_each_end_shows_its_state_its_reason_and_its_lines(server: Server, tmp_path: Path, kind: str) -> None:
    how, word, state, reason = ENDS[kind]

    class Fails(RunCallback):
        def on_epoch_end(self, row: Any) -> None:
            raise RuntimeError("a bug, password=abcdefgh12345")

    config = resolve_config({**TINY, "optimizer": "sgd", "lr": how.get("lr", 0.05)})
    record = create_run(config, tmp_path / "runs", RunMetadata(run_id=f"ends-{kind}"))
    stop = how.get("stop")
    hooks = RunHooks(callbacks=[Fails()] if "fails" in how else [], poll_stop=lambda: str(stop) if stop else None)
    with contextlib.suppress(RuntimeError):
        train_run(config, record, hooks=hooks)
    mirror = Mirror(record, "online", pytest.fail)
    if kind == "preempted":  # it may go on, so the mirror does not end it
        mirror.sync(everything=True)
        mirror.suspend()
    else:
        assert mirror.finish()
    run = server.runs[record.id]
    assert (run.state, run.summary["state"]) == (word, state) and run.summary["reason"].startswith(reason)
    assert_shown_as_recorded(run, record.path)
    lines = shown_lines(run)
    assert lines[0].startswith(f"run ends-{kind}: ") and lines[-1].startswith(f"{state}: ")
    assert ("Traceback (most recent call last):" in lines) == (kind == "failed") and "abcdefgh" not in str(lines)
    if reason:
        assert lines[-1] == f"{state}: {run.summary['reason']}"
