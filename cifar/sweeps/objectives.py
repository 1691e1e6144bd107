"""The objectives of a sweep: `metric:`, or several `metrics:` with W&B's `scheduler:` and `method: custom`.

The forms are those of W&B's sweep schema. Several objectives have no single best trial: see `pareto_front`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar import registry
from cifar.errors import UserError, did_you_mean

ACCURACY = "val/acc"
TEST_ACCURACY = "test/acc"  # what is shown of trials that score the test set; no file may name it
MAX_METRICS = 20
_METRIC_KEYS = ("name", "goal", "target", "impute", "impute_while_running")
_EPOCH_METRICS = (
    "train/loss", "train/acc", "val/loss", "val/acc", "system/seconds", "system/images_per_second", "system/memory_gib",
)  # fmt: skip
_FINAL_METRICS = ("best/val/acc", "macs", "params", "seconds")
_SCHEDULER_KEYS = ("engine", "source", "optimizer", "search_space")
_ENGINES = ("optuna", "ax")
# What W&B's Optuna engine turns into one of Optuna's own distributions (wandb/sdk/sweeps/scheduler/optuna.py).
SCHEDULER_DISTRIBUTIONS = (
    "constant",
    "categorical",
    "int_uniform",
    "uniform",
    "log_uniform_values",
    "q_uniform",
    "q_log_uniform_values",
)


@dataclass(frozen=True)
class Metric:
    """An objective: the name of a metric, whether more or less is better, and the value to reach."""

    name: str = ACCURACY
    goal: str = "maximize"
    target: float | None = None

    def as_cost(self, value: float) -> float:
        """`value` with its sign such that less is better."""
        return -value if self.goal == "maximize" else value

    def target_met(self, value: float | None) -> bool:
        return self.target is not None and value is not None and self.as_cost(value) <= self.as_cost(self.target)


@dataclass(frozen=True)
class Scheduler:
    """What suggests the trials of a `method: custom` sweep. On W&B that is a process of W&B's beside the agents."""

    engine: str
    optimizer: str = ""  # a function in the file `source` that makes the engine's study

    def check_runs_locally(self) -> None:
        """Raise UserError if only W&B's process can do it."""
        if self.engine != "optuna":
            raise UserError(
                f"scheduler: engine: {self.engine} runs on W&B only; write engine: optuna, or log in and give --wandb online"
            )
        if self.optimizer:
            raise UserError(
                "scheduler: optimizer: is a Python function that W&B's scheduler calls; without W&B leave it and source: out "
                "(Optuna's TPE for several objectives suggests, seeded by --sweep-seed)"
            )


def parse_objectives(content: Mapping[str, Any], *, stops_early: bool) -> tuple[tuple[Metric, ...], Scheduler | None]:
    """The objectives of a sweep file and its scheduler. `stops_early`: whether early stopping judges runs by the metric."""
    method, scheduler = content["method"], None
    if method != "custom":
        for key in ("scheduler", "metrics"):
            if key in content:
                raise UserError(f"{key}: goes with method: custom, not with {method}; change the one or remove the other")
        if "metric" not in content and (method == "bayes" or stops_early):
            asker = "method: bayes" if method == "bayes" else "early_terminate"
            raise UserError(f"{asker} needs a metric; add metric: {{name: val/acc, goal: maximize}}")
        return (_parse_metric(content["metric"], each_epoch=stops_early) if "metric" in content else Metric(),), None
    scheduler = _parse_scheduler(content.get("scheduler"))
    if ("metric" in content) == ("metrics" in content):
        raise UserError("method: custom needs either metric:, or metrics: with two or more, for example val/acc and macs")
    if "metric" in content:
        return (_parse_metric(content["metric"], each_epoch=stops_early),), scheduler
    block = content["metrics"]
    if not isinstance(block, list) or len(block) < 2:
        raise UserError("metrics: write a list of two or more, for example [{name: val/acc, goal: maximize}, {name: macs}]")
    if len(block) > MAX_METRICS:
        raise UserError(
            f"metrics: {len(block):,} are more than the {MAX_METRICS} that can be compared; keep the ones that matter"
        )
    metrics = tuple(_parse_metric(spec, each_epoch=False) for spec in block)
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"metrics: '{name}' is there twice; remove one of them")
    if stops_early and ACCURACY not in names:
        raise UserError(f"early_terminate judges runs of several metrics by {ACCURACY}; add that metric, or remove the block")
    return metrics, scheduler


