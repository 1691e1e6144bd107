"""The accuracy by the values of each swept key."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar.registry import figures
from cifar.report.aggregate import Comparison
from cifar.report.formatting import format_power, format_value
from cifar.report.labels import set_log_axis
from cifar.report.palette import BLUE, INK, MUTED
from cifar.report.style import Nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 3
MAX_DRAWN_APART = 300  # dots of a panel


@dataclass(frozen=True)
class Effect:
    key: str
    ticks: list[str]  # names of the categories; empty if the axis is numeric
    dots: list[tuple[float, float, str]]  # position or value, accuracy in percent, label (of many dots: "")
    means: list[tuple[float, float]]  # by value; empty if the axis is numeric and values do not repeat
    is_log: bool


@figures.register("effects")
class Effects:
    scope, order = "sweep", 30
    title = "What each swept key does"
    caption = (
        "Each dot is one configuration; bars and line are means over all configurations with that value, so they compare "
        "like with like only where every value was tried with the same others (a grid). Categories are sorted by their mean; "
        "dots are shifted sideways to be seen."
    )

    def select(self, comparison: Comparison) -> list[Effect] | Nothing:
        effects = [effect for key in comparison.setting_keys if (effect := _compute_effect(key, comparison))]
        if [effect.key for effect in effects] == ["model"]:
            return Nothing("only the network was swept: the first figure says it all")
        return effects or Nothing("fewer than two values of any key have finished")

    def size(self, data: list[Effect]) -> tuple[float, float]:
        columns = min(MAX_COLUMNS, len(data))
        names = max((len(tick) for effect in data for tick in effect.ticks), default=0)
        return max(3.2 * columns, 5.6), math.ceil(len(data) / MAX_COLUMNS) * (2.5 + 0.045 * min(names, 24))

    def draw(self, data: list[Effect], figure: Figure) -> None:
        columns = min(MAX_COLUMNS, len(data))
        grid = figure.subplots(math.ceil(len(data) / columns), columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(data) :]:
            axes.set_axis_off()
        for axes, effect in zip(grid.flat, data, strict=False):
            if len(effect.dots) > MAX_DRAWN_APART:  # as one picture: piles show as dark places, and the file stays small
                xs, ys, _ = zip(*effect.dots, strict=True)
                axes.scatter(xs, ys, s=6, color=BLUE, alpha=0.25, lw=0, rasterized=True)
            for x, y, label in effect.dots if len(effect.dots) <= MAX_DRAWN_APART else ():
                (dot,) = axes.plot(x, y, "o", ms=4.5, color=BLUE, alpha=0.55, mew=0)
                dot.set_gid(f"tip:{label}\n{effect.key}: {y:.1f} %")
            if effect.ticks:
                for x, y in effect.means:
                    axes.plot([x - 0.28, x + 0.28], [y, y], color=INK, lw=1.8, solid_capstyle="butt")
                axes.set_xticks(range(len(effect.ticks)), [t if len(t) < 25 else t[:24] + "…" for t in effect.ticks])
                if len(effect.ticks) > 3:
                    axes.tick_params(axis="x", rotation=45, labelsize=7.5)
                    for name in axes.get_xticklabels():
                        name.set(ha="right", rotation_mode="anchor")
                axes.set_xlim(-0.6, len(effect.ticks) - 0.4)
                axes.grid(visible=False, axis="x")
            else:
                axes.plot(*zip(*effect.means, strict=True), color=INK, lw=1.2) if effect.means else None
                if effect.is_log:
                    set_log_axis(axes.xaxis, format_power)
            axes.set_title(effect.key)
        figure.supylabel("accuracy, mean over seeds (%)", size=9, color=MUTED)


def _compute_effect(key: str, comparison: Comparison) -> Effect | None:
    groups: dict[Any, list[tuple[float, str]]] = defaultdict(list)
    is_named = sum(point.values.get(key) is not None for point in comparison.configurations) <= MAX_DRAWN_APART
    for point in comparison.configurations:
        value = point.values.get(key)
        if value is not None:
            groups[value if isinstance(value, str | int | float) else format_value(value)].append(
                (100 * point.mean, point.label if is_named else "")
            )
    if len(groups) < 2:
        return None
    mean = {value: statistics.fmean(y for y, _ in dots) for value, dots in groups.items()}
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in groups)
    if numeric and len(groups) > 2:
        values = sorted(groups)
        dots = [(float(value), y, label) for value in values for y, label in groups[value]]
        has_repeats = len(dots) >= 2 * len(values)
        is_wide_range = values[0] > 0 and values[-1] / values[0] >= 30
        return Effect(key, [], dots, [(float(v), mean[v]) for v in values] if has_repeats else [], is_wide_range)
    order = sorted(groups) if numeric else sorted(groups, key=lambda value: mean[value])
    shifted = [
        (i + 0.36 * ((j + 0.5) / len(groups[value]) - 0.5), y, label)
        for i, value in enumerate(order)
        for j, (y, label) in enumerate(groups[value])
    ]
    means = [(float(i), mean[value]) for i, value in enumerate(order) if len(groups[value]) > 1]
    return Effect(key, [format_value(value) for value in order], shifted, means, False)
