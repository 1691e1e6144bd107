"""A W&B sweep file -> a validated Sweep, its grid cells and random trials, every value checked against our configuration.

W&B's schema of the file takes no keys of ours. What we add is an ordinary configuration key, given as a parameter
(`max_macs: {value: 5.0e7}`), or an option of the command line.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar.config.resolve import ExperimentReader, flatten_values, format_name_value, load_experiment, resolve_config
from cifar.config.schema import Settings
from cifar.config.yaml_loader import parse_yaml, read_yaml_text
from cifar.errors import UserError, did_you_mean
from cifar.sweeps import objectives
from cifar.sweeps.distributions import Parameter, is_same_value, parse_parameter
from cifar.sweeps.early_stopping import Hyperband, parse_early_terminate
from cifar.sweeps.objectives import Metric, Scheduler
from cifar.system.files import shorten_repr
from cifar.system.redact import reject_secrets

MAX_GRID_CELLS = 10_000  # a larger grid is a mistake in the file
MAX_PARAMETERS = 500
_PROGRESS_STEP = 200  # trials between two calls of a progress bar
_STRUCTURE_KEYS = (
    "experiment",
    "model",
    "optimizer",
    "schedule",
    "probes",
)  # keys whose values decide which other keys exist
FINAL_KEYS = ("experiment", "seed")  # what a sweep may vary whose trials score the test set
_TOP_LEVEL_KEYS = (
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
    early_stopping: Hyperband | None
    project: str
    entity: str
    description: str = ""  # what the sweep asks; "" if the file does not say it under that key

    @property
    def metric(self) -> Metric:
        """The one that is displayed, and that early stopping judges by. With several metrics: validation accuracy."""
        return next((metric for metric in self.metrics if metric.name == objectives.ACCURACY), self.metrics[0])

    def targets_met(self, values: Sequence[float | None]) -> bool:
        """Whether a trial with these values, one for each metric, meets every target that the file sets."""
        aimed = [
            metric.target_met(value) for metric, value in zip(self.metrics, values, strict=True) if metric.target is not None
        ]
        return bool(aimed) and all(aimed)

    @property
    def swept_keys(self) -> list[str]:
        """The configuration keys that the file varies, in its order. Those in which trials differ: `list_swept_keys`."""
        keys: list[str] = []
        for parameter in self.parameters:
            values = parameter.values
            if values is None:
                keys.append(parameter.name)
            elif len(values) > 1:
                flat = [flatten_values({parameter.name: value}) for value in values]
                keys += [k for k in dict.fromkeys(k for f in flat for k in f) if any(f.get(k) != flat[0].get(k) for f in flat)]
        return keys


# -- reading -----------------------------------------------------------------------------------------------------------


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises UserError with what to do."""
    text = read_yaml_text(path)
    return parse_sweep(parse_yaml(text, str(path)), text, str(path), path.stem)


