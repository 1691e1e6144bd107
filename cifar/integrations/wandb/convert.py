"""Converts what W&B has of a run back into a run folder, which the report reads like any other."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar.states import FROM_WANDB
from cifar.system.files import parse_json

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as wandb writes them into JSON
_INTEGER_KEYS = ("epoch", "step")  # may come as floats, because a parquet column has one type


def build_run_files(
    run_id: str, config: Mapping[str, Any], summary: Mapping[str, Any], state: str
) -> dict[str, dict[str, Any]]:
    """The JSON files of the run folder: name -> content. `state` is W&B's. Raises ValueError for a run that is not ours."""
    description = _parse_object(config.get("cifar"))
    if not all(isinstance(description.get(name), dict) for name in ("run", "config")):
        raise ValueError("it was not logged by this suite: its configuration has no `cifar`")
    content = {name: description.get(name) or {} for name in ("run", "config", "labels", "environment")}
    end = _parse_object(summary.get("cifar") or None)
    if end.get("status") and state not in ("running", "preempting"):  # a resumed run still has its earlier end
        return {**content, "status": end["status"], "summary": end.get("summary") or {}}
    if summary.get("state") == "incomplete" and state not in (
        "running",
        "preempting",
    ):  # it has ended where it ran, and W&B has not got all of it
        return {**content, "status": {"state": "interrupted", "reason": str(summary.get("reason") or "incomplete on W&B")}}
    our_state = FROM_WANDB.get(state, "killed")
    return {**content, "status": {"state": our_state, "reason": "" if our_state == "running" else f"{state}, says W&B"}}


def _parse_object(text: Any) -> dict[str, Any]:
    value = parse_json(text) if isinstance(text, str) else None
    return value if isinstance(value, dict) else {}


def parse_number(value: Any) -> Any:
    """W&B sends NaN and the infinities as words."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def build_rows(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """W&B's history -> the rows of metrics.jsonl by epoch, without W&B's own keys and media."""
    by_epoch: dict[int, dict[str, Any]] = {}
    for line in history:
        row = build_row(line)
        if "epoch" in row:
            by_epoch[row["epoch"]] = dict(sorted(row.items(), key=lambda item: (item[0] not in _INTEGER_KEYS, item[0])))
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def build_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """One line of W&B's history -> the row of metrics.jsonl, without W&B's own keys and media."""
    row = {k: parse_number(v) for k, v in line.items() if k[:1] != "_" and v is not None and not isinstance(v, Mapping)}
    for key in _INTEGER_KEYS:
        if isinstance(row.get(key), float) and row[key].is_integer():
            row[key] = int(row[key])
    return row


def write_run_dir(folder: Path, content: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the folder, or replace the whole folder. It is a cache, so nothing is flushed to the disk (fsync)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if "epoch" not in content["status"]:
        epochs = content["config"].get("epochs", 0)
        content = {**content, "status": {**content["status"], "epoch": rows[-1]["epoch"] if rows else 0, "epochs": epochs}}
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, value in content.items():
            (temporary / f"{name}.json").write_text(json.dumps(value))
        (temporary / "metrics.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
