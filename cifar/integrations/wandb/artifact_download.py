"""Reads a model artifact back from W&B: ENTITY/PROJECT/NAME:ALIAS, or the URL of its page, -> a run folder in the cache.

The folder has what loading and scoring need: the weights, the configuration, run.json and environment.json. Only files of these
names are fetched, each below a bound and with the checksum that the artifact says.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cifar.errors import UserError
from cifar.integrations.wandb.artifacts import MODEL, RECORD_FILES, WEIGHTS_FILE
from cifar.integrations.wandb.download import connect_to_api, describe_error
from cifar.system.disk import cache_folder
from cifar.system.files import is_regular_file, shorten_repr
from cifar.system.names import is_id
from cifar.tracking.pretrained import find_run_or_pretrained
from cifar.tracking.run_dir import RunDir

MAX_WEIGHTS_BYTES, MAX_RECORD_BYTES = 2**36, 2**24
_PART = re.compile(r"[\w.][\w. -]*")


@dataclass(frozen=True)
class ArtifactPath:
    """A version of an artifact on W&B. `alias`: latest, best, run-ID, v3, ..."""

    entity: str
    project: str
    collection: str
    alias: str

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.collection}:{self.alias}"


def parse_artifact_path(name: str) -> ArtifactPath | None:
    """Parse ENTITY/PROJECT/NAME:ALIAS, or the URL of an artifact's page. None if it is neither."""
    if "://" in name:
        parts = [unquote(part) for part in urlsplit(name).path.strip("/").split("/")]
        if "artifacts" not in parts[2:]:
            return None
        start = parts.index("artifacts", 2)
        parts = [*parts[start - 2 : start], *parts[start + 2 : start + 4]]  # ENTITY/PROJECT/artifacts/TYPE/NAME/VERSION
        if len(parts) == 3:
            parts.append("latest")
    else:
        first, colon, alias = name.rpartition(":")
        parts = [*first.split("/"), alias] if colon else []
    if len(parts) != 4 or not all(_PART.fullmatch(part) and part not in (".", "..") for part in parts):
        return None
    return ArtifactPath(*parts)


def find_run(name: str, runs_dir: Path) -> RunDir:
    """A run of this runs folder, a pretrained network, or the run of a model artifact on W&B. Raises UserError.

    The first two as `find_run_or_pretrained` names them.
    """
    path = None if is_regular_file(Path(name) / "run.json") else parse_artifact_path(name)
    return fetch_model(path) if path else find_run_or_pretrained(name, runs_dir)


def fetch_model(path: ArtifactPath) -> RunDir:
    """The run folder of a model artifact, in the cache. A version that is there already is not fetched again."""
    api = connect_to_api()
    try:
        artifact = api.artifact(str(path))
        entries = {file: artifact.manifest.entries.get(file) for file in (WEIGHTS_FILE, *RECORD_FILES)}
    except Exception as error:  # wandb raises many kinds of errors
        raise UserError(
            f"{path} cannot be read from W&B ({describe_error(error)}); its page lists the versions and aliases that there are"
        ) from None
    run_id = str(artifact.metadata.get("run") or "")
    missing = [file for file, entry in entries.items() if entry is None or entry.ref is not None]
    if artifact.type != MODEL or missing or not is_id(run_id):
        why = f"it lacks {missing[0]}" if missing else f"it is of type {shorten_repr(artifact.type)}"
        raise UserError(f"{path} is no model artifact of this program ({why}); name one, such as me/cifar/model-SWEEP:best")
    version = re.sub(r"\W", "", f"{artifact.version}-{artifact.digest[:16]}")  # whatever a server says, it is one folder
    place = [path.entity, path.project, f"{path.collection}-{version}"]
    folder = cache_folder().joinpath("wandb", "models", *place)
    run_dir = RunDir(folder / run_id)
    if all(_is_there(run_dir.path / file, entry) for file, entry in entries.items()):
        return run_dir
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix="."))
    try:
        for file, entry in entries.items():
            if (entry.size or 0) > (MAX_WEIGHTS_BYTES if file == WEIGHTS_FILE else MAX_RECORD_BYTES):
                raise UserError(f"{file} of {path} has {entry.size:,} bytes, more than any model of this program")
        try:
            for file in entries:
                artifact.download(root=str(temporary), path_prefix=file, skip_cache=True)
        except Exception as error:  # as above
            raise UserError(f"{path} cannot be fetched from W&B ({describe_error(error)}); try again") from None
        for file, entry in entries.items():
            if not _is_there(temporary / file, entry):
                raise UserError(f"{file} of {path} has not arrived as W&B says that it is; try again")
        RunDir(temporary).set_status("finished")
        shutil.rmtree(run_dir.path, ignore_errors=True)
        os.replace(temporary, run_dir.path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return run_dir


def _is_there(file: Path, entry: Any) -> bool:
    """Whether a file has the size and the MD5 that the artifact's manifest says."""
    if not is_regular_file(file) or file.stat().st_size != entry.size:
        return False
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).digest()
    return base64.b64encode(digest).decode() == str(entry.digest)
