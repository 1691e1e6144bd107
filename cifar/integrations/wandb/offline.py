"""Converts offline runs (`wandb/offline-run-*/run-ID.wandb`) back into run folders, without a server."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cifar.integrations.wandb import convert
from cifar.integrations.wandb.document import DOCUMENT_FILE, read_document
from cifar.integrations.wandb.mirror import PREDICTIONS_FILE
from cifar.integrations.wandb.run_file import read_records
from cifar.system.disk import cache_folder
from cifar.system.files import parse_json
from cifar.system.names import is_id


def unpack_runs(files: Iterable[Path]) -> tuple[list[Path], list[tuple[str, str, str]]]:
    """.wandb files -> run folders in the cache, and (id, name, reason) of the files that cannot be read.

    If a run has two files, the one with more rows counts.
    """
    folders: dict[str, tuple[int, Path]] = {}
    damaged = []
    for file in files:
        run_id = file.stem.removeprefix("run-")
        try:
            run_id, about, config, summary, history, exit_code = _read_run(file)
            state = {None: "running", 0: "finished"}.get(exit_code, "failed")
            document = read_document(file.parent / "files" / DOCUMENT_FILE)
            content = convert.build_run_files(run_id, config, summary, state, document, about)
            rows = convert.build_rows(history)
            if len(rows) >= folders.get(run_id, (0,))[0]:
                folder = cache_folder() / "wandb" / "offline" / run_id
                convert.write_run_dir(folder, content, rows)
                if (saved := file.parent / "files" / PREDICTIONS_FILE).exists():
                    shutil.copy(saved, folder)
                folders[run_id] = (len(rows), folder)
        except Exception as error:  # what a damaged file holds can be of any kind
            damaged.append((run_id, run_id, f"{file}: {' '.join(str(error).split())[:200] or type(error).__name__}"))
    return [folder for _, folder in folders.values()], damaged


def _read_run(file: Path) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], list[dict[str, Any]], int | None]:
    """(id, name with group and tags, configuration, summary, history, exit code). The code is None if the file has no end."""
    run_id, exit_code = "", None
    about: dict[str, Any] = {}
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history = []
    for record in read_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            said = {"name": record.run.display_name, "group": record.run.run_group, "tags": list(record.run.tags)}
            about |= {key: value for key, value in said.items() if value}  # a later record says again only what it changes
            _set_items(config, record.run.config.update)
        elif kind == "config":
            _set_items(config, record.config.update)
        elif kind == "summary":
            _set_items(summary, record.summary.update)
        elif kind == "history":
            history.append(_set_items({}, record.history.item))
        elif kind == "exit":
            exit_code = record.exit.exit_code
    if not run_id:
        raise ValueError("it holds no run")
    if not is_id(run_id):
        raise ValueError("its run's id cannot be the name of a folder")
    return run_id, about, config, summary, history, exit_code


def _set_items(values: dict[str, Any], items: Iterable[Any]) -> dict[str, Any]:
    """Set W&B's key-value items, which may be nested, in `values`, and return it."""
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        inside = values
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = parse_json(item.value_json)
    return values
