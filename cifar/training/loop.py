"""The loop over epochs of one run, or of several that are trained side by side: rows, checkpoints and how each run ends."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from cifar.config.schema import Settings
from cifar.tracking.histograms import append_histograms
from cifar.tracking.run_dir import RunDir
from cifar.training.callbacks import RunCallback
from cifar.training.checkpoint import SpentSoFar, resume_from_checkpoint, save_checkpoint
from cifar.training.console import RunConsole
from cifar.training.costs import SharedEnergy, share_energy
from cifar.training.cudagraph import StepRunner, new_timing_event
from cifar.training.evaluation import compute_loss_and_accuracy
from cifar.training.trainer import Trainer

CHECKPOINT_SECONDS = 30.0  # between checkpoints, where `checkpoint_every` is 0


@dataclass(frozen=True)
class RunHooks:
    """What a run tells its caller, and asks it."""

    callbacks: Sequence[RunCallback] = ()
    should_continue: Callable[[dict[str, Any]], bool] = lambda row: True  # gets each row once it is on disk; False: pruned
    poll_stop: Callable[[], str | None] = lambda: None  # called after every step; the state to end in, if the run has to end


class RunLoop:
    """One run on its way through the epochs. `state` is empty until the run ends."""

    def __init__(self, config: Settings, run_dir: RunDir, hooks: RunHooks | None = None) -> None:
        self.config, self.run_dir, self.hooks = config, run_dir, hooks or RunHooks()
        self.state, self.reason, self.summary = "", "", dict[str, Any]()
        self.end_recorded = False  # its folder says how it ended
        self.has_retired = False  # it trains no more, and others of its pack may go on
        self.joules: float | None = 0.0  # of the GPU, in all parts of its training; None: not known, and why
        self.joules_problem, self.pack_size = "", 1
        self.energy: SharedEnergy | None = None
        self.console: RunConsole | None = None  # its output.log
        self.val_outputs: tuple[torch.Tensor, torch.Tensor] | None = None  # logits and labels after the latest epoch
        self._last_saved = self._started_at = time.monotonic()

    def attach_console(self, console: RunConsole) -> None:
        """Tell it about the run, as the other callbacks."""
        self.console = console
        self.hooks = dataclasses.replace(self.hooks, callbacks=(*self.hooks.callbacks, console))

    def attach_trainer(self, trainer: Trainer) -> None:
        """Train with this trainer from now on, from the run's checkpoint if there is one."""
        self.trainer = trainer
        self._stopwatch = Stopwatch(trainer.device)
        spent = resume_from_checkpoint(trainer, self.run_dir)
        self.joules, self.joules_problem, self.pack_size = spent.joules, spent.joules_problem, spent.pack_size
        trainer.context.broadcast_weights(trainer.model, trainer.eval_model)
        if trainer.epoch > self.config.epochs:  # killed after its last epoch, before its end was written
            self._set_end("finished", "")
        elif trainer.epoch > 1 and trainer.next_step == 0:  # killed after an epoch; the answer may not have been acted on
            row = list(self.run_dir.read_rows())[-1]
            if not self.hooks.should_continue(row):
                self._set_end("pruned", f"stopped early after epoch {row['epoch']}")

    def begin_epoch(self) -> None:
        """Start the clock and prepare the batches that are left of this epoch."""
        trainer = self.trainer
        self._stopwatch.start_timing(trainer.epoch_seconds)
        if trainer.next_step < trainer.steps_per_epoch:
            trainer.begin_epoch()

    def after_step(self, step: int) -> None:
        """Step `step` of the epoch has been taken, or is in the device's queue: report, check, stop or save as needed."""
        trainer, config = self.trainer, self.config
        trainer.next_step = step + 1
        for callback in self.hooks.callbacks:
            callback.on_step_end(trainer.epoch, step + 1)
        # Reading the loss would make a GPU wait. There the end of the epoch shows a divergence.
        loss = float(trainer.meter.last_loss) if trainer.device.type == "cpu" else 0.0
        if not math.isfinite(loss):
            self._set_end("diverged", f"the loss became {loss} at step {step + 1} of epoch {trainer.epoch}")
        elif end_state := self.hooks.poll_stop():
            self._set_end(end_state, f"asked to end at step {step + 1} of epoch {trainer.epoch}")
        if trainer.context.world_size > 1:
            self.state, self.reason = trainer.context.sync_stop((self.state, self.reason) if self.state else ()) or ("", "")
        if self.state == "diverged":
            return
        is_due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
        if self.state or is_due or (not config.checkpoint_every and time.monotonic() - self._last_saved > CHECKPOINT_SECONDS):
            trainer.epoch_seconds = self._stopwatch.elapsed_seconds()
            if not self.state or trainer.next_step < trainer.steps_per_epoch:  # after the last step the row is written first
                self._save_checkpoint()

    def launch_evaluation(self) -> None:
        """Queue the evaluation behind the steps, without waiting for them."""
        self._stopwatch.stop_timing()
        self.val_outputs = self.trainer.evaluate("val") if "val" in self.trainer.splits else None

    def collect_metrics(self) -> None:
        """All steps of the epoch have been taken: compute its row, and whether the run diverged. Waits for the device."""
        trainer, self._epoch_row, self._histograms = self.trainer, dict[str, Any](), None
        loss, accuracy = trainer.meter.read_and_reset()  # waits for the device
        trainer.epoch_seconds = self._stopwatch.elapsed_seconds()
        if not math.isfinite(loss):
            return self._set_end("diverged", f"the training loss of epoch {trainer.epoch} is {loss}")
        row = self._build_row(loss, accuracy)
        if not math.isfinite(row.get("val/loss", 0.0)):
            return self._set_end("diverged", f"the validation loss of epoch {trainer.epoch} is {row['val/loss']}")
        self._epoch_row = row
        if recorder := trainer.probe_runner.histograms:
            self._histograms = recorder.read_and_reset()

    def write_row(self) -> None:
        """Write the row to disk. Uses nothing but this run's folder, so runs may do it in threads."""
        if self._epoch_row:
            if self._histograms:  # before the row: who sees the row finds its histograms
                append_histograms(self.run_dir, {"epoch": self._epoch_row["epoch"], **self._histograms})
            self.run_dir.append_row(self._epoch_row)
            self.run_dir.set_status("running", epoch=self._epoch_row["epoch"], epochs=self.config.epochs)

    def end_epoch(self) -> None:
        """Report the row, save if it is time, and decide whether the run goes on."""
        trainer, config, row = self.trainer, self.config, self._epoch_row
        if not row:
            return
        trainer.epoch, trainer.next_step, trainer.epoch_seconds = trainer.epoch + 1, 0, 0.0
        for callback in self.hooks.callbacks:
            callback.on_epoch_end(row)
        if config.checkpoint_every or time.monotonic() - self._last_saved > CHECKPOINT_SECONDS:
            self._save_checkpoint()
        goes_on = self.hooks.should_continue(row)
        if trainer.epoch > config.epochs:
            self._set_end("finished", "")
        elif not goes_on:
            self._set_end("pruned", f"stopped early after epoch {row['epoch']}")
        elif self.state:
            self._save_checkpoint()

    def _set_end(self, state: str, reason: str) -> None:
        self.state, self.reason = state, reason

    def _save_checkpoint(self) -> None:
        if self.energy:
            self.energy.settle()
        save_checkpoint(self.trainer, self.run_dir, SpentSoFar(self.joules, self.joules_problem, self.pack_size))
        self._last_saved = time.monotonic()

    def _build_row(self, loss: float, accuracy: float) -> dict[str, Any]:
        """The metrics of the epoch that has just been trained."""
        trainer = self.trainer
        row: dict[str, Any] = {
            "epoch": trainer.epoch,
            "step": trainer.epoch * trainer.steps_per_epoch,
            "train/loss": loss,
            "train/acc": accuracy,
            "train/lr": trainer.optimizer.lrs_at(trainer.progress_at(trainer.steps_per_epoch - 1))[0],
        }
        if self.val_outputs is not None:
            row["val/loss"], row["val/acc"] = compute_loss_and_accuracy(*self.val_outputs)
        row["system/seconds"] = trainer.epoch_seconds
        row["system/images_per_second"] = trainer.steps_per_epoch * trainer.config.batch_size / trainer.epoch_seconds
        row["system/memory_gib"] = peak_memory_bytes(trainer.device) / 2**30
        return {**row, **trainer.probe_runner.read_and_reset()}

    @property
    def seconds_since_start(self) -> float:
        """Since this process began with the run."""
        return time.monotonic() - self._started_at


