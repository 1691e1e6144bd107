"""Moves the alias `best` of a model collection to the version with the highest val/acc of the last epoch.

Online, W&B's own list of versions decides, so runs of other machines count. The alias is moved under a lock of the sweep.
A machine that does not share its folder may move it at the same time, so every agent looks again when it ends, and `push` does.

Offline, the alias is a part of the run's file. If a better run ends, the file of the former best is written again without it.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar.integrations.wandb.api import GraphqlClient
from cifar.integrations.wandb.artifact_choice import Candidate, find_best, list_candidates, read_candidate
from cifar.integrations.wandb.artifacts import DATASET, MODEL, collection_name, parse_metadata
from cifar.integrations.wandb.notes import read_or_set_aside, write_notes
from cifar.system.disk import cache_folder
from cifar.system.names import is_id
from cifar.tracking.run_dir import RunDir, list_folders

BEST = "best"
LOCK_FILE = "artifacts.lock"
NOTE_FILE = "artifacts.json"  # in RUN/wandb: what the run's offline file says
LOCK_SECONDS = 10.0
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
class Marked:
    """A collection with a new version. `run_dir`: one of its runs. Without an entity it is that of offline files."""

    run_dir: RunDir
    entity: str = ""
    project: str = ""


_new: dict[tuple[Path, str, str, str], Marked] = {}  # since the last `take_marked`
_all: dict[tuple[Path, str, str, str], Marked] = {}  # in this process


def lock_file(run_dir: RunDir) -> Path:
    """The lock of a run's collections: in the folder of its sweep, which agents of other machines may share."""
    runs_dir, sweep = run_dir.path.parent, str(run_dir.read_json("run").get("sweep") or "")
    if is_id(sweep) and (runs_dir / "sweeps" / sweep).is_dir():
        return runs_dir / "sweeps" / sweep / LOCK_FILE
    return dataset_lock_file(run_dir)


def dataset_lock_file(run_dir: RunDir) -> Path:
    """The lock of a runs folder's datasets on this machine."""
    folder = cache_folder() / "wandb" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(str(run_dir.path.parent).encode()).hexdigest()[:16]}.lock"


def mark(run_dir: RunDir, entity: str, project: str) -> None:
    """Note that W&B has a new version of a run's model collection: `settle` looks which one is the best."""
    key = (run_dir.path.parent, collection_name(MODEL, run_dir.read_json("run")), entity, project)
    _new[key] = _all[key] = Marked(run_dir, entity, project)


def take_marked(*, everything: bool = False) -> dict[str, list[Marked]]:
    """The collections that were marked since the last call, or in this process: name -> where."""
    found: dict[str, list[Marked]] = {}
    for (_, collection, _, _), marked in (_all if everything else _new).items():
        found.setdefault(collection, []).append(marked)
    _new.clear()
    return found


# -- online ------------------------------------------------------------------------------------------------------------


def settle_online(client: GraphqlClient, marked: Marked, collection: str) -> None:
    """Move `best` to the best version that W&B has now, if it is another one. Raises what wandb raises."""
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


def _fetch_versions(client: GraphqlClient, marked: Marked, collection: str) -> list[tuple[Candidate, dict[str, Any]]]:
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
    """Whether this run, whose offline file is being written, is the best of its collection here. Notes what the file says."""
    with FileLock(lock_file(run_dir), timeout=LOCK_SECONDS):
        best = find_best(list_candidates(run_dir))
        is_best = best is not None and best.run_id == run_dir.id
        _write_note(run_dir, best=is_best)
    mark(run_dir, "", "")
    return is_best


def take_dataset_offline(run_dir: RunDir) -> bool:
    """Whether this run's offline file is to hold the dataset: one file does, since `wandb sync` sends files side by side.

    Two at once would make two versions of the same. `push` tells W&B of the other runs that they use it.
    """
    about, fingerprint = run_dir.read_json("run"), run_dir.read_json("environment").get("data_fingerprint")
    dataset = f"{collection_name(DATASET, about)} {fingerprint}"
    with FileLock(dataset_lock_file(run_dir), timeout=LOCK_SECONDS):
        for folder in list_folders(run_dir.path.parent):
            if folder != run_dir.path and read_note(folder).get("dataset") == dataset and list_offline_files(folder):
                return False
        _write_note(run_dir, dataset=dataset)
    return True


def list_offline_files(folder: Path) -> list[Path]:
    return list((folder / "wandb").glob("offline-run-*/*.wandb"))


def read_note(folder: Path) -> dict[str, Any]:
    """What the offline file of a run says: `best`, whether it is the best; `dataset`, which dataset it holds."""
    return read_or_set_aside(folder / "wandb" / NOTE_FILE)


def _write_note(run_dir: RunDir, **values: Any) -> None:
    write_notes(run_dir.path / "wandb" / NOTE_FILE, {**read_note(run_dir.path), **values}, indent=None)
