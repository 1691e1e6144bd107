"""Downloads runs from W&B exactly: every row of their histories, not the sample that a chart shows.

    download = download_runs(parse_wandb_path("entity/project/sweep"))
    download.folders      # run folders in the cache, for the report

A run stays in the cache until W&B says that it has changed. Of a run that has grown, only the new steps are read. W&B is asked
for one list of runs without configurations and metrics, and then for the runs that the cache lacks. The rows of a run that has
ended are a file there. The history, which takes longer, is asked for where that file is missing, or is not the one that
`cifar.json` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from filelock import FileLock

from cifar.errors import UserError
from cifar.integrations.wandb import convert
from cifar.integrations.wandb.api import download_file, execute_graphql
from cifar.integrations.wandb.arrival import scan_history
from cifar.integrations.wandb.document import DOCUMENT_FILE, MAX_METRICS_BYTES, METRICS_FILE, compute_md5, read_document
from cifar.integrations.wandb.mirror import PREDICTIONS_FILE, URL_FILE
from cifar.integrations.wandb.mirror_process import stop_core
from cifar.integrations.wandb.notes import read_or_set_aside
from cifar.integrations.wandb.paths import WandbPath
from cifar.integrations.wandb.settings import find_credentials
from cifar.states import ENDED_STATES
from cifar.system.disk import cache_folder
from cifar.system.files import read_bytes
from cifar.system.names import check_id
from cifar.system.redact import redact
from cifar.tracking.run_dir import read_json

RUNS_PER_LIST_PAGE, RUNS_PER_FULL_PAGE = 500, 50  # without and with their configurations
NUM_THREADS = 8
STALL_SECONDS = 60.0  # without an answer, after which the server is given up
NOTES_FILE = "pulled.json"  # in the cached run folder: `_change_stamp` and last step when it was read

_GET_DETAILS = f"""query RunDetails($project: String!, $entity: String!, $filters: JSONString, $first: Int) {{
  project(name: $project, entityName: $entity) {{
    runs(filters: $filters, first: $first) {{
      edges {{ node {{
        name state summaryMetrics historyKeys
        files(names: ["{DOCUMENT_FILE}", "{METRICS_FILE}"], first: 2) {{
          edges {{ node {{ id name url(upload: false) directUrl sizeBytes }} }}
        }}
      }} }}
    }}
  }}
}}"""

Progress = Callable[[int, int], None]  # called with (done, total)


@dataclass(frozen=True)
class Download:
    """Run folders in the cache, and (id, name, reason) of the runs that could not be read."""

    folders: tuple[Path, ...]
    damaged: tuple[tuple[str, str, str], ...] = ()
    title: str = ""
    question: str = ""
    num_cells: int = 0  # runs that the sweep will have; 0 if that is not known, or if it is no sweep


def ignore_progress(done: int, total: int) -> None:
    pass


def download_runs(path: WandbPath, progress: Progress | None = None) -> Download:
    """Bring the cache up to date. Raises UserError if there is no such project, sweep or run.

    `progress` is called with (runs read, runs in all).
    """
    progress = progress or ignore_progress
    api = connect_to_api()
    import wandb

    project_folder = (
        cache_folder()
        / "wandb"
        / quote(urlsplit(api.settings["base_url"]).netloc.rpartition("@")[2])  # a password may stand before the host
        / quote(path.entity, safe="")
        / quote(path.project, safe="")
    )
    project_folder.mkdir(parents=True, exist_ok=True)
    try:
        sweep = _find_sweep(api, path)
        filters = {"sweep": path.item_id} if sweep else {"name": path.item_id} if path.item_id else {}
        listed = {run.id: run for run in api.runs(f"{path.entity}/{path.project}", filters, per_page=RUNS_PER_LIST_PAGE)}
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read from W&B ({describe_error(error)}), and there is no such folder here") from None
    for run_id in listed:
        check_id(run_id, "a run's id on W&B")
    if path.item_id and not sweep and not listed:
        raise UserError(f"{path}: there is no sweep and no run '{path.item_id}' in this project on W&B")
    with FileLock(project_folder / "pull.lock"):
        stale = [
            run_id
            for run_id, run in listed.items()
            if read_or_set_aside(project_folder / run_id / NOTES_FILE).get("stamp") != _change_stamp(run)
        ]
        damaged = dict(
            _download_stale_runs(
                api, path, project_folder, listed, stale, lambda n: progress(len(listed) - len(stale) + n, len(listed))
            )
        )
    folders = tuple(project_folder / run_id for run_id in listed if run_id not in damaged)
    if len(folders) == 1 and not sweep:  # only the report of a single run shows its predictions
        _download_predictions(listed[folders[0].name], folders[0])
    unreadable = tuple((run_id, str(listed[run_id].name or run_id), reason) for run_id, reason in damaged.items())
    if not sweep:
        return Download(folders, unreadable, str(path))
    config = sweep.config if isinstance(sweep.config, dict) else {}
    name = config.get("name")
    title = f"{name} ({path.item_id})" if name and name != path.item_id else path.item_id
    return Download(
        folders, unreadable, title, str(config.get("description") or "").strip(), int(sweep.expected_run_count or 0)
    )


def connect_to_api() -> Any:
    """wandb's public API of the configured server. Raises UserError if there is no key; it never asks for one."""
    if not find_credentials():
        raise UserError("W&B needs a key: run `wandb login` or set WANDB_API_KEY")
    if "wandb" not in sys.modules:
        os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    import wandb

    try:
        return wandb.Api()
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"W&B cannot be reached ({describe_error(error)})") from None


