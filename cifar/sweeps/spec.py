"""A W&B sweep file -> a validated Sweep, its grid cells and its k-th suggestions, every value bound to our configuration.

The file stays W&B's: its schema is closed to keys of ours, so what we add is an ordinary configuration key given as a
parameter (`max_macs: {value: 5.0e7}`) or an option of the command line.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar import registry
from cifar.config import resolve as config
from cifar.config.resolve import Settings
from cifar.errors import UserError, choices
from cifar.sweeps import distributions, objectives
from cifar.sweeps import early_stopping as hyperband
from cifar.sweeps.distributions import Parameter
from cifar.sweeps.early_stopping import Hyperband
from cifar.sweeps.objectives import Metric, Scheduler

MOST = 10_000  # cells; a grid above that is a slip of the pen
_KINDS = ("experiment", "model", "optimizer", "schedule", "probes")  # keys whose value decides which other keys there are
_TOP = (
    "apiVersion", "command", "controller", "description", "early_terminate", "entity", "image_uri", "job", "kind", "method",
    "metric", "metrics", "name", "parameters", "program", "project", "run_cap", "scheduler",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked."""

    text: str
    name: str
    method: str
    metrics: tuple[Metric, ...]
    scheduler: Scheduler | None
    parameters: tuple[Parameter, ...]
    run_cap: int | None
    early: Hyperband | None
    project: str
    entity: str

    @property
    def metric(self) -> Metric:
        """The one that is shown, and by which runs are ended early: validation accuracy, where there are several."""
        return next((metric for metric in self.metrics if metric.name == objectives.ACCURACY), self.metrics[0])

    def reached(self, values: Sequence[float | None]) -> bool:
        """Whether a trial with these values, one a metric, is what was aimed at."""
        aimed = [metric.reached(value) for metric, value in zip(self.metrics, values, strict=True) if metric.target is not None]
        return bool(aimed) and all(aimed)

    @property
    def swept(self) -> list[str]:
        """The configuration keys that differ between trials, in the file's order."""
        keys: list[str] = []
        for parameter in self.parameters:
            values = parameter.values
            if values is None:
                keys.append(parameter.name)
            elif len(values) > 1:
                flat = [config.flatten({parameter.name: value}) for value in values]
                keys += [k for k in dict.fromkeys(k for f in flat for k in f) if any(f.get(k) != flat[0].get(k) for f in flat)]
        return keys


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Sweep:
    """A sweep file. Raises UserError with what to do."""
    content = config.read_yaml(path)
    return parse(content, path.read_text(encoding="utf-8"), str(path), path.stem)


