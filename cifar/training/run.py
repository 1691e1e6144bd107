"""One run from its configuration to its results on disk. This module joins the configuration, the trainer and the folder.

run_dir = create_run(config, resolve_runs_dir())  # makes the run's folder, before anything is computed
state = train_run(config, run_dir)                # trains, from the run's checkpoint if there is one
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import resource
import shutil
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cifar import data, flops, registry
from cifar.config.resolve import format_run_name
from cifar.config.schema import Settings
from cifar.errors import DiskFullError, UserError
from cifar.models.limits import limit_size
from cifar.probes import weight_layers
from cifar.states import pack_failure_reason
from cifar.system import environment
from cifar.system.disk import is_disk_full_error
from cifar.system.names import check_id, escape_controls
from cifar.system.ownership import OwnershipError
from cifar.system.redact import redact, reject_secrets
from cifar.system.user_code import describe_error, describe_failure, pass_interrupt
from cifar.system.variables import read_variable
from cifar.tracking.pretrained import find_run_or_pretrained
from cifar.tracking.records import MAX_NAME
from cifar.tracking.run_dir import RunDir, generate_id
from cifar.training.compile import WaitStoppedError
from cifar.training.console import RunConsole, record_output
from cifar.training.costs import count_train_flops, find_idle_weights, is_any_weight_idle
from cifar.training.distributed import SINGLE_PROCESS, DistributedContext, PeerLostError
from cifar.training.evaluation import compute_loss_and_accuracy, count_views
from cifar.training.loop import RunHooks, RunLoop, train_epochs
from cifar.training.part_checks import check_parts, is_out_of_memory
from cifar.training.parts import describe_plugins
from cifar.training.teachers import describe_teachers, find_teachers, read_common_teachers
from cifar.training.trainer import Trainer, resolve_device
from cifar.training.trainer_cache import clear_trainer_cache, get_step_runner, prepare_step_runner, release_step_runner

CONTEXT_GIB = 0.6  # of GPU memory that a process has besides its tensors, about: libraries and kernels
MAX_WORST_IMAGES = 25  # misclassified images that predictions.npz stores
METRIC_LABELS = {
    "train/loss": ("training loss", "nats"),
    "train/acc": ("training accuracy", "fraction"),
    "train/lr": ("learning rate", ""),
    "val/loss": ("validation loss", "nats"),
    "val/acc": ("validation accuracy", "fraction"),
    "system/seconds": ("training time of the epoch", "s"),
    "system/images_per_second": ("throughput of training", "images/s"),
    "system/memory_gib": ("peak memory", "GiB"),
}  # metric -> (label, unit)


# -- the run's folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunMetadata:
    """What run.json says about a run besides its configuration and its cost."""

    run_id: str = ""  # empty: a new one
    name: str = ""  # empty: made of the model and the swept values
    tags: Sequence[str] = ()
    project: str = ""  # on W&B; empty: WANDB_PROJECT, else "cifar"
    entity: str = ""  # on W&B; empty: WANDB_ENTITY
    sweep: str = ""  # id of the sweep that the run belongs to
    engine: str = ""  # "wandb" where W&B gave out the run, so that it belongs to the sweep of that id on W&B
    cell: int | None = None  # its place in the sweep's grid
    swept: Sequence[str] = ()  # the keys that the sweep varies and that this run was given
    description: str = ""  # of the sweep
    sweep_keys: Sequence[str] = ()  # all keys that the sweep varies, as known when the run was made


def create_run(
    config: Settings,
    runs_dir: Path,
    metadata: RunMetadata | None = None,
    *,
    find_run: Callable[[str, Path], RunDir] = find_run_or_pretrained,
) -> RunDir:
    """Make the folder of a run, or find it if the run of that id exists. `config.dataset` may not be "auto".

    find_run: a name and the runs folder -> a run, for its teachers. Raises UserError, before anything is made, for parts that
    cannot be trained and for teachers that cannot teach it.
    """
    assert config.dataset != "auto"
    about = metadata or RunMetadata()
    run_id = check_id(about.run_id, "the run's id") if about.run_id else generate_id()
    if (runs_dir / run_id / "run.json").exists():
        existing = RunDir(runs_dir / run_id)
        existing.check_resumable()
        describe_parts_again(config, existing, runs_dir, find_run)
        return existing
    reject_secrets({**config.to_dict(), "the name": about.name, "a tag": list(about.tags)})
    described = _describe_run(config, run_id, about) | _describe_parts(config, lambda name: find_run(name, runs_dir))
    described["tags"] += _list_part_tags(config, described["cost"])
    return RunDir.create(runs_dir, run_id, described, config.to_dict())


def describe_parts_again(
    config: Settings, record: RunDir, runs_dir: Path, find_run: Callable[[str, Path], RunDir] = find_run_or_pretrained
) -> None:
    """Write what run.json says about the parts of a run once more, if the run was refused and is to be trained after all.

    The record of a refused run lacks its teachers, and perhaps its cost. Nothing happens to a run that has begun. Raises
    PartError where the parts still cannot be trained, or the teachers cannot teach.
    """
    began = any((record.path / name).exists() for name in ("environment.json", "metrics.jsonl", "checkpoint.pt"))
    if began or not record.read_json("status"):
        return
    parts, about = _describe_parts(config, lambda name: find_run(name, runs_dir)), record.read_json("run")
    kept = {key: value for key, value in about.items() if key not in _PART_FIELDS}
    tags = [tag for tag in about.get("tags") or () if tag not in _PART_TAGS] + _list_part_tags(config, parts["cost"])
    with contextlib.nullcontext() if record.is_owned else record.own("trained"):
        record.write_json("run", {**kept, "tags": tags, **parts})


def record_refused_run(config: Settings, runs_dir: Path, metadata: RunMetadata, reason: str) -> RunDir:
    """The folder of a sweep's trial whose parts cannot be trained, in state "failed": a sweep has a record of each trial."""
    try:
        cost = measure_cost(config).as_dict()
    except UserError:
        cost = flops.Cost(0, 0, 0, 0, (), False, "the network could not be counted").as_dict()
    described = {**_describe_run(config, metadata.run_id, metadata), "cost": cost, **_describe_plugins(config)}
    described["tags"] += _list_part_tags(config, cost)
    run_dir = RunDir.create(runs_dir, metadata.run_id, described, config.to_dict())
    with run_dir.own("trained"):
        run_dir.set_status("failed", reason=reason, epochs=config.epochs)
    return run_dir


