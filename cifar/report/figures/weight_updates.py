"""The size of each layer's updates over the training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cifar.registry import figures
from cifar.report.heat_map import HeatMap, draw_heat_map, select_heat_map, size_heat_map
from cifar.report.load import Run
from cifar.report.style import Nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_RATIO = 1e3  # older runs have 1e8 and more where the weights before the step were zero


@figures.register("weight_updates")
class WeightUpdates:
    scope, order = "run", 20
    title = "Weight updates over training"
    caption = (
        "Norm of one update over the norm of the weights it moves, by layer (input on top) and epoch. Around 10⁻³ is the usual "
        "order; a dark row is a layer that hardly learns, a bright one is thrown about. Blank: no update, or weights of zero."
    )

    def select(self, run: Run) -> HeatMap | Nothing:
        data = select_heat_map(run, "update_ratio", MAX_RATIO)
        if data is None:
            return Nothing("the run has no update_ratio rows (probe weight_updates was off, or no epoch has ended)")
        return data if math.isfinite(data.limits[0]) else Nothing("no weight was moved")

    def size(self, data: HeatMap) -> tuple[float, float]:
        return size_heat_map(data)

    def draw(self, data: HeatMap, figure: Figure) -> None:
        draw_heat_map(data, figure, "update norm / weight norm (log)")
