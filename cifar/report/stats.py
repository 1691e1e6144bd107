"""The statistics of a report: a confidence interval over seeds, the Pareto front, a rank correlation."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

from cifar.sweeps.objectives import find_non_dominated


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22, evaluated by Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction = c = 1.0
    d = 0.0
    for i in range(1000):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / ((1 + term * d) or 1e-300)
        c = (1 + term / c) or 1e-300
        fraction *= c * d
        if abs(1 - c * d) < 1e-15:
            break
    return math.exp(logarithm) / a * (fraction - 1)


def t_tail(t: float, df: float) -> float:
    """P(|T| > |t|) for Student's T with `df` degrees of freedom, which need not be a whole number."""
    return incomplete_beta(df / (df + t * t), df / 2, 0.5)


def t_probability(t: float, df: float) -> float:
    """P(|T| <= |t|) for Student's T with `df` degrees of freedom."""
    return 1 - t_tail(t, df)


@functools.cache  # a report asks for the same few again and again
def t_quantile(confidence: float, df: float) -> float:
    """The t with P(|T| <= t) = confidence, by bisection."""
    assert 0 < confidence < 1 and df > 0
    low, high = 0.0, 1.0
    while t_probability(high, df) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < confidence else (low, middle)
    return high


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """The mean, and the half-width of Student's confidence interval of the mean; None for a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None
    return mean, t_quantile(confidence, n - 1) * statistics.stdev(values) / math.sqrt(n)


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices of the points that no other point dominates, cheapest first. Of equal points the first one stays.

    A point dominates another one if it costs at most as much and gains at least as much.
    """
    points = [(cost, -gain) for cost, gain in zip(costs, gains, strict=True)]
    first: dict[tuple[float, float], int] = {}
    for i in find_non_dominated(points):
        first.setdefault(points[i], i)
    return sorted(first.values(), key=lambda i: costs[i])


def compute_ranks(values: Sequence[float]) -> list[float]:
    """Rank 1 for the smallest value; equal values get the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    result = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            result[i] = (start + end) / 2 + 1
        start = end + 1
    return result


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rho; None if it is not defined (fewer than two points, or all values of one side are equal)."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(compute_ranks(x), compute_ranks(y))


t_within, interval, front, ranks = t_probability, mean_interval, pareto_front, compute_ranks  # old names, for plug-ins
