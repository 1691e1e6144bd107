"""The best trial and the counts that an agent shows are those of all cells, whoever has trained them."""

from __future__ import annotations

import math
from typing import Any

from cifar.agent.dashboard import describe_counts, describe_early_stopping, describe_lost_folders, find_best_trial
from cifar.config.yaml_loader import parse_yaml
from cifar.sweeps import spec
from cifar.sweeps.early_stopping import Hyperband


def read(metric: str) -> spec.Sweep:
    text = f"method: grid\nmetric: {metric}\nparameters: {{lr: {{values: [1, 2, 3, 4, 5, 6]}}}}\n"
    return spec.parse_sweep(parse_yaml(text, "sweep"), text)


def make_cells(*ends: tuple[str, float | None]) -> list[dict[str, Any]]:
    return [
        {"cell": n, "run_id": f"abc-{n:03d}", "state": state, "values": {"lr": n + 1}, "value": value, "objectives": [value]}
        for n, (state, value) in enumerate(ends)
    ]


def test_the_best_is_of_all_finished_cells() -> None:
    ends = [("finished", 0.3), ("pruned", 0.9), ("finished", 0.5), ("running", None), ("finished", math.nan), ("finished", 0.5)]
    best = find_best_trial(read("{name: val/acc, goal: maximize}"), make_cells(*ends), ["lr"])
    assert best.run_id == "abc-002" and best.describe() == "val/acc 50.00 % by abc-002 (lr=3)", "the first of equals"
    best = find_best_trial(read("{name: val/loss, goal: minimize}"), make_cells(*ends), ["lr"])
    assert best.describe() == "val/loss 0.3 by abc-000 (lr=1)"
    assert find_best_trial(read("{name: val/loss}"), make_cells(("failed", None), ("waiting", None)), ["lr"]).describe() == ""


def test_the_front_is_of_all_finished_cells() -> None:
    text = (
        "method: custom\nscheduler: {engine: optuna}\nrun_cap: 3\nparameters: {lr: {min: 0.1, max: 0.2}}\n"
        "metrics: [{name: val/acc, goal: maximize}, {name: macs, goal: minimize}]\n"
    )
    cells = make_cells(("finished", 0.5), ("finished", 0.4), ("finished", 0.3), ("diverged", None))
    for cell, objectives in zip(cells, ([0.5, 2e6], [0.4, 1e6], [0.3, 1e6], []), strict=True):
        cell["objectives"] = objectives
    best = find_best_trial(spec.parse_sweep(parse_yaml(text, "sweep"), text), cells, ["lr"])
    assert best.describe() == "val/acc 50.00 % by abc-000 (lr=1); 2 of 3 on the front of val/acc and macs"


def test_words() -> None:
    counts = {"waiting": 3, "running": 1, "finished": 2, "failed": 1, "diverged": 1, "pruned": 4}
    assert describe_counts(counts) == (
        "3 waiting, 1 running elsewhere, 2 finished, 1 failed, 1 diverged, 4 pruned by early termination"
    )
    assert describe_lost_folders(make_cells(("finished", 0.1))) == "1 of them has no folder: abc-000"
    assert describe_lost_folders(make_cells(*[("finished", 0.1)] * 8)).endswith("abc-004, abc-005 and 2 more")


def test_bands_are_those_of_the_trials() -> None:
    rule = Hyperband(min_iter=3)
    assert describe_early_stopping(rule, [25]) == "early termination (hyperband, eta 3): after epochs 3, 9"
    assert describe_early_stopping(rule, [3, 25]).endswith("after epochs 3, 9; trials of 3 epochs are too short")
    assert describe_early_stopping(rule, [2, 3]).endswith("after epochs none: its runs are too short")
