"""Trials that are trained side by side, and trials after one another in one process, are what each would be alone."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar import registry
from cifar.config import resolve as configuration
from cifar.errors import DiskFullError
from cifar.tracking.run_dir import RunDir
from cifar.training import run, trainer_cache
from cifar.training.cudagraph import StepRunner
from cifar.training.loop import RunHooks, RunLoop
from cifar.training.trainer import Trainer
from helpers.run_configs import FULL, RECIPES, TINY
from helpers.weights import hash_run

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: captured steps are NOT checked")
DROPOUT: dict[str, Any] = {"model": "wrn", "depth": 10, "width": 1, "dropout": 0.2, "precision": "fp32"}
VARIED = [
    {"seed": 0, "lr": 0.05, "weight_decay": 1e-4, "momentum": 0.9, "label_smoothing": 0.1, "schedule": "onecycle"},
    {"seed": 1, "lr": 0.01, "weight_decay": 5e-4, "momentum": 0.8, "label_smoothing": 0.2, "schedule": "cosine"},
    {"seed": 2, "lr": 0.1, "weight_decay": 1e-3, "momentum": 0.5, "label_smoothing": 0.05, "schedule": "linear", "epochs": 3},
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    trainer_cache.clear_trainer_cache()


def together(runs: Path, values: list[dict[str, Any]]) -> list[RunDir]:
    configs = [configuration.resolve_config(each) for each in values]
    assert trainer_cache.can_pack(configs)
    each = [RunLoop(config, run.create_run(config, runs)) for config in configs]
    run.train_runs(each)
    return [running.run_dir for running in each]


def alone(runs: Path, values: dict[str, Any]) -> RunDir:
    trainer_cache.clear_trainer_cache()
    return together(runs, [values])[0]


@pytest.mark.parametrize(
    "base",
    [
        pytest.param({**FULL}, id="conv"),
        pytest.param({**RECIPES, "train_size": 128, "val_size": 64, "probes": "none"}, id="few steps of recipes"),
        pytest.param({**RECIPES}, id="recipes", marks=pytest.mark.slow),
        pytest.param({key: FULL[key] for key in TINY if key != "width"} | DROPOUT, id="dropout", marks=pytest.mark.slow),
    ],
)
def test_a_pack_trains_each_trial_as_if_it_were_alone(runs: Path, base: dict[str, Any]) -> None:
    values = [{**base, "optimizer": "sgd", **changes} for changes in VARIED]
    packed = together(runs, values)
    for record, each in zip(packed, values, strict=True):
        assert record.state == "finished" and record.read_json("environment")["step"]["together"] == 3
        assert hash_run(record) == hash_run(alone(runs, each))


def test_one_that_diverges_and_one_that_is_pruned_leave_the_others_alone(runs: Path) -> None:
    values = [{**TINY, "epochs": 3, "optimizer": "sgd", "lr": lr, "seed": seed} for seed, lr in enumerate((0.05, 1e30, 0.02))]
    configs = [configuration.resolve_config(each) for each in values]
    records = [run.create_run(config, runs) for config in configs]
    prunes = [lambda row: True, lambda row: True, lambda row: row["epoch"] < 2]
    hooks = [RunHooks(should_continue=prune) for prune in prunes]
    run.train_runs([RunLoop(*each) for each in zip(configs, records, hooks, strict=True)])
    assert [record.state for record in records] == ["finished", "diverged", "pruned"]
    assert hash_run(records[0]) == hash_run(alone(runs, values[0]))
    assert len(list(records[2].read_rows())) == 2


def test_one_that_is_stopped_within_an_epoch_goes_on_alone(runs: Path) -> None:
    values = [{**FULL, "epochs": 3, "seed": seed} for seed in range(2)]
    configs = [configuration.resolve_config(each) for each in values]
    records, steps = [run.create_run(config, runs) for config in configs], iter(range(1000))
    stops = [lambda: None, lambda: "interrupted" if next(steps) == 10 else None]
    hooks = [RunHooks(poll_stop=stop) for stop in stops]
    run.train_runs([RunLoop(*each) for each in zip(configs, records, hooks, strict=True)])
    assert [record.state for record in records] == ["finished", "interrupted"]
    run.train_run(configs[1], records[1])
    for record, each in zip(records, values, strict=True):
        assert hash_run(record) == hash_run(alone(runs, each))


def test_a_trainer_that_is_used_again_starts_like_a_new_one(runs: Path) -> None:
    values = [{**FULL, **changes} for changes in VARIED]
    first = [hash_run(alone(runs, each)) for each in values]
    trainer_cache.clear_trainer_cache()
    kept = [together(runs, [each])[0] for each in values]
    assert len(trainer_cache._cached_runners) == 1, "one form, so one set of parts"
    assert [hash_run(record) for record in kept] == first


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "conv4"},
        {"batch_size": 32},
        {"keep": 0.5, "mixup": 0.0},
        {"mixup": 0.0},
        {"weight_decay": 0.0},
        {"optimizer": "adam"},
        {"ema": 0.5},
    ],
)
def test_runs_that_need_another_trainer_have_another_graph_signature(changes: dict[str, Any]) -> None:
    values = {key: value for key, value in FULL.items() if key != "width" or "model" not in changes}
    base, other = configuration.resolve_config(values), configuration.resolve_config({**values, **changes})
    assert not trainer_cache.can_pack([base, other])
    assert not Trainer(base, None).restart_with(other)


def test_one_over_the_budget_is_skipped_and_the_others_train(runs: Path) -> None:
    records = together(runs, [{**TINY, "epochs": 1}, {**TINY, "epochs": 1, "max_macs": 1000.0, "seed": 1}])
    assert [record.state for record in records] == ["finished", "skipped"]


@GPU
@pytest.mark.parametrize("base", [FULL, RECIPES], ids=["conv", "recipes"])
def test_a_captured_step_is_the_step(runs: Path, base: dict[str, Any]) -> None:
    values = {**base, "device": "cuda", "precision": "fp32", "deterministic": True}
    eager, captured = alone(runs, {**values, "capture": False}), alone(runs, values)
    assert captured.read_json("environment")["step"]["captured"] and not eager.read_json("environment")["step"]["captured"]
    assert hash_run(eager) == hash_run(captured)


def test_steps_leave_out_the_gradients_of_what_has_stopped_learning() -> None:
    values = {**TINY, "model": "airbench94", "optimizer": "muon", "whiten_until": 0.5, "max_steps": 4}
    training = Trainer(configuration.resolve_config(values), None)
    asked: list[tuple[int, bool]] = []  # (step of the run, whether it was watched)
    training.model.whiten.bias.register_hook(lambda gradient: asked.append(now))
    steps = StepRunner([training])
    for training.epoch in (1, 2):
        training.next_step = 0
        training.begin_epoch()
        for training.next_step in range(4):
            now = 4 * (training.epoch - 1) + training.next_step, training.next_step == 2
            steps(now[1])
    assert asked == [(0, False), (1, False), (2, True), (3, False), (6, True)]
    assert training.model.whiten.bias.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"whiten_until": 1.0}, {"whiten_until": 0.2}])
def test_parameters_freeze_on_time_in_a_trainer_that_is_used_again(runs: Path, changes: dict[str, Any]) -> None:
    values = {**TINY, "model": "airbench94", "optimizer": "muon", "whiten_until": 0.5, "label_smoothing": 0.1}
    both = [{**values, "seed": 3}, {**values, **changes}]
    expected = [hash_run(alone(runs, each)) for each in both]
    trainer_cache.clear_trainer_cache()
    assert [hash_run(together(runs, [each])[0]) for each in both] == expected
    assert len(trainer_cache._cached_runners) == (2 if changes["whiten_until"] == 1 else 1), (
        "what never stops is not part of that graph"
    )
    assert [hash_run(record) for record in together(runs, both)] == expected, "side by side"


@pytest.mark.slow
def test_a_step_is_compiled_again_when_parameters_are_frozen(runs: Path) -> None:
    """torch 2.11 has to be told; 2.15 sees it by itself."""
    from torch._dynamo.utils import counters

    from cifar.training.step import ForwardOptions, forward

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2 * 30 * 30, 10))
    compiled = torch.compile(forward, backend="aot_eager", dynamic=False)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    before = counters["stats"]["unique_graphs"]
    for frozen, num_graphs in ((False, 1), (True, 2), (False, 2), (True, 2)):
        net[0].requires_grad_(not frozen)
        compiled(net, images, labels, labels, ForwardOptions(skip_frozen=frozen))[0].backward()
        assert counters["stats"]["unique_graphs"] - before == num_graphs
        assert (net[0].weight.grad is None) == frozen
        net.zero_grad()


@GPU
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_captured_step_that_leaves_something_out_is_the_step(runs: Path, compile: str) -> None:
    values = {
        **TINY, "model": "airbench94", "width": 16, "optimizer": "muon", "whiten_until": 0.3, "epochs": 3, "device": "cuda",
        "precision": "fp32", "deterministic": True, "compile": compile, "keep": 0.7,
    }  # fmt: skip
    configs = [configuration.resolve_config(values)] * 2
    records = [run.create_run(config, runs) for config in configs]
    run.train_run(configs[0], records[0], num_planned_runs=1)
    trainer_cache.clear_trainer_cache()
    run.train_run(configs[1], records[1], num_planned_runs=2)
    ((_, steps),) = trainer_cache._cached_runners
    assert len(steps.graphs) == 3, "bare, watched, and what leaves something out"
    one, two = ([row["train/loss"] for row in record.read_rows()] for record in records)
    assert one == pytest.approx(two, rel=1e-4) if compile == "on" else one == two


@GPU
@pytest.mark.parametrize("recipe", [FULL, RECIPES], ids=["conv", "recipes"])
def test_a_pack_on_a_gpu_trains_each_trial_as_if_it_were_alone(runs: Path, recipe: dict[str, Any]) -> None:
    base = {**recipe, "device": "cuda", "precision": "fp32", "deterministic": True, "optimizer": "sgd"}
    values = [{**base, **changes} for changes in VARIED]
    for record, each in zip(together(runs, values), values, strict=True):
        assert (
            record.read_json("environment")["step"] | {"captured": True, "together": 3}
            == record.read_json("environment")["step"]
        )
        assert hash_run(record) == hash_run(alone(runs, each))


@GPU
def test_capturing_and_measuring_leave_the_state_as_it_was() -> None:
    training = Trainer(configuration.resolve_config({**FULL, "device": "cuda"}), None)
    training.begin_epoch()
    before = copy.deepcopy(training.state_dict())
    steps = StepRunner([training])
    assert steps.measure_step_seconds(3) > 0
    after = training.state_dict()
    assert all(torch.equal(before["model"][name], value) for name, value in after["model"].items())
    assert all(torch.equal(before["optimizer"][name], value) for name, value in after["optimizer"].items())
    assert torch.equal(before["cuda"], after["cuda"]) and not after["meter"].any()


def test_the_process_is_set_as_each_trial_wants_it(runs: Path) -> None:
    wanted = [{"threads": 1}, {"threads": 2}, {"threads": 1}, {"deterministic": True}, {"precision": "bf16"}, {}]
    for changes in wanted:
        values = {**TINY, "epochs": 1, "max_steps": 1, **changes}
        together(runs, [values])
        assert torch.get_num_threads() == values["threads"]
        assert torch.are_deterministic_algorithms_enabled() == values.get("deterministic", False)
        expected = "highest" if values.get("precision") == "fp32" else "high"
        assert torch.get_float32_matmul_precision() == expected


def test_buffers_that_no_checkpoint_holds_start_anew() -> None:
    class Noisy(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3 * 32 * 32, 10)
            self.register_buffer("noise", torch.randn(10), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1)) + self.noise

    registry.models.register("noisy")(Noisy)
    try:
        values = {**{key: value for key, value in TINY.items() if key != "width"}, "model": "noisy"}
        first, second = (configuration.resolve_config({**values, "seed": seed}) for seed in (0, 1))
        reused, new = Trainer(first, None), Trainer(second, None)
        assert reused.restart_with(second)
        assert torch.equal(reused.model.noise, new.model.noise)
    finally:
        registry.models._entries.pop("noisy")


def test_the_lr_plan_stays_where_a_captured_step_reads_it() -> None:
    training = Trainer(configuration.resolve_config({**TINY, "max_steps": 1, "schedule": "linear"}), None)
    places = set()
    for epoch in (1, 2):
        training.epoch = epoch
        training.begin_epoch()
        places.add(training.optimizer._lr_plan.data_ptr())
        training.optimizer.set_lr_from_plan(training.step_index)
        assert training.optimizer.lr == pytest.approx(training.optimizer.lrs_at(training.progress_at(0))[0])
    assert len(places) == 1 and training.optimizer._lrs.data_ptr() not in places


@pytest.mark.parametrize("members", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_full_disk_leaves_every_run_to_go_on_with(runs: Path, members: int) -> None:
    configs = [configuration.resolve_config({**TINY, "seed": seed}) for seed in range(members)]
    records = [run.create_run(config, runs) for config in configs]

    def full(row: dict[str, Any]) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError):
        run.train_runs([RunLoop(*pair, RunHooks(should_continue=full)) for pair in zip(configs, records, strict=True)])
    assert [record.state for record in records] == ["interrupted"] * members
    for config, record in zip(configs, records, strict=True):
        run.train_run(config, record)
        assert hash_run(record) == hash_run(alone(runs, config.to_dict()))


@GPU
def test_a_step_that_cannot_be_captured_is_taken_as_it_is(runs: Path) -> None:
    class Reading(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x.flatten(1))
            return y * 2 if y.sum().item() > 1e9 else y  # the host reads: that is not to be captured

    registry.models.register("reading")(lambda: Reading(3 * 32 * 32, 10))
    try:
        values = {**{key: value for key, value in TINY.items() if key != "width"}, "model": "reading"}
        values |= {"device": "cuda", "deterministic": True}
        first, second = alone(runs, values), alone(runs, {**values, "capture": False})
        assert first.read_json("environment")["step"]["not_captured_because"] and hash_run(first) == hash_run(second)
    finally:
        registry.models._entries.pop("reading")
