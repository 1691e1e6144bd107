"""Offline runs, `wandb/offline-run-*/run-ID.wandb`, made run folders again without a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cifar.integrations.wandb import convert as rebuild
from cifar.integrations.wandb.mirror import PREDICTIONS
from cifar.integrations.wandb.run_file import records


def unpack(files: Iterable[Path]) -> tuple[list[Path], list[tuple[str, str, str]]]:
    """.wandb files -> run folders in the cache, and (id, name, reason) of those that cannot be read.

    Of two files of one run the one with more rows counts.
    """
    folders: dict[str, tuple[int, Path]] = {}
    damaged = []
    for file in files:
        run_id = file.stem.removeprefix("run-")
        try:
            run_id, config, summary, history, code = _read(file)
            state = {None: "running", 0: "finished"}.get(code, "failed")
            content, rows = rebuild.files(run_id, config, summary, state), rebuild.rows(history)
            if len(rows) >= folders.get(run_id, (0,))[0]:
                folder = rebuild.cache_folder() / "offline" / run_id
                rebuild.write(folder, content, rows)
                if (saved := file.parent / "files" / PREDICTIONS).exists():
                    shutil.copy(saved, folder)
                folders[run_id] = (len(rows), folder)
        except (OSError, ValueError) as error:
            damaged.append((run_id, run_id, f"{file}: {error}"))
    return [folder for _, folder in folders.values()], damaged


def _read(file: Path) -> tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]], int | None]:
    """(id, configuration, summary, history, exit code: None while the run is open)."""
    run_id, code = "", None
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history = []
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            _update(config, record.run.config.update)
        elif kind == "config":
            _update(config, record.config.update)
        elif kind == "summary":
            _update(summary, record.summary.update)
        elif kind == "history":
            history.append(_update({}, record.history.item))
        elif kind == "exit":
            code = record.exit.exit_code
    if not run_id:
        raise ValueError("it holds no run")
    return run_id, config, summary, history, code


def _update(values: dict[str, Any], items: Iterable[Any]) -> dict[str, Any]:
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        inside = values
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return values
