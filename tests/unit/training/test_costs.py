"""What a training costs: shares of energy add up over runs and parts, and FLOPs are those of the passes that were needed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifar.config.resolve import resolve_config
from cifar.tracking.run_dir import RunDir
from cifar.training import checkpoint, run
from cifar.training.costs import SharedEnergy, count_train_flops, find_idle_weights, is_any_weight_idle
from cifar.training.loop import RunHooks, RunLoop
from helpers.run_configs import TINY


class Trainee:
    """A run as the sharing of energy sees it."""

    def __init__(self, joules: float | None = 0.0) -> None:
        self.joules, self.joules_problem, self.has_retired = joules, "", False


class Counter:
    """An energy counter that is told what it shows; None: from then on it is not known."""

    def __init__(self) -> None:
        self.joules: float | None = 0.0
        self.problem = ""

    def read(self) -> float | None:
        return self.joules


def share(runs: list[Trainee]) -> tuple[SharedEnergy, Counter]:
    counter: Any = Counter()
    return SharedEnergy(runs, counter), counter


def test_a_pack_shares_what_is_used_while_a_trial_is_in_it() -> None:
    runs = [Trainee(), Trainee(), Trainee()]
    energy, counter = share(runs)
    counter.joules = 90.0
    energy.settle()
    assert [each.joules for each in runs] == [30.0, 30.0, 30.0]
    counter.joules = 120.0
    energy.settle()  # of the moment when the first ends
    runs[0].has_retired = True
    counter.joules = 160.0
    energy.settle()
    assert [each.joules for each in runs] == [40.0, 60.0, 60.0] and sum(each.joules or 0 for each in runs) == 160.0


def test_what_was_used_before_is_added_and_what_is_not_known_stays_so() -> None:
    known, unknown = Trainee(1000.0), Trainee(None)
    unknown.joules_problem = "an earlier version"
    energy, counter = share([known, unknown])
    counter.joules = 50.0
    energy.settle()
    assert (known.joules, unknown.joules) == (1025.0, None) and unknown.joules_problem == "an earlier version"
    counter.joules, counter.problem = None, "another process was on the GPU"
    energy.settle()
    assert known.joules is None and known.joules_problem == "another process was on the GPU"


@pytest.mark.slow
def test_a_checkpoint_carries_what_was_used(runs: Path) -> None:
    """The parts of a run add up. This machine has no counter, so a part here makes the sum unknown."""
    config = resolve_config({**TINY, "checkpoint_every": 2})
    record = run.create_run(config, runs)
    steps = iter(range(5))
    run.train_run(config, record, hooks=RunHooks(poll_stop=lambda: None if next(steps) < 3 else "interrupted"))
    path = record.path / "checkpoint.pt"
    state = torch.load(path)
    assert state["spent"] == {"joules": None, "joules_problem": "", "pack_size": 1}
    spent = {"joules": 321.0, "joules_problem": "", "pack_size": 3}
    for kept, joules in ((spent, 321.0), (None, None)):
        state = {key: value for key, value in state.items() if key != "spent"} | ({"spent": kept} if kept else {})
        torch.save(state, buffer := io.BytesIO())
        path.write_bytes(buffer.getvalue())
        loop = resume(config, record)
        assert loop.joules == joules and loop.pack_size == (3 if kept else 1)
        assert loop.joules_problem == "", "on a CPU there is no energy to miss"
    run.train_run(config, record)
    summary = record.read_json("summary")
    assert record.state == "finished" and "joules" not in summary and "joules_missing" not in summary


def test_a_checkpoint_of_an_earlier_version_makes_the_energy_of_a_gpu_unknown() -> None:
    on_gpu, on_cpu = (checkpoint._read_spent({}, torch.device(kind)) for kind in ("cuda", "cpu"))
    assert on_gpu.joules is None and "earlier version" in on_gpu.joules_problem
    assert on_cpu.joules is None and on_cpu.joules_problem == ""


def resume(config: Any, record: RunDir) -> RunLoop:
    from cifar.training.trainer_cache import get_step_runner

    loop = RunLoop(config, record)
    with record.own("trained"):
        loop.attach_trainer(get_step_runner([config], None).trials[0])
    return loop


def test_a_run_on_a_cpu_has_flops_and_bytes_and_no_joules(runs: Path) -> None:
    config = resolve_config({**TINY, "keep": 0.5, "max_steps": 3})
    record = run.create_run(config, runs)
    run.train_run(config, record)
    summary = record.read_json("summary")
    num_images = 2 * 3 * 64  # epochs, steps, images a step
    assert summary["train_flops"] == 6 * summary["macs"] * num_images
    assert summary["weights_bytes"] == (record.path / "weights.pt").stat().st_size
    assert not summary.keys() & {"joules", "joules_missing", "pack_size"}


@pytest.mark.slow
def test_a_pack_says_how_many_it_was(runs: Path) -> None:
    configs = [resolve_config({**TINY, "epochs": 1, "max_steps": 2, "seed": seed}) for seed in (0, 1, 2)]
    loops = [RunLoop(config, run.create_run(config, runs)) for config in configs]
    run.train_runs(loops)
    assert [loop.run_dir.read_json("summary")["pack_size"] for loop in loops] == [3, 3, 3]


@pytest.mark.slow
def test_frozen_weights_cost_no_gradient_of_their_own(runs: Path) -> None:
    """airbench: a whitening convolution 3 -> 24, 2x2, 32x32 -> 31x31 that never learns, in a network of width 8."""
    config = resolve_config({"dataset": "stand-in", "model": "airbench", "width": 8, "optimizer": "muon", "epochs": 1,
                             "max_steps": 2, "batch_size": 32, "train_size": 128, "val_size": 64, "device": "cpu",
                             "probes": "none"})  # fmt: skip
    record = run.create_run(config, runs)
    run.train_run(config, record)
    summary = record.read_json("summary")
    whitening = 24 * 3 * 2 * 2 * 31 * 31
    assert summary["train_flops"] == 2 * 64 * (3 * summary["macs"] - whitening)


def test_weights_that_stop_learning_are_counted_until_then() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    class Group:
        names, freeze_after = ("0.weight", "0.bias"), 0.5

    class Optimizer:
        groups = (Group(),)

    class Layer:
        def __init__(self, name: str, macs: int) -> None:
            self.name, self.macs = name, macs

    layers: Any = [Layer("0", 32), Layer("1", 16), Layer("(functional products)", 7)]
    assert is_any_weight_idle(model, Optimizer()) and not is_any_weight_idle(model, None)
    idle = find_idle_weights(model, Optimizer(), layers, [0.0, 0.25, 0.5, 0.75], batch_size=10)
    assert idle == [(32.0, 20)]
    assert count_train_flops(55, 40, idle) == 2 * (3 * 55 * 40 - 32 * 20)
