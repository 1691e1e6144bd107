"""A local sweep pushed to W&B: once, whole, and gone on with after every kind of interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_runs import write
from leet import draw_png
from on_server import send, server
from protocol import Fault, Server

from cifar.cli.app import main
from cifar.integrations.wandb.mirror import Mirror, stop_core
from cifar.report.load import collect
from cifar.tracking.run_dir import Record

__all__ = ["server"]  # a fixture
ID = "abcd1234"
TEXT = """# Which learning rate?
name: rates
method: grid
metric: {name: val/acc, goal: maximize}
parameters:
  lr: {values: [1e-5, 0.1, 0.2]}
  seed: {values: [0, 1]}
"""


def make(runs: Path, n: int = 6, **of_the_sweep: object) -> list[Record]:
    folder = runs / "sweeps" / ID
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(TEXT)
    info = {"id": ID, "name": "rates", "method": "grid", "cells": 6, "dataset": "cifar10", "created": 1.0, "storage": ""}
    (folder / "sweep.json").write_text(json.dumps({**info, "fixed": {"epochs": 5, "dataset": "cifar10"}, **of_the_sweep}))
    made = []
    for cell in range(n):
        lr, seed = (1e-5, 0.1, 0.2)[cell // 2], cell % 2
        made.append(write(runs, f"{ID}-{cell:03d}", lr=lr, seed=seed, sweep=ID, cell=cell, layers=2, swept=("lr", "seed")))
    return made


def state_of(server: Server) -> object:
    runs = {run.id: (run.history_lines, run.config, run.rows, run.sweep, run.group, run.state) for run in server.runs.values()}
    return runs, {sweep.id: (sweep.text, sweep.runs) for sweep in server.sweeps.values()}


def all_is_there(server: Server, records: list[Record], project: str = "cifar") -> None:
    sweep = server.only_sweep()
    assert sorted(sweep.runs) == sorted(record.id for record in records) == sorted(server.runs)
    assert sweep.project == project and sweep.config["parameters"]["lr"]["values"] == [1e-5, 0.1, 0.2]
    for record in records:
        run = server.runs[record.id]
        assert run.rows == list(record.rows()), record.id
        assert (run.project, run.group, run.sweep, run.state) == (project, ID, sweep.id, "finished")
        assert run.config["lr"] == record.read("config")["lr"] and run.summary["val/acc"] == record.read("summary")["val/acc"]


def test_a_sweep_arrives_once_with_all_its_runs(
    tmp_path: Path, runs: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    records = make(runs)
    draw_png(records[0].path / "pictures" / "curves.png")
    write(runs, "alone", layers=2)  # of no sweep
    assert main(["push", ID]) == 0
    all_is_there(server, records)
    out = capsys.readouterr().out
    assert "6 runs of abcd1234 are on W&B (6 sent now)" in out and f"/me/cifar/sweeps/{server.only_sweep().id}" in out
    assert any("curves" in name for name in server.runs[records[0].id].files)
    before = state_of(server)
    server.requests.clear()
    assert main(["push", "rates"]) == 0  # by its name
    assert state_of(server) == before and "0 sent now" in capsys.readouterr().out
    assert not server.asked("UpsertBucket") and not server.asked("UpsertSweep") and not server.asked("file_stream")
    here, there = collect([ID], runs).runs, collect([f"me/cifar/{server.only_sweep().id}"], tmp_path).runs
    assert [(run.id, run.rows, run.config, run.summary) for run in here] == [
        (run.id, run.rows, run.config, run.summary) for run in sorted(there, key=lambda run: run.id)
    ]


def test_what_comes_later_joins_the_sweep(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    records = make(runs, 4)
    open_run = write(runs, f"{ID}-004", lr=0.2, seed=0, sweep=ID, cell=4, layers=2, state="running")
    assert main(["push", ID, "--project", "other"]) == 0
    assert f"not ended yet, push again later: {ID}-004" in capsys.readouterr().out
    all_is_there(server, records, "other")
    records += [write(runs, open_run.id, lr=0.2, seed=0, sweep=ID, cell=4, layers=2)]
    records += [write(runs, f"{ID}-005", lr=0.2, seed=1, sweep=ID, cell=5, layers=2)]
    assert main(["push", ID, "--project", "other"]) == 0
    all_is_there(server, records, "other")


@pytest.mark.slow
def test_a_run_that_w_and_b_has_half_of_is_completed(
    runs: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
    record = write(runs, "half0001", layers=2, state="running")
    mirror = Mirror(record, "online")
    assert mirror.sync() == 2
    deadline = time.monotonic() + 20
    while len(server.runs[record.id].rows) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    server.die()  # in the middle of the run
    stop_core()
    mirror.leave()
    write(runs, "half0001", layers=2)
    server.revive()
    for sent in (1, 0):
        assert main(["push", "half0001"]) == 0 and f"1 run of half0001 on W&B ({sent} sent now)" in capsys.readouterr().out
        run = server.runs[record.id]
        assert run.rows == list(record.rows()) and (run.state, run.project, run.exits) == ("finished", "cifar", [0])
    assert not server.sweeps


def test_what_a_sweep_of_w_and_b_lacks_is_sent(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = server.world.add_sweep("me", "cifar", TEXT)
    (runs / "sweeps" / sweep.id).mkdir(parents=True)
    (runs / "sweeps" / sweep.id / "wandb.json").write_text(json.dumps({"id": sweep.id, "entity": "me", "project": "cifar"}))
    records = [write(runs, f"hosted0{n}", layers=2, sweep=sweep.id) for n in range(3)]
    for record in records:
        record.write("run", {**record.read("run"), "engine": "wandb"})
    send(records[:1])
    assert main(["push", sweep.id]) == 0 and f"3 runs of {sweep.id} on W&B (2 sent now)" in capsys.readouterr().out
    assert sorted(sweep.runs) == sorted(server.runs) == [record.id for record in records] and len(server.sweeps) == 1
    assert all(server.runs[record.id].rows == list(record.rows()) for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["runs", "before the sweep", "after the sweep"])
def test_one_that_was_killed_goes_on(runs: Path, server: Server, where: str) -> None:
    records = make(runs)
    if where != "runs":  # it dies between the server's work and the writing down of it
        code = f"""
