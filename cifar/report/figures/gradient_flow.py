"""How much gradient reaches each layer: of one run over its training, and of all networks of a sweep."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar.registry import figures
from cifar.report.aggregate import Comparison
from cifar.report.formatting import format_power, shorten_text
from cifar.report.labels import set_layer_ticks, set_log_axis
from cifar.report.load import Run
from cifar.report.palette import BLUE, MUTED, RED, ramp_colours
from cifar.report.style import Nothing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 12
MAX_LINES = 40  # a panel with more shows where most of them are
METRICS = ("gradient_norm", "gradient_mean")  # the first one that a run has
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_NAMED = 6  # a panel with more lines has no legend


@dataclass(frozen=True)
class Flow:
    layers: list[str]
    first: list[float]  # mean |gradient| by layer, nan where it is zero or missing
    mean: list[float]
    maximum: list[float]
    zero: list[int]  # layers whose last gradient is exactly zero
    epochs: tuple[int, int]


def _read_layers(row: dict[str, Any], metric: str, layers: list[str]) -> list[float]:
    found = [row.get(f"{metric}/{layer}") for layer in layers]
    return [v if isinstance(v, int | float) and math.isfinite(v) and v > 0 else math.nan for v in found]


@figures.register("gradient_flow")
class GradientFlow:
    scope, order = "run", 10
    title = "Gradient flow across layers"
    caption = (
        "Mean and largest |gradient| of each weight, from the input to the output, averaged over the epoch's measured steps. "
        "A line that falls by decades towards the input is a vanishing gradient; a cross is a layer that no gradient reaches."
    )

    def select(self, run: Run) -> Flow | Nothing:
        layers = run.layers_with("gradient_mean")
        rows = [row for row in run.rows if any(f"gradient_mean/{layer}" in row for layer in layers)]
        if not rows:
            return Nothing("the run has no gradient_mean rows (probe gradient_flow was off, or no epoch has ended)")
        first, last = rows[0], rows[-1]
        return Flow(
            layers,
            _read_layers(first, "gradient_mean", layers) if len(rows) > 1 else [],
            _read_layers(last, "gradient_mean", layers),
            _read_layers(last, "gradient_max", layers),
            [i for i, layer in enumerate(layers) if last.get(f"gradient_mean/{layer}") == 0],
            (int(first.get("epoch", 1)), int(last.get("epoch", len(rows)))),
        )

    def size(self, data: Flow) -> tuple[float, float]:
        return min(12.0, max(6.0, 2.5 + 0.24 * len(data.layers))), 4.2

    def draw(self, data: Flow, figure: Figure) -> None:
        axes = figure.subplots()
        where = range(len(data.layers))
        axes.fill_between(where, data.mean, data.maximum, color=BLUE, alpha=0.10, lw=0)
        axes.plot(where, data.maximum, "^-", color=BLUE, ms=4, lw=1, alpha=0.7, label=f"largest, epoch {data.epochs[1]}")
        axes.plot(where, data.mean, "o-", color=BLUE, ms=4.5, label=f"mean, epoch {data.epochs[1]}")
        if data.first:
            axes.plot(where, data.first, "o--", color=MUTED, ms=3, lw=1, label=f"mean, epoch {data.epochs[0]}")
        set_log_axis(axes.yaxis, format_power)
        if data.zero:
            at = axes.get_xaxis_transform()
            axes.plot(
                data.zero,
                [0.02] * len(data.zero),
                "x",
                color=RED,
                ms=7,
                mew=2,
                transform=at,
                label="zero gradient",
                clip_on=False,
            )
        set_layer_ticks(axes.xaxis, data.layers)
        axes.tick_params(axis="x", rotation=60 if len(data.layers) < 14 else 90, labelsize=7)
        axes.set_ylabel("|gradient| (log)")
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


@dataclass(frozen=True)
class Panel:
    title: str
    layers: int
    lines: list[tuple[str, list[float]]]  # label, gradient norm by layer; none of more than MAX_LINES
    num_lines: int
    quantiles: dict[float, list[float]]  # share of the lines -> norm by layer below which they are, of more than MAX_LINES


def _panel_title(model: str, layers: int, has_siblings: bool) -> str:
    """The title of a panel, at most 26 characters. `has_siblings`: the network has other panels."""
    end = f", {layers} layers" if has_siblings else ""
    return shorten_text(model, 26 - len(end)) + end


def _shorten_labels(model: str, lines: list[tuple[str, list[float]]]) -> list[tuple[str, list[float]]]:
    """The labels of a panel's lines without the parts that all of them share."""
    parts = [re.split(r", (?=\w+=)", label) for label, _ in lines]
    shared = {model, *set.intersection(*map(set, parts))} if len(lines) > 1 else set()
    return [
        (", ".join(p for p in parts_of_line if p not in shared) or label, norms)
        for parts_of_line, (label, norms) in zip(parts, lines, strict=True)
    ]


