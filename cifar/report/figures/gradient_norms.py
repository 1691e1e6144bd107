"""The norm of each layer's gradient over the training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cifar.registry import figures
from cifar.report.heat_map import HeatMap, draw_heat_map, select_heat_map, size_heat_map
from cifar.report.load import Run
from cifar.report.style import Nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@figures.register("gradient_norms")
class GradientNorms:
    scope, order = "run", 15
    title = "Gradient norms over training"
    caption = (
        "Norm of each weight's gradient, by layer (input on top) and epoch, averaged over the measured steps. Rows that "
        "get darker towards the input are a vanishing gradient. Blank: a gradient of zero."
    )

    def select(self, run: Run) -> HeatMap | Nothing:
        data = select_heat_map(run, "gradient_norm")
        if data is None:
            return Nothing("the run has no gradient_norm rows (probe gradient_flow was off, or no epoch has ended)")
        return data if math.isfinite(data.limits[0]) else Nothing("every gradient is zero")

    def size(self, data: HeatMap) -> tuple[float, float]:
        return size_heat_map(data)

    def draw(self, data: HeatMap, figure: Figure) -> None:
        draw_heat_map(data, figure, "gradient norm (log)")
