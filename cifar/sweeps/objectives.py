"""What a sweep looks at: `metric:`, or several `metrics:` with W&B's `scheduler:` and `method: custom`.

The forms are those of W&B's sweep schema. Several objectives make no single best trial but a front: see `front`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar import registry
from cifar.errors import UserError, choices

ACCURACY = "val/acc"
_METRIC = ("name", "goal", "target", "impute", "impute_while_running")
_EPOCH_METRICS = (
    "train/loss", "train/acc", "val/loss", "val/acc", "system/seconds", "system/images_per_second", "system/memory_gib",
)  # fmt: skip
_FINAL_METRICS = ("best/val/acc", "macs", "params", "seconds")
_SCHEDULER = ("engine", "source", "optimizer", "search_space")
_ENGINES = ("optuna", "ax")
# What W&B's Optuna engine turns into one of Optuna's own distributions (wandb/sdk/sweeps/scheduler/optuna.py).
SCHEDULED = ("constant", "categorical", "int_uniform", "uniform", "log_uniform_values", "q_uniform", "q_log_uniform_values")


@dataclass(frozen=True)
class Metric:
    """An objective."""

    name: str = ACCURACY
    goal: str = "maximize"
    target: float | None = None

    def worse(self, value: float) -> float:
        """`value` with less-is-better sign."""
        return -value if self.goal == "maximize" else value

    def reached(self, value: float | None) -> bool:
        return self.target is not None and value is not None and self.worse(value) <= self.worse(self.target)


@dataclass(frozen=True)
class Scheduler:
    """Who suggests the trials of a `method: custom` sweep. On W&B that is a process of W&B's beside the agents."""

    engine: str
    optimizer: str = ""  # a function in the file `source` that makes the engine's study

    def check_here(self) -> None:
        """Raise where only W&B's process could do it."""
        if self.engine != "optuna":
            raise UserError(
                f"scheduler: engine: {self.engine} runs on W&B only; write engine: optuna, or log in and give --wandb online"
            )
        if self.optimizer:
            raise UserError(
                "scheduler: optimizer: is a Python function that W&B's scheduler calls; without W&B leave it and source: out "
                "(Optuna's TPE for several objectives suggests, seeded by --sweep-seed)"
            )


def parse(content: Mapping[str, Any], *, early: bool) -> tuple[tuple[Metric, ...], Scheduler | None]:
    """The objectives of a sweep file and its scheduler. `early`: whether runs are ended early by the metric."""
    method, scheduler = content["method"], None
    if method != "custom":
        for key in ("scheduler", "metrics"):
            if key in content:
                raise UserError(f"{key}: goes with method: custom, not with {method}; change the one or remove the other")
        if "metric" not in content and (method == "bayes" or early):
            asker = "method: bayes" if method == "bayes" else "early_terminate"
            raise UserError(f"{asker} needs a metric; add metric: {{name: val/acc, goal: maximize}}")
        return (_metric(content["metric"], each_epoch=early) if "metric" in content else Metric(),), None
    scheduler = _scheduler(content.get("scheduler"))
    if ("metric" in content) == ("metrics" in content):
        raise UserError("method: custom needs either metric:, or metrics: with two or more, for example val/acc and macs")
    if "metric" in content:
        return (_metric(content["metric"], each_epoch=early),), scheduler
    block = content["metrics"]
    if not isinstance(block, list) or len(block) < 2:
        raise UserError("metrics: write a list of two or more, for example [{name: val/acc, goal: maximize}, {name: macs}]")
    metrics = tuple(_metric(spec, each_epoch=False) for spec in block)
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"metrics: '{name}' is there twice; remove one of them")
    if early and ACCURACY not in names:
        raise UserError(f"early_terminate judges runs of several metrics by {ACCURACY}; add that metric, or remove the block")
    return metrics, scheduler


def _scheduler(spec: Any) -> Scheduler:
    if not isinstance(spec, Mapping) or "engine" not in spec:
        raise UserError("method: custom needs W&B's scheduler; add scheduler: {engine: optuna}")
    for key in spec:
        if key not in _SCHEDULER:
            raise UserError(f"scheduler: unknown key '{key}': {choices(str(key), _SCHEDULER)}")
        if not isinstance(spec[key], str):
            raise UserError(f"scheduler: {key} = {spec[key]!r}: expected text")
    engine = spec["engine"]
    if engine == "wandb":
        raise UserError("scheduler: engine: wandb is W&B's own search; remove the block, write method: grid, random or bayes")
    if engine not in _ENGINES:
        raise UserError(f"scheduler: engine = {engine!r}: {choices(engine, _ENGINES)}")
    if "search_space" in spec:
        raise UserError("scheduler: search_space: cannot be checked before anything runs; list the parameters: instead")
    if "optimizer" in spec and not spec.get("source"):
        raise UserError("scheduler: optimizer: names a function in the Python file source:; add source: FILE.py")
    return Scheduler(engine, spec.get("optimizer", ""))


def _metric(spec: Any, *, each_epoch: bool) -> Metric:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise UserError("metric: write a mapping with a name, for example {name: val/acc, goal: maximize}")
    for key in spec:
        if key not in _METRIC:
            raise UserError(f"metric: unknown key '{key}': {choices(str(key), _METRIC)}")
    name, goal, target = spec["name"], spec.get("goal", "minimize"), spec.get("target")
    if name.startswith("test") or "/test/" in name:
        raise UserError(f"metric '{name}': a sweep chooses by validation only; the test set is scored once, later; use val/acc")
    known = [*_EPOCH_METRICS, *(() if each_epoch else _FINAL_METRICS)]
    watched = {label for probe in registry.probes for label in getattr(probe.builder, "labels", {})}
    if name not in known and name.partition("/")[0] not in watched:
        raise UserError(f"unknown metric '{name}': {choices(name, [*known, *watched])}")
    if goal not in ("minimize", "maximize"):
        raise UserError(f"metric: goal = {goal!r}: write minimize or maximize")
    if name.endswith("/acc") and goal == "minimize":
        raise UserError(f"metric '{name}' would be minimized, W&B's default; add goal: maximize")
    if target is not None and (isinstance(target, bool) or not isinstance(target, int | float)):
        raise UserError(f"metric: target = {target!r} is not a number")
    for key in ("impute", "impute_while_running"):  # W&B's Bayesian search reads them; the local one counts failures as worst
        allowed = ["latest", "best", "worst", *(["false"] if key != "impute" else [])]
        if spec.get(key, "worst") not in allowed:
            raise UserError(f"metric: {key} = {spec[key]!r}: {choices(str(spec[key]), allowed)}")
    return Metric(name, goal, target)


# -- several of them ---------------------------------------------------------------------------------------------------


def whole(values: Sequence[float | None]) -> list[float] | None:
    """The values if each is there and finite."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return found if len(found) == len(values) else None


def front(metrics: Sequence[Metric], points: Sequence[Sequence[float]]) -> list[int]:
    """Which points (one value a metric) no other point dominates: is nowhere worse than, and somewhere better."""
    costs = [tuple(metric.worse(value) for metric, value in zip(metrics, point, strict=True)) for point in points]
    return [
        n
        for n, cost in enumerate(costs)
        if not any(other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other in costs)
    ]
