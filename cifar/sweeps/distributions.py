"""The distributions of a W&B sweep's parameters, each as its inverse distribution function: u in [0, 1) -> value.

One uniform number for each parameter makes a trial, so random search, Bayesian search and the check of a range's boundaries
share one formula. Names, defaults and the distribution of a {min, max} without a name are those of W&B's sweep schema.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from cifar.errors import UserError, did_you_mean

_NEEDED, _MU_SIGMA, _BETA, _Q = {"min": None, "max": None}, {"mu": 0.0, "sigma": 1.0}, {"a": 1.0, "b": 1.0}, {"q": 1.0}
# distribution -> its options and their defaults; None: the option is required
DISTRIBUTION_OPTIONS: dict[str, dict[str, Any]] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": _NEEDED,
    "uniform": _NEEDED,
    "q_uniform": _NEEDED | _Q,
    "log_uniform": _NEEDED,  # min and max are exponents of e here ...
    "q_log_uniform": _NEEDED | _Q,
    "inv_log_uniform": _NEEDED,
    "log_uniform_values": _NEEDED,  # ... and limits of the value here
    "q_log_uniform_values": _NEEDED | _Q,
    "inv_log_uniform_values": _NEEDED,
    "normal": _MU_SIGMA,
    "q_normal": _MU_SIGMA | _Q,
    "log_normal": _MU_SIGMA,
    "q_log_normal": _MU_SIGMA | _Q,
    "beta": _BETA,
    "q_beta": _BETA | _Q,
}
TAIL_PROBABILITY = 1e-3  # of each tail that is left out where an unbounded distribution is checked


@dataclass(frozen=True)
class Parameter:
    """A swept or constant parameter, with all its options."""

    name: str
    distribution: str
    options: dict[str, Any]

    @property
    def values(self) -> list[Any] | None:
        """The list of values without repeats, or None for a range."""
        if self.distribution == "constant":
            return [self.options["value"]]
        if self.distribution in ("categorical", "categorical_w_probabilities"):
            return self._distinct_values()
        return None

    @property
    def grid_values(self) -> list[Any] | None:
        """The values that a grid visits, or None where W&B's grid search does not take the distribution."""
        low, high = self.options.get("min", 0), self.options.get("max", 0)
        if self.distribution == "int_uniform":
            return list(range(low, high + 1))
        if self.distribution == "q_uniform":  # W&B leaves the upper end out here
            q = self.options["q"]
            return [low + i * q for i in range(math.ceil((high - low) / q - 1e-9))]
        return None if self.distribution == "categorical_w_probabilities" else self.values

    @property
    def boundary_values(self) -> list[Any]:
        """The values to check, which stand for all others: every listed value, or both ends of the range."""
        edge = (
            0.0 if "min" in self.options else TAIL_PROBABILITY
        )  # a beta distribution has no min and max, and never reaches 0 and 1
        return self.values or [self.value_at(edge), self.value_at(1.0 - edge)]

    def _distinct_values(self) -> list[Any]:
        return [value for i, value in enumerate(self.options["values"]) if value not in self.options["values"][:i]]

    def value_at(self, u: float) -> Any:
        """The value at which the cumulative distribution is `u`."""
        options, kind = self.options, self.distribution
        if kind == "constant":
            return options["value"]
        if kind == "categorical":
            return options["values"][min(int(u * len(options["values"])), len(options["values"]) - 1)]
        if kind == "categorical_w_probabilities":
            cumulative = list(itertools.accumulate(options["probabilities"]))
            index = bisect.bisect_right(cumulative, u * cumulative[-1])
            return options["values"][min(index, len(cumulative) - 1)]
        if kind == "int_uniform":
            return options["min"] + max(math.ceil(u * (options["max"] - options["min"] + 1)) - 1, 0)
        value = _ICDFS[kind.removeprefix("q_")](u, options)
        if kind.startswith("q_"):
            steps = round(value / options["q"])
            return steps * options["q"]  # an int where q is an int
        return value


