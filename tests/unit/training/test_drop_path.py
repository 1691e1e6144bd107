"""Stochastic depth in a run: which branches are dropped depends on seed, epoch and step alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar.config import resolve as configuration
from cifar.models.blocks import DropPath
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.distributed import SINGLE_PROCESS, DistributedContext
from cifar.training.loop import RunHooks
from cifar.training.trainer import Trainer
from helpers.run_configs import RECIPES
from helpers.weights import hash_run


def make_trainer(context: DistributedContext = SINGLE_PROCESS, **changes: Any) -> Trainer:
    return Trainer(configuration.resolve_config({**RECIPES, **changes}), None, context=context)


def read_scales(trainer: Trainer, epoch: int, start: int = 0) -> Tensor:
    """(steps, blocks, B): what the blocks multiply by in each step."""
    trainer.epoch, trainer.next_step = epoch, start
    trainer.begin_epoch()
    found = []
    for step in range(start, trainer.steps_per_epoch):
        trainer.step_index.fill_(step)
        assert trainer.step.select_draws is not None
        trainer.step.select_draws()
        blocks = [module for module in trainer.model.modules() if isinstance(module, DropPath)]
        found.append(torch.stack([block.scales.clone() for block in blocks if block.scales is not None]))
    return torch.stack(found)


def test_each_step_has_its_own_draws_at_the_rates_of_the_blocks() -> None:
    scales = read_scales(make_trainer(train_size=12_800, epochs=1), 1)
    assert scales.shape == (200, 3, 64)
    for block, rate in enumerate((0.5 / 3, 1 / 3, 0.5)):
        values = scales[:, block]
        dropped = values == 0
        torch.testing.assert_close(values[~dropped], torch.full_like(values[~dropped], 1 / (1 - rate)))
        assert abs(float(dropped.float().mean()) - rate) < 4.5 * (rate * (1 - rate) / 12_800) ** 0.5
    together = ((scales[:, 1] == 0) & (scales[:, 2] == 0)).float().mean()
    assert abs(float(together) - 1 / 6) < 0.015, "blocks are independent"


def test_seed_and_epoch_decide_and_an_epoch_can_begin_at_any_step() -> None:
    trainer = make_trainer()
    first, second = read_scales(trainer, 1), read_scales(trainer, 2)
    assert torch.equal(read_scales(make_trainer(), 2, start=3), second[3:])
    others = [first, second, read_scales(make_trainer(seed=1), 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])


def test_ranks_share_the_draws_of_the_whole_batch() -> None:
    whole = read_scales(make_trainer(), 1)
    shares = [read_scales(make_trainer(DistributedContext(rank, 2)), 1) for rank in (0, 1)]
    assert torch.equal(torch.cat(shares, 2), whole)


def test_without_it_a_step_has_nothing_to_select() -> None:
    trainer = make_trainer(drop_path=0.0)
    assert trainer.step.select_draws is None and trainer.train_loader.plan_epoch(1).kept_paths is None


@pytest.mark.parametrize("model", ["resnet8", pytest.param("airbench", marks=pytest.mark.slow)])
def test_a_run_with_every_recipe_goes_on_bit_for_bit_from_any_step(runs: Path, model: str) -> None:
    values = {**RECIPES, "model": model}
    if model == "airbench":
        values = {k: v for k, v in values.items() if k != "se"} | {"depth": 3, "augment_policy": "trivialaugment"}
        values |= {"cutmix": 0.0, "keep": 0.6}
    config = configuration.resolve_config(values)

    def train(record: RunDir, hooks: RunHooks | None = None) -> None:
        run.train_run(config, record, hooks=hooks)

    whole, record, lengths = run.create_run(config, runs), run.create_run(config, runs), iter((1, 5, 99))
    train(whole)
    while record.read_json("status").get("state") != "finished":
        left = next(lengths)

        def stop() -> str | None:
            nonlocal left
            left -= 1
            return "interrupted" if left == 0 else None

        train(record, RunHooks(poll_stop=stop))
    assert hash_run(record) == hash_run(whole)
