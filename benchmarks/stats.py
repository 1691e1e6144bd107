"""The few statistics of a benchmark: what a list of timings says, and how sure a ratio of interleaved pairs is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000


def describe(values: Sequence[float]) -> dict[str, Any]:
    """n, median, spread (the quartiles), range, mean and standard deviation (of a sample; None for a single value)."""
    array = np.asarray(values, np.float64)
    low, median, high = np.percentile(array, (25, 50, 75))
    return {
        "n": len(array),
        "median": float(median),
        "spread": [float(low), float(high)],
        "range": [float(array.min()), float(array.max())],
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else None,
        "values": [float(value) for value in array],
    }


def median_interval(values: Sequence[float], confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float] | None:
    """The percentile bootstrap's interval of the median (Efron 1979); None for fewer than two values.

    With up to five values it is their range: they say no more about the median.
    """
    if len(values) < 2:
        return None
    array = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.median(array[drawn], axis=1), (tail, 100 - tail))
    return float(low), float(high)


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """The median of above/below, pair by pair, with its interval; the ratio of medians where they are no pairs."""
    if len(above) == len(below):
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        interval = median_interval(ratios)
        return {"n": len(ratios), "ratio": float(np.median(ratios)), "interval": list(interval) if interval else None}
    return {
        "n": min(len(above), len(below)),
        "ratio": float(np.median(above) / np.median(below)),
        "interval": None,  # of no pairs
    }
