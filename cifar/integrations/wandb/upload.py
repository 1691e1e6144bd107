"""A local sweep made a sweep on W&B, with all its runs: once, and gone on with where it was interrupted.

First the runs, each by its mirror, which sends what W&B lacks; then the sweep, made in one request around them. So there is
never a second sweep: if that request was answered and we did not live to write it down, the runs say which sweep they are in.
What was done is in <sweep folder>/push.json.
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

from cifar.config.resolve import parse_yaml
from cifar.errors import UserError
from cifar.integrations.wandb.backend import text_for
from cifar.integrations.wandb.download import Place, connect, reason
from cifar.integrations.wandb.mirror import Mirror
from cifar.sweeps import spec as sweeps
from cifar.tracking.run_dir import END_STATES, Record, write_atomic


@dataclass(frozen=True)
class Pushed:
    """Where the sweep is, how many runs this push sent, and the ids of those that have not ended and were left."""

    url: str
    sent: int
    open: tuple[str, ...]


def push(
    folder: Path,
    records: Sequence[Record],
    *,
    entity: str = "",
    project: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> Pushed:
    """Send the sweep in `folder` and its records. Raises UserError where W&B cannot be used, or nothing has ended yet."""
    text = (folder / "sweep.yaml").read_text(encoding="utf-8")
    info = json.loads((folder / "sweep.json").read_text())
    sweep = sweeps.parse(parse_yaml(text, "sweep.yaml"), text, "sweep.yaml", info["name"])
    ended = [record for record in records if record.state in END_STATES]
    left = tuple(record.id for record in records if record.state not in END_STATES)
    if not ended:
        raise UserError(f"no run of sweep {folder.name} has ended yet; push it when one has")
    api = connect()
    entity = entity or sweep.entity or str(api.settings["entity"] or api.default_entity)
    project = project or sweep.project or os.environ.get("WANDB_PROJECT") or str(ended[0].read("run").get("project") or "cifar")
    server = str(api.settings["base_url"])
    known = _known(folder)
    done = known.setdefault(f"{server}/{entity}/{project}", {"sweep": "", "runs": {}})
    place = {"server": server, "entity": entity, "project": project, "group": folder.name}
    if done["sweep"]:
        place |= {"sweep": done["sweep"], "engine": "wandb"}
    sent = 0
    for n, record in enumerate(ended):
        progress(n, len(ended))
        stamp = record.read("status").get("time")
        if done["runs"].get(record.id) == stamp:
            continue
        _send(record, place, say)
        sent += 1
        done["runs"][record.id] = stamp
        _keep(folder, known)
    progress(len(ended), len(ended))
    if not done["sweep"]:
        ids = [record.id for record in ended]
        made = _sweep_of(api, f"{entity}/{project}", ids)
        done["sweep"] = made or _create(text_for(sweep, info["fixed"]), entity, project, ids)
        _keep(folder, known)
    return Pushed(api.sweep(f"{entity}/{project}/{done['sweep']}").url, sent, left)


def push_runs(
    records: Sequence[Record],
    *,
    entity: str = "",
    project: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = print,
) -> int:
    """Send what W&B lacks of these runs to where they belong -> how many lacked something. Raises UserError."""
    place = {name: value for name, value in (("entity", entity), ("project", project)) if value}
    lacking = [record for record in records if not Mirror(record, "online", say, place).complete()]
    for n, record in enumerate(lacking):
        progress(n, len(lacking))
        _send(record, place, say)
    progress(len(lacking), len(lacking))
    return len(lacking)


def _send(record: Record, place: Mapping[str, str], say: Callable[[str], None]) -> None:
    mirror = Mirror(record, "online", say, place)
    try:
        sent = mirror.finish(sorted((record.path / "pictures").glob("*.png")))
    except Exception as error:  # of wandb, whose server went away
        raise UserError(f"W&B did not take run {record.id} ({reason(error)}); push again to go on from here") from None
    if mirror.mode != "online":
        raise UserError(f"W&B did not take run {record.id}; push again to go on from here")
    if not sent:
        raise UserError(f"run {record.id} is being sent by another process; push again when that is done")


def _sweep_of(api: Any, path: str, ids: Sequence[str]) -> str:
    """The sweep that these runs are in already, or ""."""
    return next((run.sweep_name for run in api.runs(path, {"name": {"$in": list(ids)}}, per_page=500) if run.sweep_name), "")


def _create(text: str, entity: str, project: str, ids: Sequence[str]) -> str:
    import wandb

    config = parse_yaml(text, "sweep.yaml")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the id
        try:
            return str(wandb.sweep(config, entity=entity, project=project, prior_runs=list(ids)))
        except (wandb.errors.Error, ValueError) as error:
            raise UserError(f"W&B made no sweep ({error}); the runs are there, push again to go on") from None


def place_of_sweep(folder: Path) -> Place | None:
    """Where on W&B a sweep of this runs folder is: it was made there, or pushed. None: nowhere."""
    with contextlib.suppress(FileNotFoundError):
        made = json.loads((folder / "wandb.json").read_bytes())
        return Place(made["entity"], made["project"], made["id"], "sweep")
    for where, done in reversed(_known(folder).items()):
        if done["sweep"]:
            _, entity, project = where.rsplit("/", 2)
            return Place(entity, project, done["sweep"], "sweep")
    return None


def _known(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        return dict(json.loads((folder / "push.json").read_bytes()))
    return {}


def _keep(folder: Path, known: Mapping[str, Any]) -> None:
    write_atomic(folder / "push.json", json.dumps(known, indent=1).encode())
