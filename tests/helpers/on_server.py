"""A protocol server that this process's wandb talks to, and record folders sent there by the real client."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest

from cifar.integrations.wandb.mirror import Mirror
from cifar.tracking.run_dir import RunDir
from helpers.protocol import Server


def send(records: Iterable[RunDir]) -> None:
    """By the mirror, as while training."""
    for record in records:
        assert Mirror(record, "online", lambda line: pytest.fail(line)).finish()


def put(server: Server, record: RunDir, sweep: str = "", project: str = "cifar") -> None:
    """The same, without a client: for a great many runs. `test_put_is_what_a_client_sends` compares the two."""
    read = record.read_json
    about = json.dumps({name: read(name) for name in ("run", "config", "labels", "environment")})
    run = server.world.add_run("me", project, record.id)
    run.arrived, run.sweep, run.group, run.display_name = True, sweep, read("run").get("sweep") or "", read("run")["name"]
    run.raw_config = {key: {"value": value} for key, value in {**read("config"), "cifar": about}.items()}
    rows = list(record.read_rows())
    run.history_lines = [json.dumps({**row, "_step": row["epoch"], "_runtime": 1.5, "_timestamp": 1.75e9}) for row in rows]
    status = {name: value for name, value in read("status").items() if name != "pid"}
    if status["state"] == "running":
        run.base_state = "running"
        return
    summary = read("summary")
    run.summary = {**(rows[-1] if rows else {}), **summary, "state": status["state"]}
    run.summary |= {"cifar": json.dumps({"status": status, "summary": summary}), "reason": status.get("reason", "")}
    run.end(0 if status["state"] in ("finished", "pruned", "skipped") else 255 if status["state"] == "stopped" else 1)
    if sweep:
        server.sweeps[sweep].runs.append(record.id)