def _find_sweep(api: Any, path: WandbPath) -> Any:
    """The sweep that `path` names; None if it names a project or a run."""
    import wandb

    if not path.item_id or path.kind == "run":
        return None
    with contextlib.suppress(ValueError, wandb.errors.CommError):
        return api.sweep(str(path))
    return None


def _change_stamp(run: Any) -> list[Any]:
    """Values that change when the run changes. W&B's list of runs contains them, so they cost no request."""
    return [run.created_at, run.history_line_count, run.state, run.heartbeat_at]


def _download_stale_runs(
    api: Any, path: WandbPath, project_folder: Path, listed: dict[str, Any], stale: list[str], progress: Callable[[int], None]
) -> Iterator[tuple[str, str]]:
    """Download the stale runs, several at a time. Yields (id, reason) of those that fail."""
    progress(0)
    remaining = iter(stale)
    num_done = 0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while chunk := list(itertools.islice(remaining, RUNS_PER_FULL_PAGE)):
            try:
                details = _fetch_details(api, path, chunk)
            except Exception as error:  # wandb raises many kinds of errors if a server fails
                yield from ((run_id, describe_error(error)) for run_id in chunk)
                continue
            downloads: dict[Future[None], str] = {
                pool.submit(_download_run, api, listed[run_id], project_folder / run_id, one): run_id
                for run_id, one in details.items()
            }
            for run_id in set(chunk) - set(downloads.values()):
                yield run_id, "W&B did not hand it out"
            while downloads:
                ready = wait(downloads, STALL_SECONDS, FIRST_COMPLETED).done
                if not ready:
                    stop_core()  # W&B hangs; without wandb-core every request ends with an error
                    ready = wait(downloads).done
                for future in ready:
                    num_done += 1
                    progress(num_done)
                    run_id = downloads.pop(future)
                    if failure := future.exception():
                        yield run_id, describe_error(failure)


@dataclass(frozen=True)
class _Details:
    """What W&B says of one run beyond its list of runs. `document` and `metrics`: its files; None if the run has none."""

    state: str
    last_step: int
    config: dict[str, Any]  # only of a run without the file
    summary: dict[str, Any]
    document: dict[str, Any] | None
    metrics: dict[str, Any] | None


