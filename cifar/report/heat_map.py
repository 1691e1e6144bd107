"""A heat map of one number of each layer over the training: a row for each layer, a column for each epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar.report.formatting import format_power
from cifar.report.labels import set_epoch_axis, set_layer_ticks
from cifar.report.load import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class HeatMap:
    layers: list[str]
    epochs: list[int]
    values: list[list[float]]  # (layers, epochs), nan where there is no positive number
    limits: tuple[float, float]


def select_heat_map(run: Run, metric: str, largest: float = math.inf) -> HeatMap | None:
    """The rows that have the metric; None if there are none. Values from `largest` on are left out.

    `limits` is (nan, nan) if no value is positive.
    """
    layers = run.layers_with(metric)
    rows = [row for row in run.rows if any(f"{metric}/{layer}" in row for layer in layers)]
    if not rows:
        return None
    values = [[_positive_or_nan(row.get(f"{metric}/{layer}"), largest) for row in rows] for layer in layers]
    seen = sorted(value for line in values for value in line if math.isfinite(value))
    cut = len(seen) // 50  # without the 2 % at each end
    limits = (seen[cut], max(seen[-1 - cut], seen[cut] * 10)) if seen else (math.nan, math.nan)
    return HeatMap(layers, [int(row.get("epoch", i + 1)) for i, row in enumerate(rows)], values, limits)


def size_heat_map(data: HeatMap) -> tuple[float, float]:
    """Width and height in inches."""
    return 8.0, min(7.0, max(2.6, 1.2 + 0.19 * len(data.layers)))


def draw_heat_map(data: HeatMap, figure: Figure, label: str) -> None:
    """Draw it on a logarithmic scale of colours. `label`: of the scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = figure.subplots()
    axes.grid(visible=False)
    norm = LogNorm(*data.limits)
    image = axes.imshow(data.values, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest",
                        extent=(data.epochs[0] - 0.5, data.epochs[-1] + 0.5, len(data.layers) - 0.5, -0.5))  # fmt: skip
    set_layer_ticks(axes.yaxis, data.layers)
    axes.tick_params(axis="y", labelsize=7, length=0)
    set_epoch_axis(axes, max_ticks=10)
    bar = figure.colorbar(image, pad=0.02, aspect=35, extend="both")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_power(value)))
    is_narrow = data.limits[1] / data.limits[0] < 100
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_narrow else (1.0,)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(label)
    bar.outline.set_visible(False)


def _positive_or_nan(value: object, largest: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < largest else math.nan  # type: ignore[operator, arg-type]
