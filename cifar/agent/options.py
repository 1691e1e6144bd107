"""Options of the command line that travel together. Light to import: the command line makes them before it loads PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cifar.tracking import run_dir


@dataclass(frozen=True)
class PathOptions:
    """Where data is read and runs are written. None: the environment variable, else the default place."""

    data_dir: Path | None = None  # else $CIFAR_DATA
    runs_dir: Path | None = None  # else $CIFAR_RUNS, else ./runs

    def resolve_runs_dir(self) -> Path:
        """The folder of runs, as an absolute path."""
        return run_dir.resolve_runs_dir(self.runs_dir)


@dataclass(frozen=True)
class AgentOptions:
    """How an agent works through a sweep."""

    count: int | None = None  # trials to run at most
    workers: int | None = None  # worker processes; None: `system.devices.default_workers`
    gpus: str = ""  # "all" or "0,1": workers are pinned to these GPUs
    per_gpu: int = 1  # workers on each GPU of `gpus`
    pack: str = "auto"  # trials trained side by side in one worker: "auto", "off" or a number
    time_limit: float = math.inf  # seconds of wall time
    storage: str = ""  # URL of the Optuna storage; "": $CIFAR_STORAGE, else the sweep's own
    compile_ahead: str = "off"  # processes that compile the next trials' networks: "auto", "off" or a number
    wandb: str = "auto"  # "auto", "online", "offline" or "disabled"