def _fetch_details(api: Any, path: WandbPath, run_ids: Sequence[str]) -> dict[str, _Details]:
    """What W&B says of these runs, by id; those that W&B does not have are left out. Two requests at most."""
    place = {"project": path.project, "entity": path.entity}
    filters = json.dumps({"name": {"$in": list(run_ids)}})
    found = execute_graphql(api, _GET_DETAILS, **place, filters=filters, first=len(run_ids)).get("project") or {}
    details = {}
    for run in (edge["node"] for edge in (found.get("runs") or {}).get("edges", ())):
        nodes = [edge["node"] for edge in (run.get("files") or {}).get("edges", ())]
        files = {file.get("name"): file for file in nodes if file.get("sizeBytes")}
        last_step = int((run.get("historyKeys") or {}).get("lastStep", -1))
        summary = json.loads(run.get("summaryMetrics") or "{}")
        details[str(run["name"])] = _Details(
            str(run["state"]), last_step, {}, summary, files.get(DOCUMENT_FILE), files.get(METRICS_FILE)
        )
    if old := [run_id for run_id, one in details.items() if one.document is None]:
        for run in api.runs(f"{path.entity}/{path.project}", {"name": {"$in": old}}, per_page=RUNS_PER_FULL_PAGE, lazy=False):
            details[run.id] = dataclasses.replace(details[run.id], config=dict(run.config))
    return details


def _download_run(api: Any, run: Any, folder: Path, details: _Details) -> None:
    """Download one run into its folder in the cache, from the last step that the cache has, and note its address."""
    _download_files(api, run, folder, details)
    (folder / "wandb").mkdir(exist_ok=True)
    (folder / "wandb" / URL_FILE).write_text(str(run.url or ""))


def _download_files(api: Any, run: Any, folder: Path, details: _Details) -> None:
    document = _download_document(api, details.document, folder.parent) if details.document else None
    about = {"name": run.name, "group": run.group, "tags": run.tags}
    content = convert.build_run_files(run.id, details.config, details.summary, details.state, document, about)
    stamp, last = _change_stamp(run), details.last_step
    written = {**content, "pulled": {"stamp": stamp, "last": last}}
    if lines := _download_rows(api, content, details, document or {}, folder.parent):
        convert.write_run_dir(folder, written, lines)
        return
    notes = read_or_set_aside(folder / NOTES_FILE)
    old_rows: list[dict[str, Any]] = []
    if notes and notes["stamp"][0] == stamp[0] and notes["stamp"][1] <= stamp[1] and notes["last"] <= last:  # it has grown
        old_rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = notes["last"] + 1 if old_rows else 0
    rows = convert.build_rows([*old_rows, *scan_history(run, first, last)]) if last >= first else old_rows
    if not old_rows and run.history_line_count and not rows:
        raise ValueError(f"W&B counts {run.history_line_count} rows and hands out none")
    convert.write_run_dir(folder, written, rows)


def _download_rows(
    api: Any, content: Mapping[str, Mapping[str, Any]], details: _Details, document: Mapping[str, Any], parent: Path
) -> bytes:
    """The file of the rows of a run that has ended; b"" if it is not the one that `document` names, or W&B has other rows."""
    file, named = details.metrics, convert.get_object(document, "metrics")
    has_ended = content["status"] == document.get("status")
    if not file or not named or not has_ended or int(file["sizeBytes"]) != named.get("bytes"):
        return b""
    try:
        with tempfile.TemporaryDirectory(prefix=".metrics.", dir=parent) as folder:
            download_file(api, file, Path(folder))
            lines = read_bytes(Path(folder) / METRICS_FILE, MAX_METRICS_BYTES)
        is_right = compute_md5(lines) == named.get("md5") and len(lines) == named.get("bytes")
        is_right = is_right and convert.read_last_epoch(lines) == details.last_step
    except Exception:  # wandb raises many kinds of errors, and a damaged file some more; the history may still be had
        return b""
    return lines if is_right else b""


def _download_document(api: Any, file: Mapping[str, Any], parent: Path) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory(prefix=".document.", dir=parent) as folder:
        download_file(api, file, Path(folder))
        return read_document(Path(folder) / DOCUMENT_FILE)


def _download_predictions(run: Any, folder: Path) -> None:
    """Download the run's predictions, unless the cache has them or W&B does not."""
    if (folder / PREDICTIONS_FILE).exists() or read_json(folder / "status.json").get("state") not in ENDED_STATES:
        return
    with contextlib.suppress(Exception):  # then the report says that there are none
        for file in run.files([PREDICTIONS_FILE]):
            file.download(root=str(folder), replace=True).close()


def describe_error(error: BaseException) -> str:
    """wandb's error in one short line, without secrets."""
    return redact(" ".join(str(error).split()) or type(error).__name__)[:200]
