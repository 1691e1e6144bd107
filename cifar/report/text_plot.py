"""Accuracy against cost as a few lines of text, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FRONT, OTHER, CORNER = "●", "·", "─"


@dataclass(frozen=True)
class TextPoint:
    """A point of the plot: a cost (positive), an accuracy as a fraction, and whether it is on the front."""

    cost: float
    accuracy: float
    on_front: bool


def draw_text_plot(
    points: Sequence[TextPoint], format_cost: Callable[[float], str], *, width: int = 72, height: int = 12
) -> list[str]:
    """Lines of at most `width` columns; none for fewer than two points. The cost is logarithmic.

    A point of the front is drawn over others in its place; the line is the best accuracy so far.
    """
    shown = [point for point in points if point.cost > 0 and math.isfinite(point.accuracy)]
    if len(shown) < 2 or width < 30:
        return []
    left = 7  # "100.0 │"
    columns = width - left
    low, high = min(math.log(p.cost) for p in shown), max(math.log(p.cost) for p in shown)
    bottom, top = min(p.accuracy for p in shown), max(p.accuracy for p in shown)

    def column(cost: float) -> int:
        return round((math.log(cost) - low) / ((high - low) or 1) * (columns - 1))

    def row(accuracy: float) -> int:
        return round((top - accuracy) / ((top - bottom) or 1) * (height - 1))

    grid = [[" "] * columns for _ in range(height)]
    front = sorted((p for p in shown if p.on_front), key=lambda p: p.cost)
    for before, after in zip(front, [*front[1:], None], strict=True):
        end = column(after.cost) if after else columns
        for at in range(column(before.cost), end):
            grid[row(before.accuracy)][at] = CORNER
    for point in sorted(shown, key=lambda p: p.on_front):
        grid[row(point.accuracy)][column(point.cost)] = FRONT if point.on_front else OTHER
    labelled = {0: top, height - 1: bottom, (height - 1) // 2: top - (top - bottom) * ((height - 1) // 2) / (height - 1)}
    lines = []
    for index, cells in enumerate(grid):
        label = f"{100 * labelled[index]:.1f}" if index in labelled else ""
        lines.append(f"{label:>5} │{''.join(cells)}".rstrip())
    first, last = format_cost(math.exp(low)), format_cost(math.exp(high))
    lines.append(f"{'%':>5} └{'─' * columns}")
    lines.append(" " * left + first + " " * max(1, columns - len(first) - len(last)) + last)
    return lines
