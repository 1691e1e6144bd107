"""The small files of a run's record as one file on W&B, `cifar.json`: what a report needs to be exact.

W&B keeps neither the order of keys nor the difference between 1.0 and 1, and each key is a column there. So the
configuration and the summary on W&B hold what people sort by. This file among the run's files holds the record word for word.

Once the run has ended, its rows are there as a file too, and `cifar.json` says which one: a history is long in coming, with a
histogram of each layer in it. Of a run that goes on, and where the file is another one, the history counts.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar.states import ENDED_STATES
from cifar.system.files import MissingFileError, UnreadableFileError, parse_json, read_bytes
from cifar.system.redact import mask_secrets, redact
from cifar.tracking.records import parse_rows
from cifar.tracking.run_dir import RunDir

DOCUMENT_FILE = "cifar.json"
DOCUMENT_SCHEMA = 2  # 1: the same as text, under the key `cifar` of the configuration and of the summary
PARTS, END_PARTS = ("run", "config", "labels", "environment"), ("status", "summary")
METRICS_FILE = "metrics.jsonl"
MAX_METRICS_BYTES = 2**25  # of the file on W&B: 200 epochs of a network of 500 layers; a longer one is read from the history


def build_document(run_dir: RunDir, *, with_metrics: bool = True) -> bytes:
    """The file's content now. How the run ended is in it once it has ended, and then which file has its rows.

    Earlier versions sent it without that (`with_metrics`).
    """
    has_ended = run_dir.state in ENDED_STATES
    parts = {name: read_clean(run_dir, name) for name in PARTS + END_PARTS * has_ended}
    parts.get("status", {}).pop("pid", None)
    metrics = describe_metrics(run_dir) if has_ended and with_metrics else {}
    return json.dumps({"schema": DOCUMENT_SCHEMA, **parts, **({"metrics": metrics} if metrics else {})}).encode()


def describe_metrics(run_dir: RunDir) -> dict[str, Any]:
    """The MD5 and the length of metrics.jsonl as it is sent to W&B; {} if it is not sent.

    That is so if it is long, cut off or damaged, or holds more than numbers under names without secrets.
    """
    try:
        content = read_bytes(run_dir.path / METRICS_FILE, MAX_METRICS_BYTES)
        rows = parse_rows(content)
    except (UnreadableFileError, ValueError):
        return {}
    is_plain = all(set(map(type, row.values())) <= {int, float} for row in rows)
    if not rows or not is_plain or not content.endswith(b"\n"):
        return {}
    if any(redact(name) != name for name in set[str]().union(*rows)):
        return {}
    return {"md5": compute_md5(content), "bytes": len(content)}


def read_clean(run_dir: RunDir, name: str) -> dict[str, Any]:
    """A file of the record without secrets: an earlier version may have written some."""
    return dict(mask_secrets(run_dir.read_json(name), mask_keys=False))


def read_document(file: Path) -> dict[str, Any] | None:
    """What a file holds that `build_document` made; None if there is no such file. Raises ValueError if it is damaged."""
    try:
        content = parse_json(read_bytes(file))
    except MissingFileError:
        return None
    except UnreadableFileError as error:
        raise ValueError(f"its {DOCUMENT_FILE} is damaged ({error.reason})") from None
    except ValueError as error:
        raise ValueError(f"its {DOCUMENT_FILE} is damaged ({error})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"its {DOCUMENT_FILE} is damaged (it holds no JSON object)")
    return dict(content)


def compute_md5(content: bytes) -> str:
    """The digest that W&B gives of a file: MD5 in base64."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
