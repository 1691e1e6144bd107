"""What the commands that train do before a run and after it: the data, the run's folder, what is printed at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar.cli.console import echo, ensure_dataset, spinner, warn_of_stand_in
from cifar.states import ENDED_STATES, OPEN_RUN_STATES
from cifar.system.amounts import format_joules, format_operations
from cifar.system.durations import format_duration
from cifar.system.variables import read_variable

if TYPE_CHECKING:
    from cifar.config.schema import Settings
    from cifar.tracking.run_dir import RunDir


def begin_ahead(layers: Sequence[tuple[str, Mapping[str, Any]]], data_dir: Path | None) -> None:
    """Let threads start CUDA and read the official images while this one imports PyTorch, unless others are asked for.

    layers: where the values come from, and values.
    """
    from cifar import data
    from cifar.system.cuda_start import start_cuda_ahead

    values = dict(pair for _, each in layers for pair in each.items())
    is_own_file = str(values.get("experiment", "")).endswith((".yaml", ".yml"))  # it may name a device; no other one does
    if "device" in values or not is_own_file:
        start_cuda_ahead(str(values.get("device", "auto")))
    if values.get("dataset") != "stand-in":
        data.read_ahead(data_dir)


def prepare_data(settings: Settings, data_dir: Path | None) -> None:
    """Find everything that can be wrong about device and data before a folder is made; download with a progress bar."""
    with spinner("importing PyTorch ..."):
        from cifar import data
        from cifar.training import trainer
        from cifar.training.gpu_libraries import begin_loading_libraries
    device = trainer.resolve_device(settings.device)
    begin_loading_libraries(device)
    if settings.dataset == "cifar10" and data.find_cifar10(data_dir) is None:
        ensure_dataset(data_dir, [])
    with spinner(f"reading {settings.dataset} ..."):
        trainer.load_splits(settings.dataset, data_dir, settings.val_size, settings.train_size, device)


def create_run_dir(settings: Settings, runs: Path, swept: list[str], name: str, tags: list[str]) -> RunDir:
    """The run's folder, which this process owns from now on."""
    from cifar.integrations.wandb.artifact_download import find_run
    from cifar.training import run

    sweep, run_id = (read_variable(f"WANDB_{kind}_ID") if swept else "" for kind in ("SWEEP", "RUN"))
    engine = "wandb" if sweep else ""  # the plain `wandb agent` started this process
    metadata = run.RunMetadata(run_id=run_id, name=name, swept=swept, sweep=sweep, engine=engine, tags=tags)
    record = run.create_run(settings, runs, metadata, find_run=find_run)
    record.acquire(on_wait=echo)
    return record


def print_result(record: RunDir, state: str) -> None:
    summary, status = record.read_json("summary"), record.read_json("status")
    if state == "finished":
        scores = [f"{k.split('/')[0]} {100 * summary[k]:.2f} %" for k in ("train/acc", "val/acc", "test/acc") if k in summary]
        views = f" ({summary['test/views']} views)" if summary.get("test/views", 1) > 1 else ""
        time = format_duration(summary["seconds"])
        cost = "".join(f", {text}" for text in _describe_cost(summary))
        echo(f"\n{', '.join(scores)}{views} after {summary['epochs']} epochs, {time} of training{cost}")
    else:
        echo(f"\n{state}: {status.get('reason', '')}")
    echo(f"folder    {record.path}")
    for picture in sorted((record.path / "pictures").glob("*.png")):
        echo(f"picture   {picture}")
    if state in OPEN_RUN_STATES:
        echo(f"go on     python -m cifar train --resume {record.id}")
    echo(f"repeat    {record.read_json('run').get('command', '')}")
    if record.read_json("run").get("dataset") == "stand-in":
        warn_of_stand_in()


def _describe_cost(summary: Mapping[str, Any]) -> Iterator[str]:
    """What a training has cost beside its seconds, in words."""
    if flops := summary.get("train_flops"):
        yield format_operations(flops)
    if flops := summary.get("teacher_flops"):
        yield f"{format_operations(flops)} of its teacher"
    if (joules := summary.get("joules")) is not None:
        yield format_joules(joules)
    elif problem := summary.get("joules_missing"):
        yield f"energy not known: {problem}"


def print_wandb_place(record: RunDir, mode: str, state: str, *, is_complete: bool) -> None:
    """Say where the run is on W&B, or how an offline run gets there."""
    from cifar.integrations.wandb.mirror import read_run_url

    url = read_run_url(record)
    if mode == "online" and url:
        echo(f"W&B       {url}")
    if state not in ENDED_STATES:
        return  # what W&B lacks is sent when the run goes on
    offline = sorted((record.path / "wandb").glob("offline-run-*"))
    if mode == "online" and not is_complete:
        echo(f"W&B has not got all of it; send the rest with: python -m cifar push {record.id}")
    elif mode == "offline" and offline:
        echo(f"W&B       offline; send it with: python -m cifar push {record.id}   (or wandb sync {offline[-1]})")