def parse_parameter(name: str, spec: Any) -> Parameter:
    """Parse one entry of `parameters:`. Raises UserError that says what W&B accepts."""
    where = f"parameters.{name}"
    if not isinstance(spec, Mapping):
        shown = f"values: {spec}" if isinstance(spec, list) else f"value: {'...' if spec is None else spec}"
        raise UserError(f"{where}: write a mapping, for example {{{shown}}}")
    kind = spec.get("distribution") or _infer_distribution(where, spec)
    if kind not in DISTRIBUTION_OPTIONS:
        raise UserError(f"{where}: unknown distribution '{kind}': {did_you_mean(str(kind), DISTRIBUTION_OPTIONS)}")
    form = DISTRIBUTION_OPTIONS[kind]
    for option in spec:
        if option != "distribution" and option not in form:
            raise UserError(f"{where}: '{kind}' does not take '{option}': {did_you_mean(str(option), form)}")
    missing = [option for option, default in form.items() if default is None and option not in spec]
    if missing:
        raise UserError(f"{where}: '{kind}' needs '{missing[0]}'; add it")
    options = {**form, **{str(option): value for option, value in spec.items() if option != "distribution"}}
    _check_options(where, kind, options)
    return Parameter(name, kind, options)


def _infer_distribution(where: str, spec: Mapping[str, Any]) -> str:
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if "value" in spec:
        return "constant"
    if "min" in spec and "max" in spec:  # the schema's order: whole numbers mean int_uniform
        return "int_uniform" if _is_int(spec["min"]) and _is_int(spec["max"]) else "uniform"
    raise UserError(f"{where}: give 'value', 'values', 'min' and 'max', 'distribution', or nested 'parameters'")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_options(where: str, kind: str, options: Mapping[str, Any]) -> None:
    values = options.get("values", [None])
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: 'values' is a list with at least one value")
    weights = options.get("probabilities", [1.0 / len(values)] * len(values))
    if not isinstance(weights, list) or len(weights) != len(values):
        raise UserError(f"{where}: 'probabilities' needs one number for each of the {len(values)} values")
    numbers = {f"probabilities[{i}]": weight for i, weight in enumerate(weights)}
    numbers |= {option: value for option, value in options.items() if option not in ("value", "values", "probabilities")}
    for option, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"{where}: {option} = {number!r} is not a number")
        if kind == "int_uniform" and option in ("min", "max") and not _is_int(number):
            raise UserError(f"{where}: {option} = {number!r}: 'int_uniform' takes whole numbers; use 'uniform'")
    if min(weights) < 0 or abs(sum(weights) - 1.0) > 1e-8:
        raise UserError(f"{where}: the probabilities are at least 0 and their sum is 1, not {sum(weights):g}")
    if "min" in options and options["min"] >= options["max"]:
        raise UserError(f"{where}: min {options['min']} is not less than max {options['max']}")
    if kind.endswith("log_uniform_values") and options["min"] <= 0:
        raise UserError(f"{where}: '{kind}' needs a min above 0, not {options['min']}")
    if kind.endswith("log_uniform") and max(abs(options["min"]), abs(options["max"])) > 700:
        raise UserError(f"{where}: '{kind}' takes exponents of e; for limits of the value use '{kind}_values'")
    for option in ("q", "a", "b"):
        if options.get(option, 1) <= 0:
            raise UserError(f"{where}: {option} is above 0, not {options[option]}")
    if options.get("sigma", 0) < 0:
        raise UserError(f"{where}: sigma is at least 0, not {options['sigma']}")


def _uniform_icdf(u: float, low: float, high: float) -> float:
    return low + u * (high - low)


def _normal_icdf(u: float, options: Mapping[str, Any]) -> float:
    u = min(max(u, 1e-300), 1.0 - 1e-16)  # at 0 and 1 it is infinite
    return float(options["mu"] + options["sigma"] * NormalDist().inv_cdf(u))


def _beta_icdf(u: float, options: Mapping[str, Any]) -> float:
    from scipy.special import betaincinv  # half a second of import, which few sweeps need

    return float(betaincinv(options["a"], options["b"], u))


_ICDFS: dict[str, Callable[[float, Mapping[str, Any]], float]] = {
    "uniform": lambda u, o: _uniform_icdf(u, o["min"], o["max"]),
    "log_uniform": lambda u, o: math.exp(_uniform_icdf(u, o["min"], o["max"])),
    "inv_log_uniform": lambda u, o: math.exp(-_uniform_icdf(1.0 - u, o["min"], o["max"])),
    "log_uniform_values": lambda u, o: math.exp(_uniform_icdf(u, math.log(o["min"]), math.log(o["max"]))),
    # 1/value is log-uniform between 1/max and 1/min, which is log-uniform between min and max again
    "inv_log_uniform_values": lambda u, o: math.exp(_uniform_icdf(u, math.log(o["min"]), math.log(o["max"]))),
    "normal": _normal_icdf,
    "log_normal": lambda u, o: math.exp(_normal_icdf(u, o)),
    "beta": _beta_icdf,
}
