"""The files of a local sweep's folder: sweep.json and sweep.yaml, read and checked. Nothing of the database is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar.errors import UserError
from cifar.system.files import UnreadableFileError, read_text
from cifar.tracking.run_dir import read_json

# Values of a sweep.json that lacks a field.
_DEFAULTS: dict[str, Any] = {
    "name": "", "created": 0.0, "method": "", "cells": 0, "dataset": "", "threads": 0, "sweep_seed": 0, "fixed": {},
    "storage": "",
}  # fmt: skip


def read_sweep_info(folder: Path) -> dict[str, Any]:
    """A sweep's sweep.json. Raises UserError where it is damaged."""
    file = folder / "sweep.json"
    info = {name: value for name, value in read_json(file, "sweep").items() if value is not None}
    if not info:
        raise UserError(f"{file} is damaged (it is empty); restore it, or delete {folder}")
    return {**_DEFAULTS, **info, "id": folder.name}  # whatever the file says: the folder is what is opened


def read_sweep_text(folder: Path) -> str:
    """A sweep's sweep.yaml. Raises UserError."""
    try:
        return read_text(folder / "sweep.yaml")
    except UnreadableFileError as error:
        raise UserError(f"{folder / 'sweep.yaml'} is damaged ({error.reason}); restore it, or delete {folder}") from None
