"""W&B's own sweep scheduler beside our agent, the real one, against a server of our own: one a sweep, and gone with us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar.config.yaml_loader import parse_yaml
from cifar.errors import UserError
from cifar.integrations.wandb import scheduler
from cifar.integrations.wandb.backend import WandbBackend, create_sweep, format_sweep_yaml
from cifar.integrations.wandb.mirror_process import stop_core
from cifar.integrations.wandb.scheduler import OptimizerProxy, SchedulerProcess
from cifar.sweeps import spec
from cifar.tracking.run_dir import RunDir
from helpers.paths import ROOT
from helpers.processes import is_alive, wait_until
from helpers.protocol import Server

TEXT = """
name: two
method: custom
run_cap: 6
metrics: [{name: val/acc, goal: maximize}, {name: macs, goal: minimize}]
scheduler: {engine: optuna}
parameters:
  model: {value: conv}
  width: {values: [4, 8, 64]}
  lr: {distribution: log_uniform_values, min: 1.0e-3, max: 1.0e-1}
"""
TINY = """  max_macs: {value: 1.0e+6}
  dataset: {value: stand-in}
  val_size: {value: 200}
  train_size: {value: 256}
  batch_size: {value: 64}
  max_steps: {value: 2}
  epochs: {value: 1}
  probes: {value: none}
"""
EARLY = "early_terminate: {type: hyperband, min_iter: 1}\n"
PLACE = {"entity": "me", "project": "cifar"}


@pytest.fixture(autouse=True)
def fresh_core() -> Iterator[None]:
    stop_core()  # the next one reads the environment anew
    yield
    stop_core()


def parsed(text: str = TEXT) -> spec.Sweep:
    return spec.parse_sweep(parse_yaml(text, "two"), text, "two")


def children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


# -- what W&B's optimizer is told --------------------------------------------------------------------------------------


def theirs() -> Any:
    from wandb.sdk.sweeps.scheduler.optimizer import make_optimizer
    from wandb.sdk.sweeps.sweep_info import SweepInfo

    return make_optimizer(SweepInfo("abc", "two", "me", "p", yaml.safe_load(TEXT), "c"))


def ended(state: str, ours: str, **summary: Any) -> Any:
    from wandb.sdk.sweeps.run_state import RunState
    from wandb.sdk.sweeps.scheduler.optimizer import RunConfig, RunWithMetrics

    return RunWithMetrics(RunConfig({}), RunState(state), "x", {"state": ours, **summary}, [])


def widths(optimizer: Any, count: int) -> list[int]:
    """What it suggests, where 64 is too dear: W&B's core calls a run without its objectives failed."""
    found = []
    for _ in range(count):
        (suggested,) = optimizer.ask_n_runs(1)
        values = suggested.config.flat_dict()
        found.append(values["width"])
        dear = values["width"] == 64
        result = {} if dear else {"val/acc": 0.5 + values["lr"], "macs": values["width"]}
        told = ended("failed", "skipped") if dear else ended("finished", "finished", **result)
        optimizer.tell_run(suggested.run_id, told)
    return found


def test_a_trial_that_was_too_dear_is_no_mere_failure() -> None:
    import optuna

    plain, advised = theirs(), OptimizerProxy(theirs(), 0)
    for optimizer in (plain, advised):
        optimizer.study.sampler = optuna.samplers.TPESampler(seed=1)
    assert widths(plain, 45)[-25:].count(64) == 25  # as W&B has it: on and on
    assert widths(advised, 45)[-25:].count(64) <= 6
    assert advised.engine == "optuna" and not advised.has_terminator() and advised.prune_runs([], []) == []


def test_every_run_counts_towards_the_cap() -> None:
    adviser = OptimizerProxy(theirs(), 4)
    assert [len(adviser.ask_n_runs(n) or ()) for n in (3, 3, 3)] == [3, 1, 0]
    adviser.forget_run("0")
    assert [len(adviser.ask_n_runs(n) or ()) for n in (3, 3)] == [1, 0]
    adviser = OptimizerProxy(theirs(), 4)  # another process, that finds what there is
    done = ended("finished", "finished", **{"val/acc": 0.5, "macs": 8})
    done.config.config.update(dict(theirs().ask_n_runs(1)[0].config.config))
    adviser.tell_existing_finished_run(done)
    assert len(adviser.study.trials) == 1 and adviser.tell_existing_active_run(done) == "1"
    assert [len(adviser.ask_n_runs(n) or ()) for n in (1, 3, 3)] == [1, 1, 0]
    for run_id in "123":
        assert not adviser.should_terminate_sweep()
        adviser.tell_run(run_id, ended("running", ""))
        adviser.tell_run(run_id, ended("failed", "failed"))
    assert adviser.should_terminate_sweep()


