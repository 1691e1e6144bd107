"""torch.compile: one compiled function per process, and the decision whether compiling a run's steps pays off."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cifar import kernels
from cifar.config.resolve import graph_signature
from cifar.config.schema import Settings
from cifar.data import cache_folder
from cifar.training.cudagraph import StepRunner

if TYPE_CHECKING:
    from cifar.training.trainer import Trainer

COMPILE_SAVING = 0.3  # typical fraction of a captured step's time that compiling saves (LOG.md)
COLD_COMPILE_SECONDS = 45.0  # compiling for the first time on a machine (LOG.md)
WARM_COMPILE_SECONDS = 8.0  # compiling when the result is in the cache on disk (LOG.md)


@functools.cache
def compile_once(function: Any, max_autotune: bool = False) -> Any:
    """The compiled function, the same one for all trainers of a process, so an architecture is compiled once.

    `max_autotune`: try out more kernels, which takes minutes.
    """
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, 64)  # a sweep can have more architectures than 8
    return torch.compile(function, mode="max-autotune-no-cudagraphs" if max_autotune else None, dynamic=False)


def compile_if_worthwhile(step_runner: StepRunner[Trainer], configs: Sequence[Settings], num_planned_runs: int) -> str:
    """Compile the steps if that saves more time than it takes. Returns a sentence for the user.

    `num_planned_runs`: runs with the same graph signature that this process will train, these included.
    """
    first = step_runner.trials[0]
    # One trial is measured, because capturing all of a pack takes seconds. Side by side they take less than this sum.
    single = step_runner if len(step_runner.trials) == 1 else StepRunner([first])
    seconds = single.measure_step_seconds() * len(step_runner.trials)
    if not seconds:
        return ""
    work = seconds * first.steps_per_epoch * max(config.epochs for config in configs) * max(1, num_planned_runs / len(configs))
    cost = WARM_COMPILE_SECONDS if _marker_path(configs[0], first.device).exists() else COLD_COMPILE_SECONDS
    pays = first.context.rank_zero_call(lambda: COMPILE_SAVING * work > cost)  # the ranks do the same
    if pays:
        compile_trainers(step_runner)
    return (
        f"compile: {'on' if pays else 'off'} (steps of {1e6 * seconds:.0f} us, {work:.0f} s of work ahead; "
        f"compiling takes about {cost:.0f} s and saves about {100 * COMPILE_SAVING:.0f} %)"
    )


def compile_trainers(step_runner: StepRunner[Trainer]) -> None:
    """Compile the step of every trainer, capture it, and note on disk that its kernels are cached now."""
    first = step_runner.trials[0]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))  # outlives the process
    # Inductor's cache on disk knows our operators by name, not by code. The tag makes a changed kernel miss the cache.
    torch.compiler.config.cache_key_tag = kernels.digest_sources()
    for trainer in step_runner.trials:
        trainer.compile_step()
    step_runner.discard_graphs()
    step_runner.ensure_captured()
    marker = _marker_path(first.config, first.device)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{time.time()}\n")


def _marker_path(config: Settings, device: torch.device) -> Path:
    """This file exists if the step has been compiled on a machine of this kind, so that its kernels are in the cache."""
    key = [
        graph_signature(config),
        torch.__version__,
        kernels.digest_sources(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    ]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_folder() / "inductor" / "cifar" / digest