def _describe_run(config: Settings, run_id: str, about: RunMetadata) -> dict[str, Any]:
    """The content of run.json, without what depends on the parts."""
    stand_in = config.dataset == "stand-in"
    return {
        "name": format_run_name(config.to_dict(), about.swept, about.name),
        "group": about.sweep,
        "tags": [*map(escape_controls, about.tags), config.dataset, config.model],
        "project": about.project or read_variable("WANDB_PROJECT", "cifar"),
        "entity": about.entity or read_variable("WANDB_ENTITY"),
        "sweep": about.sweep,
        "engine": about.engine,
        "cell": about.cell,
        "swept": list(about.swept),
        "sweep_keys": list(about.sweep_keys),
        "dataset": config.dataset,
        "official": not stand_in,
        **({"artifacts": "off"} if read_variable("CIFAR_ARTIFACTS") == "off" else {}),  # so that a later `push` sends none
        **({"description": escape_controls(about.description[:MAX_NAME], keeps_lines=True)} if about.description else {}),
        "command": f"python -m cifar train --from {run_id}",
    }


_PART_FIELDS = ("cost", "plugins", "notes", "teachers")  # of run.json
_PART_TAGS = ("macs unverified", "distilled")


def _describe_parts(config: Settings, find_run: Callable[[str], RunDir]) -> dict[str, Any]:
    """What run.json says about the parts of a run, and about its teachers. Raises PartError where it cannot be trained."""
    notes, teachers = check_plugins(config), find_teachers(config, find_run)
    return {
        "cost": measure_cost(config).as_dict(),
        **_describe_plugins(config),
        **({"notes": list(notes)} if notes else {}),
        **({"teachers": describe_teachers(teachers)} if teachers else {}),
    }


def _describe_plugins(config: Settings) -> dict[str, Any]:
    return {"plugins": plugins} if (plugins := describe_plugins(config)) else {}  # of its parts, each with a digest


