"""What W&B's page shows of a run by itself, worked out from what a server was sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helpers.protocol import Run

HIDDEN = 2  # wandb_internal.proto, MetricOptions: 1 step_sync, 2 hidden, 3 defined


def definitions(run: Run) -> list[dict[str, Any]]:
    """What `define_metric` has said: "1" is the name, "2" a glob, "6" the options, "7" the summary."""
    return list(run.raw_config["_wandb"]["value"].get("m", []))


def hidden_keys(run: Run) -> set[str]:
    """Keys that are hidden by their own name. A glob does not count: whether W&B's page reads it is not known."""
    return {metric["1"] for metric in definitions(run) if "1" in metric and HIDDEN in metric.get("6", [])}


def history_keys(run: Run) -> set[str]:
    return {key for row in run.history for key in row if key[0] != "_"}


def custom_charts(run: Run) -> set[str]:
    return set(run.raw_config["_wandb"]["value"].get("visualize", {}))


def automatic_panels(run: Run) -> set[str]:
    """One for each logged key that is not hidden, pictures and tables included, and one for each custom chart."""
    return (history_keys(run) - hidden_keys(run)) | custom_charts(run)


# Of summary.json: the record's file on W&B has them, its table of runs has no column for them.
NOT_COLUMNS = {
    "weights_bytes", "joules_missing", "teacher_train_flops",
    "latency_p5_seconds", "latency_p95_seconds", "latency_n", "latency_device",
}  # fmt: skip


def list_columns(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the table of runs on W&B shows of a run's summary.json."""
    return {key: value for key, value in summary.items() if key not in NOT_COLUMNS}


def summary_keys(run: Run) -> set[str]:
    return {key for key in run.summary if key[0] != "_"}
