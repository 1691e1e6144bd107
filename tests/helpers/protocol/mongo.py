"""The part of MongoDB's language that W&B's run filters and orders speak."""

from __future__ import annotations

import re
from typing import Any

from helpers.protocol.world import Run

_PLAIN = {
    "name": "id", "display_name": "display_name", "displayName": "display_name", "state": "state", "sweep": "sweep",
    "group": "group", "jobType": "job_type", "job_type": "job_type", "tags": "tags",
    "created_at": "created", "createdAt": "created", "heartbeat_at": "beat", "heartbeatAt": "beat",
}  # fmt: skip
_COMPARE = {
    "$eq": lambda a, b: a == b,
    "$ne": lambda a, b: a != b,
    "$in": lambda a, b: bool(set(a) & set(b)) if isinstance(a, list) else a in b,
    "$nin": lambda a, b: a not in b,
    "$gt": lambda a, b: a is not None and a > b,
    "$gte": lambda a, b: a is not None and a >= b,
    "$lt": lambda a, b: a is not None and a < b,
    "$lte": lambda a, b: a is not None and a <= b,
    "$regex": lambda a, b: re.search(b, str(a)) is not None,
    "$exists": lambda a, b: (a is not None) == b,
}


def value_of(run: Run, key: str) -> Any:
    """`state`, `config.lr.value` or `summary_metrics.val/acc`."""
    if key in _PLAIN:
        return getattr(run, _PLAIN[key])
    kind, _, name = key.partition(".")
    if kind == "config":
        return run.config.get(name.removesuffix(".value"))
    assert kind in ("summary_metrics", "summaryMetrics"), f"no run has a '{key}'"
    return run.summary.get(name)


def matches(run: Run, filters: dict[str, Any]) -> bool:
    for key, wanted in filters.items():
        if key in ("$and", "$or"):
            found = [matches(run, each) for each in wanted]
            fits = all(found) if key == "$and" else any(found)
        elif isinstance(wanted, dict):
            fits = all(_COMPARE[operator](value_of(run, key), other) for operator, other in wanted.items())
        else:
            value = value_of(run, key)
            fits = wanted in value if isinstance(value, list) else value == wanted
        if not fits:
            return False
    return True


def ordered(runs: list[Run], order: str | None) -> list[Run]:
    """`+created_at`, `-summary_metrics.val/acc`; several by commas. Runs without the value come last."""
    for each in reversed((order or "").split(",") if order else []):
        name, backwards = each.strip().lstrip("+-"), each.strip().startswith("-")
        if name == "id":
            name = "created_at"
        have = [run for run in runs if value_of(run, name) is not None]
        lack = [run for run in runs if value_of(run, name) is None]
        runs = sorted(have, key=lambda run: value_of(run, name), reverse=backwards) + lack
    return runs
