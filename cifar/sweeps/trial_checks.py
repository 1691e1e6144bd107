"""Whether the plug-ins of a sweep's trials train: found out before the sweep is made, and not by a trial in the night."""

from __future__ import annotations

import time
from collections.abc import Iterable

from cifar.config.schema import Settings
from cifar.registry import plugin_directories
from cifar.system.devices import has_gpu

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