def test_what_is_private_of_wandb_is_as_it_was() -> None:
    import inspect

    from wandb.sdk.sweeps.scheduler import client, ipc, optimizer

    asked = inspect.signature(client.run_scheduler).parameters
    assert {"entity", "project", "sweep_id", "make_optimizer", "batch_size", "poll_interval"} == set(asked)
    for name in ("ask_n_runs", "forget_run", "tell_run", "tell_existing_active_run", "tell_existing_finished_run"):
        assert f"._optimizer.{name}(" in inspect.getsource(ipc) and hasattr(optimizer.Optimizer, name)


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_early_termination_is_not_for_wandb(wandb_server: Server, runs: Path) -> None:
    with pytest.raises(UserError, match=r"no early_terminate beside a scheduler; remove the block, or use --wandb offline"):
        create_sweep(parsed(EARLY + TEXT), runs, fixed={})
    assert not wandb_server.requests
    assert format_sweep_yaml(parsed(), {}) == TEXT  # what is pushed after it has run here goes without the block
    assert yaml.safe_load(format_sweep_yaml(parsed(EARLY + TEXT), {})) == yaml.safe_load(TEXT)


def test_elsewhere_the_one_command_is_said(wandb_server: Server, runs: Path) -> None:
    sweep = wandb_server.world.add_sweep("me", "cifar", TEXT)
    backend = WandbBackend(f"me/cifar/{sweep.id}", runs)
    (said,) = backend.pop_messages()
    assert f"where there is none, run one, and one only: wandb sweep-scheduler me/cifar/{sweep.id}" in said
    assert backend.claim_trial("me") == "wait" and not sweep.queue and backend._scheduler is None
    backend.close()


def beside(server: Server, runs: Path) -> SchedulerProcess:
    (runs / "sweep" / "logs").mkdir(parents=True, exist_ok=True)
    return SchedulerProcess(PLACE, server.only_sweep().id, runs / "sweep", runs_ahead=2, run_cap=6)


@pytest.mark.slow
def test_one_at_a_time_and_the_next_takes_over(wandb_server: Server, runs: Path) -> None:
    sweep = wandb_server.world.add_sweep("me", "cifar", TEXT)
    first = beside(wandb_server, runs)
    wait_until(lambda: len(sweep.queue) == 2)
    second = beside(wandb_server, runs)
    time.sleep(scheduler.POLL_SECONDS + 2)
    assert len(sweep.queue) == 2 and len(wandb_server.asked("SweepRunsWithHistory")) == 1  # as the first thing it does
    first.close(is_sweep_over=False)
    wait_until(lambda: not is_alive(first._process.pid), 5)
    for count in range(3, 9):
        with wandb_server.world.lock:
            run = wandb_server.runs[sweep.queue.pop(0)]
            run.arrived, run.summary = True, {"val/acc": 0.5, "macs": 8, "state": "finished"}
            run.end(0)
        wait_until(lambda count=count: len(sweep.runs) == min(count, 6))
    wait_until(lambda: sweep.state == "FINISHED")
    wait_until(lambda: not is_alive(second._process.pid))
    assert not first.poll() and not second.poll() and not sweep.queue
    second.close(is_sweep_over=True)


@pytest.mark.slow
def test_it_does_not_outlive_a_killed_agent(wandb_server: Server, runs: Path) -> None:
    sweep = wandb_server.world.add_sweep("me", "cifar", TEXT)
    (runs / "logs").mkdir(parents=True)
    code = (
        "import time; from pathlib import Path; from cifar.integrations.wandb.scheduler import SchedulerProcess;"
        f"b = SchedulerProcess({PLACE!r}, {sweep.id!r}, Path({str(runs)!r}), runs_ahead=1, run_cap=None);"
        "print(b._process.pid, flush=True); time.sleep(100)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        wait_until(lambda: sweep.queue)
        family = [pid, *children(pid)]
        assert len(family) > 1  # its wandb-core
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: all(not is_alive(each) for each in family), 5)


@pytest.mark.slow
def test_where_it_cannot_run_the_agent_says_why(wandb_server: Server, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(scheduler, "MAX_TRIES", 2)
    backend = WandbBackend(create_sweep(parsed(TEXT.replace("optuna", "ax")), runs, fixed={}), runs)
    with pytest.raises(UserError, match=r"W&B's sweep scheduler has ended: .*\(the whole log is .*run the agent again"):
        wait_until(lambda: backend.claim_trial("me") != "wait")
    assert any("trying again" in line for line in backend.pop_messages())
    backend.close()


# -- all of it ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_two_objectives_on_wandb(wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(TEXT + TINY)
    words = ["sweep", str(tmp_path / "two.yaml"), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cifar", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    sweep, said = wandb_server.only_sweep(), done.stdout + done.stderr
    assert done.returncode == 0 and "runs beside this agent" in said and "on the front of val/acc and macs" in said, said
    assert sweep.text == TEXT + TINY and len(sweep.runs) == 6 and not sweep.queue
    for run_id in sweep.runs:
        run, record = wandb_server.runs[run_id], RunDir(runs / run_id)
        assert run.exits == [0] and run.summary["state"] == record.state
        if run.config["width"] == 64:
            assert record.state == "skipped" and not run.rows
        else:
            assert record.state == "finished" and run.rows == list(record.read_rows())
            assert [run.summary[name] for name in ("val/acc", "macs")] == [
                record.read_json("summary")[n] for n in ("val/acc", "macs")
            ]
    assert json.loads((runs / "sweeps" / sweep.id / "wandb.json").read_text())["made"] is True
    assert (runs / "sweeps" / sweep.id / "report" / "report.html").exists()
