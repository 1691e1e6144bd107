"""Shares of variance of functions whose shares are known, and designs that allow none."""

from __future__ import annotations

import random
import statistics
from types import SimpleNamespace
from typing import Any

import pytest

from cifar.report.importance import compute_importance, find_confounded, split_variance

pytest.importorskip("sklearn")


def make_comparison(rows: list[dict[str, Any]], accuracies: list[float]) -> Any:
    """As much of a Comparison as is read."""
    points = [SimpleNamespace(values=row, mean=mean, num_views=1) for row, mean in zip(rows, accuracies, strict=True)]
    return SimpleNamespace(points=points, setting_keys=list(rows[0]))


def draw_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {"a": draw.random(), "b": draw.random(), "kind": draw.choice(["x", "y"]), "noise": draw.random()} for _ in range(count)
    ]


def shares_of(found: dict[str, Any]) -> dict[str, float]:
    return {share["key"]: share["mean"] for share in found["shares"]}


@pytest.mark.slow
def test_shares_of_a_sum_are_those_of_its_variances() -> None:
    """Var(0.3 a) : Var(0.15 b) : Var(0.1 [kind]) = 0.0075 : 0.001875 : 0.0025. Forests take some of a category for noise."""
    rows = draw_rows(250)
    found = compute_importance(
        make_comparison(rows, [0.5 + 0.3 * r["a"] + 0.15 * r["b"] + 0.1 * (r["kind"] == "y") for r in rows])
    )
    assert found is not None
    shares = shares_of(found)
    assert [*shares] == ["a", "kind", "b", "noise"]
    for key, variance in {"a": 0.0075, "b": 0.001875, "kind": 0.0025, "noise": 0.0}.items():
        assert shares[key] == pytest.approx(variance / 0.011875, abs=0.08)
    assert all(share["low"] <= share["mean"] <= share["high"] for share in found["shares"])


@pytest.mark.slow
def test_shares_are_those_of_optuna_over_20_seeds() -> None:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator

    rows = draw_rows(200, seed=1)
    accuracies = [0.6 + 0.2 * (r["a"] - 0.6) ** 2 - 0.1 * r["a"] * r["b"] + 0.03 * (r["kind"] == "x") for r in rows]
    low, high = ({key: bound(r[key] for r in rows) for key in ("a", "b", "noise")} for bound in (min, max))
    distributions: dict[str, Any] = {key: FloatDistribution(low[key], high[key]) for key in low}
    distributions["kind"] = CategoricalDistribution(["x", "y"])
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(params=r, distributions=distributions, value=v)
            for r, v in zip(rows, accuracies, strict=True)
        ]
    )
    theirs: dict[str, list[float]] = {}
    for seed in range(20):
        for key, share in FanovaImportanceEvaluator(seed=seed).evaluate(study).items():
            theirs.setdefault(key, []).append(share)
    expected = {key: statistics.fmean(values) for key, values in theirs.items()}
    found = compute_importance(make_comparison(rows, accuracies))
    assert found is not None
    ours = shares_of(found)
    assert [*ours] == sorted(expected, key=expected.__getitem__, reverse=True)
    for key, share in expected.items():
        assert ours[key] == pytest.approx(share, abs=0.05)


def test_designs_that_allow_none() -> None:
    assert compute_importance(make_comparison(draw_rows(10), [0.5] * 10)) is None
    few = draw_rows(40)
    assert "too few" in compute_importance(make_comparison(few, [0.5] * 40))["reason"]  # type: ignore[index]
    together = [{"a": i / 60, "b": 2 * i / 60 + 0.01 * (i % 2)} for i in range(60)]
    assert "a and b vary together" in compute_importance(make_comparison(together, [0.5] * 60))["reason"]  # type: ignore[index]
    own = [{"model": f"m{i % 3}", "width": None if i % 2 else 8 + i} for i in range(60)]
    assert compute_importance(make_comparison([{"model": f"m{i % 3}"} for i in range(60)], [0.5] * 60)) is None
    found = compute_importance(
        make_comparison(
            [{**r, "width": o["width"]} for r, o in zip(draw_rows(60), own, strict=True)], [r["a"] for r in draw_rows(60)]
        )
    )
    assert found is not None and "width" in found["note"] and "width" not in shares_of(found)


def test_confounded() -> None:
    assert find_confounded({"model": ["x", "x", "y", "y"], "lr": [1, 1, 2, 2]}) == ("model", "lr")
    assert find_confounded({"model": ["x", "x", "y", "y"], "lr": [1, 2, 1, 2]}) is None
    assert find_confounded({"lr": [0.1, 0.2, 0.3, 0.4], "decay": [1e-3, 1e-4, 1e-3, 1e-4]}) is None


def test_shares_of_a_tree_are_those_of_optunas_walk_through_it() -> None:
    """Numbers, a category of three (three inputs that count together), and an input by which nothing is split."""
    import numpy as np
    from optuna.importance._fanova._tree import _FanovaTree
    from sklearn.tree import DecisionTreeRegressor

    draw = np.random.default_rng(0)
    kind = draw.integers(0, 3, 120)
    inputs = np.column_stack([draw.random(120), 5 * draw.random(120) + 2, *(kind == k for k in range(3)), np.ones(120)])
    low, high = np.append(inputs.min(0)[:-1], 0.0), inputs.max(0)
    for seed in range(3):
        target = inputs[:, 0] ** 2 * inputs[:, 1] + (kind == 1) + draw.normal(0, 0.1, 120)
        tree = DecisionTreeRegressor(random_state=seed).fit(inputs, target).tree_
        theirs = _FanovaTree(tree, np.stack([low, high], 1))
        expected = {
            key: theirs.get_marginal_variance(np.array(places)) / theirs.variance
            for key, places in {"a": [0], "b": [1], "kind": [2, 3, 4]}.items()
        }
        assert split_variance(tree, low, high, ["a", "b", "kind", "kind", "kind", "same"]) == {
            **{key: pytest.approx(share, rel=1e-9) for key, share in expected.items()},
            "same": pytest.approx(0, abs=1e-12),
        }


def test_a_setting_of_many_categories_has_a_share() -> None:
    """Walking through the combinations of 25 inputs of 0 or 1 would take for ever."""
    rows = [{**row, "model": f"network{i % 25}"} for i, row in enumerate(draw_rows(200))]
    found = compute_importance(make_comparison(rows, [0.5 + 0.02 * (i % 25) for i in range(200)]))
    assert found is not None and next(iter(shares_of(found))) == "model"


def test_values_that_no_forest_takes_and_accuracies_without_variance() -> None:
    rows = draw_rows(60)
    assert compute_importance(make_comparison(rows, [0.5] * 60)) == {"reason": "all points have the same accuracy."}
    for wrong in (1e300, float("inf"), float("nan"), 10**400):
        odd = [{**row, "a": wrong if i == 7 else row["a"]} for i, row in enumerate(rows)]
        found = compute_importance(make_comparison(odd, [row["b"] for row in rows]))
        assert found == {"reason": "a setting has a value that a forest cannot take."}
    near = [{**row, "a": 1.0 + (i % 2) * 1.2e-7} for i, row in enumerate(rows)]  # neighbours among the 32-bit numbers
    found = compute_importance(make_comparison(near, [row["b"] + 0.1 * (i % 2) for i, row in enumerate(rows)]))
    assert found is not None and sum(shares_of(found).values()) < 1.5
