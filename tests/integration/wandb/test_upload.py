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

from cifar.cli.app import main
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.mirror_process import stop_core
from cifar.report.load import collect_runs
from cifar.tracking.run_dir import RunDir
from helpers.fake_runs import write
from helpers.finished_sweeps import ID, TEXT, write_finished_sweep
from helpers.leet import draw_png, write_checkpoint
from helpers.on_server import send
from helpers.paths import ROOT
from helpers.protocol import Fault, Server


def state_of(server: Server) -> object:
    runs = {run.id: (run.history_lines, run.config, run.rows, run.sweep, run.group, run.state) for run in server.runs.values()}
    return runs, {sweep.id: (sweep.text, sweep.runs) for sweep in server.sweeps.values()}


def all_is_there(server: Server, records: list[RunDir], project: str = "cifar") -> None:
    sweep = server.only_sweep()
    assert sorted(sweep.runs) == sorted(record.id for record in records) == sorted(server.runs)
    assert sweep.project == project and sweep.config["parameters"]["lr"]["values"] == [1e-5, 0.1, 0.2]
    for record in records:
        run = server.runs[record.id]
        assert run.rows == list(record.read_rows()), record.id
        assert (run.project, run.group, run.sweep, run.state) == (project, ID, sweep.id, "finished")
        assert (
            run.config["lr"] == record.read_json("config")["lr"]
            and run.summary["val/acc"] == record.read_json("summary")["val/acc"]
        )


@pytest.mark.slow
def test_a_sweep_arrives_once_with_all_its_runs(
    tmp_path: Path, runs: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    records = write_finished_sweep(runs)
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
    here, there = collect_runs([ID], runs).runs, collect_runs([f"me/cifar/{server.only_sweep().id}"], tmp_path).runs
    assert [(run.id, run.rows, run.config, run.summary) for run in here] == [
        (run.id, run.rows, run.config, run.summary) for run in sorted(there, key=lambda run: run.id)
    ]


@pytest.mark.slow
def test_what_comes_later_joins_the_sweep(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    records = write_finished_sweep(runs, 4)
    open_run = write(runs, f"{ID}-004", lr=0.2, seed=0, sweep=ID, cell=4, layers=2, state="running")
    assert main(["push", ID, "--project", "other"]) == 0
    assert f"not ended yet, push again later: {ID}-004" in capsys.readouterr().out
    all_is_there(server, records, "other")
    records += [write(runs, open_run.id, lr=0.2, seed=0, sweep=ID, cell=4, layers=2)]
    records += [write(runs, f"{ID}-005", lr=0.2, seed=1, sweep=ID, cell=5, layers=2)]
    assert main(["push", ID, "--project", "other"]) == 0
    all_is_there(server, records, "other")


@pytest.mark.slow
def test_a_run_that_w_and_b_has_half_of_is_completed(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    record = write(runs, "half0001", layers=2, state="running")
    write_checkpoint(record)
    mirror = Mirror(record, "online")
    assert mirror.sync() == 2
    deadline = time.monotonic() + 20
    while len(server.runs[record.id].rows) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    server.die()  # in the middle of the run
    stop_core()
    mirror.suspend()
    write(runs, "half0001", layers=2)
    server.revive()
    for sent in (1, 0):
        assert main(["push", "half0001"]) == 0 and f"1 run of half0001 on W&B ({sent} sent now)" in capsys.readouterr().out
        run = server.runs[record.id]
        assert run.rows == list(record.read_rows()) and (run.state, run.project, run.exits) == ("finished", "cifar", [0])
    assert not server.sweeps


@pytest.mark.slow
def test_what_a_sweep_of_w_and_b_lacks_is_sent(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = server.world.add_sweep("me", "cifar", TEXT)
    (runs / "sweeps" / sweep.id).mkdir(parents=True)
    (runs / "sweeps" / sweep.id / "wandb.json").write_text(json.dumps({"id": sweep.id, "entity": "me", "project": "cifar"}))
    records = [write(runs, f"hosted0{n}", layers=2, sweep=sweep.id) for n in range(3)]
    for record in records:
        record.write_json("run", {**record.read_json("run"), "engine": "wandb"})
    send(records[:1])
    assert main(["push", sweep.id]) == 0 and f"3 runs of {sweep.id} on W&B (2 sent now)" in capsys.readouterr().out
    assert sorted(sweep.runs) == sorted(server.runs) == [record.id for record in records] and len(server.sweeps) == 1
    assert all(server.runs[record.id].rows == list(record.read_rows()) for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["runs", "before the sweep", "after the sweep"])
def test_one_that_was_killed_goes_on(runs: Path, server: Server, where: str) -> None:
    records = write_finished_sweep(runs)
    if where != "runs":  # it dies between the server's work and the writing down of it
        code = f"""
import os, signal
from cifar.integrations.wandb import upload
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
if {where!r} == "before the sweep":
    upload._create_sweep = die
else:
    made = upload._create_sweep
    upload._create_sweep = lambda *a: (made(*a), die())
from cifar.cli.app import main
main(["push", {ID!r}])
"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False)
        assert process.returncode == -signal.SIGKILL
    else:
        command = [sys.executable, "-m", "cifar", "push", ID]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while sum(run.state == "finished" for run in server.runs.values()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        killed.kill()
        killed.wait()
        assert len(server.sweeps) == 0 and len(server.runs) >= 2
    if where == "after the sweep":
        assert len(server.sweeps) == 1
    assert main(["push", ID]) == 0
    all_is_there(server, records)


@pytest.mark.slow
def test_a_server_that_goes_away_is_one_sentence(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    records = write_finished_sweep(runs, 3)
    server.fault = Fault("status", 400, where="UpsertSweep")
    assert main(["push", ID]) == 2
    assert "push again to go on" in capsys.readouterr().err and not server.sweeps and len(server.runs) == 3
    server.heal()
    assert main(["push", ID]) == 0
    all_is_there(server, records)


def test_what_cannot_be_pushed(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "nope"]) == 2 and "no run 'nope' in" in capsys.readouterr().err
    write_finished_sweep(runs, 0)
    assert main(["push", ID]) == 2 and "has ended yet" in capsys.readouterr().err
