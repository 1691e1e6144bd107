"""Checkpoints of a run, and how a run goes on from one."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cifar.config.schema import MAX_THREADS
from cifar.errors import UserError
from cifar.tracking.records import is_amount, is_count
from cifar.tracking.run_dir import RunDir
from cifar.training.parts import find_changed_files
from cifar.training.trainer import Trainer
from cifar.training.weights import read_tensors


@dataclass(frozen=True)
class SpentSoFar:
    """What a run has cost by a checkpoint, in all its parts: what comes later is added."""

    joules: float | None = 0.0  # None: not known
    joules_problem: str = ""
    pack_size: int = 1  # the most trials that were trained side by side, this one included


def save_checkpoint(trainer: Trainer, run_dir: RunDir, spent: SpentSoFar = SpentSoFar()) -> None:
    """Replace the checkpoint atomically. It stores the length of the metrics file, which tells what rows belong to it."""
    buffer = io.BytesIO()
    torch.save({"metrics_bytes": run_dir.metrics_bytes(), "spent": asdict(spent), **trainer.state_dict()}, buffer)
    run_dir.write_file("checkpoint.pt", buffer.getvalue())


def resume_from_checkpoint(trainer: Trainer, run_dir: RunDir) -> SpentSoFar:
    """Load the run's checkpoint and delete the metrics rows written after it. Without a checkpoint, start from the beginning.

    Raises UserError for a checkpoint that is damaged or of another run, and for a metrics file that lacks rows.
    """
    path = run_dir.path / "checkpoint.pt"
    if not path.exists():
        run_dir.truncate_metrics(0)
        return SpentSoFar()
    try:
        state = read_tensors(path)
        _check_progress(state, trainer)
        spent = _read_spent(state, trainer.device)
        trainer.load_state_dict(state)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        for part, changed in find_changed_files(run_dir.read_json("run").get("plugins", {})).items():
            raise UserError(
                f"the checkpoint of run {run_dir.id} does not fit its {part} as {changed} has it, which has changed since the "
                f"run began; make the file what it was, or train again: python -m cifar train --from {run_dir.id}"
            ) from error
        raise UserError(f"{path} is damaged, or no checkpoint of this run; delete it to start the run again") from error
    if run_dir.metrics_bytes() < state["metrics_bytes"]:
        raise UserError(f"{run_dir.path / 'metrics.jsonl'} is shorter than its checkpoint knows; restore it, or delete {path}")
    run_dir.truncate_metrics(state["metrics_bytes"])
    rows = list(run_dir.read_rows())  # raises for a damaged row now, and not after the last epoch
    if [row.get("epoch") for row in rows] != list(range(1, trainer.epoch)) or not all(row.keys() >= _NEEDED for row in rows):
        raise UserError(f"{run_dir.path / 'metrics.jsonl'} lacks rows that its checkpoint knows; restore it, or delete {path}")
    return spent


def _read_spent(state: dict[str, Any], device: torch.device) -> SpentSoFar:
    """Raises ValueError where it is nothing that a run can have spent. Checkpoints of earlier versions do not say."""
    if "spent" not in state:
        return SpentSoFar(None, "a part of the training was by an earlier version" if device.type == "cuda" else "")
    spent = SpentSoFar(**state["spent"])
    if not (spent.joules is None or is_amount(spent.joules)) or not is_count(spent.pack_size):
        raise ValueError("spent")
    return spent


_NEEDED = {"system/seconds", "system/images_per_second"}  # in every row, for the summary


def _check_progress(state: dict[str, Any], trainer: Trainer) -> None:
    """Raise ValueError where a checkpoint is at a place that the run does not have."""
    limits = {"epoch": (1, trainer.config.epochs + 1), "batch": (0, trainer.steps_per_epoch), "threads": (1, MAX_THREADS)}
    for name, (low, high) in limits.items():
        if not is_count(state[name]) or not low <= state[name] <= high:
            raise ValueError(f"{name} is {state[name]}")
    if not is_count(state["metrics_bytes"]) or not is_amount(state["seconds"]):
        raise ValueError("metrics_bytes or seconds")
