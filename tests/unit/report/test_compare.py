"""Two points side by side, against scipy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cifar.errors import UserError
from cifar.report import write_report
from cifar.report.aggregate import Comparison
from cifar.report.compare import compare_means, compare_pairs, describe_comparison, find_point
from cifar.report.config_columns import describe_config, list_columns
from cifar.report.stats import t_tail
from helpers.fake_runs import write

A = {0: 0.9123, 1: 0.9089, 2: 0.9151, 5: 0.9102}
B = {0: 0.9081, 1: 0.9060, 2: 0.9077}


def test_welch_and_paired_tests_are_scipys() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    found = compare_means([*A.values()], [*B.values()])
    expected = scipy_stats.ttest_ind([*A.values()], [*B.values()], equal_var=False)
    interval = expected.confidence_interval()
    assert (found.mean - found.half, found.mean + found.half, found.p) == pytest.approx(
        (interval.low, interval.high, expected.pvalue), rel=1e-9
    )
    pairs = compare_pairs(A, B)
    expected = scipy_stats.ttest_rel([A[seed] for seed in B], [*B.values()])
    interval = expected.confidence_interval()
    assert pairs.num_pairs == 3
    assert (pairs.mean - pairs.half, pairs.mean + pairs.half, pairs.p) == pytest.approx(
        (interval.low, interval.high, expected.pvalue), rel=1e-9
    )
    for t in (0.2, 1.7, 6.0):
        for df in (1.0, 2.6, 30.0):
            assert t_tail(t, df) == pytest.approx(2 * scipy_stats.t.sf(t, df), rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [([0.9], [0.8, 0.81]), ([0.9, 0.9], [0.8, 0.8])])
def test_what_tells_nothing_has_no_interval(a: list[float], b: list[float]) -> None:
    found = compare_means(a, b)
    assert found.mean == pytest.approx(sum(a) / len(a) - sum(b) / len(b)) and math.isnan(found.half) and math.isnan(found.p)
    assert math.isnan(compare_pairs({0: 0.9}, {1: 0.8}).mean)
    assert math.isnan(compare_pairs({0: 0.9, 1: 0.8}, {0: 0.8, 1: 0.7}).half)  # the same difference twice has no scatter


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    for name, values in (("resnet20", A), ("resnet56", B)):
        for seed, accuracy in values.items():
            write(
                tmp_path,
                f"{name[-2:]}run{seed}",
                model=name,
                seed=seed,
                accuracy=accuracy,
                lr=0.1 if name == "resnet20" else 0.05,
            )
    return write_report([], runs=tmp_path).comparison


def test_a_comparison_says_what_differs(comparison: Comparison) -> None:
    first, second = find_point(comparison, "resnet20"), find_point(comparison, "56run1")
    rows, sentences = describe_comparison(comparison, first, second)
    assert [row[0] for row in rows] == ["model", "lr", "MACs", "val accuracy"]
    assert rows[1] == ("lr", "0.1", "0.05")
    assert sentences[0].startswith(f"{first.label} against {second.label}: +0.44 points (95 % interval +0.0")
    assert "Over the 3 seeds that both have: +0.48 points" in sentences[1]


@pytest.mark.parametrize(("name", "words"), [("nothing", "no point of this report"), ("", "fit"), ("resnet5", "no point")])
def test_a_name_that_fits_no_point_or_several(comparison: Comparison, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_point(comparison, name)


def test_settings_side_by_side() -> None:
    assert list_columns([]) == {} and list_columns([{"a": 1}, {"a": 2}]) == {"a": (1, 2)}
    assert list_columns([{"a": 1, "b": 0}, {"b": 2, "a": 3}]) == {"a": [1, 3], "b": [0, 2]}  # in another order
    assert list_columns([{"a": 1}, {"b": 2}]) == {"a": [1, None], "b": [None, 2]}
    same = [{"a": 1, "seed": 0, "b": "x"}, {"b": "x", "a": 1, "seed": 1}, {"a": 1, "b": "x"}]
    others = [
        {"a": 1.0, "b": "x"},
        {"a": True, "b": "x"},
        {"a": 1},
        {"a": "1", "b": "x"},
        {"a": [1], "b": {"c": 1}},
        {"a": -0.0},
        {"a": 0.0},
    ]
    assert len({describe_config(config) for config in same}) == 1
    assert len({describe_config(config) for config in [*same, *others]}) == 1 + len(others)
    assert describe_config({"a": {"b": 1, "c": 2}}) == describe_config({"a": {"c": 2, "b": 1}, "seed": 5})
