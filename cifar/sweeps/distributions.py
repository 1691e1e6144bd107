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
from functools import cached_property
from statistics import NormalDist
from typing import Any

from cifar.errors import UserError, did_you_mean
from cifar.system.files import MAX_INTEGER, shorten_repr

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
MAX_VALUES = 10_000  # of a list: each is checked before anything runs
TAIL_PROBABILITY = 1e-3  # of each tail that is left out where an unbounded distribution is checked
EDGE = 2.0**-53  # the smallest step of a random number in [0, 1)
NEVER_DRAWN = 1e-12  # a listed value with a smaller probability is not drawn in the life of any sweep


@dataclass(frozen=True)
class Parameter:
    """A swept or constant parameter, with all its options."""

    name: str
    distribution: str
    options: dict[str, Any]

    @cached_property
    def values(self) -> list[Any] | None:
        """The listed values that can be drawn, without repeats, or None for a range."""
        if self.distribution == "constant":
            return [self.options["value"]]
        if self.distribution in ("categorical", "categorical_w_probabilities"):
            listed = self.options["values"]
            weights = self.options.get("probabilities", [1.0] * len(listed))
            drawn = [value for value, weight in zip(listed, weights, strict=True) if weight >= NEVER_DRAWN]
            found: dict[Any, Any] = {}
            for value in drawn:
                found.setdefault(freeze_value(value), value)
            return list(found.values())
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
        """The values to check, which stand for all others: every listed one, or the smallest and the largest that is drawn."""
        return self.values or [self.value_at(u) for u in self._edges]

    @property
    def boundary_names(self) -> list[Any]:
        """The `boundary_values` as an error names them: the ends of a range as the file writes them."""
        if self.distribution.startswith("q_"):
            return self.boundary_values
        return self.values or [self._value_at(u) for u in self._edges]

    @property
    def _edges(self) -> tuple[float, float]:
        """Where the cumulative distribution is looked at for the boundaries. Without `min` and `max` there are tails."""
        edge = 0.0 if "min" in self.options else TAIL_PROBABILITY
        return edge, 1.0 - edge

    @property
    def has_exponents(self) -> bool:
        """Whether `min` and `max` are exponents of e, and not limits of the value."""
        return self.distribution.endswith("log_uniform")

    def value_at(self, u: float) -> Any:
        """The value at which the cumulative distribution is `u`. The ends of a continuous range are open: never drawn."""
        return self._value_at(min(max(u, EDGE), 1.0 - EDGE), has_open_ends=True) if self._is_continuous else self._value_at(u)

    @property
    def _is_continuous(self) -> bool:
        return self.distribution.removeprefix("q_") in _ICDFS

    def _value_at(self, u: float, has_open_ends: bool = False) -> Any:
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
            drawn = options["min"] + max(math.ceil(u * (options["max"] - options["min"] + 1)) - 1, 0)
            return min(drawn, options["max"])  # a float rounds whole numbers from 2**53 on
        value = _ICDFS[kind.removeprefix("q_")](u, options)
        if has_open_ends and kind.removeprefix("q_") in _LIMITED_BY_VALUES:  # rounding may have met an end
            value = min(max(value, math.nextafter(options["min"], math.inf)), math.nextafter(options["max"], -math.inf))
        if kind.startswith("q_"):
            steps = round(value / options["q"])
            return steps * options["q"]  # an int where q is an int
        return value


def is_same_value(one: Any, other: Any) -> bool:
    """Whether two values are one. To Python `true` equals 1, but to a configuration key it does not."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def freeze_value(value: Any) -> Any:
    """Something that can be the key of a mapping, the same for values that are one (`is_same_value`)."""
    return isinstance(value, bool), _freeze(value)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozenset((key, _freeze(inner)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return (type(value), *map(_freeze, value))
    return frozenset(value) if isinstance(value, set) else value


def parse_parameter(name: str, spec: Any) -> Parameter:
    """Parse one entry of `parameters:`. Raises UserError that says what W&B accepts."""
    where = f"parameters.{name}"
    if not isinstance(spec, Mapping):
        shown = f"values: {spec}" if isinstance(spec, list) else f"value: {'...' if spec is None else spec}"
        raise UserError(f"{where}: write a mapping, for example {{{shown}}}")
    kind = spec.get("distribution") or _infer_distribution(where, spec)
    if not isinstance(kind, str) or kind not in DISTRIBUTION_OPTIONS:
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
    parameter = Parameter(name, kind, options)
    _check_reach(where, parameter)
    return parameter


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
    if len(values) > MAX_VALUES:
        raise UserError(f"{where}: {len(values):,} values are more than the {MAX_VALUES:,} that are tried; give a range")
    weights = options.get("probabilities", [1.0 / len(values)] * len(values))
    if not isinstance(weights, list) or len(weights) != len(values):
        raise UserError(f"{where}: 'probabilities' needs one number for each of the {len(values)} values")
    numbers = {f"probabilities[{i}]": weight for i, weight in enumerate(weights)}
    numbers |= {option: value for option, value in options.items() if option not in ("value", "values", "probabilities")}
    for option, number in numbers.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not -MAX_INTEGER <= number <= MAX_INTEGER:
            raise UserError(f"{where}: {option} = {shorten_repr(number)} is not a number, or far too large")
        if kind == "int_uniform" and option in ("min", "max") and not _is_int(number):
            raise UserError(f"{where}: {option} = {number!r}: 'int_uniform' takes whole numbers; use 'uniform'")
    if min(weights) < 0 or abs(sum(weights) - 1.0) > 1e-8:
        raise UserError(f"{where}: the probabilities are at least 0 and their sum is 1, not {sum(weights):g}")
    if "min" in options and options["min"] >= options["max"]:
        advice = f"; for one value write {{value: {options['min']}}}" if options["min"] == options["max"] else ""
        raise UserError(f"{where}: min {options['min']} is not less than max {options['max']}{advice}")
    if kind.endswith("log_uniform_values") and options["min"] <= 0:
        exponents = kind.removesuffix("_values")
        advice = f"; for exponents of e use '{exponents}'" if options["min"] < 0 else ""
        raise UserError(f"{where}: '{kind}' needs a min above 0, not {options['min']}{advice}")
    if kind.endswith("log_uniform") and max(abs(options["min"]), abs(options["max"])) > 700:
        raise UserError(f"{where}: '{kind}' takes exponents of e; for limits of the value use '{kind}_values'")
    for option in ("q", "a", "b"):
        if options.get(option, 1) <= 0:
            raise UserError(f"{where}: {option} is above 0, not {options[option]}")
    if options.get("sigma", 0) < 0:
        raise UserError(f"{where}: sigma is at least 0, not {options['sigma']}")


def _check_reach(where: str, parameter: Parameter) -> None:
    """Raise UserError where a draw may be beyond all numbers, or nothing of a range is left between its steps."""
    if parameter.values is not None or parameter.distribution.endswith("beta"):
        return
    try:
        ends = [parameter.value_at(u) for u in (2.0**-53, 1 - 2.0**-53)]  # as far out as a random number comes
    except (OverflowError, ValueError):
        ends = [math.inf]
    if not all(map(math.isfinite, ends)):
        raise UserError(f"{where}: its values go beyond all numbers; take smaller limits, a smaller mu or sigma, or a larger q")


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
_LIMITED_BY_VALUES = ("uniform", "log_uniform_values", "inv_log_uniform_values")  # whose `min` and `max` are values
