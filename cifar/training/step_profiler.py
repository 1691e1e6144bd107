"""Where a step's time goes: its kernels, the replay of its graph, and what the host adds."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cifar.config.resolve import Settings
from cifar.training import trainer_cache as warm
from cifar.training.trainer import Training

Kernel = tuple[str, int, float]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step, and of its kernels by name (one step's sum, in the order of what they cost)."""

    step: float  # as an epoch takes it: wall clock, the host included
    watched: float  # a step that the probes look at
    replay: float  # of the captured step alone, back to back; 0.0 where steps are not captured
    epoch: float  # what an epoch begins with: order, draws, on a GPU all its augmented images
    evaluation: float  # of the validation images; 0.0 where there are none
    kernels: list[Kernel]  # (name, calls a step, seconds a step); on a CPU, torch's operations
    how: dict[str, object]
    device: torch.device
    steps: int  # an epoch
    batch_size: int


def measure(configs: Sequence[Settings], data_dir: Path | None, *, steps: int = 50, kernels: bool = True) -> StepTimes:
    """Times of a step of these runs side by side. They have to fit together (`warm.fit`)."""
    taken = warm.steps(configs, data_dir)
    how = warm.prepare(taken, configs, 1)
    trainings: list[Training] = taken.trials
    first, device = trainings[0], taken.device

    def begin() -> None:
        for training in trainings:
            training.begin_epoch()

    def evaluate() -> None:
        for training in trainings:
            if "val" in training.splits:
                training.evaluate("val")
            training.model.train()

    def some(count: int, look: bool = False) -> None:
        for index in range(count):
            if index % first.steps == 0:
                for training in trainings:
                    training.at.zero_()
            taken(look)

    begin()
    evaluate()  # as it is, and captured
    for training in trainings:
        training.train_batches.reseed(training.config.seed)  # the epoch's draws are to be made again
    epoch, evaluation = _seconds(begin, device), min(_seconds(evaluate, device) for _ in range(2))
    replay = taken.measure(max(steps, 100))
    some(5)
    step = _seconds(lambda: some(steps), device) / steps
    some(2, True)
    watched = _seconds(lambda: some(steps, True), device) / steps
    return StepTimes(
        step, watched, replay, epoch, evaluation, _kernels(some, device) if kernels else [], how,
        device, first.steps, configs[0].batch_size,
    )  # fmt: skip


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - begun


def _kernels(some: Callable[[int], None], device: torch.device, steps: int = 10) -> list[Kernel]:
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with _silent(), profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        some(steps)
        _wait(device)
    found = []
    for row in seen.key_averages():
        seconds = (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6 / steps
        if seconds > 0:
            found.append((str(row.key), round(row.count / steps), seconds))
    return sorted(found, key=lambda row: -row[2])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes its own messages to the process's standard error."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
