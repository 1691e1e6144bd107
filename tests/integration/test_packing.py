"""Trials that an agent packs: what goes together, what each becomes, and what is left of a pack in which one fails."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cifar.agent import packing
from cifar.config.resolve import graph_signature, resolve_config
from cifar.errors import UserError
from cifar.sweeps.backend import Trial
from cifar.sweeps.local import LocalBackend
from cifar.tracking.run_dir import RunDir
from helpers.agent_processes import create_sweep, start_agent
from helpers.processes import list_workers, wait_for_exit, wait_until

CELLS = "parameters: {lr: {values: [0.05, 0.02]}, seed: {values: [0, 1, 2]}, model: {values: [conv4, conv8]}}"
RAISING = """
from cifar.optim import Group, Optimizer
from cifar.registry import optimizers

def rule(params, grads, state, hyper):
    if hyper["lr"] > 1:
        raise RuntimeError("a rate above 1")
    for p, g in zip(params, grads):
        p.sub_(hyper["lr"] * g)

@optimizers.register("raising")
def raising(parameters, *, lr: float = 0.1):
    return Optimizer([Group(list(parameters.tensors), list(parameters.tensors.values()), rule, {"lr": lr})])
"""


class Offered:
    """Trials in a row, as a backend hands them out."""

    def __init__(self, values: list[dict[str, Any]], heedless: bool = False) -> None:
        self.heedless = heedless  # as W&B, which hands out what it likes
        self.runs_dir = Path("absent")  # no run has a folder yet
        self.trials = [Trial(cell, each, f"run{cell}", 1) for cell, each in enumerate(values)]

    def claim_trial(self, worker: str, max_trials: int = 1, trial_filter: Any = None) -> Any:
        wanted = [trial for trial in self.trials if self.heedless or trial_filter is None or trial_filter(trial.values)]
        if wanted:
            self.trials.remove(wanted[0])
        return wanted[0] if wanted else "wait" if self.trials else None

    def claim_more(self, worker: str, count: int, trial_filter: Any) -> list[Trial]:
        wanted = [trial for trial in self.trials if not self.heedless and trial_filter(trial.values)][:count]
        self.trials = [trial for trial in self.trials if trial not in wanted]
        return wanted

    def peek_values(self, limit: int) -> list[dict[str, Any]]:
        return [trial.values for trial in self.trials[:limit]]

    def count_states(self) -> dict[str, int]:
        return {"waiting": len(self.trials)}


def taken(
    values: list[dict[str, Any]], asked: str, free: int = 1, count: float = 99, heedless: bool = False
) -> list[list[int]]:
    packer, found = packing.Packer(Offered(values, heedless), "me", asked, count), []
    while isinstance(trials := packer.claim_group(free, lambda given: given), list):
        found.append([trial.cell for trial in trials])
    return found


SEEDS = [{"model": "conv4", "seed": seed} for seed in range(6)]


def test_trials_of_a_form_go_together_and_others_wait_for_their_own() -> None:
    assert taken(SEEDS, "4") == [[0, 1, 2, 3], [4, 5]]
    mixed = [*SEEDS[:2], {"model": "conv8"}, {"model": "conv8", "seed": 1}, *SEEDS[2:3]]
    assert taken(mixed, "4") == [[0, 1, 4], [2, 3]]
    assert taken(mixed, "4", heedless=True) == [[0, 1], [2, 3], [4]]
    assert taken(SEEDS, "off") == taken(SEEDS, "1") == [[cell] for cell in range(6)]


def test_what_is_open_is_shared_out_and_a_count_is_kept() -> None:
    assert taken(SEEDS, "16", free=2)[0] == [0, 1, 2]
    assert taken(SEEDS, "4", count=3) == [[0, 1, 2]]


def test_after_a_failure_side_by_side_its_trials_are_alone() -> None:
    packer = packing.Packer(Offered(SEEDS), "me", "4", 99)
    first = packer.claim_group(1, lambda given: given)
    assert isinstance(first, list) and len(first) == 4
    for trial in first:
        packer.record_pack_failure(trial, 4)
    packer.set_aside += first  # as if they were offered again
    assert [len(packer.claim_group(1, lambda given: given) or ()) for _ in range(5)] == [1, 1, 1, 1, 2]


def test_why_trials_are_not_packed_is_said_once_where_others_of_their_kind_wait() -> None:
    def sign(values: Any) -> dict[str, Any]:
        return graph_signature(resolve_config(values))

    packer = packing.Packer(Offered([*SEEDS[1:], {"model": "conv8"}]), "me", "auto", 99)
    for first in (SEEDS[0], SEEDS[1], {"model": "conv16"}, {"model": "conv4", "batch_size": 64}):
        packer._explain_single(first, "it is large", sign)
    assert packer.messages == ["trials of conv4 at batch_size 128 are trained one after the other: it is large"]


def test_how_many_is_asked_for_in_words() -> None:
    for wrong in ("0", "many", "-3", "2.5"):
        with pytest.raises(UserError, match="auto, off"):
            packing.check_pack_option(wrong)


def rows(backend: LocalBackend, cell: int) -> list[dict[str, Any]]:
    record = RunDir(backend.runs_dir / backend.run_id(cell))
    assert record.state == "finished"
    return [{key: row[key] for key in row if not key.startswith("system/")} for row in record.read_rows()]


@pytest.mark.slow
def test_packed_trials_are_what_they_are_alone(runs: Path) -> None:
    packed, alone = create_sweep(runs, CELLS), create_sweep(runs, CELLS)
    for backend, options in ((packed, ("workers=2", "pack='4'")), (alone, ("workers=1",))):
        code, output = wait_for_exit(start_agent(backend, *options))
        assert code == 0, output
    together = [
        RunDir(packed.runs_dir / packed.run_id(cell)).read_json("environment")["step"]["together"] for cell in range(12)
    ]
    assert max(together) > 1
    for cell in range(12):
        assert rows(packed, cell) == rows(alone, cell)


@pytest.mark.slow
def test_one_that_raises_fails_alone(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "plugins" / "optim").mkdir(parents=True)
    (tmp_path / "plugins" / "optim" / "raising.py").write_text(RAISING)
    os.environ["CIFAR_PLUGINS"] = str(tmp_path / "plugins")
    try:
        backend = create_sweep(runs, "parameters: {lr: {values: [0.05, 3.0, 0.02]}}", model="conv4", optimizer="raising")
        code, output = wait_for_exit(start_agent(backend, "workers=1", "pack='3'", CIFAR_LEASE="30"))
    finally:
        del os.environ["CIFAR_PLUGINS"]
    assert code == 0, output
    assert [cell["state"] for cell in backend.list_cells()] == ["finished", "failed", "finished"], output
    assert "side by side with 2 others" in output and "a rate above 1" in output


@pytest.mark.slow
def test_a_pack_whose_worker_is_killed_is_trained_again_and_once(runs: Path) -> None:
    values = "parameters: {seed: {values: [0, 1, 2, 3]}}"
    backend = create_sweep(runs, values, model="conv4", epochs=12, train_size=2048)
    process = start_agent(backend, "workers=1", "pack='4'", CIFAR_LEASE="30")
    wait_until(lambda: all(RunDir(runs / backend.run_id(cell)).metrics_bytes() for cell in range(4)))
    (worker,) = list_workers(process.pid)
    os.kill(worker, signal.SIGKILL)
    code, output = wait_for_exit(process)
    assert code == 0, output
    assert backend.count_states() == {"finished": 4}
    for cell in range(4):
        assert [row["epoch"] for row in rows(backend, cell)] == list(range(1, 13))


@pytest.mark.slow
def test_one_that_kills_its_process_takes_no_other_with_it(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "plugins" / "optim").mkdir(parents=True)
    deadly = RAISING.replace('raise RuntimeError("a rate above 1")', "os.kill(os.getpid(), signal.SIGKILL)")
    deadly = "import os, signal\n" + deadly.replace("raising", "deadly")  # this process knows the other one already
    (tmp_path / "plugins" / "optim" / "deadly.py").write_text(deadly)
    os.environ["CIFAR_PLUGINS"] = str(tmp_path / "plugins")
    try:
        backend = create_sweep(runs, "parameters: {lr: {values: [0.05, 3.0, 0.02]}}", model="conv4", optimizer="deadly")
        code, output = wait_for_exit(start_agent(backend, "workers=1", "pack='3'", CIFAR_LEASE="30"))
    finally:
        del os.environ["CIFAR_PLUGINS"]
    assert code == 0, output
    assert [cell["state"] for cell in backend.list_cells()] == ["finished", "killed", "finished"], output
    assert not (runs / backend.run_id(0) / "traceback.txt").exists()
