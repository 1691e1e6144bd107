"""Whether a sweep's trials can be trained, by their plug-ins and their teachers: found out before the sweep is made, and not by
a trial in the night."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from cifar.config.schema import Settings
from cifar.registry import plugin_directories
from cifar.system.devices import has_gpu
from cifar.tracking.run_dir import RunDir

MAX_SECONDS = 30.0  # for all trials together; a trial that was not reached is checked when it starts


def check_trials(configs: Iterable[Settings], *, on_gpu: bool = False) -> list[str]:
    """Take a step with each kind of network and optimizer, if there are plug-ins -> sentences about them, each once.

    Trials that differ in fractions, seeds and epochs only are of a kind. Trials for a GPU are left to their workers unless
    `on_gpu`: this process would hold the GPU's memory from then on. Raises PartError for a trial that cannot be trained.
    """
    if not plugin_directories():
        return []
    from cifar.training.run import check_plugins

    start, seen, notes = time.monotonic(), set[str](), dict[str, None]()
    for config in configs:
        values = config.to_dict()
        kind = repr({k: v for k, v in values.items() if k not in ("seed", "epochs") and not isinstance(v, float)})
        if kind in seen or time.monotonic() - start > MAX_SECONDS:
            continue
        seen.add(kind)
        if on_gpu or config.device == "cpu" or not has_gpu():
            notes |= dict.fromkeys(check_plugins(config))
    return list(notes)


def check_teachers(configs: Iterable[Settings], find_run: Callable[[str], RunDir]) -> None:
    """Raise PartError for a trial whose teacher is not there, or may not teach it. A `dataset` of auto is left to the trial."""
    seen = set[tuple[object, ...]]()
    for config in configs:
        kind = config.teacher, config.dataset, config.val_size, config.train_size
        if not config.teacher or config.dataset == "auto" or kind in seen:
            continue
        seen.add(kind)
        from cifar.training.teachers import find_teachers  # needs PyTorch

        find_teachers(config, find_run)