def _list_part_tags(config: Settings, cost: Mapping[str, Any]) -> list[str]:
    return ([] if cost["verified"] else ["macs unverified"]) + (["distilled"] if config.teacher else [])


def resolve_dataset(config: Settings, data_dir: Path | None) -> tuple[Settings, str]:
    """Replace `dataset: auto` by a dataset. Returns the configuration and the reason for the choice."""
    if config.dataset != "auto":
        return config, ""
    dataset, reason = data.resolve_auto(data_dir)
    return config.model_copy(update={"dataset": dataset}), reason


def check_plugins(config: Settings) -> tuple[str, ...]:
    """Find out whether the run's parts train, where a plug-in is among them -> sentences. Raises PartError if they do not.

    On this machine's CPU, where the run's device is on another machine. A run that `max_macs` will skip is not tried.
    """
    if config.max_macs and measure_cost(config).macs > config.max_macs:
        return ()
    try:
        device = resolve_device(config.device)
    except UserError:
        device = torch.device("cpu")
    return check_parts(config, device).notes


def measure_cost(config: Settings) -> flops.Cost:
    """MACs and parameters of the configuration's model. Cached, because a sweep asks for each trial."""
    return _measure_model_cost(config.model, tuple(sorted(config.kwargs_for("model").items())))


@functools.lru_cache(maxsize=256)
def _measure_model_cost(model: str, arguments: tuple[tuple[str, Any], ...]) -> flops.Cost:
    return measure_network(registry.models[model], dict(arguments))[1]


