"""Networks of recorded runs: built as their configuration says, with their weights. Other parts of the run may be gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from cifar import registry
from cifar.config.resolve import name_lost_plugin, resolve_for_evaluation
from cifar.config.schema import Settings
from cifar.errors import UserError
from cifar.system.user_code import describe_error, pass_interrupt
from cifar.tracking.pretrained import describe_missing_weights, is_pretrained
from cifar.tracking.run_dir import RunDir
from cifar.training.parts import build_model, find_changed_files
from cifar.training.weights import WrongWeightsError, load_weights


def load_model(run_dir: RunDir) -> nn.Module:
    """The network of a finished run with its weights, on the CPU. Raises UserError where it has none, or they do not fit."""
    path = run_dir.path / "weights.pt"
    if not path.exists():
        if is_pretrained(run_dir.path):
            raise UserError(describe_missing_weights(run_dir.id))
        raise UserError(
            f"run {run_dir.id} has no weights, it is {run_dir.state}; go on with `python -m cifar train --resume {run_dir.id}`"
        )
    settings = _resolve_settings(run_dir)
    entry = registry.models[settings.model]
    try:
        model = build_model(settings)
    except UserError:
        raise
    except BaseException as error:
        pass_interrupt(error)
        raise UserError(
            f"model '{settings.model}' of run {run_dir.id} cannot be built as {entry.file} has it now: {describe_error(error)}"
        ) from error
    try:
        load_weights(model, path)
    except WrongWeightsError as error:
        if not entry.is_plugin:
            raise
        changed = find_changed_files(run_dir.read_json("run").get("plugins", {}))
        since = ", which has changed since the run" if "model" in changed else " now"
        raise UserError(
            f"the weights of run {run_dir.id} do not fit model '{settings.model}' as {entry.file} has it{since}; make the file "
            f"what it was, or train the run again: python -m cifar train --from {run_dir.id}"
        ) from error
    return model


def describe_changes(run_dir: RunDir, parts: tuple[str, ...] = ()) -> list[str]:
    """A sentence for each plug-in file of the run that has changed since it was made; of these `parts` only, if given."""
    changed = find_changed_files(run_dir.read_json("run").get("plugins"))
    return [
        f"{file} has changed since run {run_dir.id} was made ({part})"
        for part, file in changed.items()
        if not parts or part in parts
    ]


def read_notes(run_dir: RunDir) -> list[str]:
    """The sentences about a run that its run.json keeps."""
    notes = run_dir.read_json("run").get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def add_notes(run_dir: RunDir, notes: Sequence[str]) -> None:
    """Keep sentences about a run in its run.json, each once."""
    about, known = run_dir.read_json("run"), read_notes(run_dir)
    if about and (new := [note for note in notes if note not in known]):
        run_dir.write_json("run", {**about, "notes": [*known, *new]})


def evaluation_settings(run_dir: RunDir, changes: Mapping[str, Any] | None = None) -> Settings:
    """What is needed to score the run: its network and its images, in the memory format that it was trained in.

    changes: other values of some keys.
    """
    settings = _resolve_settings(run_dir, changes or {})
    step = run_dir.read_json("environment").get("step", {})
    used = step.get("channels_last") if isinstance(step, dict) and "channels_last" not in (changes or {}) else None
    return settings.model_copy(update={"channels_last": used}) if isinstance(used, bool) else settings


def _resolve_settings(run_dir: RunDir, changes: Mapping[str, Any] = MappingProxyType({})) -> Settings:
    with name_lost_plugin(run_dir.id, run_dir.read_json("run").get("plugins")):
        return resolve_for_evaluation({**run_dir.read_json("config"), **changes})
