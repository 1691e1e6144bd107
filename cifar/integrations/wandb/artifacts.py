"""What of a run becomes an artifact on W&B, and under which names. Everything is in the run's folder first.

    the data of the run  -> a dataset: a reference to where it can be had, with the fingerprint; the run uses it
    weights.pt           -> a version of the model collection of its sweep, or of the project's single runs
    predictions.npz      -> a table of the worst mistakes with their images, and one of the accuracy of each class

A run has artifacts once it is finished and has weights. W&B says itself which of them it has (`artifact_arrival.py`), so each
is sent once, whoever sends it and when. `artifact_choice.py` bounds how many models a sweep sends and says which is the best;
`artifact_feed.py` sends; `artifact_best.py` moves the alias `best`, when `artifact_settle.py` says so; `artifact_download.py`
reads a model back.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from typing import Any

from cifar.system.files import parse_json
from cifar.system.redact import mask_secrets
from cifar.system.variables import read_variable
from cifar.tracking.run_dir import RunDir

DATASET, MODEL, PREDICTIONS = "dataset", "model", "predictions"  # W&B's types of artifacts
SWITCH = "CIFAR_ARTIFACTS"  # on or off; `--artifacts` sets it
WEIGHTS_FILE, PREDICTIONS_FILE = "weights.pt", "predictions.npz"
RECORD_FILES = ("config.json", "run.json", "environment.json")  # beside the weights: what loading and scoring them needs
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"  # as cifar.data has it; that would import PyTorch
_ENVIRONMENT = ("versions", "device", "step", "data_fingerprint")
_RESULTS = ("val/acc", "val/loss", "test/acc", "test/loss", "test/views", "epochs", "seconds")  # of the summary


def parse_metadata(text: Any) -> dict[str, Any]:
    """A version's metadata, which W&B gives as JSON text."""
    value: Any = None
    with contextlib.suppress(ValueError):
        value = parse_json(text) if isinstance(text, str) else text
    return value if isinstance(value, dict) else {}


def is_enabled(run_dir: RunDir) -> bool:
    """Whether the run's artifacts may be sent. What `--artifacts` says now counts before what it said when the run was made."""
    choice = read_variable(SWITCH) or run_dir.read_json("run").get("artifacts") or "on"
    return str(choice) != "off"


# -- names and metadata ------------------------------------------------------------------------------------------------


def collection_name(kind: str, about: Mapping[str, Any]) -> str:
    """The collection that a run's artifact is a version of. `about`: its run.json.

    One for each sweep, and one for the single runs of a project. Runs on generated images are never among real ones.
    """
    dataset = str(about.get("dataset") or "")
    if kind == DATASET:
        return _to_name(dataset or "dataset")
    words = [kind, str(about.get("sweep") or "")]
    if not about.get("sweep") and dataset and dataset != "cifar10":
        words.append(dataset)
    return _to_name("-".join(filter(None, words)))


def _to_name(text: str) -> str:
    """W&B allows ASCII letters, digits, `-`, `_` and `.`, and 128 characters."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)[:128]


def run_alias(run_id: str) -> str:
    """The alias of a run's version. With a prefix, since an id may be `best` or `v3`."""
    return f"run-{run_id}"[:128]


def read_clean(run_dir: RunDir, name: str) -> dict[str, Any]:
    """A file of the record without secrets: an earlier version may have written some."""
    return dict(mask_secrets(run_dir.read_json(name), mask_keys=False))


def build_record_file(run_dir: RunDir, name: str) -> dict[str, Any]:
    """What a model artifact holds of a file of the record. Of the environment only what tells how the network was trained."""
    content = read_clean(run_dir, name)
    return {key: content[key] for key in _ENVIRONMENT if key in content} if name == "environment" else content


def build_metadata(run_dir: RunDir) -> dict[str, Any]:
    """What the versions of a run say about it. Accuracies are fractions; `macs`: of one image."""
    about, summary = read_clean(run_dir, "run"), read_clean(run_dir, "summary")
    cost = about.get("cost") or {}
    values = {
        "run": run_dir.id,
        "name": str(about.get("name") or "")[:128],
        "sweep": about.get("sweep"),
        "cell": about.get("cell"),
        "model": run_dir.read_json("config").get("model"),
        "dataset": about.get("dataset"),
        "data_fingerprint": run_dir.read_json("environment").get("data_fingerprint"),
        **{key: summary.get(key) for key in _RESULTS},
        "macs": cost.get("macs"),
        "params": cost.get("params"),
        "macs_verified": cost.get("verified"),
        "created": about.get("created"),
        "ended": run_dir.read_json("status").get("time"),
    }
    return {key: value for key, value in values.items() if value not in (None, "") and _is_finite(value)}


def build_dataset_metadata(run_dir: RunDir) -> dict[str, Any]:
    about = run_dir.read_json("run")
    fingerprint = run_dir.read_json("environment").get("data_fingerprint")
    return {"data_fingerprint": fingerprint, "dataset": about.get("dataset"), "official": bool(about.get("official"))}


def dataset_reference(run_dir: RunDir) -> tuple[str, str]:
    """Where the run's data can be had -> (address, name). With the fingerprint, so that other data is another version."""
    about = run_dir.read_json("run")
    fingerprint = str(run_dir.read_json("environment").get("data_fingerprint"))[:64]
    if about.get("official") or about.get("dataset") == "cifar10":
        return f"{CIFAR10_URL}#{fingerprint}", CIFAR10_URL.rpartition("/")[2]
    return f"cifar://{_to_name(str(about.get('dataset')))}/{fingerprint}", "generated"  # the program makes it


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
