"""Compiles the step of a run that another process will train, so that the kernels are in the cache when that one begins.

It takes the worker's own way (the same trainer, images, step and capture) up to the first step, and leaves no run behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from cifar.config.schema import Settings
from cifar.training import compile_cache
from cifar.training.compile import find_step_key
from cifar.training.run import measure_cost
from cifar.training.trainer import resolve_device
from cifar.training.trainer_cache import clear_trainer_cache, get_step_runner, prepare_step_runner

MIN_GPU_BYTES = 3 * 2**30  # with less GPU memory to itself a process does not begin

Answer = Literal["ready", "busy", "short", "skipped"]


def needs_compiling(config: Settings) -> bool:
    """Whether this run's step is compiled ahead.

    With `compile=auto` the worker decides when it has timed a step. With `max` kernels are chosen by timing them for minutes,
    which another training on the same GPU would disturb.
    """
    return config.compile == "on"


def compile_ahead(config: Settings, data_dir: Path | None, num_planned_runs: int, gpu_share: float) -> Answer:
    """Compile the run's step into the cache.

    num_planned_runs: as for `train_runs`. gpu_share: the fraction of the free GPU memory that this process may use.
    "ready": it is in the cache. "busy": another process is compiling it. "short": there is too little GPU memory to do this
    beside a training. "skipped": a worker does not compile it, or is better left alone with it.
    """
    if not needs_compiling(config) or (config.max_macs and measure_cost(config).macs > config.max_macs):
        return "skipped"
    device = resolve_device(config.device)
    key = find_step_key(config, device)
    if compile_cache.is_compiled(key):
        return "ready"
    with compile_cache.hold_compile_lock(key, wait_seconds=0.0) as is_held:
        if not is_held:
            return "busy"
        if compile_cache.is_compiled(key):
            return "ready"
        if device.type == "cuda" and not _limit_gpu_memory(device, gpu_share):
            return "short"
        _compile(config, data_dir, num_planned_runs)
        compile_cache.mark_compiled(key)
    return "ready"


def _limit_gpu_memory(device: torch.device, share: float) -> bool:
    """Let this process take that share of what is free now, and fail beyond it. False if that is too little to begin."""
    free, total = torch.cuda.mem_get_info(device)
    if free * share < MIN_GPU_BYTES:
        return False
    torch.cuda.set_per_process_memory_fraction(free * share / total, device)
    return True


def _compile(config: Settings, data_dir: Path | None, num_planned_runs: int) -> None:
    step_runner = get_step_runner([config], data_dir)
    # The worker lets cuDNN time its algorithms. Here that would only take the GPU from those who train.
    torch.backends.cudnn.benchmark = False
    prepare_step_runner(step_runner, [config], num_planned_runs)
    if not step_runner.wants_graphs:  # nothing was captured, so nothing has been compiled yet
        for trainer in step_runner.trials:
            trainer.begin_epoch()
        for with_probes in (False, True):
            step_runner(with_probes)
    clear_trainer_cache()