def train_epochs(step_runner: StepRunner[Trainer], runs: Sequence[RunLoop], record_end: Callable[[RunLoop], None]) -> None:
    """Train every run until it ends, and call `record_end` at once for one that does: in a pack the others go on.

    All runs have to be at the same step of their epochs.
    """

    def retire_run(run: RunLoop) -> None:
        if run.energy:
            run.energy.settle()
        run.trainer.has_ended = run.has_retired = True
        record_end(run)

    for run in runs:
        if run.state:  # it had ended before this process began
            retire_run(run)
    active = [run for run in runs if not run.state]
    if not active:
        return
    energy = share_energy(active, step_runner.device, active[0].trainer.context)
    for run in active:
        run.energy, run.pack_size = energy, max(run.pack_size, len(active))
    while active := [run for run in runs if not run.state]:
        for run in runs:
            run.trainer.step_index.zero_()  # also of those that have ended: a captured step goes on computing them
        for run in active:
            run.begin_epoch()
        first = active[0].trainer
        for run in active:
            run.trainer.prefetch_next_epoch()
        for step in range(first.next_step, first.steps_per_epoch):
            step_runner(first.probe_runner.is_due(step))
            for run in active:
                run.after_step(step)
            if any(run.state for run in active):  # a stop that comes at the last step waits until the epoch's row is written
                is_last = step + 1 == first.steps_per_epoch
                ended = [run for run in active if run.state and (not is_last or run.state == "diverged")]
                active = [run for run in active if run not in ended]
                for run in ended:
                    retire_run(run)
                if not active:
                    break
        for run in active:
            run.launch_evaluation()
        for run in active:
            run.collect_metrics()
        _write_rows(active)
        for run in active:
            run.end_epoch()
            if run.state:
                retire_run(run)


