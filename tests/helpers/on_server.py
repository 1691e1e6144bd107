"""A protocol server that this process's wandb talks to, and record folders sent there by the real client."""

from __future__ import annotations

import base64
import hashlib
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


def put(
    server: Server,
    record: RunDir,
    sweep: str = "",
    project: str = "cifar",
    *,
    old_form: bool = False,
    with_metrics: bool = True,
) -> None:
    """The same, without a client: for a great many runs. `test_put_is_what_a_client_sends` compares the two.

    `with_metrics`: earlier versions did not send metrics.jsonl.

    `old_form`: as versions sent a run that wrote the record as text into the configuration and the summary.
    """
    read = record.read_json
    about = {name: read(name) for name in ("run", "config", "labels", "environment")}
    cost = {name: read("run")["cost"][name] for name in ("macs", "params")}
    run = server.world.add_run("me", project, record.id)
    run.arrived, run.sweep, run.group, run.display_name = True, sweep, read("run").get("sweep") or "", read("run")["name"]
    extra = {"cifar": json.dumps(about)} if old_form else {"cifar_schema": 2, **cost}
    run.raw_config = {key: {"value": value} for key, value in {**extra, **read("config")}.items()}
    rows = list(record.read_rows())
    run.history_lines = [json.dumps({**row, "_step": row["epoch"], "_runtime": 1.5, "_timestamp": 1.75e9}) for row in rows]
    status = {name: value for name, value in read("status").items() if name != "pid"}
    has_ended, summary = status["state"] != "running", read("summary")
    if not old_form:
        end: dict[str, object] = {"status": status, "summary": summary} if has_ended else {}
        if has_ended and rows and with_metrics:
            content = run.files["metrics.jsonl"] = (record.path / "metrics.jsonl").read_bytes()
            end["metrics"] = {"md5": base64.b64encode(hashlib.md5(content).digest()).decode(), "bytes": len(content)}
        run.files["cifar.json"] = json.dumps({"schema": 2, **about, **end}).encode()
    if not has_ended:
        run.base_state = "running"
        return
    last = rows[-1] if rows else {}
    if old_form:
        run.summary = {**last, **summary, "cifar": json.dumps({"status": status, "summary": summary})}
    else:
        shown = {k: v for k, v in last.items() if k == "epoch" or k.startswith(("train/", "val/"))}
        run.summary = {**shown, **cost, **summary, "flops": 2 * cost["macs"]}
    run.summary |= {"state": status["state"], "reason": status.get("reason", "")}
    run.end(0 if status["state"] in ("finished", "pruned", "skipped") else 255 if status["state"] == "stopped" else 1)
    if sweep:
        server.sweeps[sweep].runs.append(record.id)
