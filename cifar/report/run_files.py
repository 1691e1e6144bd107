"""What a run's folder says, as a report reads it: its documents as they are, and its rows as numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.report.metric_rows import MetricRows, Row, RowPacker
from cifar.system.files import UnreadableFileError, read_bytes
from cifar.system.names import escape_controls
from cifar.system.redact import MASK, is_secret_name, mask_secrets
from cifar.tracking.run_dir import MAX_METRICS_BYTES, RunDir

FIRST_DOCUMENTS, LAST_DOCUMENTS = ("run", "config", "status"), ("summary", "labels", "environment")  # before and after the rows
DOCUMENTS = (*FIRST_DOCUMENTS, *LAST_DOCUMENTS)
SHARED_DOCUMENTS = ("labels", "environment")  # that many runs have in common
FILES = (*(f"{name}.json" for name in DOCUMENTS), "metrics.jsonl")
MAX_SCATTERED = 2_000_000  # cells of a table of rows and metrics, from which on not more than 9 of 10 may be empty
MAX_REMEMBERED = 256  # characters of a text that is cleaned once for all runs
MAX_NAME_LISTS = 10_000  # names of one document each, that are cleaned once for all runs
_MASK_63 = 2**63 - 1


@dataclass(frozen=True)
class RunFiles:
    """The documents of a run's folder by name, and the rows of its metrics.jsonl."""

    documents: Mapping[str, dict[str, Any]]
    rows: Sequence[Row]


class RunReader:
    """Reads many run folders. What they have in common is kept once."""

    def __init__(self) -> None:
        self._packer, self._shared = RowPacker(), dict[str, dict[str, Any]]()
        self._known: dict[int, dict[str, Any]] = {}  # by id, of what has come from other processes
        self._kept: list[Any] = []  # so that an id stays that of one thing

    def read(self, path: Path) -> RunFiles:
        """Read a run's folder. Raises UserError, ValueError or OSError that says what is damaged."""
        run_dir = RunDir(path)
        documents = {name: run_dir.read_json(name) for name in FIRST_DOCUMENTS}
        if not documents["run"] or not documents["config"]:
            raise ValueError(f"{'config' if documents['run'] else 'run'}.json is missing")
        rows = self._read_rows(run_dir)
        documents |= {name: run_dir.read_json(name) for name in LAST_DOCUMENTS}
        documents |= {name: self._shared.setdefault(repr(documents[name]), documents[name]) for name in SHARED_DOCUMENTS}
        return RunFiles(documents, rows)

    def _read_rows(self, run_dir: RunDir) -> Sequence[Row]:
        content = b""
        with contextlib.suppress(UnreadableFileError):  # `read_rows` says what is wrong
            content = read_bytes(run_dir.path / FILES[-1], MAX_METRICS_BYTES)
        if table := self._packer.parse(content):
            return table
        rows = list(run_dir.read_rows())
        check_columns(rows)
        return self._packer.pack(rows)

    def share(self, files: RunFiles) -> RunFiles:
        """What another process has read, with what it has in common with the other runs kept once."""
        documents = dict(files.documents)
        for name in SHARED_DOCUMENTS:
            document = documents[name]
            if id(document) not in self._known:
                self._known[id(document)] = self._shared.setdefault(repr(document), document)
                self._kept.append(document)
            documents[name] = self._known[id(document)]
        return RunFiles(documents, self._packer.share(files.rows) if isinstance(files.rows, MetricRows) else files.rows)


def check_columns(rows: Sequence[Row]) -> None:
    """Raise ValueError for rows that name so many different metrics that a table of them would fill the memory."""
    num_values = sum(map(len, rows))
    if len(rows) * num_values <= MAX_SCATTERED:  # at least the size of the table
        return
    if len(rows) * len(set[str]().union(*rows)) > max(MAX_SCATTERED, 10 * num_values):
        raise ValueError("metrics.jsonl has other metrics in nearly every row")


def stat_files(path: Path, names: Sequence[str] = FILES) -> list[int]:
    """Size, times of the last change of content and of anything, and inode of each file; -1 for one that is not there.

    Whatever happens to a file, one of them changes: a file that is replaced has another inode, and no program can set the time
    of the last change of anything.
    """
    found, folder = [], os.fspath(path)
    for name in names:
        try:
            about = os.stat(f"{folder}/{name}")
        except (OSError, ValueError):
            found += [-1, -1, -1, -1]
            continue
        found += [about.st_size, about.st_mtime_ns & _MASK_63, about.st_ctime_ns & _MASK_63, about.st_ino & _MASK_63]
    return found


def clean_document(value: Any) -> Any:
    """A copy of a record's file as it may be shown: what an earlier version wrote may hold secrets, and names anything."""
    return _escape(mask_secrets(value, mask_keys=False))


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return escape_controls(" ".join(value.splitlines()))
    if isinstance(value, dict):
        return {escape_controls(str(key)): _escape(inner) for key, inner in value.items()}
    return [_escape(inner) for inner in value] if isinstance(value, list) else value


class Cleaner:
    """`clean_document` for many runs, which have the same names and texts again and again. For one report."""

    def __init__(self) -> None:
        self._names, self._texts = dict[tuple[str, ...], tuple[str, ...]](), dict[str, str]()
        self._harmless, self._secret_names = set[str](), dict[str, bool]()

    def clean(self, value: Any) -> Any:
        if type(value) is str:
            found = self._texts.get(value)
            if found is None:
                found = clean_document(value)
                if len(value) <= MAX_REMEMBERED:
                    self._texts[value] = found
            return found
        if type(value) is dict:
            known = self._texts.get
            cleaned = [
                inner
                if (kind := type(inner)) not in _NESTED
                else text
                if kind is str and (text := known(inner)) is not None
                else self.clean(inner)
                for inner in value.values()
            ]
            return dict(zip(self._clean_names(tuple(value)), cleaned, strict=True))
        return [self.clean(inner) for inner in value] if type(value) is list else value

    def _clean_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        found = self._names.get(names)
        if found is None:
            found = tuple(next(iter(clean_document({name: 0}))) for name in names)
            if len(self._names) < MAX_NAME_LISTS:
                self._names[names] = found
        return found

    def has_secrets(self, files: RunFiles) -> bool:
        """Whether the documents hold what must not be written anywhere else."""
        named = (inner for name, document in files.documents.items() if name != "config" for inner in document.items())
        return any(map(self._holds_secret, files.documents.values())) or any(
            isinstance(inner, str) and inner not in ("", MASK) and self._is_secret_name(name) for name, inner in named
        )

    def _is_secret_name(self, name: str) -> bool:
        if name not in self._secret_names:
            self._secret_names[name] = is_secret_name(name)
        return self._secret_names[name]

    def _holds_secret(self, value: Any) -> bool:
        if type(value) is str:
            if value in self._harmless:
                return False
            is_harmless = bool(mask_secrets({value: value}, mask_keys=False) == {value: value})
            if is_harmless and len(value) <= MAX_REMEMBERED:
                self._harmless.add(value)
            return not is_harmless
        if type(value) is dict:
            return any(self._holds_secret(inner) for pair in value.items() for inner in pair if type(inner) in _NESTED)
        return type(value) is list and any(self._holds_secret(inner) for inner in value if type(inner) in _NESTED)


_NESTED = {str, dict, list}
