"""Moves the alias `best` of a model collection to the version with the highest val/acc of the last epoch.

Online, W&B's own list of versions decides, so runs of other machines count. The alias is moved under a lock of the runs folder.
A machine without this lock may move it at the same time, so every agent looks again when it ends, and `push` does.

Offline, the alias is a part of the run's file. If a better run ends, the file of the former best is written again without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar.integrations.wandb.api import GraphqlClient
from cifar.integrations.wandb.artifact_choice import Candidate, find_best, list_candidates, read_candidate
from cifar.integrations.wandb.artifacts import DATASET, MODEL, collection_name, parse_metadata
from cifar.integrations.wandb.notes import read_or_set_aside, write_notes
from cifar.tracking.run_dir import RunDir

BEST = "best"
LOCK_FILE, NOTES_FILE = ".wandb-best.lock", ".wandb-best.json"  # in the runs folder; notes: of offline files
LOCK_SECONDS, QUERY_SECONDS = 10.0, 10.0
VERSIONS_PER_PAGE = 500
_GET_VERSIONS = """query ModelVersions(
  $entity: String!, $project: String!, $type: String!, $collection: String!, $first: Int, $after: String
) {
  project(name: $project, entityName: $entity) {
    artifactType(name: $type) {
      artifactCollection(name: $collection) {
        artifacts(first: $first, after: $after) {
          edges { node { id state metadata aliases { alias } } }
          pageInfo { endCursor hasNextPage }
        }
      }
    }
  }
}"""
_ADD_ALIAS = """mutation AddAliases($input: AddAliasesInput!) { addAliases(input: $input) { success } }"""  # wandb's own


@dataclass(frozen=True)
class _Marked:
    """A collection with a new version. `run_dir`: one of its runs. Without an entity it is that of offline files."""

    run_dir: RunDir
    entity: str = ""
    project: str = ""


_marked: dict[tuple[Path, str, str, str], _Marked] = {}  # since the last `settle`
_touched: dict[tuple[Path, str, str, str], _Marked] = {}  # in this process


def lock_file(run_dir: RunDir) -> Path:
    return run_dir.path.parent / LOCK_FILE


def mark(run_dir: RunDir, entity: str, project: str) -> None:
    """Note that W&B has a new version of a run's model collection: `settle` looks which one is the best."""
    key = (run_dir.path.parent, collection_name(MODEL, run_dir.read_json("run")), entity, project)
    _marked[key] = _touched[key] = _Marked(run_dir, entity, project)


def settle(on_message: Callable[[str], None], *, everything: bool = False) -> None:
    """Let `best` be the best of every collection that got a version since the last call, or in this process. Never raises."""
    work = dict(_touched if everything else _marked)
    _marked.clear()
    for (_, collection, _, _), marked in work.items():
        try:
            if marked.entity:
                _settle_online(marked, collection)
            else:
                _settle_offline(marked.run_dir, on_message)
        except Exception as error:  # a failing server, a full disk
            on_message(f"{collection}: W&B's alias `best` was not checked ({type(error).__name__}); `push` checks it again")


# -- online ------------------------------------------------------------------------------------------------------------


def _settle_online(marked: _Marked, collection: str) -> None:
    client = GraphqlClient(QUERY_SECONDS)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(Timeout, OSError):  # without it, the check at the end of the sweep is left
            stack.enter_context(FileLock(lock_file(marked.run_dir), timeout=LOCK_SECONDS))
        versions = _fetch_versions(client, marked, collection)
        best = find_best(candidate for candidate, _ in versions)
        found = next((node for candidate, node in versions if candidate is best), None)
        if found is None or BEST in {each["alias"] for each in found.get("aliases") or ()}:
            return
        where = {"entityName": marked.entity, "projectName": marked.project, "artifactCollectionName": collection}
        client.execute_graphql(_ADD_ALIAS, input={"artifactID": found["id"], "aliases": [{**where, "alias": BEST}]})


