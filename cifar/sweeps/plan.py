"""What a sweep would do, without running it: its trials, their MACs and an estimate of their time (`sweep --dry-run`)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cifar import registry
from cifar.config.schema import Settings
from cifar.sweeps import spec
from cifar.sweeps.spec import Sweep


@dataclass(frozen=True)
class PlannedTrial:
    """A trial that has not run."""

    cell: int
    values: dict[str, Any]  # of the swept keys
    model: str
    macs: float
    params: int
    epochs: int
    seconds: float  # of training, estimated from one short step on this machine
    is_skipped: bool  # it needs more than max_macs


def plan_sweep(sweep: Sweep, fixed: Mapping[str, Any], *, sweep_seed: int = 0, count: int | None = None) -> list[PlannedTrial]:
    """The trials of a sweep. For a search, random samples stand for the trials that results will suggest."""
    from cifar.training import run

    spec.check_sweep(sweep, fixed, sweep_seed, count)
    trials = spec.list_known_trials(sweep, sweep_seed, count)
    if not trials:
        trials = [spec.sample_trial(sweep, k, sweep_seed) for k in range(spec.num_trials(sweep, count))]
    swept_values = spec.list_swept_values(trials, spec.list_swept_keys(sweep, trials, fixed), fixed)
    seconds_per_image: dict[str, float] = {}  # by architecture
    plan = []
    for cell, values in enumerate(trials):
        config = spec.resolve_trial(values, fixed)
        cost = run.measure_cost(config)
        architecture = repr((config.model, sorted(config.kwargs_for("model").items())))
        num_images = min(config.images_per_epoch, config.max_steps * config.batch_size or config.images_per_epoch)
        is_skipped = bool(config.max_macs and cost.macs > config.max_macs)
        if not is_skipped and architecture not in seconds_per_image:
            seconds_per_image[architecture] = _measure_seconds_per_image(config, cost.macs)
        seconds = 0.0 if is_skipped else config.epochs * num_images * seconds_per_image[architecture]
        known = (swept_values[cell], config.model, cost.macs, cost.params, config.epochs)
        plan.append(PlannedTrial(cell, *known, seconds, is_skipped))
    return plan


def _measure_seconds_per_image(config: Settings, macs: float) -> float:
    """Time a forward and backward pass, of about 2 GMACs forward, so that it takes seconds with a large model too."""
    import torch

    from cifar.models.limits import limit_size
    from cifar.training.trainer import resolve_device

    device = resolve_device(config.device)
    with torch.random.fork_rng(devices=[]):
        with limit_size(config.model):
            model = registry.models[config.model].build(**config.kwargs_for("model")).to(device)
        images = torch.randn(max(8, min(config.batch_size, int(2e9 / max(macs, 1)))), 3, 32, 32, device=device)
        best = math.inf
        for _ in range(5):  # the best of five: other programs can only make it slower
            start = time.perf_counter()
            model(images).float().logsumexp(1).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return best / len(images)
