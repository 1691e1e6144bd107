"""Axes and labels of a figure: logarithmic axes, layers and epochs along an axis, names beside points and lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar.report.formatting import shorten_text
from cifar.report.palette import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def lay_out_figure(figure: Figure) -> None:
    """Compute the positions of everything. figure.draw_without_rendering() would also draw, which takes longer."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)


def set_log_axis(axis: Any, format_tick: Callable[[float], str]) -> None:
    """Make an x or y axis logarithmic. Ticks are at 1, 2, 5 if there are few decades; `format_tick` writes them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis._set_axes_scale("log")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 and high > low else 1
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0, 3.0) if decades < 4 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axis.set_minor_locator(LogLocator(subs=tuple(range(2, 10)) if decades < 8 else (1.0,)))
    axis.set_minor_formatter(NullFormatter())
    axis.grid(visible=False, which="minor")


def set_epoch_axis(axes: Axes, max_ticks: int = 6) -> None:
    """Put ticks at whole epochs on the x axis; a single epoch gets one tick."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(max_ticks, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def set_layer_ticks(axis: Any, layers: Sequence[str], max_ticks: int = 32) -> None:
    """Write layer names along an axis; every k-th name if there are more than `max_ticks`."""
    step = max(1, math.ceil(len(layers) / max_ticks))
    axis.set_ticks(range(0, len(layers), step), [shorten_text(name, 28) for name in layers[::step]])


def label_line_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], size: float = 7.5) -> None:
    """Write names in the margin to the right of lines. `ends`: (x, y, text, colour). Names that would overlap are moved."""
    if not ends:
        return
    lay_out_figure(axes.figure)  # type: ignore[arg-type]
    pixels_per_point = axes.figure.dpi / 72
    by_height = sorted(ends, key=lambda end: end[1])
    line_heights = [axes.transData.transform((x, y))[1] / pixels_per_point for x, y, _, _ in by_height]
    label_heights = separate_labels(line_heights, min_gap=1.25 * size)
    for (x, y, text, colour), label_height, line_height in zip(by_height, label_heights, line_heights, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            shorten_text(text, 30), (x, y), (10, label_height - line_height), textcoords="offset points",
            color=colour, size=size, va="center", arrowprops=arrow,
        )  # fmt: skip


def separate_labels(positions: Sequence[float], min_gap: float) -> list[float]:
    """Sorted positions -> positions at least `min_gap` apart, in the same order, each cluster around its mean."""
    clusters: list[tuple[float, int]] = []  # (sum of positions minus their offsets in the cluster, size)
    for position in positions:
        total, n = position, 1
        while clusters:
            before, m = clusters[-1]
            if total / n - (before / m + min_gap * m) >= 0:
                break
            clusters.pop()
            total, n = before + total - n * min_gap * m, n + m
        clusters.append((total, n))
    return [total / n + min_gap * i for total, n in clusters for i in range(n)]


@dataclass(frozen=True)
class PointLabel:
    """A name for a point. Earlier labels are placed first. A required label is written even if it overlaps something."""

    x: float
    y: float
    text: str
    colour: str = INK
    is_required: bool = False
    is_bold: bool = False


_OFFSETS = [
    (dx * r, dy * r) for r in (8, 14, 22) for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]


def label_points(
    axes: Axes,
    labels: Sequence[PointLabel],
    paths: Iterable[Sequence[tuple[float, float]]] = (),
    size: float = 7.5,
) -> int:
    """Write names beside points without overlaps and off the given paths -> how many labels found no place."""
    figure: Any = axes.figure
    lay_out_figure(figure)
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent()
    centres = [axes.transData.transform((label.x, label.y)) for label in labels]
    point_boxes = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in centres]
    line_boxes = []
    for path in paths:
        pixels = [axes.transData.transform(xy) for xy in path]
        line_boxes += [
            (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])) for a, b in itertools.pairwise(pixels)
        ]
    label_boxes: list[tuple[float, ...]] = []
    num_left_out = 0
    for label, (cx, cy) in zip(labels, centres, strict=True):
        drawn = axes.annotate(
            shorten_text(label.text, 44), (label.x, label.y), (0, 0), textcoords="offset points",
            size=size, color=label.colour, weight="bold" if label.is_bold else "normal", zorder=6,
        )  # fmt: skip
        drawn.set_in_layout(False)
        extent = drawn.get_window_extent(renderer)
        best: tuple[float, Any, Any] = (math.inf, None, None)
        for i, (dx, dy) in enumerate(_OFFSETS):
            x = cx + dx * scale - (0 if dx > 0 else extent.width if dx < 0 else extent.width / 2)
            y = cy + dy * scale - (0 if dy > 0 else extent.height if dy < 0 else extent.height / 2)
            box = (x, y, x + extent.width, y + extent.height)
            is_outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
            cost = (
                30 * is_outside
                + 20 * _count_overlaps(box, label_boxes, 2)
                + 10 * _count_overlaps(box, point_boxes, 0)
                + 3 * _count_overlaps(box, line_boxes, 0)
                + 0.1 * i
            )
            best = min(best, (cost, (dx, dy), box), key=lambda choice: choice[0])
        cost, (dx, dy), box = best
        if cost >= 10 and not label.is_required:
            drawn.remove()
            num_left_out += 1
            continue
        label_boxes.append(box)
        drawn.set_position((dx, dy))
        drawn.set(
            ha="left" if dx > 0 else "right" if dx < 0 else "center", va="bottom" if dy > 0 else "top" if dy < 0 else "center"
        )
    return num_left_out


def _count_overlaps(box: tuple[float, ...], others: Iterable[tuple[float, ...]], margin: float) -> int:
    return sum(
        box[0] < o[2] + margin and box[2] > o[0] - margin and box[1] < o[3] + margin and box[3] > o[1] - margin for o in others
    )
