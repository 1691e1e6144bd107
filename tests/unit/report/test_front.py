"""The probability of being on the front, against what can be computed otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from cifar.report.front import front_probabilities, pool_deviation

scipy_stats = pytest.importorskip("scipy.stats")


def make_groups(means: list[float], deviation: float, seeds: int) -> list[list[float]]:
    """Groups of exactly these means, and of exactly this deviation within each."""
    pattern = np.linspace(-1, 1, seeds)
    pattern *= deviation / pattern.std(ddof=1)
    return [[mean + value for value in pattern] for mean in means]


def test_pooled_deviation_is_that_of_an_analysis_of_variance() -> None:
    noise = np.random.default_rng(0)
    groups = [list(noise.normal(k, 0.3, size)) for k, size in enumerate((2, 3, 5, 1))]
    residuals = np.concatenate([np.array(group) - np.mean(group) for group in groups])
    assert pool_deviation(groups) == pytest.approx(np.sqrt((residuals**2).sum() / (11 - 4)))


@pytest.mark.parametrize(("gap", "seeds"), [(0.0, 4), (0.002, 4), (0.005, 6), (-0.003, 5)])
def test_two_points_are_a_normal_difference(gap: float, seeds: int) -> None:
    groups = make_groups([0.9, 0.9 + gap], 0.004, seeds)
    found = front_probabilities([1e6, 2e6], groups, num_draws=40_000)
    expected = scipy_stats.norm.cdf(gap / (0.004 * np.sqrt(2 / seeds)))
    assert found is not None
    assert found[0] == 1.0  # nothing costs less
    assert found[1] == pytest.approx(expected, abs=0.01)


def test_three_points_are_a_trivariate_normal() -> None:
    means, deviation, seeds = [0.90, 0.903, 0.904], 0.004, 4
    found = front_probabilities([1.0, 2.0, 3.0], make_groups(means, deviation, seeds), num_draws=40_000)
    error = (deviation / np.sqrt(seeds)) ** 2
    # the third is on the front if it beats both: two differences with a shared part
    covariance = error * np.array([[2.0, 1.0], [1.0, 2.0]])
    expected = scipy_stats.multivariate_normal(cov=covariance).cdf([means[2] - means[0], means[2] - means[1]])
    assert found is not None
    assert found[2] == pytest.approx(expected, abs=0.01)


def test_of_points_of_one_cost_one_is_on_the_front() -> None:
    found = front_probabilities([5.0, 5.0, 5.0], make_groups([0.9, 0.9, 0.9], 0.01, 3), num_draws=20_000)
    assert found is not None
    assert sum(found) == pytest.approx(1.0)
    assert found[0] == pytest.approx(1 / 3, abs=0.02)


def test_one_seed_a_point_tells_nothing() -> None:
    assert front_probabilities([1.0, 2.0], [[0.9], [0.91]]) is None
