"""How much each setting matters: the share of the variance of accuracy that it explains alone (functional ANOVA).

Optuna's implementation is used (Hutter, Hoos and Leyton-Brown 2014, "An efficient approach for assessing hyperparameter
importance"). It fits random forests. How sure a share is shows in resamples of the points, each with a forest of its own seed.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cifar.report.aggregate import Comparison
from cifar.report.stats import rank_correlation

MIN_MENTIONED = 20  # a page with fewer points says nothing of importance
MIN_POINTS = 50  # below it a forest has too little to learn from
MAX_POINTS = 300  # of more, so many are drawn for each forest, since its time grows with them
NUM_RESAMPLES = 6
NUM_TREES = 16
MAX_CORRELATION = 0.8  # of two settings, above which what each of them does cannot be told apart


def compute_importance(comparison: Comparison) -> dict[str, Any] | None:
    """{"shares": [{"key", "mean", "low", "high"}, ...], "note"}, or {"reason"} if the design does not allow it.

    None where there is nothing to say: nothing but the network differs, or there are few points. Shares are fractions of the
    variance.
    """
    points = [point for point in comparison.points if point.num_views == 1]
    columns = {key: [point.values.get(key) for point in points] for key in comparison.distinguishing_keys}
    columns = {key: values for key, values in columns.items() if len({str(value) for value in values}) > 1}
    if [*columns] in ([], ["model"]):
        return None
    conditional = [key for key, values in columns.items() if None in values]
    shared = {key: values for key, values in columns.items() if key not in conditional}
    if len(points) < MIN_MENTIONED:
        return None
    if len(points) < MIN_POINTS:
        return {"reason": f"{len(points)} points are too few: it needs {MIN_POINTS}."}
    if not shared:
        return {"reason": "no setting is one of all networks."}
    if confounded := find_confounded(shared):
        return {"reason": f"{confounded[0]} and {confounded[1]} vary together, so what each of them does cannot be told apart."}
    try:
        shares = _resample_shares(shared, [point.mean for point in points])
    except ImportError:
        return {"reason": "scikit-learn is not installed."}
    note = f"Functional ANOVA by random forests, mean and range of {NUM_RESAMPLES} resamples of {len(points)} points. "
    note += "The rest is what settings do together, and noise."
    if conditional:
        note += f" Left out, since not all networks have them: {', '.join(conditional)}."
    return {"shares": shares, "note": note}


def find_confounded(columns: Mapping[str, Sequence[Any]]) -> tuple[str, str] | None:
    """Two settings of which one says (nearly) what the other is; None if there are none."""
    names = [*columns]
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            a, b = columns[first], columns[second]
            if _is_number(a) and _is_number(b):
                correlation = rank_correlation(a, b)
                if correlation is not None and abs(correlation) > MAX_CORRELATION:
                    return first, second
            elif _determines(a, b) or _determines(b, a):
                return first, second
    return None


def _determines(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether each value of `a` that is there twice goes with one value of `b` only."""
    names, seen = [str(value) for value in a], dict[str, set[str]]()
    for x, y in zip(names, b, strict=True):
        seen.setdefault(x, set()).add(str(y))
    repeated = [seen[x] for x, number in Counter(names).items() if number > 1]
    return bool(repeated) and len(repeated) > len(seen) / 2 and all(len(values) == 1 for values in repeated)


def _is_number(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _resample_shares(columns: Mapping[str, Sequence[Any]], accuracies: Sequence[float]) -> list[dict[str, Any]]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {key: _make_distribution(values) for key, values in columns.items()}
    readers = {key: (float if _is_number(values) else str) for key, values in columns.items()}
    draw = random.Random(0)
    found: dict[str, list[float]] = {key: [] for key in columns}
    for seed in range(NUM_RESAMPLES):
        chosen = draw.choices(range(len(accuracies)), k=min(len(accuracies), MAX_POINTS))
        study = optuna.create_study()
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params={key: readers[key](columns[key][i]) for key in columns},
                    distributions=distributions,
                    value=accuracies[i],
                )
                for i in chosen
            ]
        )
        shares = FanovaImportanceEvaluator(n_trees=NUM_TREES, seed=seed).evaluate(study, params=[*columns])
        for key, share in shares.items():
            found[key].append(float(share))
    listed = [
        {"key": key, "mean": sum(shares) / len(shares), "low": min(shares), "high": max(shares)}
        for key, shares in found.items()
        if shares
    ]
    return sorted(listed, key=lambda share: -share["mean"])


def _make_distribution(values: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not _is_number(values):
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = float(min(values)), float(max(values))
    return FloatDistribution(low, high, log=low > 0 and math.log10(high / low) > 1.5)
