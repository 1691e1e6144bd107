"""Checkpoints of a run, and how a run goes on from one."""

from __future__ import annotations

import io
import pickle
import zipfile

import torch

from cifar.errors import UserError
from cifar.tracking.run_dir import RunDir
from cifar.training.trainer import Trainer

CORRUPTION_ERRORS = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError)  # what reading a damaged checkpoint raises


def save_checkpoint(trainer: Trainer, run_dir: RunDir) -> None:
    """Replace the checkpoint atomically. It stores the length of the metrics file, which tells what rows belong to it."""
    buffer = io.BytesIO()
    torch.save({"metrics_bytes": run_dir.metrics_bytes(), **trainer.state_dict()}, buffer)
    run_dir.write_file("checkpoint.pt", buffer.getvalue())


def resume_from_checkpoint(trainer: Trainer, run_dir: RunDir) -> None:
    """Load the run's checkpoint and delete the metrics rows written after it. Without a checkpoint, start from the beginning.

    Raises UserError for a checkpoint that is damaged or of another run, and for a metrics file that lacks rows.
    """
    path = run_dir.path / "checkpoint.pt"
    if not path.exists():
        run_dir.truncate_metrics(0)
        return
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums
            if archive.testzip():
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
        trainer.load_state_dict(state)
    except (*CORRUPTION_ERRORS, RuntimeError, KeyError, TypeError, AttributeError, AssertionError) as error:
        # torch's own message would advise to load the file without weights_only, which is unsafe
        raise UserError(f"{path} is damaged, or no checkpoint of this run; delete it to start the run again") from error
    if run_dir.metrics_bytes() < state["metrics_bytes"]:
        raise UserError(f"{run_dir.path / 'metrics.jsonl'} is shorter than its checkpoint knows; restore it, or delete {path}")
    run_dir.truncate_metrics(state["metrics_bytes"])
    for _ in run_dir.read_rows():  # raises for a damaged row now, and not after the last epoch
        pass
