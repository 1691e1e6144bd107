"""A protocol server that this process's wandb talks to, and record folders sent there by the real client."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from protocol import Server

from cifar.integrations.wandb.mirror import Mirror, stop_core
from cifar.tracking.run_dir import Record


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """One for each test, with a home and a cache of the test's own. What it was not taught fails the test."""
    stop_core()  # the next one reads the environment anew
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")  # as our code sets it for good where it is the first to import wandb
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.chdir(tmp_path)
    with Server() as one:
        for name, value in one.environment().items():
            monkeypatch.setenv(name, value)
        yield one
        stop_core()
        one.assert_understood()
    for name in ("WANDB_ENTITY", "WANDB_PROJECT"):  # wandb.sweep sets them
        os.environ.pop(name, None)


def send(records: Iterable[Record]) -> None:
    """By the mirror, as while training."""
    for record in records:
        assert Mirror(record, "online", lambda line: pytest.fail(line)).finish()


def put(server: Server, record: Record, sweep: str = "", project: str = "cifar") -> None:
    """The same, without a client: for a great many runs. `test_put_is_what_a_client_sends` compares the two."""
    read = record.read
    about = json.dumps({name: read(name) for name in ("run", "config", "labels", "environment")})
    run = server.world.add_run("me", project, record.id)
    run.arrived, run.sweep, run.group, run.display_name = True, sweep, read("run").get("sweep") or "", read("run")["name"]
    run.raw_config = {key: {"value": value} for key, value in {**read("config"), "cifar": about}.items()}
    rows = list(record.rows())
    run.history_lines = [json.dumps({**row, "_step": row["epoch"], "_runtime": 1.5, "_timestamp": 1.75e9}) for row in rows]
    status = {name: value for name, value in read("status").items() if name != "pid"}
    if status["state"] == "running":
        run.base_state = "running"
        return
    summary = read("summary")
    run.summary = {**(rows[-1] if rows else {}), **summary, "state": status["state"]}
    run.summary["cifar"] = json.dumps({"status": status, "summary": summary})
    run.end(0 if status["state"] in ("finished", "stopped", "pruned", "skipped") else 1)
    if sweep:
        server.sweeps[sweep].runs.append(record.id)
