"""What was read of the runs of a folder, kept in one file: the next report reads that instead of seven files a run.

    <runs>/.cache/runs.npz   arrays without pickled objects: a JSON text about the runs, and the numbers of all their rows

A run is taken from it only if its files are those that were read: same sizes, times and inodes (`stat_files`). What changed
less than SETTLE_SECONDS before it was read is not kept, since a file can change twice within one tick of its clock. So a run
that changes is read again. Everything in the file is checked as in a run's folder. A file that is damaged, of another version,
or no such file at all, counts as none; so does one that cannot be written. Readers and writers need no lock: a new file takes
the place of the old one as a whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar.config.recorded import check_all_configs
from cifar.errors import UserError
from cifar.report.metric_rows import Ids, Layout, MetricRows, Numbers, find_starts, is_exact
from cifar.report.run_files import DOCUMENTS, FILES, SHARED_DOCUMENTS, Cleaner, RunFiles, stat_files
from cifar.system.files import check_all_values, check_text, read_arrays
from cifar.tracking.records import MAX_EPOCH, MAX_NAME, SCHEMA, check_all_fields
from cifar.tracking.run_dir import CACHE_FILE, CACHE_FOLDER

FORMAT = 2  # changes with what is in the file
MAX_BYTES = 2**30  # of the numbers of all rows; further runs are not kept
MIN_RUNS = 200  # of a folder; fewer are read from their folders
SETTLE_SECONDS = 2.0
MIN_CHANGED_SHARE = 0.02  # of the runs, from which on the file is written anew
_HOUR = 3600.0
_WIDTH = 4 * len(FILES)


@dataclass(frozen=True)
class CachedRun:
    """A run as it was read, and what `stat_files` said before that."""

    signature: list[int]
    files: RunFiles


class RunCache:
    """The cache of one runs folder. `read` before `write`."""

    def __init__(self, runs_dir: Path, *, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._runs_dir, self._file = runs_dir, runs_dir / CACHE_FOLDER / CACHE_FILE
        self._settle_ns, self._start_ns = int(settle_seconds * 1e9), time.monotonic_ns()
        self._known: dict[str, CachedRun] = {}

    def read(self) -> None:
        """Read the file, if there is one that can be used."""
        with contextlib.suppress(UserError, ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError):
            self._known = _parse(read_arrays(self._file, 2 * MAX_BYTES))

    def find_run(self, path: Path, signature: list[int]) -> CachedRun | None:
        """The run as it was read, if they are still the same and all is right with them."""
        known = self._known.get(path.name)
        return known if known is not None and known.signature == signature else None

    def read_sweep(self, path: Path) -> str | None:
        """The sweep of a run whose run.json is still the same; None if that is not known."""
        known = self._known.get(path.name)
        if known is None or stat_files(path, FILES[:1]) != known.signature[:4]:
            return None
        return str(known.files.documents.get("run", {}).get("sweep") or "")

    def write(self, found: Mapping[str, CachedRun], cleaner: Cleaner) -> None:
        """Keep the runs that have just been read, beside those of before whose folders are still there.

        Nothing happens if few have changed, or where the file cannot be written.
        """
        changed = {name: run for name, run in found.items() if self._known.get(name) is not run}
        if len(changed) <= MIN_CHANGED_SHARE * len(found):
            return
        with contextlib.suppress(OSError, OverflowError):  # OverflowError: too many layouts
            self._file.parent.mkdir(exist_ok=True)
            self._remove_torn_files()
            handle, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=f".{CACHE_FILE}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    now = os.fstat(handle).st_mtime_ns  # by the clock of the folder's disk, which may be another machine's
                    deadline = now - (time.monotonic_ns() - self._start_ns) - self._settle_ns
                    np.savez(file, **_compose(self._choose_runs(found, deadline, cleaner)))
                    os.fchmod(handle, os.stat(self._runs_dir).st_mode & 0o666)
                os.replace(temporary, self._file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise

    def _choose_runs(self, found: Mapping[str, CachedRun], deadline: int, cleaner: Cleaner) -> dict[str, CachedRun]:
        there = set(os.listdir(self._runs_dir))
        chosen, num_bytes = {}, 0
        for name, run in {**self._known, **found}.items():
            rows, signature = run.files.rows, run.signature
            times = [*signature[1::4], *signature[2::4]]
            if name not in there or not isinstance(rows, MetricRows) or max(times) > deadline:
                continue
            if self._known.get(name) is not run and cleaner.has_secrets(run.files):
                continue
            num_bytes += rows.values.nbytes
            if num_bytes > MAX_BYTES:
                break
            chosen[name] = run
        return chosen

    def _remove_torn_files(self) -> None:
        """Delete what reports that were killed have left."""
        for file in self._file.parent.glob(f".{CACHE_FILE}.*"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > _HOUR:
                    file.unlink()


# -- the file ----------------------------------------------------------------------------------------------------------


def _compose(runs: Mapping[str, CachedRun]) -> dict[str, Any]:
    """The arrays of the file."""
    layouts = _Numbers(lambda layout: (layout.names, layout.is_whole))
    shared = {name: _Numbers(repr) for name in SHARED_DOCUMENTS}
    documents, ids = [], [np.zeros(0, np.uint16)]
    for run in runs.values():
        rows, about = _rows_of(run), dict(run.files.documents)
        documents.append(about | {name: numbers.find(about[name]) for name, numbers in shared.items()})
        ids.append(np.array([layouts.find(layout) for layout in rows.layouts], np.uint16)[rows.ids])
    about_all = {
        "format": FORMAT,
        "names": list(runs),
        "documents": documents,
        "shared": {name: numbers.items for name, numbers in shared.items()},
        "layouts": [[layout.names, layout.is_whole] for layout in layouts.items],
    }
    return {
        "about": np.frombuffer(json.dumps(about_all, separators=(",", ":")).encode(), np.uint8),
        "signatures": np.array([run.signature for run in runs.values()], np.int64).reshape(-1, _WIDTH),
        "num_rows": np.array([len(_rows_of(run)) for run in runs.values()], np.int64),
        "ids": np.concatenate(ids),
        "values": np.concatenate([np.zeros(0), *(_rows_of(run).values for run in runs.values())]),
    }


def _parse(arrays: Mapping[str, Any]) -> dict[str, CachedRun]:
    """The runs of the file. Raises ValueError and others for a file that no version of this program has written."""
    from pydantic_core import from_json

    about = from_json(arrays["about"].tobytes())
    if about["format"] != FORMAT:
        raise ValueError("another version's")
    layouts = [Layout(tuple(names), tuple(map(bool, is_whole))) for names, is_whole in about["layouts"]]
    signatures, num_rows, ids, values = (arrays[name] for name in ("signatures", "num_rows", "ids", "values"))
    num_runs = len(about["names"])
    shapes = [(num_runs, _WIDTH), (num_runs,), (int(num_rows.sum()),)]
    if [signatures.shape, num_rows.shape, ids.shape] != shapes or (num_rows < 0).any() or len(about["documents"]) != num_runs:
        raise ValueError("arrays of another size")
    if [array.dtype for array in (signatures, num_rows, ids, values)] != [np.int64, np.int64, np.uint16, np.float64]:
        raise ValueError("arrays of another kind")
    ids = ids.astype(np.int64)
    _check_rows(layouts, ids, values)
    starts, row_ends = find_starts(layouts, ids), np.cumsum(num_rows).tolist()
    documents = _share_documents(about["documents"], about["shared"])
    found = {}
    for number, (name, signature) in enumerate(zip(about["names"], signatures.tolist(), strict=True)):
        first, end = row_ends[number] - int(num_rows[number]), row_ends[number]
        rows = _slice_rows(layouts, ids[first:end], values[starts[first] : starts[end]])
        found[str(name)] = CachedRun(signature, RunFiles(documents[number], rows))
    return found


def _share_documents(runs: list[dict[str, Any]], shared: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The documents of all runs. Raises ValueError for what a run's folder could not have."""
    columns: dict[str, list[Any]] = {name: [run[name] for run in runs] for name in DOCUMENTS if name not in SHARED_DOCUMENTS}
    for name, items in {**columns, **{name: shared[name] for name in SHARED_DOCUMENTS}}.items():
        if set(map(type, items)) - {dict}:
            raise ValueError("documents of another kind")
        check_all_values(items)
        check_all_fields(name, items)
    check_all_configs(columns["config"])
    if not all(columns["run"]) or not all(columns["config"]):
        raise ValueError("runs without a configuration")
    if any(run.get("schema", SCHEMA) != SCHEMA for run in columns["run"]):
        raise ValueError("runs of another version")
    for name in SHARED_DOCUMENTS:
        numbers = [run[name] for run in runs]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("numbers of no documents")
        columns[name] = [shared[name][number] for number in numbers]
    return [dict(zip(columns, documents, strict=True)) for documents in zip(*columns.values(), strict=True)]


