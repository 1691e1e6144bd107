"""Notes of what was done on W&B, as small JSON files: wandb.json, push.json, pulled.json, mirror.json, published.json."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar.tracking.run_dir import write_atomic


def read_notes(file: Path) -> dict[str, Any]:
    """The notes; {} if the file is missing or damaged, as if nothing had been done."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(file.read_bytes()))
    return {}


def write_notes(file: Path, notes: Mapping[str, Any], indent: int | None = 1) -> None:
    write_atomic(file, json.dumps(notes, indent=indent).encode())
