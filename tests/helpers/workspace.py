"""What W&B's page shows of a run by itself, worked out from what a server was sent."""

from __future__ import annotations

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


def summary_keys(run: Run) -> set[str]:
    return {key for key in run.summary if key[0] != "_"}
