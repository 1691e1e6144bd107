"""Two points of a report side by side: the settings that differ, and the difference of their accuracies."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar.errors import UserError
from cifar.report.aggregate import Comparison, Point
from cifar.report.formatting import format_macs, format_value
from cifar.report.stats import t_quantile, t_tail

ROUNDING = 1e-12  # a scatter of accuracies below it comes from rounding


@dataclass(frozen=True)
class Difference:
    """The mean of one minus the mean of the other, as fractions. NaN where too few seeds tell nothing."""

    mean: float
    half: float  # of the 95 % interval
    p: float  # of a difference at least as large, if there were none
    num_pairs: int = 0  # seeds that both have, for the paired test


def compare_means(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Welch's interval and test: for seeds that have nothing to do with each other."""
    mean = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2:
        return Difference(mean, math.nan, math.nan)
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if math.sqrt(va + vb) < ROUNDING:
        return Difference(mean, math.nan, math.nan)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    error = math.sqrt(va + vb)
    return Difference(mean, t_quantile(0.95, freedom) * error, t_tail(mean / error, freedom))


def compare_pairs(a: Mapping[Any, float], b: Mapping[Any, float]) -> Difference:
    """The paired t-test over the seeds that both have. `a`, `b`: seed -> accuracy."""
    differences = [a[seed] - b[seed] for seed in a if seed is not None and seed in b]
    n = len(differences)
    if not n:
        return Difference(math.nan, math.nan, math.nan)
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else 0.0
    if error < ROUNDING:
        return Difference(mean, math.nan, math.nan, n)
    return Difference(mean, t_quantile(0.95, n - 1) * error, t_tail(mean / error, n - 1), n)


def find_point(comparison: Comparison, name: str) -> Point:
    """The point of a run's id (or a unique start of one), or of a label. Raises UserError."""
    points = [point for point in comparison.points if point.num_views == 1]
    for matches in (
        [point for point in points if point.label == name],
        [point for point in points if any(run.id == name or run.name == name for run in point.runs)],
        [point for point in points if any(run.id.startswith(name) for run in point.runs)],
        [point for point in points if point.model == name],
    ):
        if len(matches) == 1:
            return matches[0]
        if len(matches) > 1:
            some = ", ".join(point.runs[0].id for point in matches[:4])
            raise UserError(f"--compare {name}: {len(matches)} points fit; name a run of one of them ({some}, ...)")
    labels = [point.label for point in points] + [run.id for point in points for run in point.runs]
    close = difflib.get_close_matches(name, labels, 3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise UserError(f"--compare {name}: no point of this report; name a run that is compared, or a label of the table{hint}")


def describe_comparison(comparison: Comparison, first: Point, second: Point) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(rows: what, value of the first, value of the second; sentences)."""
    keys = dict.fromkeys(key for point in (first, second) for key in point.runs[0].config)
    differing = [key for key in keys if key != "seed" and first.runs[0].config.get(key) != second.runs[0].config.get(key)]
    rows = [
        (key, format_value(first.runs[0].config.get(key)), format_value(second.runs[0].config.get(key))) for key in differing
    ]
    rows.append(("MACs", format_macs(first.macs), format_macs(second.macs)))
    rows.append((f"{comparison.split} accuracy", first.accuracy_text, second.accuracy_text))
    apart = compare_means(first.accuracies, second.accuracies)
    by_seed = [
        {run.config.get("seed"): value for run, value in zip(point.runs, point.accuracies, strict=True)}
        for point in (first, second)
    ]
    return rows, [describe_difference(first.label, second.label, apart), *_describe_pairs(compare_pairs(*by_seed))]


def describe_difference(first: str, second: str, found: Difference) -> str:
    """ "A against B: +0.41 points (95 % interval +0.20 to +0.62, Welch, p = 0.004)." """
    text = f"{first} against {second}: {_format_points(found.mean)} points"
    if math.isnan(found.half):
        return f"{text}. An interval needs two seeds and more on both sides, and some scatter."
    return f"{text} (95 % interval {_format_interval(found)}, Welch, {_format_p(found.p)})."


def _describe_pairs(found: Difference) -> list[str]:
    if math.isnan(found.half):
        return []
    sentence = f"Over the {found.num_pairs} seeds that both have: {_format_points(found.mean)} points "
    return [f"{sentence}(95 % interval {_format_interval(found)}, paired t-test, {_format_p(found.p)})."]


def _format_points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _format_interval(found: Difference) -> str:
    return f"{_format_points(found.mean - found.half)} to {_format_points(found.mean + found.half)}"


def _format_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