def measure_network(entry: registry.Entry, arguments: Mapping[str, Any]) -> tuple[nn.Module, flops.Cost]:
    """Build a network and count it; the random state does not change.

    Raises UserError with the network's name and file where its builder or its forward pass fails.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a plug-in prints, as stdout may be a document
            with flops.keep_random_state(), limit_size(entry.name):
                model: nn.Module = entry.build(**arguments)
                flops.materialize_lazy_modules(model)
            return model, flops.measure_cost(model)
    except UserError:
        raise
    except BaseException as error:
        pass_interrupt(error)
        raise UserError(
            f"model '{entry.name}' ({entry.file}) cannot be counted, as a forward pass of one image fails: "
            f"{describe_error(error)}"
        ) from error


# -- training ----------------------------------------------------------------------------------------------------------


def train_run(
    config: Settings,
    run_dir: RunDir,
    *,
    data_dir: Path | None = None,
    hooks: RunHooks | None = None,
    num_planned_runs: int = 1,
    context: DistributedContext = SINGLE_PROCESS,
) -> str:
    """Train a run, from its checkpoint if there is one. Returns the state in which it ended.

    `num_planned_runs`: runs of this kind that this process will train, this one included; it decides about compiling.
    Each rank of a distributed `context` has a run folder of its own.
    """
    run = RunLoop(config, run_dir, hooks)
    train_runs([run], data_dir=data_dir, num_planned_runs=num_planned_runs, context=context)
    return run.state


def train_runs(
    runs: Sequence[RunLoop],
    *,
    data_dir: Path | None = None,
    num_planned_runs: int = 1,
    context: DistributedContext = SINGLE_PROCESS,
) -> None:
    """Train several runs side by side, each into its own folder. `trainer_cache.can_pack` has to be true of them.

    This process owns the folders meanwhile. Raises RunOwnedError if another one has a folder; then nothing has changed.
    """
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.callback(run.run_dir.release)
        context.rank_zero_call(lambda: _acquire_folders(runs))
        for run in runs:
            run.attach_console(RunConsole(run.config, run.run_dir, len(runs)))
        stack.enter_context(record_output([run.console for run in runs if run.console]))
        for run in runs:
            stack.enter_context(record_failures(run, len(runs)))
        live = [run for run in runs if not _skip_if_over_budget(run)]
        if live:
            for run in live:
                epoch = run.run_dir.read_json("status").get("epoch", 0)
                run.run_dir.set_status("running", epoch=epoch, epochs=run.config.epochs)
                run.run_dir.remove_file("traceback.txt")  # of an earlier attempt
            configs = [run.config for run in live]
            teachers = read_common_teachers([run.run_dir for run in live])
            step_runner = get_step_runner(configs, data_dir, context, teachers)
            for run, trainer in zip(live, step_runner.trials, strict=True):
                run.attach_trainer(trainer)
            try:
                step_description = prepare_step_runner(
                    step_runner, configs, num_planned_runs, lambda: all(run.state or run.hooks.poll_stop() for run in live)
                )
            except WaitStoppedError:
                _end_before_steps(live)
                return
            for run in live:
                _write_description(run, step_description)
            train_epochs(step_runner, live, _record_end)
            release_step_runner(step_runner)


def _acquire_folders(runs: Sequence[RunLoop]) -> None:
    for run in runs:
        run.run_dir.acquire()


def _end_before_steps(runs: Sequence[RunLoop]) -> None:
    """All of them were asked to end before this process took a step of theirs: they can go on from where they were."""
    clear_trainer_cache()  # the steps are not what they were to become
    for run in runs:
        if not run.state:
            run.state, run.reason = run.hooks.poll_stop() or "interrupted", "asked to end before its first step here"
        _record_end(run)


def _skip_if_over_budget(run: RunLoop) -> bool:
    """End a run in state "skipped" if its model needs more than `max_macs`. Returns whether it did."""
    macs, budget = run.run_dir.read_json("run")["cost"]["macs"], run.config.max_macs
    if not budget or macs <= budget:
        return False
    run.state, run.reason = "skipped", f"needs {macs:,} MACs, the budget max_macs is {budget:,.0f}"
    _write_console_end(run, run.state, run.reason)
    run.run_dir.set_status("skipped", reason=run.reason, epochs=run.config.epochs)
    _notify_end(run)
    return True


def _write_description(run: RunLoop, step_description: dict[str, Any]) -> None:
    """Write what is known before the first step: the environment, how steps are taken, and the labels of all metrics."""
    trainer, run_dir = run.trainer, run.run_dir
    described = environment.describe_environment(trainer.device, trainer.fingerprint) | trainer.context.describe()
    if "program" not in described:  # a trial: the command that repeats it
        described |= {"program": "-m cifar", "args": ["train", "--from", run_dir.id]}
    run_dir.write_json("environment", {**described, "step": {**step_description, "channels_last": trainer.channels_last}})
    if read_variable(environment.DIFF_VARIABLE) == "on" and (diff := environment.git_diff()):
        run_dir.write_file(environment.DIFF_FILE, diff)
    labels = {name: {"label": label, "unit": unit} for name, (label, unit) in METRIC_LABELS.items()}
    layers = list(weight_layers(trainer.probe_runner.parameters))
    run_dir.write_json("labels", {**labels, **trainer.probe_runner.metric_labels(), "layers": layers})
    for callback in run.hooks.callbacks:
        callback.on_run_start(run_dir.read_json("run"), epochs=run.config.epochs, steps=trainer.steps_per_epoch)
        if step_description["compile"]:
            callback.on_message(step_description["compile"])


# -- failures ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def record_failures(run: RunLoop, pack_size: int = 1) -> Iterator[None]:
    """Write an exception into the run's status before it goes on to the caller. A run that has ended keeps its status.

    In a pack any of the runs may have caused it, so each of them becomes one that can be resumed.
    """
    status_before = run.run_dir.read_json("status")
    try:
        yield
    except BaseException as error:
        pass_interrupt(error)
        clear_trainer_cache()  # the trainers may be in any state
        if not run.end_recorded:
            _record_failure(run, status_before, error, pack_size)
        raise


def _record_failure(run: RunLoop, status_before: dict[str, Any], error: BaseException, pack_size: int) -> None:
    run_dir, config = run.run_dir, run.config
    if isinstance(error, OwnershipError) and error.folder.name == run_dir.id:
        return  # the folder is another process's now, or gone
    progress = {"epoch": run_dir.read_json("status").get("epoch", 0), "epochs": config.epochs}
    if isinstance(error, OwnershipError):
        reason = f"side by side with {error.folder.name}, which was lost"
        _write_console_end(run, "interrupted", reason)
        run_dir.set_status("interrupted", reason=reason, **progress)
        return
    if is_disk_full_error(error):
        with contextlib.suppress(OSError):
            _write_console_end(run, "interrupted", "no space left on the disk")
            run_dir.set_status("interrupted", reason="no space left on the disk", **progress)
        raise DiskFullError(
            f"no space is left for {run_dir.path}; free some, then go on with `python -m cifar train --resume {run_dir.id}`"
        ) from error
    if isinstance(error, PeerLostError):
        _write_console_end(run, "interrupted", str(error))
        run_dir.set_status("interrupted", reason=str(error), **progress)
        return
    if isinstance(error, UserError):
        if status_before:  # the user can mend it, then the run can go on as before
            run_dir.write_json("status", status_before)
        elif not run_dir.metrics_bytes() and not (run_dir.path / "checkpoint.pt").exists():  # an empty run is deleted
            shutil.rmtree(run_dir.path, ignore_errors=True)
            run_dir.release()
            with contextlib.suppress(OSError):
                run_dir.path.rmdir()  # a network file system keeps the lock's file until it is closed
        return
    memory = describe_out_of_memory(error, config)
    state, reason = ("killed", memory) if memory else ("failed", describe_failure(error))
    if pack_size > 1:
        state, reason = "interrupted", pack_failure_reason(reason, pack_size)
    with contextlib.suppress(OSError):
        text = escape_controls(redact(traceback.format_exc()), keeps_lines=True)
        run_dir.write_file("traceback.txt", text.encode())
        if run.console:
            run.console.log.write_lines(text.rstrip())
        _write_console_end(run, state, reason)
        run_dir.set_status(state, reason=reason, **progress)
        error.add_note(f"the whole traceback: {run_dir.path / 'traceback.txt'}")


def describe_out_of_memory(error: BaseException, config: Settings) -> str:
    """Which memory ran out, how large it is, and at which batch size. Empty for any other error."""
    advice = f"at batch_size {config.batch_size}; take a smaller one"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        others = _memory_of_others()
        taken = f", of which other processes have {others:.0f}" if others >= max(2, total / 20) else ""
        return f"out of GPU memory ({total:.0f} GiB{taken}) {advice}"
    if is_out_of_memory(error):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if limit == resource.RLIM_INFINITY else limit
        return f"out of memory ({total / 2**30:.1f} GiB) {advice}"
    return ""


def is_gpu_taken(error: BaseException) -> bool:
    """Whether GPU memory ran out while other processes have more than half of it."""
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    return _memory_of_others() > total / 2


def _memory_of_others() -> float:
    """GiB of the current GPU that are neither free nor this process's; 0.0 if the driver does not tell."""
    with contextlib.suppress(RuntimeError, AssertionError):
        free, total = torch.cuda.mem_get_info()
        return max(0.0, (total - free - torch.cuda.memory_reserved()) / 2**30 - CONTEXT_GIB)
    return 0.0


