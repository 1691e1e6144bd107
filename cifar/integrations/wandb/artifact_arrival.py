"""Which artifacts of a run W&B has, as it says itself, and which it lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cifar.integrations.wandb.artifact_choice import is_model_wanted
from cifar.integrations.wandb.artifacts import (
    DATASET,
    MODEL,
    PREDICTIONS,
    PREDICTIONS_FILE,
    WEIGHTS_FILE,
    is_enabled,
    parse_metadata,
)
from cifar.tracking.run_dir import RunDir

_FIELDS = "node { state metadata artifactType { name } }"
RUN_FIELDS = f"outputArtifacts(first: 50) {{ edges {{ {_FIELDS} }} }} inputArtifacts(first: 50) {{ edges {{ {_FIELDS} }} }}"


@dataclass(frozen=True)
class ArrivedArtifact:
    """A version on W&B that a run made (`is_input` false) or uses. Only complete ones are kept."""

    type: str
    is_input: bool
    metadata: dict[str, Any] = field(default_factory=dict)


def parse_artifacts(node: Mapping[str, Any]) -> tuple[ArrivedArtifact, ...]:
    """The artifacts of a run. `node`: W&B's answer to RUN_FIELDS."""
    return tuple(
        ArrivedArtifact(edge["node"]["artifactType"]["name"], is_input, parse_metadata(edge["node"].get("metadata")))
        for name, is_input in (("outputArtifacts", False), ("inputArtifacts", True))
        for edge in (node.get(name) or {}).get("edges", ())
        if edge["node"]["state"] == "COMMITTED"
    )


def list_kinds(run_dir: RunDir) -> tuple[str, ...]:
    """The types of artifacts that W&B has of this run once it has all of it."""
    if run_dir.state != "finished" or not (run_dir.path / WEIGHTS_FILE).exists() or not is_enabled(run_dir):
        return ()
    has_data = bool(run_dir.read_json("environment").get("data_fingerprint"))
    has_predictions, is_wanted = (run_dir.path / PREDICTIONS_FILE).exists(), is_model_wanted(run_dir)
    kinds = {DATASET: has_data, MODEL: is_wanted, PREDICTIONS: has_predictions and is_wanted}
    return tuple(kind for kind, is_there in kinds.items() if is_there)


def list_missing(arrived: Iterable[ArrivedArtifact], run_dir: RunDir) -> list[str]:
    """The types of artifacts that W&B lacks of this run."""
    kinds = list_kinds(run_dir)
    if not kinds:
        return []
    ended = run_dir.read_json("status").get("time")
    fingerprint = run_dir.read_json("environment").get("data_fingerprint")
    there = {each.type for each in arrived if not each.is_input and each.metadata.get("ended") == ended}
    there |= {DATASET for each in arrived if each.is_input and each.metadata.get("data_fingerprint") == fingerprint}
    return [kind for kind in kinds if kind not in there]


def describe_missing(arrived: Iterable[ArrivedArtifact], run_dir: RunDir) -> str:
    """What W&B lacks of the run's artifacts, in words; "" if it has all."""
    words = {DATASET: "its use of the dataset", MODEL: "its model artifact", PREDICTIONS: "its predictions artifact"}
    missing = [words[kind] for kind in list_missing(arrived, run_dir)]
    return f"W&B lacks {' and '.join(missing)}" if missing else ""
