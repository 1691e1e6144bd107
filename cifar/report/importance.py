"""How much each setting matters: the share of the variance of accuracy that it explains alone (functional ANOVA).

The method is that of Hutter, Hoos and Leyton-Brown 2014, "An efficient approach for assessing hyperparameter importance",
with the forests of scikit-learn. How sure a share is shows in resamples of the points, each with a forest of its own seed.

The answers are those of Optuna's implementation, which walks through each tree for every combination of split values: seconds
for a report, and hours for a setting of twenty categories. Here the variance is written as a sum over pairs of leaves.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cifar.report.aggregate import Comparison
from cifar.report.stats import compute_ranks, rank_correlation

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_MENTIONED = 20  # a page with fewer points says nothing of importance
MIN_POINTS = 50  # below it a forest has too little to learn from
MAX_POINTS = 300  # of more, so many are drawn for each forest, since its time grows with them
NUM_RESAMPLES = 6
NUM_TREES = 16
MAX_DEPTH = 64  # of a tree, as Optuna has it
MAX_CORRELATION = 0.8  # of two settings, above which what each of them does cannot be told apart


def compute_importance(comparison: Comparison) -> dict[str, Any] | None:
    """{"shares": [{"key", "mean", "low", "high"}, ...], "note"}, or {"reason"} if the design does not allow it.

    None where there is nothing to say: nothing but the network differs, or there are few points. Shares are fractions of the
    variance.
    """
    return rate_settings(*list_settings(comparison))


def list_settings(comparison: Comparison) -> tuple[dict[str, list[Any]], list[float]]:
    """(setting -> its value in each point, the accuracy of each point)."""
    points = [point for point in comparison.points if point.num_views == 1]
    columns = {key: [point.values.get(key) for point in points] for key in comparison.setting_keys}
    return columns, [point.mean for point in points]


def rate_settings(columns: Mapping[str, list[Any]], accuracies: Sequence[float]) -> dict[str, Any] | None:
    """`compute_importance`, of what `list_settings` finds."""
    columns = {key: values for key, values in columns.items() if len({str(value) for value in values}) > 1}
    if [*columns] in ([], ["model"]):
        return None
    conditional = [key for key, values in columns.items() if None in values]
    shared = {key: values for key, values in columns.items() if key not in conditional}
    if len(accuracies) < MIN_MENTIONED:
        return None
    if len(accuracies) < MIN_POINTS:
        return {"reason": f"{len(accuracies)} points are too few: it needs {MIN_POINTS}."}
    if not shared:
        return {"reason": "no setting is one of all networks."}
    if confounded := find_confounded(shared):
        return {"reason": f"{confounded[0]} and {confounded[1]} vary together, so what each of them does cannot be told apart."}
    try:
        shares = _resample_shares(shared, accuracies)
    except ImportError:
        return {"reason": "scikit-learn is not installed."}
    except (ValueError, OverflowError):
        return {"reason": "a setting has a value that a forest cannot take."}
    if not shares:
        return {"reason": "all points have the same accuracy."}
    note = f"Functional ANOVA by random forests, mean and range of {NUM_RESAMPLES} resamples of {len(accuracies)} points. "
    note += "The rest is what settings do together, and noise."
    if conditional:
        note += f" Left out, since not all networks have them: {', '.join(conditional)}."
    return {"shares": shares, "note": note}


def is_rating(value: Any) -> bool:
    """Whether a value that was kept is one that `rate_settings` gives, other than None."""
    if type(value) is not dict or not all(type(text) is str for name, text in value.items() if name != "shares"):
        return False
    shares = value.get("shares")
    if shares is None:
        return "reason" in value
    return "note" in value and type(shares) is list and len(shares) > 0 and all(map(_is_share, shares))


def _is_share(value: Any) -> bool:
    is_named = type(value) is dict and type(value.get("key")) is str
    return is_named and all(type(value.get(name)) is float for name in ("mean", "low", "high"))


def find_confounded(columns: Mapping[str, Sequence[Any]]) -> tuple[str, str] | None:
    """Two settings of which one says (nearly) what the other is; None if there are none."""
    ranks = {key: compute_ranks(values) for key, values in columns.items() if _is_number(values)}
    texts = {key: list(map(str, values)) for key, values in columns.items()}
    for first, second in itertools.combinations(columns, 2):
        if first in ranks and second in ranks:
            correlation = rank_correlation(ranks[first], ranks[second])  # ranks of ranks are the same ranks
            if correlation is not None and abs(correlation) > MAX_CORRELATION:
                return first, second
        elif _determines(texts[first], texts[second]) or _determines(texts[second], texts[first]):
            return first, second
    return None


def _determines(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether each value of `a` that is there twice goes with one value of `b` only."""
    counts = Counter(a)
    repeated = {value for value, number in counts.items() if number > 1}
    if len(repeated) <= len(counts) / 2:
        return False
    return len({pair for pair in zip(a, b, strict=True) if pair[0] in repeated}) == len(repeated)