def _check_rows(layouts: list[Layout], ids: Ids, values: Numbers) -> None:
    """Raise ValueError for rows that a run's folder could not have, and for numbers that belong to no row."""
    for layout in layouts:
        is_right = len(layout.names) == len(layout.is_whole) == len(set(layout.names))
        if not is_right or not all(isinstance(name, str) and len(name) <= MAX_NAME for name in layout.names):
            raise ValueError("names of another kind")
        for name in layout.names:
            check_text(name)
    if len(ids) and ids.max() >= len(layouts):
        raise ValueError("a layout that is not there")
    starts = find_starts(layouts, ids)
    if values.shape != (starts[-1],) or not is_exact(layouts, ids, values):
        raise ValueError("numbers of another kind")
    for number, layout in enumerate(layouts):
        if "epoch" in layout.places:
            epochs = values[starts[:-1][ids == number] + layout.places["epoch"]]
            if not np.all((epochs >= 0) & (epochs <= MAX_EPOCH) & (epochs == np.rint(epochs))):
                raise ValueError("epochs of another kind")


def _slice_rows(layouts: list[Layout], ids: Ids, values: Numbers) -> MetricRows:
    """The rows of one run, of those of all."""
    if not len(ids):
        return MetricRows((), ids, values)
    first = int(ids[0])
    if (ids == first).all():
        return MetricRows((layouts[first],), np.zeros(len(ids), np.int64), values)
    own = {number: place for place, number in enumerate(dict.fromkeys(ids.tolist()))}
    return MetricRows(tuple(layouts[number] for number in own), np.array([own[number] for number in ids.tolist()]), values)


class _Numbers:
    """Numbers things 0, 1, ... Those of equal content have one number."""

    def __init__(self, describe: Callable[[Any], Any]) -> None:
        self.items: list[Any] = []
        self._describe = describe
        self._by_id, self._by_content = dict[int, int](), dict[Any, int]()

    def find(self, item: Any) -> int:
        number = self._by_id.get(id(item))
        if number is None:
            number = self._by_content.setdefault(self._describe(item), len(self.items))
            self._by_id[id(item)] = number
            if number == len(self.items):
                self.items.append(item)
        return number


def _rows_of(run: CachedRun) -> MetricRows:
    rows = run.files.rows
    assert isinstance(rows, MetricRows)
    return rows
