"""How sure the front is: the probability of each point to be on it, given the scatter of the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NUM_DRAWS = 2000
MIN_PAIRS = 5  # degrees of freedom that the pooled deviation needs


def pool_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups, pooled over all of them; None with too few repeated values to tell."""
    squares = freedom = 0.0
    for values in groups:
        mean = sum(values) / len(values)
        squares += sum((value - mean) ** 2 for value in values)
        freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom >= MIN_PAIRS else None


def front_probabilities(
    costs: Sequence[float], groups: Sequence[Sequence[float]], *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> list[float] | None:
    """The probability of each point to be on the Pareto front: no other costs at most as much and is as accurate.

    `groups`: the accuracies of each point's seeds. The true mean of a point is taken as normal around the mean of its n seeds,
    with the deviation of the seeds, pooled over all points, over sqrt(n). The means are drawn `num_draws` times, and counted is
    how often the point is on the front. None where too few points have several seeds.
    """
    deviation = pool_deviation(groups)
    if deviation is None:
        return None
    means = np.array([sum(values) / len(values) for values in groups])
    errors = deviation / np.sqrt([len(values) for values in groups])
    order = np.argsort(np.asarray(costs, float), kind="stable")
    sorted_costs = np.asarray(costs, float)[order]
    starts = np.flatnonzero(np.r_[True, np.diff(sorted_costs) > 0])  # of the points of one cost
    sizes = np.diff(np.r_[starts, len(order)])
    counts = np.zeros(len(order))
    draws = np.random.default_rng(seed)
    rows = max(1, min(num_draws, 2_000_000 // max(len(order), 1)))  # at a time
    done = 0
    while done < num_draws:
        size = min(rows, num_draws - done)
        drawn = means[order] + errors[order] * draws.standard_normal((size, len(order)))
        best = np.maximum.reduceat(drawn, starts, axis=1)
        before = np.maximum.accumulate(best, axis=1)
        is_better = np.concatenate([np.ones((size, 1), bool), best[:, 1:] > before[:, :-1]], axis=1)
        counts += ((drawn == np.repeat(best, sizes, axis=1)) & np.repeat(is_better, sizes, axis=1)).sum(0)
        done += size
    result = np.empty(len(order))
    result[order] = counts / num_draws
    return [float(value) for value in result]
