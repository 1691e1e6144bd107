"""One run: config -> parts -> training -> record. The only place where the parts meet.

record = create(config, runs_dir())          # the folder, before anything is computed
state = train(config, record)                # trains, or goes on from the record's checkpoint
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import pickle
import resource
import shutil
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar import cost, data, environment, registry
from cifar.config import Settings
from cifar.errors import DiskFull, UserError
from cifar.parts import Training
from cifar.probes import weight_layers
from cifar.ranks import ALONE, Lost, Team
from cifar.record import Record, new_id, write_atomic
from cifar.track import Sink
from cifar.train import VIEWS, score, train_epoch

CHECKPOINT_SECONDS = 30.0
WORST = 25  # images in the picture of worst mistakes
LABELS = {
    "train/loss": ("training loss", "nats"),
    "train/acc": ("training accuracy", "fraction"),
    "train/lr": ("learning rate", ""),
    "val/loss": ("validation loss", "nats"),
    "val/acc": ("validation accuracy", "fraction"),
    "system/seconds": ("training time of the epoch", "s"),
    "system/images_per_second": ("throughput of training", "images/s"),
    "system/memory_gib": ("peak memory", "GiB"),
}


# -- before: names and the folder --------------------------------------------------------------------------------------


def create(
    config: Settings,
    runs: Path,
    *,
    run_id: str = "",
    name: str = "",
    swept: Sequence[str] = (),
    sweep: str = "",
    cell: int | None = None,
    tags: Sequence[str] = (),
    project: str = "",
    entity: str = "",
    engine: str = "",
) -> Record:
    """The folder of a new run, or of the run of that id if it is there already. `config.dataset` has to be resolved.

    `engine`: "wandb" where W&B handed the run out, so that it belongs to W&B's sweep of that id.
    """
    assert config.dataset != "auto"
    run_id = run_id or new_id()
    if (runs / run_id / "run.json").exists():
        return Record(runs / run_id)
    measured = cost_of(config)
    values = [f"{key}={_short(getattr(config, key))}" for key in swept if key not in _NAMED]
    named = [str(config.experiment or config.model), *values]
    stand_in = config.dataset == "stand-in"
    run = {
        "name": ("stand-in " if stand_in else "") + (name or " ".join(named)),
        "group": sweep,
        "tags": [*tags, config.dataset, config.model] + ([] if measured.verified else ["macs unverified"]),
        "project": project or os.environ.get("WANDB_PROJECT") or "cifar",
        "entity": entity or os.environ.get("WANDB_ENTITY", ""),
        "sweep": sweep,
        "engine": engine,
        "cell": cell,
        "swept": list(swept),
        "dataset": config.dataset,
        "official": not stand_in,
        "cost": measured.as_dict(),
        "command": f"python -m cifar train --from {run_id}",
    }
    return Record.create(runs, run_id, run, config.flat())


_NAMED = ("model", "dataset", "experiment")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def resolve_dataset(config: Settings, data_dir: Path | None) -> tuple[Settings, str]:
    """`dataset: auto` -> what it is, and why."""
    if config.dataset != "auto":
        return config, ""
    dataset, reason = data.resolve_auto(data_dir)
    return config.model_copy(update={"dataset": dataset}), reason


def cost_of(config: Settings) -> cost.Cost:
    """What one image costs in this configuration's model; remembered, as a sweep asks again and again."""
    return _cost(config.model, tuple(sorted(config.part("model").items())))


@functools.lru_cache(maxsize=256)
def _cost(model: str, arguments: tuple[tuple[str, Any], ...]) -> cost.Cost:
    with torch.random.fork_rng(devices=[]):
        return cost.measure(registry.models[model].build(**dict(arguments)))


# -- training ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def outcome(record: Record, config: Settings) -> Iterator[None]:
    """What goes wrong becomes the run's status before it goes on to the caller."""
    before = record.read("status")
    try:
        yield
    except Lost as error:
        record.set_status("interrupted", reason=str(error), epoch=record.read("status").get("epoch", 0), epochs=config.epochs)
        raise
    except UserError:
        if before:  # what is wrong here can be mended; the run may go on as it could before
            record.write("status", before)
        elif not record.metrics_bytes():  # it has not begun: nothing half-made stays
            shutil.rmtree(record.path, ignore_errors=True)
        raise
    except Exception as error:
        epoch = record.read("status").get("epoch", 0)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                record.set_status("interrupted", reason="no space left on the disk", epoch=epoch, epochs=config.epochs)
            raise DiskFull(
                f"no space is left for {record.path}; free some, then go on with `python -m cifar train --resume {record.id}`"
            ) from error
        memory = out_of_memory(error, config)
        state, reason = ("killed", memory) if memory else ("failed", f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):
            write_atomic(record.path / "traceback.txt", traceback.format_exc().encode())
            record.set_status(state, reason=reason, epoch=epoch, epochs=config.epochs)
        raise