# -- the end -----------------------------------------------------------------------------------------------------------


def _record_end(run: RunLoop) -> None:
    """Write how the run ended, and its results if it finished."""
    run_dir, epoch = run.run_dir, run.trainer.epoch - 1
    if run.state == "finished":
        run.summary = _write_results(run)
    _write_console_end(run, run.state, run.reason)
    run_dir.set_status(run.state, reason=run.reason, epoch=epoch, epochs=run.config.epochs)
    if run.state in ("finished", "diverged"):
        run_dir.remove_file("checkpoint.pt")
    _notify_end(run)


def _write_console_end(run: RunLoop, state: str, reason: str) -> None:
    """The last line of output.log. Before the status: once that says that the run has ended, the mirror sends what is there."""
    if run.console:
        run.console.write_end(state, reason, run.summary)


def _notify_end(run: RunLoop) -> None:
    """All is written: give the folder back, then tell the callbacks, since an agent may hand the run out again at once."""
    run.end_recorded = True
    run.run_dir.release()
    for callback in run.hooks.callbacks:
        callback.on_run_end(run.state, run.reason, run.summary)


def _write_results(run: RunLoop) -> dict[str, Any]:
    """Write predictions, weights and summary of a finished run. Returns the summary."""
    trainer, run_dir, config = run.trainer, run.run_dir, run.config
    rows = list(run_dir.read_rows())
    last = rows[-1]
    summary = {key: value for key, value in last.items() if key.startswith(("train/", "val/"))}
    summary["epochs"] = last["epoch"]
    summary["seconds"] = sum(row["system/seconds"] for row in rows)
    summary["images_per_second"] = statistics.median(row["system/images_per_second"] for row in rows)
    if "val" in trainer.splits:
        summary["best/val/acc"] = max(row["val/acc"] for row in rows)
    cost = run_dir.read_json("run")["cost"]
    summary |= {"macs": cost["macs"], "params": cost["params"], "macs_verified": cost["verified"]}
    summary |= _measure_training(run, last.get("step", last["epoch"] * trainer.steps_per_epoch), cost["macs"])
    outputs, split = run.val_outputs, "val"  # of one view, as the last epoch has left them
    if config.test == "final":
        outputs, split = None, "test"
        logits, labels = trainer.evaluate("test", config.tta, config.tta_share)
        summary["seconds_to_test"] = run.seconds_since_start  # from the first step in this process to the test result
        summary["test/loss"], summary["test/acc"] = compute_loss_and_accuracy(logits, labels)
        summary["test/views"] = count_views(config.tta, config.tta_share)
        if config.tta != "none" and config.tta_share < 1:
            summary["test/acc_all_views"] = compute_loss_and_accuracy(*trainer.evaluate("test", config.tta))[1]
        outputs = (logits, labels) if config.tta == "none" else trainer.evaluate("test")
        if config.tta != "none":
            summary["test/acc_one_view"] = compute_loss_and_accuracy(*outputs)[1]
    if split in trainer.splits:
        _write_predictions(trainer, run_dir, split, outputs or trainer.evaluate(split))
    buffer = io.BytesIO()
    torch.save(trainer.eval_model.state_dict(), buffer)
    run_dir.write_file("weights.pt", buffer.getvalue())
    summary["weights_bytes"] = len(buffer.getvalue())
    run_dir.write_json("summary", summary)
    return summary


