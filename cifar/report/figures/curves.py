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
from cifar.report.aggregate import Comparison
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
class LearningData:
    accuracy: list[Line]
    loss: list[Line]
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
        accuracy = [_average_seeds(point, "val/acc", 100.0) for point in comparison.configurations]
        loss = [_average_seeds(point, "val/loss", 1.0) for point in comparison.configurations]
        kept = [line for line in accuracy if line.epochs]
        if not kept:
            return Nothing("no finished run has validation rows")
        return LearningData(kept, [line for line in loss if line.epochs], len(kept) > MAX_NAMED)

    def size(self, data: LearningData) -> tuple[float, float]:
        return 9.6, 3.9

    def draw(self, data: LearningData, figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        for axes, lines, title in ((left, data.loss, "validation loss"), (right, data.accuracy, "validation accuracy (%)")):
            ends = []
            if len(lines) > MAX_LINES:
                _draw_quantiles(axes, lines)
            drawn_places = [place for place, line in enumerate(lines) if line.is_on_front or len(lines) <= MAX_LINES]
            for place, ramp in zip(drawn_places, ramp_colours(len(lines), drawn_places), strict=True):
                line = lines[place]
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


def _draw_quantiles(axes: Any, lines: Sequence[Line]) -> None:
    """Where half and nine tenths of many lines are, at each epoch."""
    all_epochs = np.concatenate([np.array(line.epochs) for line in lines])
    all_values = np.concatenate([np.array(line.mean) for line in lines])
    order = np.lexsort((all_values, all_epochs))
    epochs, starts, counts = np.unique(all_epochs[order], return_index=True, return_counts=True)
    ordered = all_values[order]
    for low, high, alpha in ((0.05, 0.95, 0.18), (0.25, 0.75, 0.3)):
        edges = [ordered[starts + np.rint(share * (counts - 1)).astype(int)] for share in (low, high)]
        axes.fill_between(epochs, *edges, color=MUTED, alpha=alpha, lw=0)


def _average_seeds(point: Any, key: str, scale: float) -> Line:
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
