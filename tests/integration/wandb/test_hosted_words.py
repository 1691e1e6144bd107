"""The last words of an agent of a sweep on W&B: of the whole sweep, as W&B knows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cifar.integrations.wandb.sweep_runs import fetch_sweep_cells
from helpers.hosted_sweeps import GRID, start_command
from helpers.processes import wait_for_exit
from helpers.protocol import Server

TARGET = {"entity": "me", "project": "p"}


def page(*runs: tuple[str, str, str]) -> dict[str, object]:
    nodes = [{"name": n, "state": s, "summaryMetrics": m, "config": '{"lr": {"value": 0.1}}'} for n, s, m in runs]
    info = {"endCursor": None, "hasNextPage": False}
    return {"project": {"runs": {"edges": [{"node": node} for node in nodes], "pageInfo": info}}}


def test_runs_of_a_sweep_are_read_as_cells() -> None:
    answer = page(
        ("a", "finished", '{"val/acc": 0.5, "state": "finished"}'),
        ("b", "running", '{"val/acc": 0.9}'),
        ("c", "finished", '{"val/acc": 0.8, "state": "pruned"}'),
        ("d", "crashed", "{}"),
        ("e", "failed", '{"val/acc": "NaN", "state": "diverged"}'),
        ("f", "running", '{"val/acc": 0.7, "state": "interrupted"}'),
    )
    cells = fetch_sweep_cells(lambda query, **variables: answer, TARGET, "s", ["val/acc", "val/acc"])
    assert cells is not None
    assert [(cell["run_id"], cell["state"]) for cell in cells] == [
        ("a", "finished"), ("b", "running"), ("c", "pruned"), ("d", "killed"), ("e", "diverged"), ("f", "running"),
    ]  # fmt: skip
    assert [cell["value"] for cell in cells][:4] == [0.5, 0.9, 0.8, None] and cells[0]["values"] == {"lr": 0.1}


def test_a_server_that_fails_is_no_answer() -> None:
    def fail(query: str, **variables: object) -> dict[str, object]:
        raise OSError("no server")

    assert fetch_sweep_cells(fail, TARGET, "s", ["val/acc"]) is None


@pytest.mark.slow
def test_the_last_words_are_of_all_agents(wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(GRID.replace("[conv4, conv8]", "[conv4]") + "  epochs: {value: 2}\n")
    options = ("--workers", "1", "--count", "1")
    code, output = wait_for_exit(
        start_command(wandb_server, "-m", "cifar", "sweep", str(tmp_path / "tiny.yaml"), "--no-report", *options)
    )
    assert code == 0 and "this agent: 1 trial (1 finished)" in output, output
    sweep = wandb_server.only_sweep()
    other = str(tmp_path / "another machine")
    code, output = wait_for_exit(
        start_command(wandb_server, "-m", "cifar", "agent", f"me/cifar/{sweep.id}", *options, "--runs-dir", other)
    )
    assert code == 0, output
    assert f"sweep {sweep.id}: 2 finished" in output and "this agent: 1 trial (1 finished)" in output, output
    best = max(wandb_server.runs.values(), key=lambda run: run.summary["val/acc"])
    found = re.search(r"best val/acc (\S+) % by (\S+) ", output)
    assert found and found[1] == f"{100 * best.summary['val/acc']:.2f}", output
    assert run_of(found[2], wandb_server) == best.summary["val/acc"]


def run_of(run_id: str, server: Server) -> float:
    return float(server.runs[run_id].summary["val/acc"])
