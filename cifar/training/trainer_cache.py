"""Trainers that a process keeps from trial to trial, with their captured and compiled steps, for trials of the same graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cifar.config.resolve import graph_signature
from cifar.config.schema import Settings
from cifar.tracking.pretrained import find_run_or_pretrained
from cifar.tracking.run_dir import resolve_runs_dir
from cifar.training.compile import compile_if_worthwhile, compile_trainers
from cifar.training.cudagraph import StepRunner
from cifar.training.distributed import SINGLE_PROCESS, DistributedContext
from cifar.training.teachers import Teacher, find_teachers
from cifar.training.trainer import Trainer

MAX_CACHED_RUNNERS = 2  # step runners of different graphs; their tensors stay on the device

_cached_runners: list[tuple[Path | None, StepRunner[Trainer]]] = []  # (data folder, runner), the most recently used last


def can_pack(configs: Sequence[Settings]) -> bool:
    """Whether these runs can be trained side by side: they differ in seed, schedule and scalars only."""
    first = graph_signature(configs[0])
    return all(graph_signature(config) == first for config in configs[1:])


def get_step_runner(
    configs: Sequence[Settings],
    data_dir: Path | None,
    context: DistributedContext = SINGLE_PROCESS,
    teachers: Sequence[Teacher] | None = None,
) -> StepRunner[Trainer]:
    """The step runner of these runs, at their start: a cached one if it fits, else a new one.

    teachers: of all of them; None: those that the configurations name, in the runs folder.
    """
    if teachers is None:
        teachers = find_teachers(configs[0], lambda name: find_run_or_pretrained(name, resolve_runs_dir()))
    if context.world_size > 1:  # not kept: `release_step_runner`
        trainers = [Trainer(config, data_dir, context=context, teachers=teachers) for config in configs]
        capture = configs[0].capture and context.captures_steps
        return StepRunner(trainers, capture=capture, agree_on_error=context.agree_on_error)
    for entry in _cached_runners:
        cached_data_dir, cached = entry
        if cached_data_dir != data_dir or len(cached.trials) != len(configs):
            continue
        if any(trainer.teachers != tuple(teachers) for trainer in cached.trials):
            continue
        if all(trainer.restart_with(config) for trainer, config in zip(cached.trials, configs, strict=True)):
            _cached_runners.remove(entry)
            _cached_runners.append(entry)
            return cached
    clear_trainer_cache(MAX_CACHED_RUNNERS - 1)
    is_pack = len(configs) > 1
    trainers = [Trainer(config, data_dir, shares_generator=is_pack, teachers=teachers) for config in configs]
    step_runner = StepRunner(trainers, capture=configs[0].capture)
    _cached_runners.append((data_dir, step_runner))
    return step_runner


def release_step_runner(step_runner: StepRunner[Trainer]) -> None:
    """Free the captured steps of several processes. NCCL waits for that at the end, as they hold its kernels."""
    if step_runner.trials[0].context.world_size > 1:
        step_runner.discard_graphs()


def clear_trainer_cache(num_kept: int = 0) -> None:
    """Free all trainers but the `num_kept` most recently used."""
    del _cached_runners[: max(0, len(_cached_runners) - num_kept)]


def prepare_step_runner(
    step_runner: StepRunner[Trainer],
    configs: Sequence[Settings],
    num_planned_runs: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Compile where that pays off or is asked for, and capture the steps.

    Returns how steps are taken, as environment.json stores it; "compile" is a sentence for the user, or empty.
    `num_planned_runs`: runs with the same graph signature that this process will train, these included. `should_stop`: as for
    `compile_trainers`.
    """
    first: Trainer = step_runner.trials[0]
    if step_runner.wants_graphs and not step_runner.graphs and not step_runner.capture_error:
        for trainer in step_runner.trials:
            trainer.begin_epoch()  # a capture needs batches
    # Capturing the extra step takes longer than it saves in a single run.
    step_runner.captures_frozen_step = num_planned_runs > len(configs)
    message = ""
    if configs[0].compile in ("on", "max") and not first.is_compiled:
        message = compile_trainers(step_runner, should_stop)
    elif configs[0].compile == "auto" and step_runner.wants_graphs and not step_runner.compile_decided:
        message = compile_if_worthwhile(step_runner, configs, num_planned_runs, should_stop)
    step_runner.ensure_captured()
    if step_runner.capture_error and not step_runner.compile_decided:
        message = f"this step is not captured as a CUDA graph, and slower for it: {step_runner.capture_error}"
    step_runner.compile_decided = True
    return {
        "captured": bool(step_runner.graphs),
        "not_captured_because": step_runner.capture_error,
        "compiled": first.is_compiled,
        "compile": message,
        "together": len(step_runner.trials),
    }
