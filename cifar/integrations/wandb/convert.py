"""Converts what W&B has of a run back into a run folder, which the report reads like any other."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar.integrations.wandb.document import DOCUMENT_FILE, PARTS
from cifar.states import ENDED_STATES, FROM_WANDB
from cifar.system.files import parse_json

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as wandb writes them into JSON
_NOT_RESULTS = ("state", "reason", "epoch", "flops")  # keys of W&B's summary that summary.json does not have
UNVERIFIED_TAG = "macs unverified"  # that `training/run.py` gives a run whose multiply-adds are not certain
_INTEGER_KEYS = ("epoch", "step")  # may come as floats, because a parquet column has one type


def build_run_files(
    run_id: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    state: str,
    document: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The JSON files of the run folder: name -> content. Raises ValueError for a run that is not ours.

    state: W&B's word. document: what `cifar.json` of the run holds. None: an earlier version sent the run, and the same
    is text in the configuration and in the summary; or the file is lost, and what W&B knows has to do. about: W&B's name,
    group and tags of the run, for that case.
    """
    if document is None and config.get("cifar_schema") and not config.get("cifar"):
        document = _rebuild_document(run_id, config, summary, about or {})
        is_current = True
    elif document is None:
        document = {**_parse_object(config.get("cifar")), **_parse_object(summary.get("cifar") or None)}
        is_current = True
    else:  # the file and the summary are sent at different moments, and a resumed run still has its earlier end in one of them
        is_current = summary.get("state") == get_object(document, "status").get("state")
    if not all(isinstance(document.get(name), dict) for name in ("run", "config")):
        raise ValueError(f"it was not logged by this suite: it has no {DOCUMENT_FILE}")
    content = {name: get_object(document, name) for name in PARTS}
    is_open = state in ("running", "preempting")
    if is_current and not is_open and (status := get_object(document, "status")):
        return {**content, "status": status, "summary": get_object(document, "summary")}
    if summary.get("state") == "incomplete" and not is_open:  # it has ended where it ran, and W&B has not got all of it
        return {**content, "status": {"state": "interrupted", "reason": str(summary.get("reason") or "incomplete on W&B")}}
    our_state = FROM_WANDB.get(state, "killed")
    return {**content, "status": {"state": our_state, "reason": "" if our_state == "running" else f"{state}, says W&B"}}


def _rebuild_document(
    run_id: str, config: Mapping[str, Any], summary: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """What `cifar.json` says of a run, as far as W&B's own fields say it: for a .wandb file without the files beside it."""
    tags, group = [str(tag) for tag in about.get("tags") or ()], str(about.get("group") or "")
    own = {key: value for key, value in config.items() if key not in ("cifar_schema", "macs", "params", "_wandb")}
    cost = {key: config[key] for key in ("macs", "params") if key in config} | {"verified": UNVERIFIED_TAG not in tags}
    dataset = str(config.get("dataset") or "")
    run = {"name": str(about.get("name") or run_id), "group": group, "sweep": group, "tags": tags, "dataset": dataset}
    parts: dict[str, Any] = {"run": {**run, "official": dataset == "cifar10", "cost": cost}, "config": own}
    if summary.get("state") in ENDED_STATES:
        known = {
            key: value for key, value in summary.items() if key not in _NOT_RESULTS and isinstance(value, bool | int | float)
        }
        parts["status"] = {"state": summary["state"], "reason": str(summary.get("reason") or "")}
        parts["summary"] = {key: value for key, value in known.items() if key[:1] != "_"}
    return parts


def get_object(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of `cifar.json`; {} if it is no object."""
    value = document.get(name)
    return value if isinstance(value, dict) else {}


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


def read_last_epoch(lines: bytes) -> int:
    """The epoch of the last line of metrics.jsonl; 0 if it has no lines."""
    last_line = lines.rstrip(b"\n").rpartition(b"\n")[2]
    return int(json.loads(last_line).get("epoch", 0)) if last_line else 0


def write_run_dir(folder: Path, content: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]] | bytes) -> None:
    """Write the folder, or replace the whole folder. It is a cache, so nothing is flushed to the disk (fsync).

    rows: as `build_rows` makes them, or the content of metrics.jsonl.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(rows, bytes):
        rows = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
    if "epoch" not in content["status"]:
        epochs = content["config"].get("epochs", 0)
        content = {**content, "status": {**content["status"], "epoch": read_last_epoch(rows), "epochs": epochs}}
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, value in content.items():
            (temporary / f"{name}.json").write_text(json.dumps(value))
        (temporary / "metrics.jsonl").write_bytes(rows)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
