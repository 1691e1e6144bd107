"""Runs read back from W&B, exactly: every row of their histories, never the sample that a chart shows.

    pulled = pull(place_of("entity/project/sweep"))
    pulled.folders      # run folders in the cache, for the report

A run is read once: it stays in the cache until W&B says that it has changed, and a run that goes on is read from its last
step. W&B is asked for one list of runs, with neither configurations nor numbers, and then for what the cache lacks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from cifar.errors import UserError
from cifar.integrations.wandb import convert as rebuild
from cifar.integrations.wandb.mirror import PREDICTIONS, stop_core
from cifar.integrations.wandb.settings import credentials
from cifar.tracking.run_dir import END_STATES, read_json, redact

LISTED, WHOLE = 500, 50  # runs a page, without and with their configurations
THREADS = 8
STALL_SECONDS = 60.0  # without an answer
STEPS = 10_000  # of a history a request
_NAME = re.compile(r"[\w.][\w. -]*")
_VIEWS = ("workspace", "table", "overview", "sweeps", "runs", "reports", "groups", "artifacts")


@dataclass(frozen=True)
class Place:
    """Where on W&B: a project, or one sweep or run of it (`part`; `kind` is "" where the name does not say which)."""

    entity: str
    project: str
    part: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.entity, self.project, self.part)))


@dataclass(frozen=True)
class Pulled:
    """Run folders in the cache, and (id, name, reason) of the runs that could not be read."""

    folders: tuple[Path, ...]
    damaged: tuple[tuple[str, str, str], ...] = ()
    title: str = ""
    question: str = ""
    cells: int = 0  # runs that the sweep will have; 0: not known, or no sweep


def place_of(name: str) -> Place | None:
    """`entity/project`, `entity/project/sweep`, or an address copied from the browser; None for what is no such name."""
    parts = [part for part in name.strip().split("/") if part]
    if "://" in name:
        parts = [unquote(part) for part in urlsplit(name.strip()).path.split("/") if part]
        if len(parts) > 2 and parts[0] == "wandb" and parts[2] not in _VIEWS:
            parts = parts[1:]  # https://forge.coreweave.com/wandb/ENTITY/PROJECT/...
    elif name.startswith(("/", "~", ".")) or name.endswith("/"):
        return None
    kind = parts[2].removesuffix("s") if len(parts) > 2 and parts[2] in ("sweeps", "runs") else ""
    if len(parts) > 2 and parts[2] in _VIEWS:
        parts = parts[:2] + (parts[3:4] if kind else [])
    if len(parts) not in (2, 3) or not all(_NAME.fullmatch(part) for part in parts):
        return None
    return Place(parts[0], parts[1], parts[2], kind) if len(parts) == 3 else Place(parts[0], parts[1])


def pull(place: Place, progress: Callable[[int, int], None] = lambda done, total: None) -> Pulled:
    """Bring the cache up to date. `progress` hears of (runs read, runs in all). Raises UserError where there is nothing."""
    api = connect()
    import wandb

    home = (
        rebuild.cache_folder() / quote(urlsplit(api.settings["base_url"]).netloc) / quote(place.entity) / quote(place.project)
    )
    home.mkdir(parents=True, exist_ok=True)
    try:
        sweep = _sweep(api, place)
        chosen = {"sweep": place.part} if sweep else {"name": place.part} if place.part else {}
        listed = {run.id: run for run in api.runs(f"{place.entity}/{place.project}", chosen, per_page=LISTED)}
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"{place} cannot be read from W&B ({reason(error)}), and there is no such folder here") from None
    if place.part and not sweep and not listed:
        raise UserError(f"{place}: there is no sweep and no run '{place.part}' in this project on W&B")
    with FileLock(home / "pull.lock"):
        stale = [run_id for run_id, run in listed.items() if _known(home / run_id).get("stamp") != _stamp(run)]
        damaged = dict(_refresh(api, place, home, listed, stale, lambda n: progress(len(listed) - len(stale) + n, len(listed))))
    folders = tuple(home / run_id for run_id in listed if run_id not in damaged)
    if len(folders) == 1 and not sweep:  # a run's own report shows what it got wrong; those of many runs do not
        _predictions(listed[folders[0].name], folders[0])
    bad = tuple((run_id, str(listed[run_id].name or run_id), why) for run_id, why in damaged.items())
    if not sweep:
        return Pulled(folders, bad, str(place))
    config = sweep.config if isinstance(sweep.config, dict) else {}
    name = config.get("name")
    title = f"{name} ({place.part})" if name and name != place.part else place.part
    return Pulled(folders, bad, title, str(config.get("description") or "").strip(), int(sweep.expected_run_count or 0))


def connect() -> Any:
    """wandb's public API, for the configured server. Never a prompt: raises UserError where there is no key."""
    if not credentials():
        raise UserError("W&B needs a key: run `wandb login` or set WANDB_API_KEY")
    if "wandb" not in sys.modules:
        os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    import wandb

    try:
        return wandb.Api()
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"W&B cannot be reached ({reason(error)})") from None