def _write_rows(runs: Sequence[RunLoop]) -> None:
    """Write the rows of an epoch, in threads: a disk takes many files at once as quickly as one."""
    if len(runs) == 1:
        return runs[0].write_row()
    futures = [_row_writer_pool().submit(run.write_row) for run in runs]
    wait(futures)  # so that nothing is being written any more when one of them has failed
    for future in futures:
        future.result()


@functools.cache
def _row_writer_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(16, "rows")


class Stopwatch:
    """Training time of an epoch. On a GPU it is measured by events in the device's queue, so that the host need not wait."""

    def __init__(self, device: torch.device) -> None:
        self._events = [new_timing_event(), new_timing_event()] if device.type == "cuda" else []
        self._stopped = False

    def start_timing(self, seconds_before: float) -> None:
        """`seconds_before`: what an earlier process spent on this epoch."""
        self._before, self._start, self._stopped = seconds_before, time.perf_counter(), False
        if self._events:
            self._events[0].record()

    def stop_timing(self) -> None:
        """End of the epoch's steps."""
        if self._events:
            self._events[1].record()
        self._elapsed, self._stopped = time.perf_counter() - self._start, True

    def elapsed_seconds(self) -> float:
        """Until `stop_timing`, or until now. After `stop_timing` the caller has to wait for the device first."""
        if not self._stopped:
            return self._before + time.perf_counter() - self._start
        return self._before + (self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else self._elapsed)


def peak_memory_bytes(device: torch.device) -> int:
    """The highest memory use: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024  # Linux counts in KiB