def _parse_scheduler(spec: Any) -> Scheduler:
    if not isinstance(spec, Mapping) or "engine" not in spec:
        raise UserError("method: custom needs W&B's scheduler; add scheduler: {engine: optuna}")
    for key in spec:
        if key not in _SCHEDULER_KEYS:
            raise UserError(f"scheduler: unknown key '{key}': {did_you_mean(str(key), _SCHEDULER_KEYS)}")
        if not isinstance(spec[key], str):
            raise UserError(f"scheduler: {key} = {spec[key]!r}: expected text")
    engine = spec["engine"]
    if engine == "wandb":
        raise UserError("scheduler: engine: wandb is W&B's own search; remove the block, write method: grid, random or bayes")
    if engine not in _ENGINES:
        raise UserError(f"scheduler: engine = {engine!r}: {did_you_mean(engine, _ENGINES)}")
    if "search_space" in spec:
        raise UserError("scheduler: search_space: cannot be checked before anything runs; list the parameters: instead")
    if "optimizer" in spec and not spec.get("source"):
        raise UserError("scheduler: optimizer: names a function in the Python file source:; add source: FILE.py")
    return Scheduler(engine, spec.get("optimizer", ""))


def _parse_metric(spec: Any, *, each_epoch: bool) -> Metric:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise UserError("metric: write a mapping with a name, for example {name: val/acc, goal: maximize}")
    for key in spec:
        if key not in _METRIC_KEYS:
            raise UserError(f"metric: unknown key '{key}': {did_you_mean(str(key), _METRIC_KEYS)}")
    name, goal, target = spec["name"], spec.get("goal", "minimize"), spec.get("target")
    if name.startswith("test") or "/test/" in name:
        raise UserError(f"metric '{name}': a sweep chooses by validation only; the test set is scored once, later; use val/acc")
    known = [*_EPOCH_METRICS, *(() if each_epoch else _FINAL_METRICS)]
    if name not in known:
        labels = [getattr(probe.builder, "labels", None) for probe in registry.probes]  # imports PyTorch
        watched = {label for each in labels if isinstance(each, Mapping) for label in each}
        if not {name, name.partition("/")[0]} & watched:
            raise UserError(f"unknown metric '{name}': {did_you_mean(name, [*known, *watched])}")
    if goal not in ("minimize", "maximize"):
        raise UserError(f"metric: goal = {goal!r}: write minimize or maximize")
    if name.endswith("/acc") and goal == "minimize":
        raise UserError(f"metric '{name}' would be minimized, W&B's default; add goal: maximize")
    if target is not None and (isinstance(target, bool) or not isinstance(target, int | float) or math.isnan(target)):
        raise UserError(f"metric: target = {target!r} is not a number")
    for key in ("impute", "impute_while_running"):  # W&B's Bayesian search reads them; ours counts failures as the worst result
        allowed = ["latest", "best", "worst", *(["false"] if key != "impute" else [])]
        if spec.get(key, "worst") not in allowed:
            raise UserError(f"metric: {key} = {spec[key]!r}: {did_you_mean(str(spec[key]), allowed)}")
    return Metric(name, goal, target)


# -- several objectives ------------------------------------------------------------------------------------------------


def finite_or_none(values: Sequence[float | None]) -> list[float] | None:
    """The values if each is there and finite, else None."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return found if len(found) == len(values) else None


def pareto_front(metrics: Sequence[Metric], points: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the points (one value for each metric) that no other point dominates.

    A point dominates another one if it is nowhere worse and somewhere better.
    """
    return find_non_dominated(
        [tuple(metric.as_cost(value) for metric, value in zip(metrics, point, strict=True)) for point in points]
    )


def find_non_dominated(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """The indices of the points that no other point dominates. Less is better in every coordinate; equal points all stay."""
    front: list[int] = []
    for n in sorted(range(len(costs)), key=lambda n: costs[n]):  # only an earlier point in this order can dominate
        cost = costs[n]
        # With two coordinates the last point of the front has the smallest second one, so the others need no comparison.
        rivals = front[-1:] if len(cost) == 2 else front
        if not any(costs[m] != cost and all(a <= b for a, b in zip(costs[m], cost, strict=True)) for m in rivals):
            front.append(n)
    return sorted(front)
