"""Accuracy against multiply-adds: the main figure of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar.registry import figures
from cifar.report.aggregate import Comparison, Point
from cifar.report.formatting import format_macs
from cifar.report.labels import PointLabel, label_points, set_log_axis
from cifar.report.palette import BLUE, DIM, GREEN, INK, MUTED, ORANGE, PAPER
from cifar.report.style import Nothing
from cifar.system.durations import format_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


STYLES = {"front": (BLUE, "o"), "dominated": (DIM, "o"), "views": (GREEN, "D")}
MAX_NAMED = 24  # if there are more points, only the front is named
MAX_DRAWN_APART = 300  # dominated points; more are drawn as small dots without bars


@dataclass(frozen=True)
class Dot:
    x: float  # MACs
    y: float  # accuracy in percent
    error: float | None  # half-width of the interval, percentage points; None for fewer than three seeds
    bar: tuple[float, float] | None  # the ends of the interval in percent, cut at 0 and 100
    seeds: tuple[float, ...]  # both accuracies in percent, if there are two seeds
    num_seeds: int
    num_seeds_text: str  # the number, or "1 of 3" if two seeds ended without a result
    label: str
    kind: str  # front, dominated or views (several views of an image: not comparable with the front)
    tip: str  # "" where the dot is drawn without one

    @property
    def is_on_front(self) -> bool:
        return self.kind == "front"


@dataclass(frozen=True)
class Data:
    dots: list[Dot]
    steps: list[tuple[float, float]]  # corners of the front
    budget: float | None
    limits: tuple[float, float]
    axis: str
    unit: str = "MACs"


@figures.register("accuracy_vs_macs")
class AccuracyVsMacs:
    scope, order = "sweep", 0
    title = "Accuracy against multiply-adds"
    caption = (
        "Each point is one configuration. Bars are the 95 % Student-t interval of the mean over n seeds, cut at 0 and 100 %; "
        "with two seeds, small dots show both; a hollow point is a single seed. The line is the Pareto front: the best "
        "accuracy that so many multiply-adds have bought here. Points that another one beats at no higher cost are dimmed. "
        "MACs: convolutions, linear and recurrent layers, other matrix products, forward, one 3×32×32 image; FLOPs are twice "
        "that."
    )

    def select(self, comparison: Comparison) -> Data | Nothing:
        if not comparison.points:
            return Nothing(f"no finished run with {comparison.accuracy_label.partition(',')[0]} and verified MACs yet")
        has_tips = sum(not point.on_front for point in comparison.points) <= MAX_DRAWN_APART
        dots = [
            Dot(
                p.macs * comparison.cost_factor,
                100 * p.mean,
                None if p.ci_half_width is None else 100 * p.ci_half_width,
                (100 * p.interval[0], 100 * p.interval[1]) if p.interval else None,
                tuple(100 * accuracy for accuracy in p.seed_accuracies),
                p.num_seeds,
                p.num_seeds_text,
                p.label,
                point_kind(p),
                point_tooltip(p) if p.on_front or has_tips else "",
            )
            for p in comparison.points
        ]
        budget = comparison.budget * comparison.cost_factor if comparison.budget else None
        xs = [dot.x for dot in dots] + ([budget] if budget else [])
        limits = (min(xs) / 1.6, max(xs) * 2.2)
        front = [dot for dot in dots if dot.is_on_front]
        steps: list[tuple[float, float]] = []
        for dot, end in zip(front, [*(dot.x for dot in front[1:]), limits[1]], strict=False):
            steps += [(dot.x, dot.y), (end, dot.y)]
        unit = {"macs": "MACs", "flops": "FLOPs"}[comparison.cost_unit]
        return Data(dots, steps, budget, limits, comparison.accuracy_label, unit)

    def size(self, data: Data) -> tuple[float, float]:
        return 8.4, 4.8

    def draw(self, data: Data, figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_xlim(*data.limits)
        set_log_axis(axes.xaxis, lambda macs: format_macs(macs).removesuffix("MACs"))
        if data.steps:
            axes.plot(*zip(*data.steps, strict=True), color=BLUE, lw=1.4, alpha=0.75, zorder=2)
        others = [dot for dot in data.dots if not dot.is_on_front]
        if len(others) > MAX_DRAWN_APART:  # as one picture: piles show as dark places, and the file stays small
            xs, ys = [dot.x for dot in others], [dot.y for dot in others]
            axes.scatter(xs, ys, s=5, color=STYLES["dominated"][0], alpha=0.35, lw=0, zorder=3, rasterized=True)
        for dot in data.dots if len(others) <= MAX_DRAWN_APART else [dot for dot in data.dots if dot.is_on_front]:
            colour, shape = STYLES[dot.kind]
            height = 5 if dot.is_on_front else 3
            if dot.bar:
                yerr = [[dot.y - dot.bar[0]], [dot.bar[1] - dot.y]]
                axes.errorbar(dot.x, dot.y, yerr=yerr, color=colour, elinewidth=1.1, capsize=2.5, zorder=height)
            axes.plot([dot.x] * len(dot.seeds), dot.seeds, "o", ms=3.9, mec=PAPER, mew=0.4, color=colour, zorder=height + 2)
            face = PAPER if dot.num_seeds == 1 else colour
            (point,) = axes.plot(dot.x, dot.y, shape, ms=6.5, mec=colour, mfc=face, mew=1.5, zorder=height + 1)
            point.set_gid(f"tip:{dot.tip}")
        axes.margins(y=0.12)
        if data.budget:
            axes.axvline(data.budget, color=ORANGE, lw=1.1, ls=(0, (4, 3)), zorder=1)
            transform = axes.get_xaxis_transform()
            axes.text(
                data.budget,
                0.01,
                f" budget {format_macs(data.budget).removesuffix('MACs')}{data.unit}",
                color=ORANGE,
                size=8,
                transform=transform,
                va="bottom",
            )
        name = "multiply-adds (MACs)" if data.unit == "MACs" else "FLOPs (2 × MACs)"
        axes.set_xlabel(f"{name} for one image, log scale")
        axes.set_ylabel(f"{data.axis} (%)")
        self._draw_legend(axes, data)
        drawn = data.dots if len(others) <= MAX_DRAWN_APART else [dot for dot in data.dots if dot.is_on_front]
        bars = [[(d.x, min(ends)), (d.x, max(ends))] for d in drawn for ends in [d.bar or d.seeds or (d.y,)]]
        is_same_n = len({dot.num_seeds_text for dot in data.dots}) == 1
        ordered = sorted(data.dots, key=lambda dot: not dot.is_on_front)
        named = [dot for dot in ordered if dot.is_on_front or len(ordered) <= MAX_NAMED]
        marks = [
            PointLabel(
                d.x,
                d.y,
                d.label if is_same_n else f"{d.label} ({d.num_seeds_text})",
                INK if d.is_on_front else MUTED,
                is_required=d.is_on_front,
            )
            for d in named
        ]
        num_hidden = len(ordered) - len(named) + label_points(axes, marks, [data.steps, *bars])
        note = f"n = {data.dots[0].num_seeds_text} each" if is_same_n else "n in brackets"
        note += f"; {num_hidden} dominated without a name" if num_hidden else ""
        axes.set_title(note, loc="right", size=8, color=MUTED, weight="normal")

    def _draw_legend(self, axes: Axes, data: Data) -> None:
        """Draw a legend of the kinds of points that exist. It is above the axes, so that it covers no point."""
        colour = STYLES[data.dots[0].kind][0]
        handles = {"Pareto front": axes.lines[0]} if data.steps else {}
        if any(dot.bar for dot in data.dots):
            handles["mean ± 95 %, n seeds"] = axes.plot([], [], "o", ms=5.5, color=colour)[0]
        if any(dot.seeds for dot in data.dots):
            handles["each of two seeds"] = axes.plot([], [], "o", ms=3.9, color=colour)[0]
        if any(dot.num_seeds == 1 for dot in data.dots):
            handles["one seed"] = axes.plot([], [], "o", ms=5.5, mec=colour, mfc=PAPER, mew=1.5)[0]
        for kind, name in (("dominated", "dominated"), ("views", "several views (MACs × views)")):
            if any(dot.kind == kind for dot in data.dots):
                handles[name] = axes.plot([], [], STYLES[kind][1], ms=5.5, color=STYLES[kind][0])[0]
        axes.legend(
            [*handles.values()], [*handles], loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles),
            borderaxespad=0.3, columnspacing=1.4, handletextpad=0.5, labelcolor=MUTED, fontsize=8,
        )  # fmt: skip


def point_kind(point: Point) -> str:
    return "front" if point.on_front else "dominated" if point.num_views == 1 else "views"


def point_tooltip(point: Point) -> str:
    """The text that appears when the reader points at the point."""
    seeds = ", ".join(str(run.config.get("seed")) for run in point.runs)
    seconds = f"\n{format_duration(point.seconds)} a run" if point.seconds is not None else ""
    place = {"front": "on the front", "dominated": "dominated", "views": "several views: not compared with the front"}[
        point_kind(point)
    ]
    return (
        f"{point.label}\n{point.accuracy_text}\n{format_macs(point.macs)}, {point.params / 1e6:.3g} M parameters\n"
        f"seeds {seeds}; {place}{seconds}"
    )
