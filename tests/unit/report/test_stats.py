"""The report's statistics against brute force, published tables and scipy."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from cifar.report import stats


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_t_quantile_is_the_printed_tables(df: int, t: float) -> None:
    assert stats.t_quantile(0.95, df) == pytest.approx(t, abs=5e-4)


def test_t_quantile_is_scipys() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    for df in [*range(1, 40), 99, 1000]:
        for confidence in (0.5, 0.8, 0.95, 0.99, 0.999):
            expected = scipy_stats.t.ppf((1 + confidence) / 2, df)
            assert stats.t_quantile(confidence, df) == pytest.approx(expected, rel=1e-9)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(4000):
        mean, half = stats.mean_interval([draw.gauss(3, 2) for _ in range(4)])
        assert half is not None
        hits += abs(mean - 3) <= half
    assert hits / 4000 == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_one_value_has_no_interval() -> None:
    assert stats.mean_interval([0.7]) == (0.7, None)


def test_front_is_what_nothing_dominates() -> None:
    draw = random.Random(1)
    for _ in range(200):
        points = [(draw.randint(1, 8), draw.randint(1, 8)) for _ in range(draw.randint(0, 12))]
        kept = [points[i] for i in stats.pareto_front([x for x, _ in points], [y for _, y in points])]
        beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
        assert kept == sorted(set(points) - beaten)


def test_rank_correlation_is_pearsons_of_ranks() -> None:
    assert stats.rank_correlation([1, 2, 3], [10, 100, 1000]) == 1
    assert stats.rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert stats.rank_correlation([1, 1], [1, 2]) is None
    assert stats.rank_correlation([], []) is None
    assert stats.compute_ranks([5, 1, 5, 0]) == [3.5, 2, 3.5, 1]
    scipy_stats = pytest.importorskip("scipy.stats")
    draw = random.Random(2)
    for _ in range(50):
        x, y = ([draw.randint(0, 9) for _ in range(12)] for _ in range(2))
        rho = stats.rank_correlation(x, y)
        assert rho is not None
        assert rho == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-12)


def test_t_within_is_a_distribution() -> None:
    for df in (1, 2, 7, 8):
        values = [stats.t_probability(t, df) for t in (0, 0.5, 1, 2, 10, 1e6)]
        assert values[0] == 0
        assert values == sorted(values)
        assert math.isclose(values[-1], 1, abs_tol=1e-5)
    assert stats.t_probability(1.0, 10**5) == pytest.approx(statistics.NormalDist().cdf(1) * 2 - 1, abs=1e-5)