def _colour_labels(lines: Sequence[tuple[str, list[float]]]) -> dict[str, str]:
    labels = sorted({label for label, _ in lines}, key=_sort_by_numbers)
    return dict(zip(labels, ramp_colours(len(labels)), strict=True))


def _sort_by_numbers(label: str) -> list[tuple[float, str]]:
    """A key that puts lr=0.02 before lr=0.1, and text in its order."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", label)
    return [(float(part), "") if index % 2 else (-math.inf, part) for index, part in enumerate(parts)]


def _make_panel(title: str, model: str, layers: int, lines: list[tuple[str, list[float]]]) -> Panel:
    if len(lines) <= MAX_LINES:
        return Panel(title, layers, _shorten_labels(model, lines), len(lines), {})
    by_layer = [sorted(filter(math.isfinite, values)) for values in zip(*(norms for _, norms in lines), strict=True)]
    quantiles = {share: [_read_quantile(values, share) for values in by_layer] for share in QUANTILES}
    return Panel(title, layers, [], len(lines), quantiles)


def _draw_quantiles(axes: Axes, panel: Panel) -> None:
    """The middle line of many, and where half and nine tenths of them are."""
    where = range(1, panel.layers + 1)
    for low, high, alpha in ((0.05, 0.95, 0.18), (0.25, 0.75, 0.3)):
        axes.fill_between(where, panel.quantiles[low], panel.quantiles[high], color=BLUE, alpha=alpha, lw=0)
    axes.plot(where, panel.quantiles[0.5], "o-", color=BLUE, ms=2.5, lw=1.4)
    axes.text(0.03, 0.97, f"{panel.num_lines} configurations", transform=axes.transAxes, size=6.5, color=MUTED, va="top")


def _read_quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))] if ordered else math.nan


@figures.register("gradient_flow_by_network")
class GradientFlowByNetwork:
    scope, order = "sweep", 20
    title = "Gradient flow by network"
    caption = (
        "Norm of each layer's gradient in the last epoch, from the input (left) to the output (right), mean over seeds; one "
        "panel a network, one line a configuration, on one common scale. Of many configurations the middle one is shown, and "
        "where half and nine tenths of them are."
    )

    def select(self, comparison: Comparison) -> list[Panel] | Nothing:
        panels: dict[tuple[str, int], list[tuple[str, list[float]]]] = {}
        for point in comparison.configurations:
            flows = []
            for run in point.runs:
                metric, layers = next(((m, names) for m in METRICS if (names := run.layers_with(m))), ("", []))
                if metric:
                    flows.append(_read_layers(run.rows[-1], metric, layers))
            flows = [flow for flow in flows if len(flow) == len(flows[0]) and any(map(math.isfinite, flow))]
            if flows:
                mean = [*map(statistics.fmean, zip(*flows, strict=True))] if len(flows) > 1 else flows[0]
                panels.setdefault((point.model, len(mean)), []).append((point.label, mean))
        if not panels:
            return Nothing("no finished run has gradient_norm rows (the probes were off)")
        models = [model for model, _ in panels]
        return [
            _make_panel(_panel_title(model, layers, models.count(model) > 1), model, layers, lines)
            for (model, layers), lines in panels.items()
        ][:MAX_PANELS]

    def size(self, data: list[Panel]) -> tuple[float, float]:
        columns = min(4, len(data))
        return 2.45 * columns + 0.7 if columns > 1 else 6.0, 1.9 * math.ceil(len(data) / 4) + 0.5

    def draw(self, data: list[Panel], figure: Figure) -> None:
        columns = min(4, len(data))
        grid = figure.subplots(math.ceil(len(data) / columns), columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(data) :]:
            axes.set_axis_off()
        common = [line for panel in data if len(panel.lines) > 1 for line in panel.lines]
        has_many = any(panel.quantiles for panel in data) or len({label for label, _ in common}) > MAX_NAMED
        shared = {} if has_many else _colour_labels(common)
        for axes, panel in zip(grid.flat, data, strict=False):
            if panel.quantiles:
                _draw_quantiles(axes, panel)
            # The same settings have the same colour in all panels, if these are about the same few settings.
            colours = shared if shared and len(panel.lines) > 1 else _colour_labels(panel.lines)
            for label, norms in sorted(panel.lines, key=lambda line: _sort_by_numbers(line[0])):
                where = range(1, panel.layers + 1)
                (line,) = axes.plot(where, norms, "o-", color=colours[label], ms=2.5, lw=1.2, label=label)
                line.set_gid(f"tip:{label}")
            if 1 < len(panel.lines) <= MAX_NAMED:
                axes.legend(fontsize=6.5, handlelength=1.2, labelspacing=0.2, borderaxespad=0.2)
            axes.set_title(panel.title, size=8.5)
            axes.set_xticks([1, panel.layers] if panel.layers > 1 else [1])
            if axes is grid[0, 0]:
                set_log_axis(axes.yaxis, format_power)
        figure.supylabel("gradient norm (log)", size=9)
        figure.supxlabel("layer, input → output", size=9)
