"""Looks which version of a model collection is the best, after versions were added: called by the sidecar and by `push`."""

from __future__ import annotations

from collections.abc import Callable

from cifar.integrations.wandb.api import GraphqlClient
from cifar.integrations.wandb.artifact_best import list_offline_files, read_note, settle_online, take_marked
from cifar.integrations.wandb.artifact_choice import find_best, list_candidates
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.mirror_process import num_core_stops
from cifar.tracking.run_dir import RunDir

QUERY_SECONDS = 10.0  # for one question to the server

_client: tuple[int, GraphqlClient] | None = None  # the number of core stops when it was made, and the client


def settle(on_message: Callable[[str], None], *, everything: bool = False) -> None:
    """Let `best` be the best of every collection that got a version since the last call, or in this process. Never raises."""
    for collection, places in take_marked(everything=everything).items():
        for marked in places:
            try:
                if marked.entity:
                    settle_online(_connect(), marked, collection)
                else:
                    _settle_offline(marked.run_dir, on_message)
            except Exception as error:  # a failing server, a full disk
                reason = type(error).__name__
                on_message(f"{collection}: W&B's alias `best` was not checked ({reason}); `push` checks it again")


def _connect() -> GraphqlClient:
    """The client for questions to the server; another one after wandb-core was stopped."""
    global _client
    if _client is None or _client[0] != num_core_stops():
        _client = num_core_stops(), GraphqlClient(QUERY_SECONDS)
    return _client[1]


def _settle_offline(run_dir: RunDir, on_message: Callable[[str], None]) -> None:
    """Write the offline files again that say `best` and are not, and that of the best if it does not say so."""
    candidates = list_candidates(run_dir)
    best = find_best(candidates)
    for candidate in candidates:
        path = run_dir.path.parent / candidate.run_id
        if bool(read_note(path).get("best")) != (candidate is best):
            _write_again(RunDir(path), on_message)


def _write_again(run_dir: RunDir, on_message: Callable[[str], None]) -> None:
    files = list_offline_files(run_dir.path)
    if not files or any(file.with_name(f"{file.name}.synced").exists() for file in files):
        return  # it was sent: the best one takes the alias from it when it is sent
    mirror = Mirror(run_dir, "offline", on_message)
    if mirror.is_complete():
        mirror.forget()
        mirror.finish(sorted((run_dir.path / "pictures").glob("*.png")))