def parse_sweep(content: Any, text: str, where: str = "sweep", default_name: str = "") -> Sweep:
    """Parse the content of a sweep file. `text`: the same, word for word, as it is kept."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: a sweep is a mapping with 'method' and 'parameters'")
    try:
        return _parse_content(content, text, default_name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _parse_content(content: dict[str, Any], text: str, default_name: str) -> Sweep:
    for key in content:
        if key not in _TOP_LEVEL_KEYS:
            raise UserError(
                f"W&B's sweeps have no top-level key '{key}'; a configuration key goes under 'parameters': "
                + did_you_mean(str(key), _TOP_LEVEL_KEYS)
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
    early_stopping = parse_early_terminate(content["early_terminate"]) if "early_terminate" in content else None
    metrics, scheduler = objectives.parse_objectives(content, stops_early=early_stopping is not None)
    return Sweep(
        text=text,
        name=content.get("name", default_name),
        method=method,
        metrics=metrics,
        scheduler=scheduler,
        parameters=_parse_parameters(content.get("parameters"), method),
        run_cap=run_cap,
        early_stopping=early_stopping,
        project=content.get("project", ""),
        entity=content.get("entity", ""),
        description=content.get("description", "").strip(),
    )


def _parse_parameters(block: Any, method: str) -> tuple[Parameter, ...]:
    found = list(_iterate_parameters(block))
    if len(found) > MAX_PARAMETERS:
        raise UserError(f"parameters: {len(found):,} are more than the {MAX_PARAMETERS} that a sweep may have; list fewer")
    if method == "custom" and any(isinstance(spec, Mapping) and "parameters" in spec for spec in block.values()):
        raise UserError("parameters: W&B's scheduler takes no nested 'parameters'; write them side by side")
    owners: dict[str, str] = {}
    for parameter in found:
        for key in {key for value in parameter.values or [0] for key in flatten_values({parameter.name: value})}:
            if owners.setdefault(key, parameter.name) != parameter.name or [p.name for p in found].count(parameter.name) > 1:
                raise UserError(f"parameters: '{key}' is given twice, once in '{owners[key]}'; keep one of them")
        low, high, step = (parameter.options.get(option, 1) for option in ("min", "max", "q"))
        if method == "grid" and parameter.values is None and (high - low) / step > MAX_GRID_CELLS:
            raise UserError(
                f"parameters.{parameter.name}: a grid of over {MAX_GRID_CELLS:,} values; narrow it, or use method: random"
            )
        if method == "grid" and parameter.grid_values is None:
            raise UserError(
                f"parameters.{parameter.name}: a grid takes value, values, int_uniform or q_uniform, "
                f"not {parameter.distribution}; list the values, or use method: random"
            )
        if method == "custom" and parameter.distribution not in objectives.SCHEDULER_DISTRIBUTIONS:
            raise UserError(
                f"parameters.{parameter.name}: W&B's scheduler takes {', '.join(objectives.SCHEDULER_DISTRIBUTIONS)}, "
                f"not {parameter.distribution}"
            )
    return tuple(found)


def _iterate_parameters(block: Any, where: str = "parameters") -> Iterator[Parameter]:
    if not isinstance(block, Mapping) or not block:
        raise UserError(f"{where}: expected a mapping with at least one parameter, for example lr: {{values: [0.1, 0.01]}}")
    for name, spec in block.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", str(name)):
            raise UserError(f"{where}: '{name}' is not a parameter name; use letters, digits and '_'")
        if isinstance(spec, Mapping) and "parameters" in spec:
            if len(spec) > 1:
                raise UserError(f"{where}.{name}: nested 'parameters' stand alone; remove {sorted(set(spec) - {'parameters'})}")
            yield from _iterate_parameters(spec["parameters"], f"{where}.{name}.parameters")
        else:
            yield parse_parameter(str(name), spec)


# -- trials ------------------------------------------------------------------------------------------------------------


def list_grid_cells(sweep: Sweep) -> list[dict[str, Any]]:
    """The cells of a grid as flat values, at most `run_cap` of them, none twice. The last parameter changes fastest."""
    grids = [parameter.grid_values or [] for parameter in sweep.parameters]
    total = math.prod(len(grid) for grid in grids)
    if min(total, sweep.run_cap or total) > MAX_GRID_CELLS:
        raise UserError(f"the grid has {total:,} cells; list fewer values, or set run_cap to at most {MAX_GRID_CELLS:,}")
    found = []
    for values in itertools.islice(itertools.product(*grids), min(sweep.run_cap or total, MAX_GRID_CELLS)):
        found.append(flatten_values({p.name: value for p, value in zip(sweep.parameters, values, strict=True)}))
    return found


def sample_trial(sweep: Sweep, k: int, sweep_seed: int) -> dict[str, Any]:
    """The values of the k-th random trial, k = 0, 1, ... Each parameter depends on (sweep_seed, k, its name) only."""
    return flatten_values({p.name: p.value_at(random.Random(f"{sweep_seed}:{k}:{p.name}").random()) for p in sweep.parameters})


def list_known_trials(sweep: Sweep, sweep_seed: int = 0, count: int | None = None) -> list[dict[str, Any]]:
    """The values of every trial that is known in advance: none for a search. `count`: as in `num_trials`."""
    if sweep.method == "grid":
        return list_grid_cells(sweep)
    if sweep.method in ("bayes", "custom"):
        return []
    return [sample_trial(sweep, k, sweep_seed) for k in range(num_trials(sweep, count))]


def num_trials(sweep: Sweep, count: int | None) -> int:
    """How many trials a sweep has. `count`: how many where the method has no end and the file no run_cap."""
    if sweep.method == "grid":
        return len(list_grid_cells(sweep))
    if not (sweep.run_cap or count):
        raise UserError(f"method: {sweep.method} has no end of its own; add run_cap: 20 to the file, or give --count 20")
    number = sweep.run_cap or count or 0
    if number > MAX_GRID_CELLS:
        raise UserError(f"run_cap or --count is {shorten_repr(number)}: a sweep has at most {MAX_GRID_CELLS:,} trials")
    return number


def resolve_trial(
    values: Mapping[str, Any], fixed: Mapping[str, Any], read_experiment: ExperimentReader | None = None
) -> Settings:
    """A trial's configuration. `fixed` wins over `values`. A trial scores the test set only where `fixed` says so."""
    return resolve_config(values, fixed, {"test": fixed.get("test", "never")}, read_experiment=read_experiment)


def is_final(fixed: Mapping[str, Any]) -> bool:
    """Whether the trials of a sweep with these fixed values score the test set."""
    return bool(fixed.get("test", "never") != "never")


