"""Signals and kill -9 to what serves a sweep on W&B: the run is whole there in the end, under its own id, each epoch once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cifar.tracking.run_dir import RunDir
from helpers.hosted_sweeps import GRID, assert_as_trained, start_command
from helpers.processes import find_alive, list_descendants, list_workers, wait_for_exit, wait_until
from helpers.protocol import Run, Server

pytestmark = pytest.mark.slow
EPOCHS = 100
ONE_RUN = GRID.replace("[conv4, conv8]", "[conv4]").replace("[0.01, 0.02]", "[0.01]") + (
    f"  epochs: {{value: {EPOCHS}}}\n  checkpoint_every: {{value: 4}}\n"  # of 4 steps an epoch
)


def held_when_mirrored(agent: int, run: Run, runs: Path) -> int:
    """The worker, stopped early in its run (SIGSTOP), once W&B has some of its rows."""
    wait_until(lambda: len(list(RunDir(runs / run.id).read_rows())) >= 3, 60)
    (worker,) = list_workers(agent)
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: len(run.rows) >= 2, 60)
    return worker


@pytest.mark.parametrize("victim", ["cifar.agent.worker", "cifar.sidecar"])
def test_a_killed_worker_or_mirror_costs_its_run_nothing(wandb_server: Server, runs: Path, tmp_path: Path, victim: str) -> None:
    (tmp_path / "tiny.yaml").write_text(ONE_RUN)
    process = start_command(wandb_server, "-m", "cifar", "sweep", str(tmp_path / "tiny.yaml"), "--workers", "1", "--no-report")
    run = wait_until(lambda: next(iter(wandb_server.runs.values()), None), 60)
    worker = held_when_mirrored(process.pid, run, runs)
    (killed,) = [pid for pid in list_descendants(process.pid) if victim.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    mine = list_descendants(killed) | {killed}  # a mirror's wandb-core too
    os.kill(killed, signal.SIGKILL)
    if worker != killed:
        os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not find_alive(mine), 5)
    code, output = wait_for_exit(process)
    assert code == 0 and list(wandb_server.runs) == [run.id], output
    if victim == "cifar.sidecar":
        sweep = wandb_server.only_sweep()
        assert run.state == "failed" and len(run.rows) < EPOCHS, "its agent told the end; the rest nobody could tell"
        assert run.summary["state"] == "incomplete" and "finished where it ran" in run.summary["reason"]
        assert f"python -m cifar push {sweep.id}" in output
        code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "push", sweep.id))
        assert code == 0, output
    assert run.state == "finished" and RunDir(runs / run.id).state == "finished"
    assert [row["epoch"] for row in run.rows] == [row["_step"] for row in run.history] == list(range(1, EPOCHS + 1))
    # epochs after the last checkpoint are trained again; W&B gets them once, with the times of the second try
    assert run.rows == list(RunDir(runs / run.id).read_rows())


@pytest.mark.parametrize(("number", "code", "state"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "preempted")])
def test_an_agent_that_is_told_to_end_gives_its_run_back(
    wandb_server: Server, runs: Path, tmp_path: Path, number: int, code: int, state: str
) -> None:
    text = GRID.replace("[conv4, conv8]", "[conv4]").replace("[0.01, 0.02]", "[0.01]") + "  epochs: {value: 60}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    process = start_command(wandb_server, "-m", "cifar", "sweep", str(tmp_path / "tiny.yaml"), "--workers", "1", "--no-report")
    run = wait_until(lambda: next(iter(wandb_server.runs.values()), None), 60)
    wait_until(lambda: RunDir(runs / run.id).read_json("status").get("epoch", 0) >= 5, 60)
    process.send_signal(number)
    got, output = wait_for_exit(process)
    assert got == code and RunDir(runs / run.id).state == state and run.state == "preempted", output
    assert run.summary["state"] == state and "asked to end at step" in run.summary["reason"]
    sweep = wandb_server.only_sweep()
    assert sweep.requeued == [run.id]
    got, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "agent", sweep.id, "--workers", "1"))
    assert got == 0 and list(wandb_server.runs) == [run.id] and run.state == "finished", output
    assert_as_trained(wandb_server, runs, run.id, 60)


def test_a_killed_agent_leaves_nothing_behind_and_its_run_can_be_finished(
    wandb_server: Server, runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(ONE_RUN)
    process = start_command(wandb_server, "-m", "cifar", "sweep", str(tmp_path / "tiny.yaml"), "--workers", "1", "--no-report")
    run = wait_until(lambda: next(iter(wandb_server.runs.values()), None), 60)
    worker = held_when_mirrored(process.pid, run, runs)
    mine = list_descendants(process.pid)
    assert len(mine) >= 3, "worker, mirror and wandb-core"
    process.kill()
    os.kill(worker, signal.SIGCONT)
    process.wait()
    wait_until(lambda: not find_alive(mine), 5)
    assert RunDir(runs / run.id).state == "running"

    # W&B hands out no run twice; here it goes on by hand, and under its id
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "train", "--resume", run.id, "--wandb", "online"))
    assert code == 0 and list(wandb_server.runs) == [run.id] and run.state == "finished", output
    assert [row["epoch"] for row in run.rows] == [row["_step"] for row in run.history] == list(range(1, EPOCHS + 1))
    assert run.rows == list(RunDir(runs / run.id).read_rows())


PAIR = """
from torch import nn
from cifar.registry import models

class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x.flatten(1))
        return y, y

@models.register("pair")
def pair() -> nn.Module:
    return Pair(3072, 10)
"""


def test_a_network_that_cannot_be_trained_fails_with_its_reason_and_the_agent_goes_on(
    wandb_server: Server, runs: Path, tmp_path: Path
) -> None:
    """The sweep was made elsewhere, so that nothing has tried its networks before."""
    (tmp_path / "plugin" / "models").mkdir(parents=True)
    (tmp_path / "plugin" / "models" / "pair.py").write_text(PAIR)
    text = GRID.replace("[conv4, conv8]", "[pair, conv4]").replace("[0.01, 0.02]", "[0.01]") + "  epochs: {value: 1}\n"
    sweep = wandb_server.world.add_sweep("me", "cifar", text)
    agent = ("-m", "cifar", "agent", f"me/cifar/{sweep.id}", "--workers", "1")
    code, output = wait_for_exit(start_command(wandb_server, *agent, CIFAR_PLUGINS=str(tmp_path / "plugin")))
    by_model = {str(run.config["model"]): run for run in wandb_server.runs.values()}
    reason = "its output is a tuple; it has to be a floating-point tensor (B, 10)"
    assert code == 0 and "this agent: 2 trials (1 finished, 1 failed)" in output and "Traceback" not in output, output
    assert reason in output
    pair, record = by_model["pair"], RunDir(runs / by_model["pair"].id)
    assert pair.state == pair.summary["state"] == record.state == "failed" and pair.rows == []
    assert reason in pair.summary["reason"] and pair.summary["reason"] == record.read_json("status")["reason"]
    assert by_model["conv4"].state == "finished"
    assert_as_trained(wandb_server, runs, by_model["conv4"].id, 1)
