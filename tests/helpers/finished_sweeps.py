"""A local sweep whose runs have ended, as folders."""

from __future__ import annotations

import json
from pathlib import Path

from cifar.tracking.run_dir import RunDir
from helpers.fake_runs import write

ID = "abcd1234"
TEXT = """# Which learning rate?
name: rates
method: grid
metric: {name: val/acc, goal: maximize}
parameters:
  lr: {values: [1e-5, 0.1, 0.2]}
  seed: {values: [0, 1]}
"""


def write_finished_sweep(runs: Path, n: int = 6, **of_the_sweep: object) -> list[RunDir]:
    folder = runs / "sweeps" / ID
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(TEXT)
    info = {"id": ID, "name": "rates", "method": "grid", "cells": 6, "dataset": "cifar10", "created": 1.0, "storage": ""}
    (folder / "sweep.json").write_text(json.dumps({**info, "fixed": {"epochs": 5, "dataset": "cifar10"}, **of_the_sweep}))
    made = []
    for cell in range(n):
        lr, seed = (1e-5, 0.1, 0.2)[cell // 2], cell % 2
        made.append(write(runs, f"{ID}-{cell:03d}", lr=lr, seed=seed, sweep=ID, cell=cell, layers=2, swept=("lr", "seed")))
    return made
