"""The custom chart that a run logs itself: the gradient norm by layer, one line for each of some epochs.

It is one of W&B's built-in charts (`wandb/lineseries/v0`). Its numbers are a small table, which the chart reads from the
summary. W&B keeps the chart itself in the run's configuration; a run that is opened again has to send that part again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

METRIC = "gradient_norm"
CHART_KEY = "charts/gradient_norm_by_layer"
TABLE_KEY = f"{CHART_KEY}_table"  # wandb's name for the table of a chart
MAX_LINES = 6
PRESET = "wandb/lineseries/v0"


def select_points(rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> list[list[Any]]:
    """Rows of metrics.jsonl -> [number of the layer, epoch in words, log10 of the norm], for the first and the last epoch and
    some between. A gradient of zero has no point.

    layers: in the network's order; others that are measured come after them.
    """
    measured = [row for row in rows if any(key.startswith(f"{METRIC}/") for key in row)]
    keys = [key for row in measured for key in row if key.startswith(f"{METRIC}/")]
    order = list(dict.fromkeys([*(key for layer in layers if (key := f"{METRIC}/{layer}") in set(keys)), *keys]))
    last = len(measured) - 1
    chosen = sorted({round(n * last / (MAX_LINES - 1)) for n in range(MAX_LINES)}) if measured else []
    width = len(str(measured[-1]["epoch"])) if measured else 0  # W&B sorts the lines as text
    return [
        [number, f"epoch {measured[n]['epoch']:0{width}d}", math.log10(value)]
        for n in chosen
        for number, key in enumerate(order, start=1)
        if isinstance(value := measured[n].get(key), int | float) and 0 < value < math.inf
    ]


def build_chart(rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Any:
    """wandb's CustomChart; None if no gradient was measured."""
    import wandb

    points = select_points(rows, layers)
    if not points:
        return None
    table = wandb.Table(columns=["layer", "epoch", "norm"], data=points)
    fields = {"step": "layer", "lineKey": "epoch", "lineVal": "norm"}
    titles = {"title": "log10 of the gradient norm, by layer from input to output", "xname": "layer"}
    chart = wandb.plot_table(PRESET, table, fields, titles)
    chart.set_key(CHART_KEY)
    return chart


def define_chart(run: Any, chart: Any) -> None:
    """Tell W&B of the chart without a row of its own. `Run.log` does this too, but only together with a row.

    `_config_callback` is private; tests/integration/wandb/test_workspace.py compares what it sends with what `Run.log` sends.
    """
    run._config_callback(key=chart.spec.config_key, val=chart.spec.config_value)
