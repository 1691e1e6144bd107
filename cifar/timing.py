"""Where a step's time goes: its kernels, the replay of its graph, and what the host adds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cifar import warm
from cifar.capture import event
from cifar.config import Settings
from cifar.parts import Training


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step, and of its kernels by name (one step's sum, in the order of what they cost)."""

    step: float  # as an epoch takes it: wall clock, the host included
    replay: float  # of the captured step alone, back to back; 0.0 where steps are not captured
    epoch: float  # what an epoch begins with: order, augmentation
    kernels: list[tuple[str, int, float]]  # (name, calls a step, seconds a step)
    how: dict[str, object]


def measure(configs: Sequence[Settings], data_dir: Path | None, *, steps: int = 50, kernels: bool = True) -> StepTimes:
    """Times of a step of these runs side by side. They have to fit together (`warm.fit`)."""
    taken = warm.steps(configs, data_dir)
    how = warm.prepare(taken, configs, 1)
    trainings: list[Training] = taken.trials
    device = taken.device
    for training in trainings:
        training.begin_epoch()
    _wait(device)
    begun = time.perf_counter()
    for training in trainings:
        training.begin_epoch()
    _wait(device)
    epoch = time.perf_counter() - begun
    replay = taken.measure(max(steps, 100))

    def some(count: int) -> None:
        for index in range(count):
            if index % trainings[0].steps == 0:
                for training in trainings:
                    training.at.zero_()
            taken(False)

    some(5)
    _wait(device)
    begun = time.perf_counter()
    some(steps)
    _wait(device)
    step = (time.perf_counter() - begun) / steps
    return StepTimes(step, replay, epoch, _kernels(some, device) if kernels else [], how)


def _kernels(some: object, device: torch.device, steps: int = 10) -> list[tuple[str, int, float]]:
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        some(steps)  # type: ignore[operator]
        _wait(device)
    found = []
    for row in seen.key_averages():
        seconds = (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6 / steps
        if seconds > 0:
            found.append((str(row.key), round(row.count / steps), seconds))
    return sorted(found, key=lambda row: -row[2])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["StepTimes", "event", "measure"]
