"""Notes of what was done on W&B, as small JSON files: wandb.json, push.json, pulled.json, mirror.json, published.json.

A file that cannot be read must not count as "nothing was done": the next write would drop what it says. So it is one sentence,
or where nothing depends on it, it is kept aside.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar.errors import UserError
from cifar.tracking.run_dir import write_atomic

MAX_BYTES = 10_000_000  # these files are small


def read_notes(file: Path) -> dict[str, Any]:
    """The notes; {} if there is no file. Raises UserError if it cannot be read."""
    try:
        return _read_notes(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).replace("\n", " ")[:200]
        raise UserError(
            f"{file} is damaged ({reason}); restore it, or delete it: then this folder knows nothing any more of what was done "
            "on W&B, and asks W&B where it can"
        ) from None


def read_or_set_aside(file: Path) -> dict[str, Any]:
    """The notes; {} if there is no file, or if it is damaged. A damaged file is kept as NAME.damaged."""
    try:
        return _read_notes(file)
    except (OSError, ValueError, RecursionError):
        with contextlib.suppress(OSError):
            os.replace(file, file.with_name(f"{file.name}.damaged"))
        return {}


def _read_notes(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if len(content) > MAX_BYTES:
        raise ValueError("it is too large")
    notes = json.loads(content)
    if not isinstance(notes, dict):
        raise ValueError("it holds no JSON object")
    return notes


def write_notes(file: Path, notes: Mapping[str, Any], indent: int | None = 1) -> None:
    write_atomic(file, json.dumps(notes, indent=indent).encode())