def _measure_training(run: RunLoop, num_steps: int, macs: float) -> dict[str, Any]:
    """What the training has cost beside its seconds, for the summary. What is not known is not in it."""
    trainer, config = run.trainer, run.config
    num_images, idle = num_steps * config.batch_size, list[tuple[float, int]]()
    if is_any_weight_idle(trainer.model, trainer.optimizer):
        total = config.epochs * trainer.steps_per_epoch
        progress = [step / total for step in range(num_steps)]
        layers = measure_cost(config).layers
        idle = find_idle_weights(trainer.model, trainer.optimizer, layers, progress, config.batch_size)
    found: dict[str, Any] = {"train_flops": count_train_flops(macs, num_images, idle)}
    if trainer.teachers:
        found["teacher_flops"] = float(2 * num_images * sum(teacher.macs for teacher in trainer.teachers))
        known = [teacher.train_flops for teacher in trainer.teachers if teacher.train_flops is not None]
        if len(known) == len(trainer.teachers):
            found["teacher_train_flops"] = sum(known)
    if run.joules is not None:
        found["joules"] = run.joules
    elif run.joules_problem:
        found["joules_missing"] = run.joules_problem
    if run.pack_size > 1:
        found["pack_size"] = run.pack_size
    return found


def _write_predictions(trainer: Trainer, run_dir: RunDir, split: str, outputs: tuple[Tensor, Tensor]) -> None:
    """Write predictions.npz: the prediction for each image, and the images with the most confident mistakes.

    outputs: logits (N, 10) and labels (N,) of the split, of one view.
    """
    logits, labels = outputs
    confidence, predicted = logits.softmax(1).max(1)
    wrong = torch.where(predicted != labels, confidence, torch.zeros_like(confidence))
    num_wrong = int((predicted != labels).sum())
    worst = wrong.argsort(descending=True, stable=True)[: min(MAX_WORST_IMAGES, num_wrong)]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        split=np.array(split),
        index=np.arange(len(labels)),
        label=labels.cpu().numpy(),
        predicted=predicted.cpu().numpy(),
        confidence=confidence.float().cpu().numpy(),
        worst_index=worst.cpu().numpy(),
        worst_images=trainer.splits[split][0][worst].cpu().numpy(),
    )
    run_dir.write_file("predictions.npz", buffer.getvalue())
