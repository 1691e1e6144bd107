"""What W&B has of a run -> a run folder again, so that a report reads it as it reads any other."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What W&B says of a run whose mirror did not come to its end; ours are the states of record.py.
_STATES = {"running": "running", "pending": "running", "preempting": "preempted", "preempted": "preempted", "failed": "failed"}
_NOT_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as wandb writes them into JSON
_WHOLE = ("epoch", "step")  # parquet has one type a column, and it may be a float


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/cifar/wandb, else ~/.cache/cifar/wandb: runs that were read back."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cifar" / "wandb"


def files(run_id: str, config: Mapping[str, Any], summary: Mapping[str, Any], state: str) -> dict[str, dict[str, Any]]:
    """The JSON files of the record: name -> content. `state` is W&B's. Raises ValueError for a run that is not ours."""
    about = _object(config.get("cifar"))
    if not all(isinstance(about.get(name), dict) for name in ("run", "config")):
        raise ValueError("it was not logged by this suite: its configuration has no `cifar`")
    content = {name: about.get(name) or {} for name in ("run", "config", "labels", "environment")}
    ended = _object(summary.get("cifar"))
    if ended.get("status") and state not in ("running", "preempting"):  # a run that was resumed still has its earlier end
        return {**content, "status": ended["status"], "summary": ended.get("summary") or {}}
    known = _STATES.get(state, "stopped" if state == "finished" else "killed")
    return {**content, "status": {"state": known, "reason": "" if known == "running" else f"{state}, says W&B"}}


def _object(text: Any) -> dict[str, Any]:
    value = json.loads(text) if isinstance(text, str) else None
    return value if isinstance(value, dict) else {}


def number(value: Any) -> Any:
    """NaN and the infinities come as words."""
    return _NOT_NUMBERS.get(value, value) if isinstance(value, str) else value


def rows(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """History -> the rows of the record, by epoch, without W&B's own keys and media."""
    found: dict[int, dict[str, Any]] = {}
    for line in history:
        row = {k: number(v) for k, v in line.items() if k[0] != "_" and v is not None and not isinstance(v, Mapping)}
        for key in _WHOLE:
            if isinstance(row.get(key), float) and row[key].is_integer():
                row[key] = int(row[key])
        if "epoch" in row:
            found[row["epoch"]] = dict(sorted(row.items(), key=lambda item: (item[0] not in _WHOLE, item[0])))
    return [found[epoch] for epoch in sorted(found)]


def write(folder: Path, content: Mapping[str, Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> None:
    """Make the folder, or replace it as a whole. It is a cache: nothing is waited for until it is on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if "epoch" not in content["status"]:
        epochs = content["config"].get("epochs", 0)
        content = {**content, "status": {**content["status"], "epoch": lines[-1]["epoch"] if lines else 0, "epochs": epochs}}
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, value in content.items():
            (made / f"{name}.json").write_text(json.dumps(value))
        (made / "metrics.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in lines))
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
