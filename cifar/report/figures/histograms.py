"""How the gradients and the updates of each layer are distributed, in the last epoch that was looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar.errors import UserError
from cifar.registry import figures
from cifar.report.formatting import format_power
from cifar.report.labels import set_layer_ticks
from cifar.report.load import Run
from cifar.report.style import Nothing
from cifar.tracking.histograms import KINDS, NUM_BINS, bin_edges, read_histograms
from cifar.tracking.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TICKS = 6
_TITLES = {"gradients": "gradients", "updates": "weight updates"}


@dataclass(frozen=True)
class Distribution:
    """Of one kind of values. `shares` (layers, bins): the part of a layer's values in a bin; a bin is half a power of two."""

    title: str
    shares: list[list[float]]
    span: tuple[float, float]  # where the first bin begins and the last one ends, in bins from the value 1
    ticks: list[tuple[float, float]]  # (place in bins, value): powers of ten


@dataclass(frozen=True)
class Distributions:
    layers: list[str]
    kinds: list[Distribution]
    epoch: int


@figures.register("histograms")
class Histograms:
    scope, order = "run", 30
    title = "Gradients and updates by size"
    caption = (
        "Of each layer (input on top), which part of its gradients and of its updates has which size, over the measured steps "
        "of the last epoch that was looked at. Brighter is more. Blank: zero, or smaller than the layer's largest by 10⁴ᐧ⁷."
    )

    def select(self, run: Run) -> Distributions | Nothing:
        last_epoch = int(run.rows[-1].get("epoch", 0)) if run.rows else 0
        try:
            lines = [line for line in read_histograms(RunDir(run.path)) if line["epoch"] <= last_epoch]
        except UserError as error:
            return Nothing(str(error))
        if not lines:
            return Nothing("the run has no histograms (they or the probes were off, or it was read from W&B)")
        known = lines[-1].get(KINDS[0], {})
        layers = [layer for layer in run.labels.get("layers") or known if layer in known]
        kinds = [_spread(_TITLES[kind], lines[-1].get(kind, {}), layers) for kind in KINDS]
        found = [kind for kind in kinds if kind]
        return Distributions(layers, found, lines[-1]["epoch"]) if found else Nothing("all gradients and updates were zero")

    def size(self, data: Distributions) -> tuple[float, float]:
        return 5.0 * len(data.kinds), min(7.0, max(2.6, 1.2 + 0.19 * len(data.layers)))

    def draw(self, data: Distributions, figure: Figure) -> None:
        from matplotlib.colors import PowerNorm

        panels = figure.subplots(1, len(data.kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, data.kinds, strict=True):
            axes.grid(visible=False)
            axes.imshow(kind.shares, aspect="auto", norm=PowerNorm(0.5), cmap="viridis", interpolation="nearest",
                        extent=(*kind.span, len(data.layers) - 0.5, -0.5))  # fmt: skip
            axes.set_xticks([place for place, _ in kind.ticks], [format_power(value) for _, value in kind.ticks])
            axes.set_xlabel(f"size of {kind.title}, epoch {data.epoch} (log)")
            axes.tick_params(axis="y", labelsize=7, length=0)
        set_layer_ticks(panels[0].yaxis, data.layers)


def _spread(title: str, histograms: dict[str, Any], layers: list[str]) -> Distribution | None:
    """The histograms of the layers over common bins of sizes, both signs together; None where all values are zero."""
    by_layer = [_count_by_size(histograms[layer]) if layer in histograms else {} for layer in layers]
    places = [place for counts in by_layer for place in counts]
    if not places:
        return None
    first, end = min(places), max(places) + 1
    totals = [sum(histograms[layer]["counts"]) if layer in histograms else 0 for layer in layers]
    shares = [
        [counts[place] / total if place in counts else math.nan for place in range(first, end)]
        for counts, total in zip(by_layer, totals, strict=True)
    ]
    powers = [p for p in range(-50, 51) if first <= _place(10.0**p) <= end]
    powers = powers[:: math.ceil(len(powers) / MAX_TICKS) or 1]
    return Distribution(title, shares, (first, end), [(_place(10.0**p), 10.0**p) for p in powers])


def _count_by_size(histogram: dict[str, Any]) -> dict[int, int]:
    """Place of a bin -> how many values are in it. Without the bins around zero, and without empty bins."""
    half, counts = NUM_BINS // 2, histogram["counts"]
    lows = bin_edges(histogram["top"])[half + 1 : -1]  # of the bins to the right of the one that has zero
    both = [counts[half + 1 + i] + counts[half - 2 - i] for i in range(len(lows))]
    return {round(_place(low)): count for low, count in zip(lows, both, strict=True) if count}


def _place(value: float) -> float:
    """Where a positive value is, in bins from 1: whole at the edges of bins, straight between a power of two and the next."""
    mantissa, exponent = math.frexp(value)  # 0.5 <= mantissa < 1
    return 2 * (exponent - 1) + 2 * (2 * mantissa - 1)