def set_shown_metric(sweep: Sweep, fixed: Mapping[str, Any]) -> Sweep:
    """The sweep with test accuracy for its metric where its trials score the test set: shown, and nothing is chosen by it."""
    return replace(sweep, metrics=(Metric(objectives.TEST_ACCURACY, "maximize"),)) if is_final(fixed) else sweep


def check_final(sweep: Sweep) -> None:
    """Refuse a sweep that could choose by the test set. Raises UserError.

    What has been chosen before is trained again: a grid over experiments and seeds, which no result ends early.
    """
    chosen_from = [key for key in sweep.swept_keys if key not in FINAL_KEYS]
    rule = "test=final is for what has been chosen: a grid over experiment and seed"
    if chosen_from:
        raise UserError(f"{rule}; this file varies {', '.join(chosen_from[:3])}, so remove test=final")
    if sweep.method != "grid":
        raise UserError(f"{rule}; this file's method is {sweep.method}; write method: grid, or remove test=final")
    if sweep.early_stopping or any(metric.target is not None for metric in sweep.metrics):
        raise UserError(f"{rule}, of which every trial is trained to its end; remove early_terminate and target")


def check_sweep(sweep: Sweep, fixed: Mapping[str, Any], sweep_seed: int = 0, count: int | None = None) -> str:
    """Check every value before anything runs -> the dataset (may be `auto`). Raises UserError."""
    return bind_trials(sweep, fixed, sweep_seed, count)[0][1].dataset


def bind_trials(
    sweep: Sweep,
    fixed: Mapping[str, Any],
    sweep_seed: int = 0,
    count: int | None = None,
    show_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[dict[str, Any], Settings]]:
    """Check every value before anything runs -> the values and the configuration of each trial. Raises UserError.

    The trials of a search are not known in advance: one at each boundary of its parameters stands for them. show_progress is
    told now and then how many of how many trials are checked.
    """
    reject_secrets({"the sweep file": sweep.text, **{p.name: [p.values, p.options] for p in sweep.parameters}, **fixed})
    for key in fixed:
        if key in sweep.swept_keys:
            raise UserError(f"'{key}' is swept by the file and set on the command line; remove one of them")
    if is_final(fixed):
        check_final(sweep)
    known = list_known_trials(sweep, sweep_seed, count)
    boundary = [] if sweep.method == "grid" else _bind_boundary_trials(sweep, fixed)
    read_experiment = functools.cache(load_experiment)  # thousands of trials may name the same one
    trials = []
    for n, values in enumerate(known):
        trials.append((values, _bind_trial(values, fixed, read_experiment)))
        if n % _PROGRESS_STEP == _PROGRESS_STEP - 1:
            show_progress(n + 1, len(known))
    datasets = {config.dataset for _, config in [*boundary, *trials]}
    if len(datasets) > 1:
        raise UserError(f"one sweep, one dataset: it names {' and '.join(sorted(datasets))}; make two sweeps")
    return trials or boundary


def _bind_trial(
    values: Mapping[str, Any], fixed: Mapping[str, Any], read_experiment: ExperimentReader | None = None
) -> Settings:
    if values.get("test", "never") != "never":
        raise UserError(
            "'test' is set: a sweep chooses, so its trials do not score the test set; remove it (what has been chosen, a grid "
            "over experiment and seed, is trained again with --set test=final)"
        )
    config = resolve_trial(values, fixed, read_experiment)
    if not config.val_size and not is_final(fixed):
        raise UserError("val_size is 0: a sweep compares by validation accuracy; add val_size: {value: 5000}")
    return config


def _bind_boundary_trials(sweep: Sweep, fixed: Mapping[str, Any]) -> list[tuple[dict[str, Any], Settings]]:
    bound = []
    for drawn, named in _boundary_trials(sweep):
        try:
            bound.append((drawn, _bind_trial(drawn, fixed)))
        except UserError as error:
            said = str(error)
            subject = re.split(r"[ =]", said)[0]
            if (at_end := _error_of(named, fixed)).startswith(f"{subject} "):  # about the same key: shorter
                said = at_end
            taken_for_values = [p.distribution for p in sweep.parameters if p.has_exponents and p.name == subject]
            for kind in taken_for_values[:1]:
                said += f"; min and max of {kind} are exponents of e, for limits of the value use {kind}_values"
            raise UserError(said) from None
    return bound


