"""torch.compile: one compiled function per process, and the decision whether compiling a run's steps pays off."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cifar import kernels
from cifar.config.schema import Settings
from cifar.system.redacted_streams import hide_from_listeners
from cifar.training import compile_cache
from cifar.training.cudagraph import StepRunner

if TYPE_CHECKING:
    from cifar.training.trainer import Trainer

COMPILE_SAVING = 0.3  # typical fraction of a captured step's time that compiling saves (LOG.md)
COLD_COMPILE_SECONDS = 45.0  # compiling for the first time on a machine (LOG.md)
WARM_COMPILE_SECONDS = 8.0  # compiling when the result is in the cache on disk (LOG.md)


class WaitStoppedError(Exception):
    """A run was asked to end while it waited for another process to compile its step. Nothing has been compiled."""


@functools.cache
def compile_once(function: Any, max_autotune: bool = False) -> Any:
    """The compiled function, the same one for all trainers of a process, so an architecture is compiled once.

    `max_autotune`: try out more kernels, which takes minutes.
    """
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, 64)  # a sweep can have more architectures than 8
    return torch.compile(function, mode="max-autotune-no-cudagraphs" if max_autotune else None, dynamic=False)


def compile_if_worthwhile(
    step_runner: StepRunner[Trainer],
    configs: Sequence[Settings],
    num_planned_runs: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Compile the steps if that saves more time than it takes. Returns a sentence for the user.

    `num_planned_runs`: runs with the same graph signature that this process will train, these included. `should_stop`: as for
    `compile_trainers`.
    """
    first = step_runner.trials[0]
    # One trial is measured, because capturing all of a pack takes seconds. Side by side they take less than this sum.
    single = step_runner if len(step_runner.trials) == 1 else StepRunner([first])
    seconds = single.measure_step_seconds() * len(step_runner.trials)
    if not seconds:
        return ""
    work = seconds * first.steps_per_epoch * max(config.epochs for config in configs) * max(1, num_planned_runs / len(configs))
    cost = WARM_COMPILE_SECONDS if compile_cache.is_compiled(_trainer_key(first)) else COLD_COMPILE_SECONDS
    pays = first.context.rank_zero_call(lambda: COMPILE_SAVING * work > cost)  # the ranks do the same
    if pays:
        compile_trainers(step_runner, should_stop)
    return (
        f"compile: {'on' if pays else 'off'} (steps of {1e6 * seconds:.0f} us, {work:.0f} s of work ahead; "
        f"compiling takes about {cost:.0f} s and saves about {100 * COMPILE_SAVING:.0f} %)"
    )


def compile_trainers(step_runner: StepRunner[Trainer], should_stop: Callable[[], bool] = lambda: False) -> str:
    """Compile the step of every trainer, capture it, and note on disk that its kernels are cached now.

    Where another process of this machine is compiling the same step, this one waits for it and finds the kernels in the cache.
    Returns a sentence for the user where that took long, else "". `should_stop`: asked while it waits, whether the runs are to
    end; then it raises WaitStoppedError.
    """
    first = step_runner.trials[0]
    os.environ.setdefault(compile_cache.FOLDER_VARIABLE, str(compile_cache.compiler_folder()))  # outlives the process
    # Inductor's cache on disk knows our operators by name, not by code. The tag makes a changed kernel miss the cache.
    torch.compiler.config.cache_key_tag = kernels.digest_sources()
    key, start, waited = _trainer_key(first), time.monotonic(), 0.0
    is_shared = first.context.world_size > 1  # its processes compile together: each waits for the others in every step
    if not is_shared and not compile_cache.is_compiled(key):
        with compile_cache.hold_compile_lock(key, on_wait=_say_that_it_waits, should_stop=should_stop) as is_held:
            if not is_held and should_stop():
                raise WaitStoppedError
            waited = time.monotonic() - start
            if not compile_cache.is_compiled(key):
                _compile_and_capture(step_runner)
                if step_runner.wants_graphs:  # else the first steps compile
                    compile_cache.mark_compiled(key)
                return ""
    _compile_and_capture(step_runner)  # not under the lock: many processes may read the cache at once
    if is_shared and step_runner.wants_graphs:
        compile_cache.mark_compiled(key)
    return f"compile: waited {waited:.0f} s for another process that compiled this network" if waited > 1 else ""


def _say_that_it_waits() -> None:
    """On the terminal, or in a worker's log. The run's own log says afterwards how long that took."""
    with hide_from_listeners():
        print("waiting for another process that compiles this network", file=sys.stderr, flush=True)


def _compile_and_capture(step_runner: StepRunner[Trainer]) -> None:
    for trainer in step_runner.trials:
        trainer.compile_step()
    step_runner.discard_graphs()
    step_runner.ensure_captured()


def find_step_key(config: Settings, device: torch.device, num_processes: int = 1) -> str:
    """`compile_cache.step_key` on this device. num_processes: that train one network together, each a part of a batch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return compile_cache.step_key(config, name if num_processes == 1 else f"{num_processes} x {name}")


def _trainer_key(trainer: Trainer) -> str:
    return find_step_key(trainer.config, trainer.device, trainer.context.world_size)
