"""One run among those that are trained side by side: its epochs, its rows, its checkpoints and its end."""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from cifar.config.resolve import Settings
from cifar.errors import UserError
from cifar.tracking.run_dir import Record, write_atomic
from cifar.training.callbacks import Sink
from cifar.training.cudagraph import Steps, event
from cifar.training.step import score
from cifar.training.trainer import Training

CHECKPOINT_SECONDS = 30.0
DAMAGE = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError)


class Running:
    """A run's way through its epochs. `state` is empty until it ends.

    `on_epoch` sees each row once it is on disk and answers whether to go on (no: `pruned`); `stop` is asked after every
    step and names the state to end in, if any.
    """

    def __init__(
        self,
        config: Settings,
        record: Record,
        *,
        sinks: Sequence[Sink] = (),
        on_epoch: Callable[[dict[str, Any]], bool] = lambda row: True,
        stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.config, self.record, self.sinks = config, record, sinks
        self.on_epoch, self.stop = on_epoch, stop
        self.state, self.reason, self.summary = "", "", dict[str, Any]()
        self.over = False  # its record says how it ended
        self._saved = self._begun = time.monotonic()

    def start(self, training: Training) -> None:
        """Take up these parts, at the record's checkpoint if there is one."""
        self.training = training
        self._watch = Stopwatch(training.device)
        resume(training, self.record)
        training.team.same(training.model, training.evaluated)
        if training.epoch > self.config.epochs:  # it was killed between its last epoch and its end
            self._end("finished", "")
        elif training.epoch > 1 and training.batch == 0:  # or between an epoch and what follows from it: ask once more
            row = list(self.record.rows())[-1]
            if not self.on_epoch(row):
                self._end("pruned", f"stopped early after epoch {row['epoch']}")

    def begin_epoch(self) -> None:
        training = self.training
        self._watch.begin(training.seconds)
        if training.batch < training.steps:
            training.begin_epoch()

    def after_step(self, index: int) -> None:
        """Step `index` of the epoch has been taken, or is on its way to the device."""
        training, config = self.training, self.config
        training.batch = index + 1
        for sink in self.sinks:
            sink.step(training.epoch, index + 1)
        loss = float(training.meter.last) if training.device.type == "cpu" else 0.0  # a GPU would wait; the epoch's end tells
        if not math.isfinite(loss):
            self._end("diverged", f"the loss became {loss} at step {index + 1} of epoch {training.epoch}")
        elif wish := self.stop():
            self._end(wish, f"asked to end at step {index + 1} of epoch {training.epoch}")
        if training.team.size > 1:
            self.state, self.reason = training.team.agree((self.state, self.reason) if self.state else ()) or ("", "")
        if self.state == "diverged":
            return
        due = config.checkpoint_every and (index + 1) % config.checkpoint_every == 0
        if self.state or due or (not config.checkpoint_every and time.monotonic() - self._saved > CHECKPOINT_SECONDS):
            training.seconds = self._watch.seconds()
            if not self.state or training.batch < training.steps:  # a whole epoch gets its row first
                self._save()

    def launch(self) -> None:
        """Queue the evaluation behind the steps."""
        self._watch.end()
        self._scored = self.training.evaluate("val") if "val" in self.training.splits else None

    def look(self) -> None:
        """Every step of the epoch has been taken: work out its row, and whether the run diverged."""
        training, self._seen = self.training, dict[str, Any]()
        loss, accuracy = training.meter.read()  # waits for the device
        training.seconds = self._watch.seconds()
        if not math.isfinite(loss):
            return self._end("diverged", f"the training loss of epoch {training.epoch} is {loss}")
        row = self._row(loss, accuracy)
        if not math.isfinite(row.get("val/loss", 0.0)):
            return self._end("diverged", f"the validation loss of epoch {training.epoch} is {row['val/loss']}")
        self._seen = row

    def write(self) -> None:
        """The row is on disk when this returns. It touches this run's record alone."""
        if self._seen:
            self.record.append(self._seen)
            self.record.set_status("running", epoch=self._seen["epoch"], epochs=self.config.epochs)

    def end_epoch(self) -> None:
        """Tell of the row, and whether the run goes on."""
        training, config, row = self.training, self.config, self._seen
        if not row:
            return
        training.epoch, training.batch, training.seconds = training.epoch + 1, 0, 0.0
        for sink in self.sinks:
            sink.row(row)
        if config.checkpoint_every or time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self._save()
        goes_on = self.on_epoch(row)
        if training.epoch > config.epochs:
            self._end("finished", "")
        elif not goes_on:
            self._end("pruned", f"stopped early after epoch {row['epoch']}")
        elif self.state:
            self._save()

    def _end(self, state: str, reason: str) -> None:
        self.state, self.reason = state, reason

    def _save(self) -> None:
        save(self.training, self.record)
        self._saved = time.monotonic()

    def _row(self, loss: float, accuracy: float) -> dict[str, Any]:
        """The metrics of the epoch that has just been trained."""
        training = self.training
        row: dict[str, Any] = {
            "epoch": training.epoch,
            "step": training.epoch * training.steps,
            "train/loss": loss,
            "train/acc": accuracy,
            "train/lr": training.optimizer.rates(training.progress(training.steps - 1))[0],
        }
        if self._scored is not None:
            row["val/loss"], row["val/acc"] = score(*self._scored)
        row["system/seconds"] = training.seconds
        row["system/images_per_second"] = training.steps * training.config.batch_size / training.seconds
        row["system/memory_gib"] = memory(training.device) / 2**30
        return {**row, **training.watcher.read()}

    @property
    def seconds(self) -> float:
        """Since the run was taken up here."""
        return time.monotonic() - self._begun


def epochs(steps: Steps[Training], runs: Sequence[Running], end: Callable[[Running], None]) -> None:
    """Train every run until it ends, and `end` it at once: in a pack the others go on.

    All are at the same step of their epochs.
    """

    def leave(run: Running) -> None:
        run.training.idle = True
        end(run)

    for run in runs:
        if run.state:
            leave(run)
    while active := [run for run in runs if not run.state]:
        for run in runs:
            run.training.at.zero_()  # a captured step goes on for those that have ended too
        for run in active:
            run.begin_epoch()
        first = active[0].training
        for run in active:
            run.training.look_ahead()
        for index in range(first.batch, first.steps):
            steps(first.watcher.wants(index))
            for run in active:
                run.after_step(index)
            if any(run.state for run in active):  # what is asked for at the last step waits for the epoch's row
                gone = [run for run in active if run.state and (index + 1 < first.steps or run.state == "diverged")]
                active = [run for run in active if run not in gone]
                for run in gone:
                    leave(run)
                if not active:
                    break
        for run in active:
            run.launch()
        for run in active:
            run.look()
        _write(active)
        for run in active:
            run.end_epoch()
            if run.state:
                leave(run)


def _write(runs: Sequence[Running]) -> None:
    """The rows of an epoch. Disks take many at once as quickly as one."""
    if len(runs) == 1:
        return runs[0].write()
    written = [_writers().submit(run.write) for run in runs]
    wait(written)  # nobody writes any more when one of them failed
    for each in written:
        each.result()


@functools.cache
def _writers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(16, "rows")


class Stopwatch:
    """Seconds of an epoch: by events in the device's own queue where there is one, so that nothing waits to be timed."""

    def __init__(self, device: torch.device) -> None:
        self._events = [event(), event()] if device.type == "cuda" else []
        self._ended = False

    def begin(self, before: float) -> None:
        """`before`: seconds of the epoch that an earlier process took."""
        self._before, self._begun, self._ended = before, time.perf_counter(), False
        if self._events:
            self._events[0].record()

    def end(self) -> None:
        if self._events:
            self._events[1].record()
        self._elapsed, self._ended = time.perf_counter() - self._begun, True

    def seconds(self) -> float:
        """Up to the end, or to now. After the end the device must have been waited for."""
        if not self._ended:
            return self._before + time.perf_counter() - self._begun
        return self._before + (self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else self._elapsed)


def memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024  # Linux counts in KiB


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
    except (*DAMAGE, RuntimeError, KeyError, TypeError, AttributeError, AssertionError) as error:
        # torch's own words would tell people to load it unsafely
        raise UserError(f"{path} is damaged, or no checkpoint of this run; delete it to start the run again") from error
    if record.metrics_bytes() < state["metrics_bytes"]:
        raise UserError(f"{record.path / 'metrics.jsonl'} is shorter than its checkpoint knows; restore it, or delete {path}")
    record.cut_metrics(state["metrics_bytes"])
    for _ in record.rows():  # a damaged row is said now, and not after the last epoch
        pass