def _is_number(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _resample_shares(columns: Mapping[str, Sequence[Any]], accuracies: Sequence[float]) -> list[dict[str, Any]]:
    """The shares by size. [] where no forest finds any variance. Raises ValueError and OverflowError for numbers that no
    forest takes.
    """
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    inputs, owners = _encode_columns(columns)
    if not np.all(np.abs(inputs) <= np.finfo(np.float32).max):
        raise ValueError("a number that is not finite in 32 bits")
    low, high = inputs.min(0), inputs.max(0)
    targets = np.array(accuracies, float)
    draw = random.Random(0)
    found: dict[str, list[float]] = {key: [] for key in columns}
    for seed in range(NUM_RESAMPLES):
        chosen = draw.choices(range(len(accuracies)), k=min(len(accuracies), MAX_POINTS))
        forest = RandomForestRegressor(n_estimators=NUM_TREES, max_depth=MAX_DEPTH, random_state=seed)
        forest.fit(inputs[chosen], targets[chosen])
        by_tree = [split_variance(tree.tree_, low, high, owners) for tree in forest.estimators_]
        by_tree = [shares for shares in by_tree if shares]
        for key in columns if by_tree else ():
            found[key].append(float(np.mean([shares[key] for shares in by_tree])))
    listed = [
        {"key": key, "mean": sum(shares) / len(shares), "low": min(shares), "high": max(shares)}
        for key, shares in found.items()
        if shares
    ]
    return sorted(listed, key=lambda share: -share["mean"])


def _encode_columns(columns: Mapping[str, Sequence[Any]]) -> tuple[NDArray[Any], list[str]]:
    """(inputs of a forest: (points, inputs), the setting of each input). A text has an input of 0 or 1 for each value."""
    import numpy as np

    inputs, owners = [], []
    for key, values in columns.items():
        if _is_number(values):
            inputs.append([float(value) for value in values])
            owners.append(key)
            continue
        texts = [str(value) for value in values]
        for choice in sorted(set(texts)):
            inputs.append([float(text == choice) for text in texts])
            owners.append(key)
    return np.array(inputs).T, owners


def split_variance(tree: Any, low: NDArray[Any], high: NDArray[Any], owners: Sequence[str]) -> dict[str, float]:
    """The share of a tree's variance over the box from `low` to `high` that each setting explains alone. {} without variance.

    owners: the setting of each input; a setting of several inputs counts with all of them. For a set U of inputs, and leaves
    with centred values v and volumes p, of which the widths along U are divided out:

        variance of U = sum over leaves i, j of  v_i p_i / |U_i|  *  v_j p_j / |U_j|  *  |U_i and U_j overlap|
    """
    import numpy as np

    left, right, feature, threshold = tree.children_left, tree.children_right, tree.feature, tree.threshold
    lows, highs = np.empty((tree.node_count, len(low))), np.empty((tree.node_count, len(low)))
    lows[0], highs[0] = low, high
    for node in range(tree.node_count):  # a parent comes before its children
        if left[node] < 0:
            continue
        for child, limits in ((left[node], highs), (right[node], lows)):
            lows[child], highs[child] = lows[node], highs[node]
            limits[child, feature[node]] = threshold[node]
    span = np.where(high > low, high - low, 1.0)
    is_leaf = left < 0
    lows, highs = (lows[is_leaf] - low) / span, (highs[is_leaf] - low) / span
    widths = np.where(high > low, highs - lows, 1.0)
    has_volume = (widths > 0).all(1)  # a threshold is a 32-bit number, and may come to lie on an edge of the box
    lows, highs, widths = lows[has_volume], highs[has_volume], widths[has_volume]
    values, volumes = tree.value[is_leaf].reshape(-1)[has_volume], widths.prod(1)
    values = values - np.average(values, weights=volumes)
    total = float(np.sum(volumes * values**2))
    if not total > 0:
        return {}
    shares = {}
    for key in dict.fromkeys(owners):
        own = [i for i, owner in enumerate(owners) if owner == key and (widths[:, i] < 1).any()]  # that the tree splits by
        weights = values * volumes / widths[:, own].prod(1)
        overlap = np.ones((len(values), len(values)))
        for i in own:
            overlap *= np.maximum(np.minimum.outer(highs[:, i], highs[:, i]) - np.maximum.outer(lows[:, i], lows[:, i]), 0)
        shares[key] = float(np.clip(weights @ overlap @ weights, 0, None)) / total
    return shares