def parse(content: Any, text: str, where: str = "sweep", default_name: str = "") -> Sweep:
    """The content of a sweep file; `text` is kept, word for word."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: a sweep is a mapping with 'method' and 'parameters'")
    try:
        return _parse(content, text, default_name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _parse(content: dict[str, Any], text: str, default_name: str) -> Sweep:
    for key in content:
        if key not in _TOP:
            raise UserError(
                f"W&B's sweeps have no top-level key '{key}'; a configuration key goes under 'parameters': "
                + choices(str(key), _TOP)
            )
    method = content.get("method")
    if method not in ("grid", "random", "bayes", "custom"):
        raise UserError(f"method = {method!r}: write grid, random or bayes, or custom with a scheduler:")
    for key in ("name", "project", "entity", "description", "program"):
        if not isinstance(content.get(key, ""), str):
            raise UserError(f"{key} = {content[key]!r}: expected text; put it in quotes")
    if not isinstance(content.get("command", []), list):
        raise UserError("command: expected a list of words")
    run_cap = content.get("run_cap")
    if run_cap is not None and (isinstance(run_cap, bool) or not isinstance(run_cap, int) or run_cap < 1):
        raise UserError(f"run_cap = {run_cap!r}: expected a whole number above 0")
    early = hyperband.parse(content["early_terminate"]) if "early_terminate" in content else None
    metrics, scheduler = objectives.parse(content, early=early is not None)
    return Sweep(
        text=text,
        name=content.get("name", default_name),
        method=method,
        metrics=metrics,
        scheduler=scheduler,
        parameters=_parameters(content.get("parameters"), method),
        run_cap=run_cap,
        early=early,
        project=content.get("project", ""),
        entity=content.get("entity", ""),
    )


def _parameters(block: Any, method: str) -> tuple[Parameter, ...]:
    found = list(_leaves(block))
    if method == "custom" and any(isinstance(spec, Mapping) and "parameters" in spec for spec in block.values()):
        raise UserError("parameters: W&B's scheduler takes no nested 'parameters'; write them side by side")
    owners: dict[str, str] = {}
    for parameter in found:
        for key in {key for value in parameter.values or [0] for key in config.flatten({parameter.name: value})}:
            if owners.setdefault(key, parameter.name) != parameter.name or [p.name for p in found].count(parameter.name) > 1:
                raise UserError(f"parameters: '{key}' is given twice, once in '{owners[key]}'; keep one of them")
        low, high, step = (parameter.options.get(option, 1) for option in ("min", "max", "q"))
        if method == "grid" and parameter.values is None and (high - low) / step > MOST:
            raise UserError(f"parameters.{parameter.name}: a grid of over {MOST:,} values; narrow it, or use method: random")
        if method == "grid" and parameter.grid is None:
            raise UserError(
                f"parameters.{parameter.name}: a grid takes value, values, int_uniform or q_uniform, "
                f"not {parameter.distribution}; list the values, or use method: random"
            )
        if method == "custom" and parameter.distribution not in objectives.SCHEDULED:
            raise UserError(
                f"parameters.{parameter.name}: W&B's scheduler takes {', '.join(objectives.SCHEDULED)}, "
                f"not {parameter.distribution}"
            )
    return tuple(found)


def _leaves(block: Any, where: str = "parameters") -> Iterator[Parameter]:
    if not isinstance(block, Mapping) or not block:
        raise UserError(f"{where}: expected a mapping with at least one parameter, for example lr: {{values: [0.1, 0.01]}}")
    for name, spec in block.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", str(name)):
            raise UserError(f"{where}: '{name}' is not a parameter name; use letters, digits and '_'")
        if isinstance(spec, Mapping) and "parameters" in spec:
            if len(spec) > 1:
                raise UserError(f"{where}.{name}: nested 'parameters' stand alone; remove {sorted(set(spec) - {'parameters'})}")
            yield from _leaves(spec["parameters"], f"{where}.{name}.parameters")
        else:
            yield distributions.parse(str(name), spec)


# -- trials ------------------------------------------------------------------------------------------------------------


def cells(sweep: Sweep) -> list[dict[str, Any]]:
    """The grid's cells as flat values, the last parameter moving fastest, at most `run_cap` of them, none twice."""
    grids = [parameter.grid or [] for parameter in sweep.parameters]
    total = math.prod(len(grid) for grid in grids)
    if min(total, sweep.run_cap or total) > MOST:
        raise UserError(f"the grid has {total:,} cells; list fewer values, or set run_cap to at most {MOST:,}")
    found = []
    for values in itertools.islice(itertools.product(*grids), sweep.run_cap):
        found.append(flat({p.name: value for p, value in zip(sweep.parameters, values, strict=True)}))
    return found


def suggest(sweep: Sweep, k: int, sweep_seed: int) -> dict[str, Any]:
    """The k-th random suggestion, k = 0, 1, ...: a function of (sweep_seed, k) alone, parameter by parameter."""
    return flat({p.name: p.at(random.Random(f"{sweep_seed}:{k}:{p.name}").random()) for p in sweep.parameters})


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter values -> configuration keys: mappings are merged by their leaf names."""
    return config.flatten(values)


def trials(sweep: Sweep, sweep_seed: int = 0, count: int | None = None) -> list[dict[str, Any]]:
    """The values of every trial that is known beforehand (none where results decide). `count`: the end without run_cap."""
    if sweep.method == "grid":
        return cells(sweep)
    if sweep.method in ("bayes", "custom"):
        return []
    return [suggest(sweep, k, sweep_seed) for k in range(end(sweep, count))]


def end(sweep: Sweep, count: int | None) -> int:
    """How many trials a sweep has in all."""
    if sweep.method == "grid":
        return len(cells(sweep))
    if not (sweep.run_cap or count):
        raise UserError(f"method: {sweep.method} has no end of its own; add run_cap: 20 to the file, or give --count 20")
    return sweep.run_cap or count or 0


def bind(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> Settings:
    """A trial's configuration. `fixed` wins over `values`; a trial never scores the test set."""
    return config.resolve(values, fixed, {"test": "never"})


