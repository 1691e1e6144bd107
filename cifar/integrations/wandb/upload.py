"""Makes a local sweep a sweep on W&B, with all its runs. An interrupted upload is continued by the next one.

First each run is sent by its mirror, which sends what W&B lacks. Then the sweep is created around them in one request. So there
is never a second sweep: if this process dies between that request and writing it down, the runs on W&B name their sweep.
<sweep folder>/push.json notes what was done. Notes are no proof: what W&B has of each run is read back and compared with its
folder, also if an earlier push has sent it.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar.config.yaml_loader import parse_yaml
from cifar.errors import UserError
from cifar.integrations.wandb import arrival, artifact_arrival, artifact_best, artifact_settle, backend
from cifar.integrations.wandb.api import GraphqlClient
from cifar.integrations.wandb.artifacts import MODEL
from cifar.integrations.wandb.download import Progress, connect_to_api, describe_error, ignore_progress
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.notes import read_notes, write_notes
from cifar.integrations.wandb.paths import WandbPath
from cifar.states import ENDED_STATES
from cifar.sweeps import spec
from cifar.sweeps.folder import read_sweep_info, read_sweep_text
from cifar.system.files import shorten_repr
from cifar.system.ownership import find_owner
from cifar.system.variables import read_variable
from cifar.tracking.run_dir import RunDir

PATIENCE_SECONDS = 60.0  # how long to wait for the rows of a run to arrive
RUNS_AT_A_TIME = 8
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
    text, info = read_sweep_text(folder), read_sweep_info(folder)
    if spec.is_final(info["fixed"]):  # an agent that W&B hands an open cell of it to would train that without its score
        raise UserError(
            f"sweep {folder.name} scores the test set, and W&B's sweeps do not; push its runs: python -m cifar push RUN"
        )
    sweep = spec.parse_sweep(parse_yaml(text, "sweep.yaml"), text, "sweep.yaml", info["name"])
    ended = [run_dir for run_dir in run_dirs if run_dir.state in ENDED_STATES and not find_owner(run_dir.path)]
    ended_ids = {run_dir.id for run_dir in ended}
    open_run_ids = tuple(run_dir.id for run_dir in run_dirs if run_dir.id not in ended_ids)
    if not ended:
        raise UserError(f"no run of sweep {folder.name} has ended yet; push it when one has")
    api = connect_to_api()
    entity = entity or sweep.entity or str(api.settings["entity"] or api.default_entity)
    project = (
        project or sweep.project or read_variable("WANDB_PROJECT") or str(ended[0].read_json("run").get("project") or "cifar")
    )
    server = str(api.settings["base_url"])
    notes = _read_push_notes(folder)
    done = notes.setdefault(f"{server}/{entity}/{project}", {"sweep": "", "runs": {}})
    target = {"server": server, "entity": entity, "project": project, "group": folder.name}
    if done["sweep"]:
        target |= {"sweep": done["sweep"], "engine": "wandb"}
    sent_before = [run_dir.id for run_dir in ended if done["runs"].get(run_dir.id) == run_dir.read_json("status").get("time")]
    missing = _find_missing(ended, sent_before, target, on_message)
    for n, run_dir in enumerate(_send_runs(missing, target, on_message)):
        progress(n + 1, len(missing))
        done["runs"][run_dir.id] = run_dir.read_json("status").get("time")
        write_notes(folder / NOTES_FILE, notes)
    _settle_models(ended, target, entity, on_message)
    _ensure_arrived(missing, target)
    if not done["sweep"]:
        run_ids = [run_dir.id for run_dir in ended]
        existing = _find_sweep_id(api, f"{entity}/{project}", run_ids)
        done["sweep"] = existing or _create_sweep(backend.format_sweep_yaml(sweep, info["fixed"]), entity, project, run_ids)
        write_notes(folder / NOTES_FILE, notes)
    return PushResult(api.sweep(f"{entity}/{project}/{done['sweep']}").url, len(missing), open_run_ids)


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
    api = connect_to_api()  # raises UserError if there is no key
    sent_before = [run_dir.id for run_dir in run_dirs if Mirror(run_dir, "online", on_message, target).is_complete()]
    missing = _find_missing(run_dirs, sent_before, target, on_message)
    for n, _ in enumerate(_send_runs(missing, target, on_message)):
        progress(n + 1, len(missing))
    _settle_models(run_dirs, target, str(api.settings["entity"] or api.default_entity), on_message)
    _ensure_arrived(missing, target)
    return len(missing)


def _settle_models(
    run_dirs: Sequence[RunDir], target: Mapping[str, str], default_entity: str, on_message: Callable[[str], None]
) -> None:
    """Let W&B's alias `best` be right for the models of these runs, also where nothing was sent now."""
    for run_dir in run_dirs:
        if MODEL in artifact_arrival.list_kinds(run_dir):
            run = {**run_dir.read_json("run"), **target}
            artifact_best.mark(run_dir, run.get("entity") or default_entity, run.get("project") or "cifar")
    artifact_settle.settle(on_message)


def _find_missing(
    run_dirs: Sequence[RunDir], sent_before: Sequence[str], target: Mapping[str, str], on_message: Callable[[str], None]
) -> list[RunDir]:
    """The runs that W&B does not have as they are here. `sent_before`: ids of those that our notes say it has."""
    differences, missing = _find_differences(run_dirs, target), []
    for run_dir in run_dirs:
        mirror, difference = Mirror(run_dir, "online", on_message, target), differences.get(run_dir.id)
        engine = target.get("engine") or run_dir.read_json("run").get("engine")
        if run_dir.id in sent_before and difference:
            on_message(f"run {run_dir.id} is not on W&B as it is here: {difference}; sending it again")
            mirror.forget()
        elif run_dir.id in sent_before:
            continue
        elif not difference and engine != "wandb":  # `wandb sync` has sent it; it could not put it into a sweep
            mirror.note_complete()
            continue
        missing.append(run_dir)
    return missing


