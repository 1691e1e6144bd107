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
from cifar.system.files import MissingFileError, UnreadableFileError, parse_json, read_bytes
from cifar.tracking.run_dir import write_atomic

MAX_BYTES = 10_000_000  # these files are small


def read_notes(file: Path) -> dict[str, Any]:
    """The notes; {} if there is no file. Raises UserError if it cannot be read."""
    try:
        return _read_notes(file)
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}); restore it, or delete it: then this folder knows nothing any more of what was done "
            "on W&B, and asks W&B where it can"
        ) from None


def read_or_set_aside(file: Path) -> dict[str, Any]:
    """The notes; {} if there is no file, or if it is damaged. A damaged file is kept as NAME.damaged."""
    try:
        return _read_notes(file)
    except ValueError:
        with contextlib.suppress(OSError):
            os.replace(file, file.with_name(f"{file.name}.damaged"))
        return {}


def _read_notes(file: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is damaged."""
    try:
        notes = parse_json(read_bytes(file, MAX_BYTES))
    except MissingFileError:
        return {}
    except UnreadableFileError as error:
        if isinstance(error.__context__, NotADirectoryError):
            return {}
        raise ValueError(error.reason) from None
    if not isinstance(notes, dict):
        raise ValueError("it holds no JSON object")
    return notes


def write_notes(file: Path, notes: Mapping[str, Any], indent: int | None = 1) -> None:
    write_atomic(file, json.dumps(notes, indent=indent).encode())
