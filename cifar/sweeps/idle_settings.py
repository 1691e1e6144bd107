"""Settings of a sweep file that can never act, in words. They are no errors: the sweep runs, but not as its author meant it.

Said by `sweep --dry-run`, when a sweep is made, and when it is extended.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cifar import registry
from cifar.config.resolve import format_name_value, parse_probe_names
from cifar.config.schema import Settings
from cifar.config.yaml_loader import parse_yaml
from cifar.errors import did_you_mean
from cifar.registry import Entry
from cifar.sweeps import spec
from cifar.sweeps.distributions import NEVER_DRAWN, Parameter, freeze_value, is_same_value
from cifar.sweeps.early_stopping import Hyperband
from cifar.sweeps.objectives import Metric
from cifar.sweeps.spec import Sweep
from cifar.system.files import shorten_repr
from cifar.system.user_code import pass_interrupt

BoundTrial = tuple[Mapping[str, Any], Settings]  # a trial's values and its configuration

_LESS_IS_BETTER = ("train/loss", "val/loss", "system/seconds", "system/memory_gib", "macs", "params", "seconds")
_MORE_IS_BETTER = ("system/images_per_second",)
_MAX_NETWORKS = 20  # that are built to see their layers
_MAX_LISTED = 4  # values or trials that a sentence lists
# A range of exponents that begins between 0 and 1 and spans this factor, or that ends below 1, looks like one of values.
_SUSPICIOUS_FACTOR = 10.0
_SUSPICIOUS_MEDIAN = 0.5  # of log_normal: `mu` is a logarithm, and one between 0 and this looks like a value

# key -> when it has no effect, and why. Keys that a part does not take at all are errors, and never come to this.
_KEY_RULES: dict[str, tuple[Callable[[Settings], bool], str]] = {
    "tta": (lambda config: config.test == "never", "it is for the test set, which no trial of a sweep scores"),
    "tta_share": (lambda config: config.test == "never", "it is for the test set, which no trial of a sweep scores"),
    "crop_padding": (lambda config: config.crop == 0, "crop is 0"),
    "randaugment_num_ops": (lambda config: config.augment_policy != "randaugment", "augment_policy is not randaugment"),
    "randaugment_magnitude": (lambda config: config.augment_policy != "randaugment", "augment_policy is not randaugment"),
    "probe_every": (lambda config: not parse_probe_names(config.probes), "no probe is on"),
    "histograms": (lambda config: not parse_probe_names(config.probes), "no probe is on"),
    "nesterov": (lambda config: getattr(config, "momentum", 1.0) == 0.0, "momentum is 0"),
    "decay_norm_and_bias": (
        lambda config: not (getattr(config, "weight_decay", 1.0) or getattr(config, "aux_weight_decay", 0.0)),
        "weight_decay is 0",
    ),
    "distill_weight": (lambda config: not config.teacher, "there is no teacher"),
    "distill_temperature": (lambda config: not (config.teacher and config.distill_weight), "there is no teacher with a weight"),
    "label_smoothing": (lambda config: bool(config.teacher) and config.distill_weight == 1.0, "distill_weight is 1"),
    "milestones": (lambda config: getattr(config, "gamma", 0.0) == 1.0, "gamma is 1"),
    "max_steps": (
        lambda config: 0 < config.images_per_epoch // config.batch_size < config.max_steps,
        "an epoch has fewer steps than that",
    ),
}


def find_idle_settings(
    sweep: Sweep, trials: Sequence[BoundTrial], *, fixed: Mapping[str, Any], count: int | None = None, is_hosted: bool = False
) -> list[str]:
    """What can never act, a sentence each; none is said twice.

    trials: as `spec.bind_trials` returns them. count: of `--count`, where the file has no run_cap. is_hosted: W&B will hand
    out the trials.
    """
    content = parse_yaml(sweep.text, "the sweep file")
    num_trials = spec.num_trials(sweep, count) if sweep.method == "grid" or sweep.run_cap or count else None
    return list(
        dict.fromkeys(
            [
                *_check_early_stopping(sweep, content, trials, num_trials),
                *(note for parameter in sweep.parameters for note in _check_parameter(parameter, sweep.method)),
                *(note for metric in sweep.metrics for note in _check_metric(metric, trials)),
                *_check_metric_options(sweep, content, is_hosted),
                *_check_keys(trials, fixed),
                *_check_number_of_trials(sweep, trials, num_trials),
            ]
        )
    )


# -- early stopping ----------------------------------------------------------------------------------------------------


def _check_early_stopping(
    sweep: Sweep, content: Mapping[str, Any], trials: Sequence[BoundTrial], num_trials: int | None
) -> Iterator[str]:
    rule = sweep.early_stopping
    if rule is None:
        return
    given = content["early_terminate"]
    unused = [option for option in (("min_iter",) if rule.max_iter else ("max_iter", "s")) if option in given]
    for option in unused:
        used = "max_iter and s" if rule.max_iter else "min_iter"
        yield f"early_terminate: {option} is not used beside {used}"
    lengths = sorted({config.epochs for _, config in trials})
    if not any(rule.rung_epochs(epochs) for epochs in lengths):
        yield f"early_terminate: no trial is ever judged: {_describe_first_band(rule)}, and {_describe_lengths(lengths)}"
        return
    too_short = [epochs for epochs in lengths if not rule.rung_epochs(epochs)]
    if too_short:
        short = _list_values(too_short, "or")
        yield f"early_terminate: trials of {short} epochs are never judged: {_describe_first_band(rule)}"
    if rule.max_iter:
        yield from _check_bands_from_above(rule, lengths[-1])
    if num_trials and all(int(1.0 / rule.eta * n) == n - 1 for n in range(1, num_trials + 1)):
        yield (
            f"early_terminate: no trial is ever ended: the best 1/{rule.eta:g} of {num_trials} trial{'s' * (num_trials > 1)} "
            "are all of them; raise eta, or remove the block"
        )


def _describe_first_band(rule: Hyperband) -> str:
    band = min(_list_bands(rule)) if rule.max_iter else rule.min_iter
    return f"the first band is after epoch {shorten_repr(band)}"


def _describe_lengths(lengths: Sequence[int]) -> str:
    size = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return f"trials have {size} epoch{'s' * (lengths[-1] > 1)}, the last of which never counts; lower the band, or raise epochs"


def _list_bands(rule: Hyperband) -> list[int]:
    """The bands of a rule with `max_iter` and `s`, whatever the length of a run."""
    return rule.rung_epochs(rule.max_iter + 1)


def _check_bands_from_above(rule: Hyperband, longest: int) -> Iterator[str]:
    bands = _list_bands(rule)
    beyond = [band for band in bands if band >= longest]
    if beyond:
        named = (
            f"bands after epochs {_list_values(beyond, 'and')} act" if len(beyond) > 1 else f"band after epoch {beyond[0]} acts"
        )
        yield f"early_terminate: the {named} on no trial: the longest has {longest} epochs; set max_iter to {longest}"
    possible = rule.count_bands_from_above()
    if possible < rule.s:
        come = "bands come" if possible > 1 else "band comes"
        yield f"early_terminate: s is {shorten_repr(rule.s)}, but only {possible} {come} after a whole epoch"


# -- parameters --------------------------------------------------------------------------------------------------------


def _check_parameter(parameter: Parameter, method: str) -> Iterator[str]:
    where, options = f"parameters.{parameter.name}", parameter.options
    if "values" in options:
        yield from _check_listed_values(parameter, method)
    if parameter.distribution.startswith("q_"):
        values = parameter.grid_values if method == "grid" else parameter.boundary_values
        if values and all(is_same_value(value, values[0]) for value in values):
            span = f" from {options['min']:g} to {options['max']:g}" if "min" in options else ""
            yield f"{where}: q = {options['q']:g} leaves one value of the range{span}: {format_name_value(values[0])}"
    elif "values" not in options and "value" not in options:
        values = parameter.boundary_values
        if is_same_value(values[0], values[-1]):
            yield f"{where}: {parameter.distribution} draws one value only: {format_name_value(values[0])}"
    if parameter.has_exponents and _looks_like_values(options["min"], options["max"]):
        low, high = sorted(parameter.boundary_names)
        yield (
            f"{where}: min and max of {parameter.distribution} are exponents of e, so values go from {format_name_value(low)} "
            f"to {format_name_value(high)}; for limits of the value write {parameter.distribution}_values"
        )
    if parameter.distribution.endswith("log_normal") and 0 < options["mu"] < _SUSPICIOUS_MEDIAN:
        yield (
            f"{where}: mu of {parameter.distribution} is the mean of the logarithm, so half of the values are above "
            f"{math.exp(options['mu']):.4g}; for half of them above {options['mu']:g} write mu: {math.log(options['mu']):.4g}"
        )
    if parameter.name == "seed" and "values" in options and len(parameter.values or []) == 1:
        yield "parameters.seed: a single seed makes no repeats, so no interval; list three or more"


def _looks_like_values(low: float, high: float) -> bool:
    return 0 < low < 1 and (high <= 1 or high / low >= _SUSPICIOUS_FACTOR)


def _check_listed_values(parameter: Parameter, method: str) -> Iterator[str]:
    where, listed = f"parameters.{parameter.name}", parameter.options["values"]
    weights = parameter.options.get("probabilities", [1.0] * len(listed))
    never = [value for value, weight in zip(listed, weights, strict=True) if weight < NEVER_DRAWN]
    if never:
        yield f"{where}: {_list_values(never, 'and')} {'has' if len(never) == 1 else 'have'} probability 0: never drawn"
    counts = Counter(map(freeze_value, listed))
    repeated = list({key: value for value in listed if counts[key := freeze_value(value)] > 1}.values())
    if repeated:
        effect = "counts once" if method == "grid" else "is drawn as often as it stands there"
        yield f"{where}: {_list_values(repeated, 'and')} stand{'s' * (len(repeated) == 1)} there more than once; each {effect}"


# -- the metric --------------------------------------------------------------------------------------------------------


def _check_metric(metric: Metric, trials: Sequence[BoundTrial]) -> Iterator[str]:
    if metric.name in _LESS_IS_BETTER and metric.goal == "maximize":
        yield f"metric: {metric.name} is maximized: the worst trial counts as the best; write goal: minimize"
    if metric.name in _MORE_IS_BETTER and metric.goal == "minimize":
        yield f"metric: {metric.name} is minimized, W&B's default: the slowest trial counts as the best; write goal: maximize"
    if metric.target is not None and metric.name.endswith("/acc") and metric.target > 1:
        advice = f"; write {metric.target / 100:g}" if 2 <= metric.target <= 100 else ""
        yield f"metric: target {metric.target:g} is never met: an accuracy is a fraction of 1{advice}"
    elif metric.target is not None and metric.goal == "minimize" and metric.target < 0:
        yield f"metric: target {metric.target:g} is never met: {metric.name} is not negative"
    elif metric.target is not None and metric.goal == "maximize" and metric.name.endswith("/acc") and metric.target <= 0:
        yield f"metric: target {metric.target:g} is met by every trial: the first one ends the sweep; raise it or leave it out"
    yield from _check_probe_of_metric(metric, [config for _, config in trials])


def _check_probe_of_metric(metric: Metric, configs: Sequence[Settings]) -> Iterator[str]:
    """Whether a metric that a probe measures is ever measured."""
    name, _, layer = metric.name.partition("/")
    owners = {label: entry for entry in registry.probes for label in getattr(entry.builder, "labels", {})}
    owner = owners.get(metric.name) or owners.get(name)
    if owner is None:
        return
    watched = [config for config in configs if owner.name in parse_probe_names(config.probes)]
    if len(watched) < len(configs):
        some = f"{len(configs) - len(watched)} of {len(configs)} trials do not have" if watched else "no trial has"
        yield f"metric: {metric.name} is never measured where its probe {owner.name} is off, and {some} it on; set probes"
        return
    if metric.name in owners and "/" in metric.name:
        return  # of all layers together
    known = _list_layers(owner, watched)
    if known and not layer and owner.builder.__module__.startswith("cifar.probes"):  # a plug-in's may be one number
        yield f"metric: {name} is measured for each layer; write {name}/LAYER, for example {name}/{known[0]}"
    elif known and layer and layer not in known:
        yield f"metric: {metric.name} is never measured: {did_you_mean(layer, known)}"


def _list_layers(probe: Entry, configs: Sequence[Settings]) -> list[str]:
    """The layers of all the networks that this probe measures; none if a network cannot be built."""
    networks = {repr((config.model, config.kwargs_for("model"))): config for config in configs}
    layers: dict[str, None] = {}
    try:
        for config in itertools.islice(networks.values(), _MAX_NETWORKS):
            measured = probe.build(**config.kwargs_for(probe.name))
            measured.start(dict(registry.models[config.model].build(**config.kwargs_for("model")).named_parameters()))
            layers |= dict.fromkeys(measured.layers)
    except BaseException as error:  # of a plug-in; it is reported where the network is trained
        pass_interrupt(error)
        return []
    return list(layers)


def _check_metric_options(sweep: Sweep, content: Mapping[str, Any], is_hosted: bool) -> Iterator[str]:
    blocks = [content.get("metric"), *(content["metrics"] if isinstance(content.get("metrics"), list) else [])]
    given = {key for block in blocks if isinstance(block, Mapping) for key in block}
    for key in ("impute", "impute_while_running"):
        if key in given and not (is_hosted and sweep.method == "bayes"):
            yield f"metric: {key} is read by W&B's Bayesian search only"


# -- keys and trials ---------------------------------------------------------------------------------------------------


def _check_keys(trials: Sequence[BoundTrial], fixed: Mapping[str, Any]) -> Iterator[str]:
    for key, (is_idle, reason) in _KEY_RULES.items():
        given = [config for values, config in trials if key in values or key in fixed]
        idle = [config for config in given if is_idle(config)]
        if given and len(idle) == len(given):
            yield f"{key} has no effect: {reason}"
        elif len({repr(getattr(config, key)) for config in idle}) > 1:
            yield f"{key} has no effect in {len(idle)} of {len(trials)} trials: there {reason}"


def _check_number_of_trials(sweep: Sweep, trials: Sequence[BoundTrial], num_trials: int | None) -> Iterator[str]:
    if sweep.method == "grid":
        if sweep.run_cap and num_trials is not None and sweep.run_cap > num_trials:
            yield f"run_cap is {sweep.run_cap}, but the grid has {num_trials} cell{'s' * (num_trials > 1)}"
        yield from _check_equal_cells(trials)
        return
    sizes = [_count_values(parameter) for parameter in sweep.parameters]
    if num_trials and (num_different := math.prod(sizes)) < num_trials:
        different = "nothing is swept" if num_different == 1 else f"there are {num_different:g} different ones"
        yield f"{num_trials} trials are asked for, but {different}: the others repeat them; use method: grid, or fewer trials"


def _count_values(parameter: Parameter) -> float:
    """How many different values a parameter has; inf for a continuous range."""
    if parameter.values is not None:
        return len(parameter.values)
    low, high = parameter.boundary_values
    if is_same_value(low, high):
        return 1
    if parameter.distribution == "int_uniform":
        return float(high - low + 1)
    return round((high - low) / parameter.options["q"]) + 1 if parameter.distribution.startswith("q_") else math.inf


def _check_equal_cells(trials: Sequence[BoundTrial]) -> Iterator[str]:
    first: dict[str, int] = {}
    equal: list[tuple[int, int]] = []
    for cell, (_, config) in enumerate(trials):
        original = first.setdefault(config.model_dump_json(), cell)
        if original != cell:
            equal.append((original, cell))
    if equal:
        listed = ", ".join(f"{one} and {other}" for one, other in equal[:_MAX_LISTED])
        more = f" and {len(equal) - _MAX_LISTED} more" if len(equal) > _MAX_LISTED else ""
        yield f"{len(equal)} of the cells repeat the whole configuration of another one: {listed}{more}"


def _list_values(values: Sequence[Any], joiner: str) -> str:
    texts = [format_name_value(value) for value in values[:_MAX_LISTED]]
    if len(values) > _MAX_LISTED:
        return f"{', '.join(texts)} {joiner} {len(values) - _MAX_LISTED} more"
    return f" {joiner} ".join([", ".join(texts[:-1])] * (len(texts) > 1) + texts[-1:])
