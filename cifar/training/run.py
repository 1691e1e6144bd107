"""One run: config -> parts -> training -> record. The only place where the parts meet.

record = create(config, runs_dir())          # the folder, before anything is computed
state = train(config, record)                # trains, or goes on from the record's checkpoint
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import resource
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar import data, registry
from cifar import flops as cost
from cifar.config.resolve import Settings
from cifar.errors import DiskFull, UserError
from cifar.probes import weight_layers
from cifar.system import environment
from cifar.tracking.run_dir import Record, new_id, write_atomic
from cifar.training import trainer_cache as warm
from cifar.training.callbacks import Sink
from cifar.training.distributed import ALONE, Lost, Team
from cifar.training.loop import Running, epochs
from cifar.training.step import VIEWS, score
from cifar.training.trainer import Training

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
def outcome(run: Running, together: int = 1) -> Iterator[None]:
    """What goes wrong becomes the run's status before it goes on to the caller. A run that is over stays as it ended.

    Of several runs `together` any may be at fault, so each of them is one to go on with.
    """
    record, config = run.record, run.config
    before = record.read("status")
    try:
        yield
    except Exception as error:
        warm.forget()  # whatever state its parts are in
        if not run.over:
            _went_wrong(record, config, before, error, together)
        raise


def _went_wrong(record: Record, config: Settings, before: dict[str, Any], error: Exception, together: int) -> None:
    told = {"epoch": record.read("status").get("epoch", 0), "epochs": config.epochs}
    full = isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
    if full:
        with contextlib.suppress(OSError):
            record.set_status("interrupted", reason="no space left on the disk", **told)
        raise DiskFull(
            f"no space is left for {record.path}; free some, then go on with `python -m cifar train --resume {record.id}`"
        ) from error
    if isinstance(error, Lost):
        record.set_status("interrupted", reason=str(error), **told)
        return
    if isinstance(error, UserError):
        if before:  # what is wrong here can be mended; the run may go on as it could before
            record.write("status", before)
        elif not record.metrics_bytes() and not (record.path / "checkpoint.pt").exists():  # nothing half-made stays
            shutil.rmtree(record.path, ignore_errors=True)
        return
    lacking = out_of_memory(error, config)
    state, reason = ("killed", lacking) if lacking else ("failed", f"{type(error).__name__}: {error}")
    if together > 1:
        state, reason = "interrupted", f"side by side with {together - 1} others: {reason}"
    with contextlib.suppress(OSError):
        write_atomic(record.path / "traceback.txt", traceback.format_exc().encode())
        record.set_status(state, reason=reason, **told)


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
    ahead: int = 1,
    team: Team = ALONE,
) -> str:
    """Train, from the record's checkpoint if there is one, and return the state it ended in.

    `on_epoch` sees each row once it is on disk and answers whether to go on (no: `pruned`); `stop` is asked after every
    step and names the state to end in, if any: a checkpoint is written first. `ahead`: runs of this kind that this process
    will make, this one included. Each rank of a `team` has a record of its own.
    """
    one = Running(config, record, sinks=sinks, on_epoch=on_epoch, stop=stop)
    train_together([one], data_dir=data_dir, ahead=ahead, team=team)
    return one.state


def train_together(runs: Sequence[Running], *, data_dir: Path | None = None, ahead: int = 1, team: Team = ALONE) -> None:
    """Train several runs that differ in seed and scalars only (`warm.fit`), side by side, each into its own record."""
    with contextlib.ExitStack() as outcomes:
        for run in runs:
            outcomes.enter_context(outcome(run, len(runs)))
        live = [run for run in runs if not _over_budget(run)]
        if live:
            for run in live:
                before = run.record.read("status").get("epoch", 0)
                run.record.set_status("running", epoch=before, epochs=run.config.epochs)
                (run.record.path / "traceback.txt").unlink(missing_ok=True)  # of an earlier try
            steps = warm.steps([run.config for run in live], data_dir, team)
            for run, training in zip(live, steps.trials, strict=True):
                run.start(training)
            said = warm.prepare(steps, [run.config for run in live], ahead)
            for run in live:
                _describe(run, said)
            epochs(steps, live, _end)


def _over_budget(run: Running) -> bool:
    macs, budget = run.record.read("run")["cost"]["macs"], run.config.max_macs
    if not budget or macs <= budget:
        return False
    run.state, run.reason = "skipped", f"needs {macs:,} MACs, the budget max_macs is {budget:,.0f}"
    run.record.set_status("skipped", reason=run.reason, epochs=run.config.epochs)
    _tell_end(run)
    return True


def _describe(run: Running, step: dict[str, Any]) -> None:
    """What the record says before the first step. `step`: how it is taken."""
    training, record = run.training, run.record
    described = environment.describe(training.device, training.fingerprint) | training.team.described()
    record.write("environment", {**described, "step": step})
    labels = {name: {"label": label, "unit": unit} for name, (label, unit) in LABELS.items()}
    layers = list(weight_layers(training.watcher.parameters))
    record.write("labels", {**labels, **training.watcher.labels(), "layers": layers})
    for sink in run.sinks:
        sink.start(record.read("run"), epochs=run.config.epochs, steps=training.steps)
        if step["compile"]:
            sink.say(step["compile"])


def _end(run: Running) -> None:
    record, epoch = run.record, run.training.epoch - 1
    if run.state == "finished":
        run.summary = _finish(run)
    record.set_status(run.state, reason=run.reason, epoch=epoch, epochs=run.config.epochs)
    if run.state in ("finished", "diverged"):
        (record.path / "checkpoint.pt").unlink(missing_ok=True)
    _tell_end(run)


def _tell_end(run: Running) -> None:
    run.over = True
    for sink in run.sinks:
        sink.end(run.state, run.reason, run.summary)


def _finish(run: Running) -> dict[str, Any]:
    """The last words of a finished run: summary, predictions, weights."""
    training, record, config = run.training, run.record, run.config
    rows = list(record.rows())
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
        summary["seconds_to_test"] = run.seconds  # of this process: from its first step to the test's result
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