def _fetch_versions(client: GraphqlClient, marked: _Marked, collection: str) -> list[tuple[Candidate, dict[str, Any]]]:
    versions: list[tuple[Candidate, dict[str, Any]]] = []
    place = {"entity": marked.entity, "project": marked.project, "type": MODEL, "collection": collection}
    after = None
    while True:
        answer = client.execute_graphql(_GET_VERSIONS, **place, first=VERSIONS_PER_PAGE, after=after)
        page = answer
        for name in ("project", "artifactType", "artifactCollection", "artifacts"):
            page = (page or {}).get(name) or {}
        nodes = [edge["node"] for edge in page.get("edges", ()) if edge["node"]["state"] == "COMMITTED"]
        versions += [(read_candidate(parse_metadata(node.get("metadata"))), node) for node in nodes]
        after = (page.get("pageInfo") or {}).get("endCursor")
        if not (page.get("pageInfo") or {}).get("hasNextPage"):
            return versions


# -- offline -----------------------------------------------------------------------------------------------------------


def take_offline(run_dir: RunDir) -> bool:
    """Whether this run, whose offline file is being written, is the best of its collection here. Notes that it is."""
    collection = collection_name(MODEL, run_dir.read_json("run"))
    with FileLock(lock_file(run_dir), timeout=LOCK_SECONDS):
        best = find_best(list_candidates(run_dir))
        notes = _read_notes(run_dir)
        former, stale = notes.get(collection, ("", ()))
        stale = [run_id for run_id in stale if run_id != run_dir.id]
        is_best = best is not None and best.run_id == run_dir.id
        if is_best and former not in ("", run_dir.id):
            stale.append(former)
        elif former == run_dir.id and not is_best:
            former = ""
        notes[collection] = (run_dir.id if is_best else former, stale)
        _write_notes(run_dir, notes)
    mark(run_dir, "", "")
    return is_best


def take_dataset_offline(run_dir: RunDir) -> bool:
    """Whether this run's offline file is to hold the dataset: one file does, since `wandb sync` sends files side by side.

    Two at once would make two versions of the same. `push` tells W&B of the other runs that they use it.
    """
    about, fingerprint = run_dir.read_json("run"), run_dir.read_json("environment").get("data_fingerprint")
    key = f"{collection_name(DATASET, about)} {fingerprint}"
    with FileLock(lock_file(run_dir), timeout=LOCK_SECONDS):
        notes = _read_notes(run_dir)
        holder = notes.get(key, ("", ()))[0]
        if holder not in ("", run_dir.id) and any((run_dir.path.parent / holder / "wandb").glob("offline-run-*")):
            return False
        notes[key] = (run_dir.id, [])
        _write_notes(run_dir, notes)
    return True


def _settle_offline(run_dir: RunDir, on_message: Callable[[str], None]) -> None:
    """Write the offline files again that say `best` and are not, and that of the best if it does not say so."""
    collection = collection_name(MODEL, run_dir.read_json("run"))
    noted, stale = _read_notes(run_dir).get(collection, ("", ()))
    best = find_best(list_candidates(run_dir))
    wrong = [run_id for run_id in stale if run_id != noted] + ([best.run_id] if best and best.run_id != noted else [])
    for run_id in dict.fromkeys(wrong):
        _write_again(RunDir(run_dir.path.parent / run_id), on_message)


def _write_again(run_dir: RunDir, on_message: Callable[[str], None]) -> None:
    from cifar.integrations.wandb.mirror import Mirror  # it imports the feeds

    files = list((run_dir.path / "wandb").glob("offline-run-*/*.wandb"))
    if not files or any(file.with_name(f"{file.name}.synced").exists() for file in files):
        return  # it was sent: the best one takes the alias from it when it is sent
    mirror = Mirror(run_dir, "offline", on_message)
    if mirror.is_complete():
        mirror.forget()
        mirror.finish(sorted((run_dir.path / "pictures").glob("*.png")))


def _read_notes(run_dir: RunDir) -> dict[str, tuple[str, list[str]]]:
    """Collection -> the run whose offline file says that it is the best, and the runs whose files say so wrongly.

    Also dataset and fingerprint -> the run whose offline file holds the dataset.
    """
    notes = read_or_set_aside(run_dir.path.parent / NOTES_FILE)
    return {
        name: (str(value.get("best") or ""), [str(run_id) for run_id in value.get("stale") or ()])
        for name, value in notes.items()
        if isinstance(value, dict)
    }


def _write_notes(run_dir: RunDir, notes: dict[str, tuple[str, list[str]]]) -> None:
    content = {name: {"best": best, "stale": stale} for name, (best, stale) in notes.items()}
    write_notes(run_dir.path.parent / NOTES_FILE, content, indent=None)
