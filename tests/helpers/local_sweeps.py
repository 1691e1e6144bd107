"""Sweeps of the local backend whose trials nobody trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar.config.yaml_loader import parse_yaml
from cifar.sweeps import local, spec
from cifar.sweeps.local import LocalBackend, Trial

METRIC = "metric: {name: val/acc, goal: maximize}\n"
GRID = f"""
method: grid
{METRIC}
parameters:
  model: {{value: conv}}
  seed: {{values: [0, 1, 2, 3, 4, 5]}}
  lr: {{values: [1, 2, 3, 4]}}
"""


def create_local_sweep(
    runs: Path, text: str = GRID, *, url: str = "", fixed: Mapping[str, Any] | None = None, **options: Any
) -> LocalBackend:
    read = spec.parse_sweep(parse_yaml(text, "sweep"), text, "sweep", "a sweep")
    fixed = {"dataset": "stand-in", **(fixed or {})}
    return LocalBackend(local.create_sweep(read, runs, fixed=fixed, storage_url=url, **options), runs, url)


def claim_trial(backend: LocalBackend, worker: str = "me") -> Trial:
    trial = backend.claim_trial(worker)
    assert isinstance(trial, Trial)
    return trial