def out_of_memory(error: BaseException, config: Settings) -> str:
    """Empty, or which memory ran out, how much there is of it, and at which batch size."""
    advice = f"at batch_size {config.batch_size}; take a smaller one"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        return f"out of GPU memory ({total:.0f} GiB) {advice}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # PyTorch's own words on the CPU
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if limit == resource.RLIM_INFINITY else limit
        return f"out of memory ({total / 2**30:.1f} GiB) {advice}"
    return ""


def train(
    config: Settings,
    record: Record,
    *,
    data_dir: Path | None = None,
    sinks: Sequence[Sink] = (),
    on_epoch: Callable[[dict[str, Any]], bool] = lambda row: True,
    stop: Callable[[], str | None] = lambda: None,
    team: Team = ALONE,
) -> str:
    """Train, from the record's checkpoint if there is one, and return the state it ended in.

    `on_epoch` sees each row once it is on disk and answers whether to go on (no: `pruned`); `stop` is asked after every
    step and names the state to end in, if any: a checkpoint is written first. Each rank of a `team` has a record of its own.
    """
    with outcome(record, config):
        macs = record.read("run")["cost"]["macs"]
        if config.max_macs and macs > config.max_macs:
            reason = f"needs {macs:,} MACs, the budget max_macs is {config.max_macs:,.0f}"
            record.set_status("skipped", reason=reason, epochs=config.epochs)
            return "skipped"
        record.set_status("running", epoch=record.read("status").get("epoch", 0), epochs=config.epochs)
        training = Training(config, data_dir, team)
        resume(training, record)
        team.same(training.model, training.evaluated)
        record.write("environment", environment.describe(training.device, training.fingerprint) | team.described())
        described = {name: {"label": label, "unit": unit} for name, (label, unit) in LABELS.items()}
        record.write(
            "labels", {**described, **training.watcher.labels(), "layers": list(weight_layers(training.watcher.parameters))}
        )
        for sink in sinks:
            sink.start(record.read("run"), epochs=config.epochs, steps=training.steps)
        state, reason = _epochs(training, record, sinks, on_epoch, stop)
        summary = _finish(training, record) if state == "finished" else {}
        if state in ("interrupted", "preempted", "stopped"):
            save(training, record)
        record.set_status(state, reason=reason, epoch=training.epoch - 1, epochs=config.epochs)
        if state in ("finished", "diverged"):
            (record.path / "checkpoint.pt").unlink(missing_ok=True)
    for sink in sinks:
        sink.end(state, reason, summary)
    return state


def _epochs(
    training: Training,
    record: Record,
    sinks: Sequence[Sink],
    on_epoch: Callable[[dict[str, Any]], bool],
    stop: Callable[[], str | None],
) -> tuple[str, str]:
    """Train until the last epoch or a reason to end earlier -> (state, reason)."""
    config, device = training.config, training.device
    total = config.epochs * training.steps
    criterion = functools.partial(F.cross_entropy, label_smoothing=config.label_smoothing)
    mixing = training.mix()
    saved = time.monotonic()
    ended: list[str] = []

    while training.epoch <= config.epochs:
        begun = time.perf_counter() - training.seconds

        def after_step(index: int, loss: Tensor, begun: float = begun) -> bool:
            nonlocal saved
            training.batch = index + 1
            for sink in sinks:
                sink.step(training.epoch, index + 1)
            if device.type == "cpu" and not math.isfinite(loss.item()):  # on a GPU this would wait; there the epoch's end tells
                ended[:] = ["diverged", f"the loss became {loss.item()} at step {index + 1} of epoch {training.epoch}"]
            elif wish := stop():
                ended[:] = [wish, f"asked to end at step {index + 1} of epoch {training.epoch}"]
            ended[:] = training.team.agree(ended)
            training.seconds = time.perf_counter() - begun
            due = config.checkpoint_every and (index + 1) % config.checkpoint_every == 0
            if not ended and (due or (not config.checkpoint_every and time.monotonic() - saved > CHECKPOINT_SECONDS)):
                save(training, record)
                saved = time.monotonic()
            return not ended and training.batch < training.steps

        if training.batch < training.steps:
            train_epoch(
                training.forward,
                training.train_batches.epoch(training.epoch, training.batch),
                first=training.batch,
                optimizer=training.optimizer,
                progress=lambda index: ((training.epoch - 1) * training.steps + index) / total,
                criterion=criterion,
                mix=mixing,
                autocast=training.autocast(),
                meter=training.meter,
                team=training.team,
                watcher=training.watcher,
                average=training.average,
                after_step=after_step,
            )
        if ended and ended[0] == "diverged":
            return "diverged", ended[1]
        if training.batch < training.steps:
            return ended[0], ended[1]

        loss, accuracy = training.meter.read()
        training.seconds = time.perf_counter() - begun  # the meter waited for the device: now the clock is right
        if not math.isfinite(loss):
            return "diverged", f"the training loss of epoch {training.epoch} is {loss}"
        row = _row(training, loss, accuracy)
        if not math.isfinite(row.get("val/loss", 0.0)):
            return "diverged", f"the validation loss of epoch {training.epoch} is {row['val/loss']}"
        record.append(row)
        training.epoch, training.batch, training.seconds = training.epoch + 1, 0, 0.0
        record.set_status("running", epoch=row["epoch"], epochs=config.epochs)
        for sink in sinks:
            sink.row(row)
        if config.checkpoint_every or time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(training, record)
            saved = time.monotonic()
        if not on_epoch(row) and training.epoch <= config.epochs:
            return "pruned", f"stopped early after epoch {row['epoch']}"
        if ended and training.epoch <= config.epochs:
            return ended[0], ended[1]
    return "finished", ""


