"""Makes a local sweep a sweep on W&B, with all its runs. An interrupted upload is continued by the next one.

First each run is sent by its mirror, which sends what W&B lacks. Then the sweep is created around them in one request. So there
is never a second sweep: if this process dies between that request and writing it down, the runs on W&B name their sweep.
<sweep folder>/push.json notes what was done.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.config.yaml_loader import parse_yaml
from cifar.errors import UserError
from cifar.integrations.wandb import backend
from cifar.integrations.wandb.download import Progress, connect_to_api, describe_error, ignore_progress
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.notes import read_notes, write_notes
from cifar.integrations.wandb.paths import WandbPath
from cifar.states import ENDED_STATES
from cifar.sweeps import spec
from cifar.tracking.run_dir import RunDir

NOTES_FILE = "push.json"  # in the sweep's folder: "server/entity/project" -> sweep id and run id -> time of its end


@dataclass(frozen=True)
class PushResult:
    """The address of the sweep, how many runs were sent now, and the ids of those that have not ended and were not sent."""

    url: str
    num_sent: int
    open_run_ids: tuple[str, ...]


def push_sweep(
    folder: Path,
    run_dirs: Sequence[RunDir],
    *,
    entity: str = "",
    project: str = "",
    progress: Progress = ignore_progress,
    on_message: Callable[[str], None] = print,
) -> PushResult:
    """Send the sweep in `folder` and its runs. Raises UserError if W&B cannot be used, or if no run has ended yet."""
    text = (folder / "sweep.yaml").read_text(encoding="utf-8")
    info = json.loads((folder / "sweep.json").read_text())
    sweep = spec.parse_sweep(parse_yaml(text, "sweep.yaml"), text, "sweep.yaml", info["name"])
    ended = [run_dir for run_dir in run_dirs if run_dir.state in ENDED_STATES]
    open_run_ids = tuple(run_dir.id for run_dir in run_dirs if run_dir.state not in ENDED_STATES)
    if not ended:
        raise UserError(f"no run of sweep {folder.name} has ended yet; push it when one has")
    api = connect_to_api()
    entity = entity or sweep.entity or str(api.settings["entity"] or api.default_entity)
    project = (
        project or sweep.project or os.environ.get("WANDB_PROJECT") or str(ended[0].read_json("run").get("project") or "cifar")
    )
    server = str(api.settings["base_url"])
    notes = read_notes(folder / NOTES_FILE)
    done = notes.setdefault(f"{server}/{entity}/{project}", {"sweep": "", "runs": {}})
    target = {"server": server, "entity": entity, "project": project, "group": folder.name}
    if done["sweep"]:
        target |= {"sweep": done["sweep"], "engine": "wandb"}
    num_sent = 0
    for n, run_dir in enumerate(ended):
        progress(n, len(ended))
        end_time = run_dir.read_json("status").get("time")
        if done["runs"].get(run_dir.id) == end_time:
            continue
        _send_run(run_dir, target, on_message)
        num_sent += 1
        done["runs"][run_dir.id] = end_time
        write_notes(folder / NOTES_FILE, notes)
    progress(len(ended), len(ended))
    if not done["sweep"]:
        run_ids = [run_dir.id for run_dir in ended]
        existing = _find_sweep_id(api, f"{entity}/{project}", run_ids)
        done["sweep"] = existing or _create_sweep(backend.format_sweep_yaml(sweep, info["fixed"]), entity, project, run_ids)
        write_notes(folder / NOTES_FILE, notes)
    return PushResult(api.sweep(f"{entity}/{project}/{done['sweep']}").url, num_sent, open_run_ids)


def push_runs(
    run_dirs: Sequence[RunDir],
    *,
    entity: str = "",
    project: str = "",
    progress: Progress = ignore_progress,
    on_message: Callable[[str], None] = print,
) -> int:
    """Send what W&B lacks of these runs -> how many lacked something. Raises UserError."""
    target = {name: value for name, value in (("entity", entity), ("project", project)) if value}
    incomplete = [run_dir for run_dir in run_dirs if not Mirror(run_dir, "online", on_message, target).is_complete()]
    for n, run_dir in enumerate(incomplete):
        progress(n, len(incomplete))
        _send_run(run_dir, target, on_message)
    progress(len(incomplete), len(incomplete))
    return len(incomplete)


def _send_run(run_dir: RunDir, target: Mapping[str, str], on_message: Callable[[str], None]) -> None:
    mirror = Mirror(run_dir, "online", on_message, target)
    try:
        is_complete = mirror.finish(sorted((run_dir.path / "pictures").glob("*.png")))
    except Exception as error:  # wandb raises many kinds of errors if its server does not answer
        raise UserError(f"W&B did not take run {run_dir.id} ({describe_error(error)}); push again to go on from here") from None
    if mirror.mode != "online":
        raise UserError(f"W&B did not take run {run_dir.id}; push again to go on from here")
    if not is_complete:
        raise UserError(f"run {run_dir.id} is being sent by another process; push again when that is done")


def _find_sweep_id(api: Any, path: str, run_ids: Sequence[str]) -> str:
    """The sweep on W&B that these runs already belong to, or ""."""
    return next(
        (run.sweep_name for run in api.runs(path, {"name": {"$in": list(run_ids)}}, per_page=500) if run.sweep_name), ""
    )


def _create_sweep(text: str, entity: str, project: str, run_ids: Sequence[str]) -> str:
    import wandb

    config = parse_yaml(text, "sweep.yaml")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the id
        try:
            return str(wandb.sweep(config, entity=entity, project=project, prior_runs=list(run_ids)))
        except (wandb.errors.Error, ValueError) as error:
            raise UserError(f"W&B made no sweep ({error}); the runs are there, push again to go on") from None


def find_pushed_sweep(folder: Path) -> WandbPath | None:
    """The place on W&B of a sweep of this runs folder: it was created there or sent there. None if it is not on W&B."""
    if notes := read_notes(folder / backend.NOTES_FILE):
        return WandbPath(notes["entity"], notes["project"], notes["id"], "sweep")
    for target, done in reversed(read_notes(folder / NOTES_FILE).items()):
        if done["sweep"]:
            _, entity, project = target.rsplit("/", 2)
            return WandbPath(entity, project, done["sweep"], "sweep")
    return None
