"""The small files of a run's record as one file on W&B, `cifar.json`: what a report needs to be exact.

W&B keeps neither the order of keys nor the difference between 1.0 and 1, and each key is a column there. So the
configuration and the summary on W&B hold what people sort by. This file among the run's files holds the record word for word.
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
from cifar.system.redact import mask_secrets
from cifar.tracking.run_dir import RunDir

DOCUMENT_FILE = "cifar.json"
DOCUMENT_SCHEMA = 2  # 1: the same as text, under the key `cifar` of the configuration and of the summary
PARTS, END_PARTS = ("run", "config", "labels", "environment"), ("status", "summary")


def build_document(run_dir: RunDir) -> bytes:
    """The file's content now. How the run ended is in it once it has ended."""
    has_ended = run_dir.state in ENDED_STATES
    parts = {name: read_clean(run_dir, name) for name in PARTS + END_PARTS * has_ended}
    parts.get("status", {}).pop("pid", None)
    return json.dumps({"schema": DOCUMENT_SCHEMA, **parts}).encode()


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