import os, signal
from cifar.integrations.wandb import upload as push
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
if {where!r} == "before the sweep":
    push._create = die
else:
    made = push._create
    push._create = lambda *a: (made(*a), die())
from cifar.cli.app import main
main(["push", {ID!r}])
"""
        root = Path(__file__).parent.parent
        environment = {**os.environ, "PYTHONPATH": str(root)}
        process = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False)
        assert process.returncode == -signal.SIGKILL
    else:
        command = [sys.executable, "-m", "cifar", "push", ID]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while sum(run.state == "finished" for run in server.runs.values()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        killed.kill()
        killed.wait()
        assert len(server.sweeps) == 0 and 2 <= len(server.runs) < 6
    if where == "after the sweep":
        assert len(server.sweeps) == 1
    assert main(["push", ID]) == 0
    all_is_there(server, records)


def test_a_server_that_goes_away_is_one_sentence(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    records = make(runs, 3)
    server.fault = Fault("status", 400, where="UpsertSweep")
    assert main(["push", ID]) == 2
    assert "push again to go on" in capsys.readouterr().err and not server.sweeps and len(server.runs) == 3
    server.heal()
    assert main(["push", ID]) == 0
    all_is_there(server, records)


def test_what_cannot_be_pushed(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "nope"]) == 2 and "no run 'nope' in" in capsys.readouterr().err
    make(runs, 0)
    assert main(["push", ID]) == 2 and "has ended yet" in capsys.readouterr().err
