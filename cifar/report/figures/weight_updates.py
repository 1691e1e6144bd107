"""The size of each layer's updates over the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar.registry import figures
from cifar.report.formatting import format_power
from cifar.report.labels import set_epoch_axis, set_layer_ticks
from cifar.report.load import Run
from cifar.report.style import Nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_RATIO = 1e3  # older runs have 1e8 and more where the weights before the step were zero


@dataclass(frozen=True)
class Updates:
    layers: list[str]
    epochs: list[int]
    ratio: list[list[float]]  # (layers, epochs), nan where nothing moved or there is no ratio
    limits: tuple[float, float]


@figures.register("weight_updates")
class WeightUpdates:
    scope, order = "run", 20
    title = "Weight updates over training"
    caption = (
        "Norm of one update over the norm of the weights it moves, by layer (input on top) and epoch. Around 10⁻³ is the usual "
        "order; a dark row is a layer that hardly learns, a bright one is thrown about. Blank: no update, or weights of zero."
    )

    def select(self, run: Run) -> Updates | Nothing:
        layers = run.layers_with("update_ratio")
        rows = [row for row in run.rows if any(f"update_ratio/{layer}" in row for layer in layers)]
        if not rows:
            return Nothing("the run has no update_ratio rows (probe weight_updates was off, or no epoch has ended)")
        ratio = [[_ratio_or_nan(row.get(f"update_ratio/{layer}")) for row in rows] for layer in layers]
        seen = sorted(value for line in ratio for value in line if math.isfinite(value))
        if not seen:
            return Nothing("no weight was moved")
        limits = (
            seen[len(seen) // 50],
            max(seen[-1 - len(seen) // 50], seen[len(seen) // 50] * 10),
        )  # without the 2 % at each end
        return Updates(layers, [int(row.get("epoch", i + 1)) for i, row in enumerate(rows)], ratio, limits)

    def size(self, data: Updates) -> tuple[float, float]:
        return 8.0, min(7.0, max(2.6, 1.2 + 0.19 * len(data.layers)))

    def draw(self, data: Updates, figure: Figure) -> None:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes = figure.subplots()
        axes.grid(visible=False)
        norm = LogNorm(*data.limits)
        image = axes.imshow(data.ratio, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest",
                            extent=(data.epochs[0] - 0.5, data.epochs[-1] + 0.5, len(data.layers) - 0.5, -0.5))  # fmt: skip
        set_layer_ticks(axes.yaxis, data.layers)
        axes.tick_params(axis="y", labelsize=7, length=0)
        set_epoch_axis(axes, max_ticks=10)
        bar = figure.colorbar(image, pad=0.02, aspect=35, extend="both")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
        is_narrow = data.limits[1] / data.limits[0] < 100
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_narrow else (1.0,)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.set_label("update norm / weight norm (log)")
        bar.outline.set_visible(False)


def _ratio_or_nan(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if 0 < value < MAX_RATIO else math.nan