def _sweep(api: Any, place: Place) -> Any:
    """The sweep that is asked for; None where it is a project or a run."""
    import wandb

    if not place.part or place.kind == "run":
        return None
    with contextlib.suppress(ValueError, wandb.errors.CommError):
        return api.sweep(str(place))
    return None


def _stamp(run: Any) -> list[Any]:
    """What changes when a run does. A list that tells it costs nothing for a run."""
    return [run.created_at, run.history_line_count, run.state, run.heartbeat_at]


def _known(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((folder / "pulled.json").read_bytes()))
    return {}


def _refresh(
    api: Any, place: Place, home: Path, listed: dict[str, Any], stale: list[str], progress: Callable[[int], None]
) -> Iterator[tuple[str, str]]:
    """Read the stale runs, several at a time; yields (id, reason) of those that fail."""
    progress(0)
    waiting = iter(stale)
    done = 0
    with ThreadPoolExecutor(THREADS) as pool:
        while chunk := list(itertools.islice(waiting, WHOLE)):
            try:
                page = list(api.runs(f"{place.entity}/{place.project}", {"name": {"$in": chunk}}, per_page=WHOLE, lazy=False))
            except Exception as error:  # whatever wandb makes of a server in trouble
                yield from ((run_id, reason(error)) for run_id in chunk)
                continue
            reading: dict[Future[None], str] = {
                pool.submit(_pull_one, run, home / run.id, _stamp(listed[run.id])): run.id for run in page
            }
            for run_id in set(chunk) - set(reading.values()):
                yield run_id, "W&B did not hand it out"
            while reading:
                ready = wait(reading, STALL_SECONDS, FIRST_COMPLETED).done
                if not ready:
                    stop_core()  # W&B hangs; without its core every request ends with an error
                    ready = wait(reading).done
                for each in ready:
                    done += 1
                    progress(done)
                    run_id = reading.pop(each)
                    if failure := each.exception():
                        yield run_id, reason(failure)


def _pull_one(run: Any, folder: Path, stamp: list[Any]) -> None:
    """One run -> its folder in the cache, from the step that the cache ends with."""
    from wandb.apis.public import HistoryScan

    content = rebuild.files(run.id, run.config, run.summary_metrics, run.state)
    last = int((run.history_keys or {}).get("lastStep", -1))
    known = _known(folder)
    kept: list[dict[str, Any]] = []
    if known and known["stamp"][0] == stamp[0] and known["stamp"][1] <= stamp[1] and known["last"] <= last:  # rows were added
        kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = known["last"] + 1 if kept else 0
    # not run.scan_history(): it asks for the last step again, once a run
    scan: Any = HistoryScan(
        run, service_api=run._service_api, min_step=first, max_step=last + 1, page_size=STEPS, use_cache=False
    )
    lines = rebuild.rows([*kept, *scan]) if last >= first else kept
    if not kept and run.history_line_count and not lines:
        raise ValueError(f"W&B counts {run.history_line_count} rows and hands out none")
    rebuild.write(folder, {**content, "pulled": {"stamp": stamp, "last": last}}, lines)


def _predictions(run: Any, folder: Path) -> None:
    """The run's predictions beside the rest of it, where W&B has them and they are not there yet."""
    if (folder / PREDICTIONS).exists() or read_json(folder / "status.json").get("state") not in END_STATES:
        return
    with contextlib.suppress(Exception):  # the report then says that there are none
        for file in run.files([PREDICTIONS]):
            file.download(root=str(folder), replace=True).close()


def reason(error: BaseException) -> str:
    """What wandb says is wrong, in one short line."""
    return redact(" ".join(str(error).split()) or type(error).__name__)[:200]