def check(sweep: Sweep, fixed: Mapping[str, Any], sweep_seed: int = 0, count: int | None = None) -> str:
    """Bind every value before anything runs, and return the dataset (`auto` included). Raises UserError."""
    for key in fixed:
        if key in sweep.swept:
            raise UserError(f"'{key}' is swept by the file and set on the command line; remove one of them")
    datasets = set()
    for values in [*_corners(sweep), *trials(sweep, sweep_seed, count)] if sweep.method != "grid" else cells(sweep):
        if {**values, **fixed}.get("test", "never") != "never":
            raise UserError("'test' is set: a sweep's trials never score the test set; remove it")
        bound = bind(values, fixed)
        if not bound.val_size:
            raise UserError("val_size is 0: a sweep compares by validation accuracy; add val_size: {value: 5000}")
        datasets.add(bound.dataset)
    if len(datasets) > 1:
        raise UserError(f"one sweep, one dataset: it names {' and '.join(sorted(datasets))}; make two sweeps")
    return datasets.pop()


def _corners(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every combination of what decides the other keys, with each of the others at each of its ends in turn."""
    deciding = [p for p in sweep.parameters if p.values and (p.name in _KINDS or any(isinstance(v, Mapping) for v in p.values))]
    rest = [p for p in sweep.parameters if p not in deciding]
    for combination in itertools.islice(itertools.product(*(p.values or [] for p in deciding)), MOST):
        base = {p.name: value for p, value in zip(deciding, combination, strict=True)}
        base |= {p.name: p.ends[0] for p in rest}
        yield flat(base)
        for parameter in rest:
            for value in parameter.ends[1:]:
                yield flat({**base, parameter.name: value})


# -- looking ahead -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A trial that has not run. `seconds` is an estimate from one short step on this machine."""

    cell: int
    values: dict[str, Any]
    model: str
    macs: float
    params: int
    epochs: int
    seconds: float
    skipped: bool


def dry_run(sweep: Sweep, fixed: Mapping[str, Any], *, sweep_seed: int = 0, count: int | None = None) -> list[Planned]:
    """The trials, their MACs and estimated seconds. Where results decide, random draws stand for what will be chosen."""
    from cifar.training import run

    check(sweep, fixed, sweep_seed, count)
    drawn = trials(sweep, sweep_seed, count) or [suggest(sweep, k, sweep_seed) for k in range(end(sweep, count))]
    speeds: dict[str, float] = {}
    plan = []
    for cell, values in enumerate(drawn):
        bound = bind(values, fixed)
        cost = run.cost_of(bound)
        architecture = repr((bound.model, sorted(bound.part("model").items())))
        images = min(bound.images, bound.max_steps * bound.batch_size or bound.images)
        skipped = bool(bound.max_macs and cost.macs > bound.max_macs)
        if not skipped and architecture not in speeds:
            speeds[architecture] = _seconds_per_image(bound, cost.macs)
        seconds = 0.0 if skipped else bound.epochs * images * speeds[architecture]
        own = {key: values[key] for key in sweep.swept if key in values}
        plan.append(Planned(cell, own, bound.model, cost.macs, cost.params, bound.epochs, seconds, skipped))
    return plan


def _seconds_per_image(bound: Settings, macs: float) -> float:
    """One forward and backward pass, timed: about 2 GMACs of it, so that a large model answers within seconds."""
    import time

    import torch

    from cifar.training.trainer import device_of

    device = device_of(bound.device)
    with torch.random.fork_rng(devices=[]):
        model = registry.models[bound.model].build(**bound.part("model")).to(device)
        images = torch.randn(max(8, min(bound.batch_size, int(2e9 / max(macs, 1)))), 3, 32, 32, device=device)
        best = math.inf
        for _ in range(5):  # the best of a few: other programs only ever slow it
            begun = time.perf_counter()
            model(images).float().logsumexp(1).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begun)
    return best / len(images)


def name_of(values: Mapping[str, Any], swept: Sequence[str]) -> str:
    """A trial in a few words: its swept keys."""
    return " ".join(f"{key}={_short(values[key])}" for key in swept if key in values)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
