"""Where the time of a step goes: its kernels, the replay of its graph, and what the host adds."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cifar.config.schema import Settings
from cifar.training.trainer import Trainer
from cifar.training.trainer_cache import get_step_runner, prepare_step_runner

KernelTime = tuple[str, int, float]  # name, calls per step, seconds per step


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step and of its parts."""

    step: float  # wall clock in an epoch, with what the host adds
    probed_step: float  # a step with probes
    replay: float  # the captured step alone, replayed back to back; 0.0 if steps are not captured
    epoch: float  # the start of an epoch: order, random draws and, on a GPU, all its augmented images
    evaluation: float  # of the validation images; 0.0 if there are none
    kernels: list[KernelTime]  # the slowest first; on a CPU, torch's operations
    step_description: dict[str, object]  # how steps are taken, as in environment.json
    device: torch.device
    steps_per_epoch: int
    batch_size: int


def profile_steps(configs: Sequence[Settings], data_dir: Path | None, *, steps: int = 50, kernels: bool = True) -> StepTimes:
    """Measure `steps` steps of these runs side by side. `trainer_cache.can_pack` has to be true of them."""
    step_runner = get_step_runner(configs, data_dir)
    step_description = prepare_step_runner(step_runner, configs, 1)
    trainers: list[Trainer] = step_runner.trials
    first, device = trainers[0], step_runner.device

    def begin_epochs() -> None:
        for trainer in trainers:
            trainer.begin_epoch()

    def evaluate_all() -> None:
        for trainer in trainers:
            if "val" in trainer.splits:
                trainer.evaluate("val")
            trainer.model.train()

    def take_steps(count: int, with_probes: bool = False) -> None:
        for index in range(count):
            if index % first.steps_per_epoch == 0:
                for trainer in trainers:
                    trainer.step_index.zero_()
            step_runner(with_probes)

    begin_epochs()
    evaluate_all()  # the first call is not captured, the second one is
    for trainer in trainers:
        trainer.train_loader.reseed(trainer.config.seed)  # so that the epoch's draws are made again, and timed
    epoch, evaluation = _time_call(begin_epochs, device), min(_time_call(evaluate_all, device) for _ in range(2))
    replay = step_runner.measure_step_seconds(max(steps, 100))
    take_steps(5)
    step = _time_call(lambda: take_steps(steps), device) / steps
    take_steps(2, True)
    probed_step = _time_call(lambda: take_steps(steps, True), device) / steps
    return StepTimes(
        step=step,
        probed_step=probed_step,
        replay=replay,
        epoch=epoch,
        evaluation=evaluation,
        kernels=_profile_kernels(take_steps, device) if kernels else [],
        step_description=step_description,
        device=device,
        steps_per_epoch=first.steps_per_epoch,
        batch_size=configs[0].batch_size,
    )


def _time_call(function: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call, until the device has done its work."""
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - start


def _profile_kernels(take_steps: Callable[[int], None], device: torch.device, steps: int = 10) -> list[KernelTime]:
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with _silence_stderr(), profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        take_steps(steps)
        _synchronize(device)
    kernels = []
    for row in profiler.key_averages():
        seconds = (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6 / steps
        if seconds > 0:
            kernels.append((str(row.key), round(row.count / steps), seconds))
    return sorted(kernels, key=lambda kernel: -kernel[2])


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Discard what the process writes to standard error: the profiler's library puts its own messages there."""
    original = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