def _ensure_arrived(run_dirs: Sequence[RunDir], target: Mapping[str, str]) -> None:
    """Read back what was sent. Raises UserError if W&B has something else."""
    differences = _find_differences(run_dirs, target, looks_at_pictures=False)  # a server may list a file some time later
    for run_dir in run_dirs:
        if run_dir.id in differences:
            Mirror(run_dir, "online", target=target).forget()
    if differences:
        run_id, difference = next(iter(differences.items()))
        others = f" (and {len(differences) - 1} more runs)" if len(differences) > 1 else ""
        raise UserError(f"run {run_id} is not on W&B as it is here: {difference}{others}; push again to send what is missing")


def _find_differences(
    run_dirs: Sequence[RunDir], target: Mapping[str, str], *, looks_at_pictures: bool = True
) -> dict[str, str]:
    """Run id -> how W&B's run differs from the folder, for those that do. One request for many runs."""
    if not run_dirs:
        return {}
    places: dict[tuple[str, str], list[RunDir]] = {}
    client = GraphqlClient()
    for run_dir in run_dirs:
        run = {**run_dir.read_json("run"), **target}
        places.setdefault((run.get("entity") or client.entity, run.get("project") or "cifar"), []).append(run_dir)
    found: dict[str, str] = {}
    for (entity, project), there in places.items():
        try:
            arrived = arrival.fetch_runs(client.execute_graphql, entity, project, [run_dir.id for run_dir in there])
            if not looks_at_pictures:
                arrived = {run_id: replace(run, pictures=None, metrics_md5="") for run_id, run in arrived.items()}
            for run_dir in there:
                read_history = functools.partial(arrival.read_history, client.api, entity, project, run_dir.id)
                if difference := arrival.describe_difference(arrived.get(run_dir.id), run_dir, read_history):
                    found[run_dir.id] = difference
        except Exception as error:  # as above
            raise UserError(f"W&B does not tell what it has ({describe_error(error)}); push again to go on") from None
    return found


def _send_runs(run_dirs: Sequence[RunDir], target: Mapping[str, str], on_message: Callable[[str], None]) -> Iterator[RunDir]:
    """Send the runs, several at a time -> each one when W&B has it. While W&B takes the rows of one, others are sent."""
    for start in range(0, len(run_dirs), RUNS_AT_A_TIME):
        mirrors = [Mirror(run_dir, "online", on_message, target) for run_dir in run_dirs[start : start + RUNS_AT_A_TIME]]
        with contextlib.ExitStack() as stack:
            for mirror in mirrors:  # nobody can go on with these runs meanwhile
                stack.enter_context(mirror.run_dir.own("sent to W&B"))
            for patience in (0.0, PATIENCE_SECONDS):
                for mirror in mirrors:
                    if _finish_run(mirror, patience) or patience:
                        yield mirror.run_dir
                mirrors = [mirror for mirror in mirrors if not mirror.is_complete()]


def _finish_run(mirror: Mirror, patience: float) -> bool:
    """Send one run. False if W&B has not got all of it after `patience` seconds; an error if these are more than 0."""
    run_dir = mirror.run_dir
    try:
        is_complete = mirror.finish(sorted((run_dir.path / "pictures").glob("*.png")), patience)
    except Exception as error:  # wandb raises many kinds of errors if its server does not answer
        raise UserError(f"W&B did not take run {run_dir.id} ({describe_error(error)}); push again to go on from here") from None
    if mirror.mode != "online":
        raise UserError(f"W&B did not take run {run_dir.id}; push again to go on from here")
    if mirror.is_open and not patience:
        return False
    if mirror.is_open or mirror.has_given_up:
        if mirror.is_open:
            mirror.release()
        raise UserError(f"W&B does not have all of run {run_dir.id}; its summary says so there; push again to go on from here")
    if not is_complete:
        raise UserError(f"run {run_dir.id} is being sent by another process; push again when that is done")
    return True


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


def _read_push_notes(folder: Path) -> dict[str, Any]:
    """push.json: "server/entity/project" -> {"sweep": id, "runs": {run id: time}}. Raises UserError for anything else."""
    notes = read_notes(folder / NOTES_FILE)
    for target, done in notes.items():
        is_right = isinstance(done, dict) and isinstance(done.get("sweep"), str) and isinstance(done.get("runs"), dict)
        if target.count("/") < 2 or not is_right:
            raise UserError(
                f"{folder / NOTES_FILE} is damaged ({shorten_repr(target)}); restore it, or delete it: W&B is asked then"
            )
    return notes


def find_pushed_sweep(folder: Path) -> WandbPath | None:
    """The place on W&B of a sweep of this runs folder: it was created there or sent there. None if it is not on W&B."""
    notes = read_notes(folder / backend.NOTES_FILE)
    if all(isinstance(notes.get(name), str) for name in ("entity", "project", "id")):
        return WandbPath(notes["entity"], notes["project"], notes["id"], "sweep")
    for target, done in reversed(_read_push_notes(folder).items()):
        if done["sweep"]:
            _, entity, project = target.rsplit("/", 2)
            return WandbPath(entity, project, done["sweep"], "sweep")
    return None
