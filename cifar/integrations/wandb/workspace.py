"""What a project's page on W&B shows by itself: which metrics have a panel, and which are columns of the table of runs.

W&B makes a panel of each key of the history and a column of each key of the summary. A network of 20 layers has more than a
hundred keys. So the numbers of single layers are hidden from panels and kept out of the summary; charts that are asked for
still find them.

    definitions = MetricDefinitions(run)
    definitions.define(row)          # before the row is logged

Read in the source of wandb-core 0.31 (core/internal/runmetric), and tested against it:

- Of several globs that match a key, it takes any one. So every key is defined by its own name, and the globs do not overlap.
- A name is cut at its dots to find its place in the summary, while a key of a row is not cut. So a key with dots is defined
  twice: as it is, and with `\\.` for each dot, which is W&B's way to write a dot that is part of a name.
- A picture is a mapping in the row. Only a glob reaches what is inside of it.
- Definitions are not taken over when a run is opened again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cifar.integrations.wandb.document import DOCUMENT_SCHEMA, read_clean
from cifar.tracking.run_dir import RunDir

X_AXIS = "epoch"
PICTURES = "pictures/"  # prefix of the pictures' keys
NOT_COLUMNS = (  # of summary.json: cifar.json has them, and few columns are read
    "weights_bytes", "joules_missing", "teacher_train_flops",
    "latency_p5_seconds", "latency_p95_seconds", "latency_n", "latency_device",
)  # fmt: skip
SHOWN_PREFIXES = ("train", "val", "test", "best", "system", "pictures", "charts")  # of keys that have a panel


def is_hidden(key: str) -> bool:
    """Whether a key of the history has no panel of its own: the axis, and what is measured of single layers."""
    prefix, slash, _ = key.partition("/")
    return key in (X_AXIS, "step") or key.endswith("_table") or (bool(slash) and prefix not in SHOWN_PREFIXES)


def _is_in_summary(key: str) -> bool:
    """Whether the summary has the key's last value. W&B's custom charts read their tables there."""
    # of system/ the summary has a better form: seconds, images_per_second
    return key == X_AXIS or key.endswith("_table") or not (is_hidden(key) or key.startswith("system/"))


class MetricDefinitions:
    """Tells W&B of each key of a run, once each time the run is opened. `run`: wandb's run."""

    def __init__(self, run: Any) -> None:
        self._run, self._defined = run, {X_AXIS}
        run.define_metric(X_AXIS, hidden=True)
        run.define_metric(f"{PICTURES}*", step_metric=X_AXIS, step_sync=False, summary="none")

    def define(self, keys: Iterable[str]) -> None:
        """Define the keys that are new. To be called before they are logged."""
        for key in keys:
            if key in self._defined:
                continue
            self._defined.add(key)
            if "*" in key or not key:
                continue  # W&B takes it for a glob
            # step_sync=False: W&B must not add an epoch to a row that has none, so that the history has each epoch once.
            options = {"step_metric": X_AXIS, "step_sync": False, "hidden": is_hidden(key) or None}
            summary = None if _is_in_summary(key) else "none"
            self._run.define_metric(key, **options, summary=summary)
            if "." in key and summary:
                self._run.define_metric(key.replace(".", "\\."), **options, summary=summary)


def build_config(run_dir: RunDir) -> dict[str, Any]:
    """The configuration on W&B: flat, with the network's cost, so that a sweep's page can draw accuracy against it."""
    return {"cifar_schema": DOCUMENT_SCHEMA, **_read_cost(run_dir), **read_clean(run_dir, "config")}


def build_summary(run_dir: RunDir) -> dict[str, Any]:
    """The summary on W&B: what runs are sorted by, how the run ended, and why."""
    known = {name: value for name, value in read_clean(run_dir, "summary").items() if name not in NOT_COLUMNS}
    summary = {**_read_cost(run_dir), **known}
    if isinstance(summary.get("macs"), int | float):
        summary["flops"] = 2 * summary["macs"]
    reason = str(read_clean(run_dir, "status").get("reason") or "")
    return {**summary, "state": run_dir.state, "reason": reason}


def _read_cost(run_dir: RunDir) -> dict[str, Any]:
    cost = read_clean(run_dir, "run").get("cost")
    found = cost if isinstance(cost, Mapping) else {}
    return {name: found[name] for name in ("macs", "params") if found.get(name) is not None}


def list_outdated_keys(summary: Mapping[str, Any]) -> list[str]:
    """Keys of a summary on W&B that do not belong there: an earlier version has sent them."""
    return [key for key in summary if key == "cifar" or not _is_in_summary(key)]