def _row(training: Training, loss: float, accuracy: float) -> dict[str, Any]:
    """The metrics of the epoch that has just been trained."""
    seconds = training.seconds
    row: dict[str, Any] = {
        "epoch": training.epoch,
        "step": training.epoch * training.steps,
        "train/loss": loss,
        "train/acc": accuracy,
        "train/lr": training.optimizer.lr,
    }
    if "val" in training.splits:
        row["val/loss"], row["val/acc"] = score(*training.evaluate("val"))
    row["system/seconds"] = seconds
    row["system/images_per_second"] = training.steps * training.config.batch_size / seconds
    row["system/memory_gib"] = _memory(training.device) / 2**30
    return {**row, **training.watcher.read()}


def _memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024  # Linux counts in KiB


def _finish(training: Training, record: Record) -> dict[str, Any]:
    """The last words of a finished run: summary, predictions, weights."""
    config, rows = training.config, list(record.rows())
    last = rows[-1]
    summary = {key: value for key, value in last.items() if key.startswith(("train/", "val/"))}
    summary["epochs"] = last["epoch"]
    summary["seconds"] = sum(row["system/seconds"] for row in rows)
    summary["images_per_second"] = float(np.median([row["system/images_per_second"] for row in rows]))
    if "val" in training.splits:
        summary["best/val/acc"] = max(row["val/acc"] for row in rows)
    measured = record.read("run")["cost"]
    summary |= {"macs": measured["macs"], "params": measured["params"], "macs_verified": measured["verified"]}
    if config.test == "final":
        logits, labels = training.evaluate("test", config.tta)
        summary["test/loss"], summary["test/acc"] = score(logits, labels)
        summary["test/views"] = VIEWS[config.tta][0]
        if config.tta != "none":
            summary["test/acc_one_view"] = score(*training.evaluate("test"))[1]
    split = "test" if config.test == "final" else "val" if "val" in training.splits else ""
    if split:
        _predictions(training, record, split)
    buffer = io.BytesIO()
    torch.save(training.evaluated.state_dict(), buffer)
    write_atomic(record.path / "weights.pt", buffer.getvalue())
    record.write("summary", summary)
    return summary


def _predictions(training: Training, record: Record, split: str) -> None:
    logits, labels = training.evaluate(split)
    confidence, predicted = logits.softmax(1).max(1)
    wrong = torch.where(predicted != labels, confidence, torch.zeros_like(confidence))
    worst = wrong.argsort(descending=True, stable=True)[: min(WORST, int((predicted != labels).sum()))]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        split=np.array(split),
        index=np.arange(len(labels)),
        label=labels.cpu().numpy(),
        predicted=predicted.cpu().numpy(),
        confidence=confidence.float().cpu().numpy(),
        worst_index=worst.cpu().numpy(),
        worst_images=training.splits[split][0][worst].cpu().numpy(),
    )
    write_atomic(record.path / "predictions.npz", buffer.getvalue())


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save(training: Training, record: Record) -> None:
    """Write the checkpoint as a whole; the length of the metrics file says which rows belong to it."""
    buffer = io.BytesIO()
    torch.save({"metrics_bytes": record.metrics_bytes(), **training.state()}, buffer)
    write_atomic(record.path / "checkpoint.pt", buffer.getvalue())


def resume(training: Training, record: Record) -> None:
    """Load the record's checkpoint and cut off the rows that came after it; without one, start afresh."""
    path = record.path / "checkpoint.pt"
    if not path.exists():
        record.cut_metrics(0)
        return
    try:
        with zipfile.ZipFile(path) as checked:  # torch.load does not look at the checksums
            if checked.testzip():
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
        training.load(state)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, KeyError, EOFError, AssertionError) as error:
        # torch's own words would tell people to load it unsafely
        raise UserError(f"{path} is damaged, or no checkpoint of this run; delete it to start the run again") from error
    if record.metrics_bytes() < state["metrics_bytes"]:
        raise UserError(f"{record.path / 'metrics.jsonl'} is shorter than its checkpoint knows; restore it, or delete {path}")
    record.cut_metrics(state["metrics_bytes"])
    for _ in record.rows():  # a damaged row is said now, and not after the last epoch
        pass
