"""Which engine hands out a sweep's trials: Optuna on this machine or in a database, or W&B."""

from __future__ import annotations

import os
from pathlib import Path

from cifar import data
from cifar.integrations.wandb.settings import mode_from_environment
from cifar.sweeps import local
from cifar.sweeps import spec as sweeps
from cifar.sweeps.backend import Backend
from cifar.sweeps.local import Local


def opened(name: str, runs: Path, url: str, wandb: str, workers: int, data_dir: Path | None) -> Backend:
    """The sweep of that name: on W&B if it has a '/' in it, or if it is not known here and W&B is online."""
    here = local.resolve(name, runs)
    known = url or os.environ.get("CIFAR_STORAGE") or (runs / "sweeps" / here / "sweep.json").exists()
    if "/" not in name and (known or mode_from_environment(wandb) != "online"):
        return Local(here, runs, url)
    from cifar.integrations.wandb.backend import Hosted

    mode_from_environment("online")  # says what is missing
    hosted = Hosted(name, runs, slots=workers)
    if not hosted.info["dataset"]:
        dataset = sweeps.check(hosted.sweep, {}, count=hosted.sweep.run_cap or 20)
        hosted.settle_dataset(data.resolve_auto(data_dir)[0] if dataset == "auto" else dataset)
    return hosted
