"""Accuracy and loss by epoch: of one run, and of all points of a sweep."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar.registry import figures
from cifar.report.aggregate import Comparison, Point
from cifar.report.formatting import format_power
from cifar.report.labels import label_line_ends, set_epoch_axis
from cifar.report.load import Run
from cifar.report.metric_rows import read_column
from cifar.report.palette import BLUE, MUTED, ORANGE, ramp_colours
from cifar.report.style import Nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = tuple[list[int], list[float]]  # epochs, values
MAX_LINES = 100  # of more, those of the front are drawn, and where half and nine tenths of all are
MAX_NAMED = 14  # if there are more lines, only those of the front are named


def read_series(rows: Sequence[dict[str, Any]], key: str, scale: float = 1.0) -> Series:
    """The finite values of `key` by epoch."""
    values, epochs = read_column(rows, key), read_column(rows, "epoch")
    if values is not None and epochs is not None:
        is_known = np.isfinite(values) & np.isfinite(epochs)
        return epochs[is_known].astype(int).tolist(), (scale * values[is_known]).tolist()
    pairs = [
        (int(row["epoch"]), scale * row[key])
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key]) and "epoch" in row
    ]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


series = read_series  # old name, for plug-ins


@dataclass(frozen=True)
class Line:
    label: str
    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    is_on_front: bool


@dataclass(frozen=True)
class Band:
    """Where a share of many lines is, by epoch."""

    epochs: list[int]
    low: list[float]
    high: list[float]
    alpha: float


@dataclass(frozen=True)
class Lines:
    """What is drawn of lines in the order of their cost: all of them, or of many those of the front, and bands."""

    drawn: list[Line]
    places: list[int]  # of the drawn ones among all
    num_lines: int
    bands: list[Band]


@dataclass(frozen=True)
class LearningData:
    accuracy: Lines
    loss: Lines
    is_front_only: bool  # only the front is coloured and named, because there are many lines


@figures.register("learning_curves")
class LearningCurves:
    scope, order = "sweep", 10
    title = "Learning curves"
    caption = (
        "Validation accuracy and loss after each epoch, mean over seeds; the band spans the smallest and the largest seed. "
        "Colours run from the fewest multiply-adds to the most. Of many configurations those of the front are drawn; the grey "
        "bands have half and nine tenths of all."
    )

    def select(self, comparison: Comparison) -> LearningData | Nothing:
        accuracy = _select_lines(comparison.configurations, "val/acc", 100.0)
        if not accuracy.num_lines:
            return Nothing("no finished run has validation rows")
        loss = _select_lines(comparison.configurations, "val/loss", 1.0)
        return LearningData(accuracy, loss, accuracy.num_lines > MAX_NAMED)

    def size(self, data: LearningData) -> tuple[float, float]:
        return 9.6, 3.9

    def draw(self, data: LearningData, figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        for axes, lines, title in ((left, data.loss, "validation loss"), (right, data.accuracy, "validation accuracy (%)")):
            ends = []
            for band in lines.bands:
                axes.fill_between(band.epochs, band.low, band.high, color=MUTED, alpha=band.alpha, lw=0)
            for line, ramp in zip(lines.drawn, ramp_colours(lines.num_lines, lines.places), strict=True):
                grey = data.is_front_only and not line.is_on_front
                colour = MUTED if grey else ramp
                style = {"lw": 0.8, "alpha": 0.45} if grey else {"lw": 1.6}
                axes.fill_between(line.epochs, line.low, line.high, color=colour, alpha=0.15, lw=0)
                (drawn,) = axes.plot(
                    line.epochs, line.mean, color=colour, marker="o" if len(line.epochs) == 1 else None, **style
                )
                drawn.set_gid(f"tip:{line.label}")
                if not grey:
                    ends.append((line.epochs[-1], line.mean[-1], line.label, colour))
            axes.set_title(title)
            set_epoch_axis(axes)
            if axes is right:
                step = math.ceil(len(ends) / MAX_NAMED) or 1  # of many, some are named, the best one among them
                label_line_ends(axes, sorted(ends, key=lambda end: -end[1])[::step])


def _select_lines(points: Sequence[Point], key: str, scale: float) -> Lines:
    """The lines of a metric. Points without it have none."""
    if len(points) <= MAX_LINES:
        lines = [line for point in points if (line := _average_seeds(point, key, scale)).epochs]
        return Lines(lines, [*range(len(lines))], len(lines), [])
    places, epochs, values = _read_means(points, key, scale)
    present = np.unique(places)
    chosen = [place for place in present.tolist() if points[place].on_front or len(present) <= MAX_LINES]
    drawn = [_average_seeds(points[place], key, scale) for place in chosen]
    bands = _compute_bands(epochs, values) if len(present) > MAX_LINES else []
    return Lines(drawn, np.searchsorted(present, chosen).tolist(), len(present), bands)


def _read_means(points: Sequence[Point], key: str, scale: float) -> tuple[Any, Any, Any]:
    """The means of the seeds of many points: place of the point, epoch, mean, each (values,)."""
    columns = []
    for point in points:
        rows: Sequence[dict[str, Any]] = point.runs[0].rows if len(point.runs) == 1 else ()
        columns.append((read_column(rows, key), read_column(rows, "epoch")))
    is_single = np.array([values is not None and epochs is not None for values, epochs in columns], bool)
    singles = [(values, epochs) for values, epochs in columns if values is not None and epochs is not None]
    places = np.repeat(np.flatnonzero(is_single), [len(epochs) for _, epochs in singles])
    values, epochs = (np.concatenate([np.zeros(0), *each]) for each in (zip(*singles, strict=True) if singles else ((), ())))
    is_known = np.isfinite(values) & np.isfinite(epochs)
    places, epochs, values = places[is_known], epochs[is_known].astype(int), scale * values[is_known]
    is_single[places[1:][(np.diff(places) == 0) & (np.diff(epochs) <= 0)]] = False  # an epoch is there twice
    others = [(place, _average_seeds(points[place], key, scale)) for place in np.flatnonzero(~is_single).tolist()]
    is_kept = is_single[places]
    return (
        np.concatenate([places[is_kept], *(np.full(len(line.epochs), place) for place, line in others)]),
        np.concatenate([epochs[is_kept], *(np.array(line.epochs, int) for _, line in others)]),
        np.concatenate([values[is_kept], *(np.array(line.mean, float) for _, line in others)]),
    )


def _compute_bands(epochs: Any, values: Any) -> list[Band]:
    """Where half and nine tenths of many lines are, at each epoch."""
    order = np.argsort(epochs, kind="stable")
    known, starts = np.unique(epochs[order], return_index=True)
    ordered = [np.sort(part) for part in np.split(values[order], starts[1:])]

    def read_edge(share: float) -> list[float]:
        return [float(part[round(share * (len(part) - 1))]) for part in ordered]

    shares = ((0.05, 0.95, 0.18), (0.25, 0.75, 0.3))
    return [Band(known.tolist(), read_edge(low), read_edge(high), alpha) for low, high, alpha in shares]


def _average_seeds(point: Point, key: str, scale: float) -> Line:
    series = [read_series(run.rows, key, scale) for run in point.runs]
    epochs = series[0][0]
    if all(other == epochs for other, _ in series) and all(map(operator.lt, epochs, epochs[1:])):
        curves = [values for _, values in series]
        if len(curves) == 1:
            return Line(point.label, epochs, curves[0], curves[0], curves[0], point.on_front)
        sums = map(operator.add, *curves) if len(curves) == 2 else map(math.fsum, zip(*curves, strict=True))
        means = [total / len(curves) for total in sums]
        return Line(point.label, epochs, means, [*map(min, *curves)], [*map(max, *curves)], point.on_front)
    by_epoch: dict[int, list[float]] = defaultdict(list)
    for epochs, values in series:
        for epoch, value in zip(epochs, values, strict=True):
            by_epoch[epoch].append(value)
    epochs = sorted(by_epoch)  # of seeds that have other epochs, or one of them twice
    of_seeds = [by_epoch[epoch] for epoch in epochs]
    means = [math.fsum(values) / len(values) for values in of_seeds]
    return Line(point.label, epochs, means, [*map(min, of_seeds)], [*map(max, of_seeds)], point.on_front)


@figures.register("curves")
class Curves:
    scope, order = "run", 0
    title = "Loss, accuracy and learning rate"
    caption = (
        "By epoch. Training values are averages while the epoch goes on, with augmentation; validation is scored after it."
    )

    def select(self, run: Run) -> dict[str, Series] | Nothing:
        scales = {"train/loss": 1.0, "val/loss": 1.0, "train/acc": 100.0, "val/acc": 100.0, "train/lr": 1.0}
        data = {key: read_series(run.rows, key, scale) for key, scale in scales.items()}
        return data if any(epochs for epochs, _ in data.values()) else Nothing("the run has no finished epoch yet")

    def size(self, data: dict[str, Series]) -> tuple[float, float]:
        return 10.0, 3.2

    def draw(self, data: dict[str, Series], figure: Figure) -> None:
        panels = figure.subplots(1, 3, width_ratios=(1, 1, 0.7))
        for axes, kind, title in zip(panels, ("loss", "acc", "lr"), ("loss", "accuracy (%)", "learning rate"), strict=True):
            ends = []
            for part, colour, name in (("train", ORANGE, "training"), ("val", BLUE, "validation")):
                epochs, values = data.get(f"{part}/{kind}", ([], []))
                axes.plot(
                    epochs, values, color=MUTED if kind == "lr" else colour, marker="o" if len(epochs) < 3 else None, ms=4
                )
                if epochs and kind != "lr":
                    ends.append((epochs[-1], values[-1], name, colour))
            axes.set_title(title)
            set_epoch_axis(axes)
            if kind == "lr":
                axes.yaxis.set_major_formatter(lambda value, _: format_power(round(value, 9)))
                axes.set_ylim(bottom=0)
            label_line_ends(axes, ends)