def _error_of(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> str:
    try:
        _bind_trial(values, fixed)
    except UserError as error:
        return str(error)
    return ""


def _boundary_trials(sweep: Sweep) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every combination of the structure keys, with each of the other parameters at each of its boundary values in turn.

    Yields the values that can be drawn, and the same ones as an error names them: with the ends that the file gives a range.
    """
    deciding = [
        p for p in sweep.parameters if p.values and (p.name in _STRUCTURE_KEYS or any(isinstance(v, Mapping) for v in p.values))
    ]
    ranges = [p for p in sweep.parameters if p not in deciding]
    others = {p.name: list(zip(p.boundary_values, p.boundary_names, strict=True)) for p in ranges}
    first = {name: boundaries[0] for name, boundaries in others.items()}
    total = math.prod(len(p.values or []) for p in deciding) * (1 + sum(len(pairs) - 1 for pairs in others.values()))
    if total > MAX_GRID_CELLS:
        raise UserError(f"{shorten_repr(total)} combinations of values are too many to check; list fewer values")
    for combination in itertools.islice(itertools.product(*(p.values or [] for p in deciding)), MAX_GRID_CELLS):
        base = {p.name: value for p, value in zip(deciding, combination, strict=True)}
        for changed in [{}, *({name: pair} for name, boundaries in others.items() for pair in boundaries[1:])]:
            pairs = {**first, **changed}
            drawn, named = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
            yield flatten_values({**base, **drawn}), flatten_values({**base, **named})


def check_final_cells(cells: Sequence[Mapping[str, Any]], file: str) -> None:
    """Refuse old and new cells of a sweep that scores the test set if they differ in what such a sweep may not vary."""
    kept = [{key: value for key, value in values.items() if key not in FINAL_KEYS} for values in cells]
    for other in kept:
        if differing := sorted(key for key in {*kept[0], *other} if kept[0].get(key) != other.get(key)):
            raise UserError(
                f"{file}: {', '.join(differing[:3])} is not as in the sweep; one with test=final is extended by experiments "
                "and seeds only, so make another sweep"
            )


# -- swept keys --------------------------------------------------------------------------------------------------------

_NOT_TAKEN = object()  # the "value" of a key in a trial whose parts do not take it


def list_swept_keys(sweep: Sweep, trials: Sequence[Mapping[str, Any]], fixed: Mapping[str, Any]) -> list[str]:
    """The keys by which the trials of a sweep are told apart. `trials`: the values of all that are known, old and new.

    The cells of a grid are all known: the keys in which they differ. A search may yet try what its file lists.
    """
    differing = [key for key, values in _spread_values(trials, fixed).items() if not _are_same(values)]
    from_file = [] if sweep.method == "grid" else [key for key in sweep.swept_keys if key not in fixed]
    return list(dict.fromkeys([*from_file, *differing]))


def list_swept_values(
    trials: Sequence[Mapping[str, Any]], keys: Sequence[str], fixed: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Each trial's values of these keys. A key that a trial does not give has its default there, if its parts take the key."""
    spread = _spread_values(trials, fixed)
    return [
        {key: spread[key][n] for key in keys if key in spread and spread[key][n] is not _NOT_TAKEN} for n in range(len(trials))
    ]


def list_epochs(trials: Sequence[Mapping[str, Any]], fixed: Mapping[str, Any]) -> list[int]:
    """How many epochs the trials have: each length once, the shortest first."""
    found = [values["epochs"] for values in _complete_values(trials, ["epochs"], fixed)]
    return sorted({int(epochs) for epochs in found if epochs is not _NOT_TAKEN})


def _spread_values(trials: Sequence[Mapping[str, Any]], fixed: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Key -> its value in each trial, for every key that any of them gives and that the command line does not fix."""
    keys = [key for key in dict.fromkeys(key for values in trials for key in values) if key not in fixed]
    complete = _complete_values(trials, keys, fixed)
    return {key: [values[key] for values in complete] for key in keys}


def _complete_values(
    trials: Sequence[Mapping[str, Any]], keys: Sequence[str], fixed: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The value of each key in each trial: the one that it is given, else its default, which depends on the trial's parts."""
    defaults: dict[str, Settings | None] = {}  # by the parts of a trial

    def find_default(key: str, values: Mapping[str, Any]) -> Any:
        parts = {name: values[name] for name in _STRUCTURE_KEYS if name in values}
        if repr(parts) not in defaults:
            try:
                defaults[repr(parts)] = resolve_trial(parts, fixed)
            except UserError:  # a plug-in is gone
                defaults[repr(parts)] = None
        return getattr(defaults[repr(parts)], key, _NOT_TAKEN)

    given = [{**values, **fixed} for values in trials]
    return [{key: values[key] if key in values else find_default(key, values) for key in keys} for values in given]


def _are_same(values: Sequence[Any]) -> bool:
    return all(is_same_value(value, values[0]) for value in values)


def format_trial_name(values: Mapping[str, Any], swept_keys: Sequence[str]) -> str:
    """A short name of a trial: its values of the swept keys."""
    return " ".join(f"{key}={text}" for key, text in format_values(values, swept_keys).items())


def format_values(values: Mapping[str, Any], swept_keys: Sequence[str]) -> dict[str, str]:
    """A trial's values of the swept keys, each as short as it can be read."""
    return {key: format_name_value(values[key]) for key in swept_keys if key in values}
