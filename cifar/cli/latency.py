"""`profile --latency`: how long a network takes for an image, and a run's record of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar.cli.console import echo, print_json, print_sentence, print_table, redirect_messages, spinner, warn
from cifar.cli.train import gather_layers
from cifar.errors import UserError
from cifar.system.amounts import format_latency
from cifar.system.terminal import Column
from cifar.tracking import run_dir
from cifar.tracking.pretrained import is_pretrained

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cifar.config.schema import Settings
    from cifar.tracking.run_dir import RunDir
    from cifar.training.latency import LatencyReport

RUN_KEYS = ("device", "precision", "channels_last", "threads")  # that may differ from the run's when it is timed


def profile_latency(
    first: str, pairs: Sequence[str], experiment: str, batch_sizes: Sequence[int], *, runs_dir: Path | None, as_json: bool
) -> int:
    """Time forward passes of a network, or of a finished run, whose record then has the latency of one image.

    first: the name of a network or a run; it may be the first of `pairs`, or empty beside an experiment.
    """
    batch_sizes = list(dict.fromkeys(batch_sizes))
    with redirect_messages(as_json):
        with spinner("importing PyTorch ..."):
            from cifar.training.latency import measure_latency
        record, config, model = _find_network(first, pairs, experiment, runs_dir)
        is_stored = record is not None and not is_pretrained(record.path)
        if is_stored and 1 not in batch_sizes:
            raise UserError("the record of a run has the latency of one image; add --batch 1")
        with spinner("timing ..."):
            report = measure_latency(model, config, batch_sizes)
        others = _count_others(report.device)
        notes = [*report.notes, *([f"{others} computes on this GPU too: these times may be too long"] if others else [])]
        for note in notes:
            warn(note)
        if record is not None and is_stored:
            _store_latency(record, report)
    if as_json:
        print_json({"model": config.model, "run": record.id if record else None, "notes": notes, **_describe(report, config)})
        return 0
    print_sentence(f"{record.name + ', ' if record else ''}{config.model}, {_describe_conditions(report, config)}")
    rows = [
        (
            str(each.batch_size),
            each.how,
            format_latency(each.median),
            f"{format_latency(each.p5)} – {format_latency(each.p95)}",
            str(each.num_calls),
            f"{each.images_per_second:,.0f}",
        )
        for each in report.latencies
    ]
    columns = (
        Column("images", is_number=True),
        Column("how"),
        Column("median", is_number=True),
        Column("5 % – 95 %", is_number=True),
        Column("n", is_number=True),
        Column("images a second", is_number=True),
    )
    print_table("", columns, rows)
    if record is not None and is_stored:
        _print_stored(record, report)
    return 0


def _find_network(
    first: str, pairs: Sequence[str], experiment: str, runs_dir: Path | None
) -> tuple[RunDir | None, Settings, nn.Module]:
    """The run, if one is named; the configuration; and the network, of a run with its weights."""
    from cifar import registry
    from cifar.training import run
    from cifar.training.parts import build_model

    words = [word for word in (first, *pairs) if word]
    name = "" if not words or "=" in words[0] else words[0]
    if not name or experiment or registry.models.find(name):
        config = resolve_profiled(experiment, [f"model={name}" if word is name else word for word in words])
        for note in run.check_plugins(config):
            warn(note)
        return None, config, build_model(config)
    from cifar.config.resolve import parse_pairs
    from cifar.integrations.wandb.artifact_download import find_run
    from cifar.training.recorded import evaluation_settings, load_model

    try:
        record = find_run(name, run_dir.resolve_runs_dir(runs_dir))
    except UserError as error:
        raise UserError(f"'{name}' is no network (`python -m cifar models` lists them), and {error}") from None
    changes = parse_pairs(words[1:])
    if wrong := [key for key in changes if key not in RUN_KEYS]:
        raise UserError(f"a run is timed as it was trained, so '{wrong[0]}' cannot be set; what can: {', '.join(RUN_KEYS)}")
    return record, evaluation_settings(record, changes), load_model(record)


def resolve_profiled(experiment: str, pairs: Sequence[str]) -> Settings:
    """The configuration of `profile`: an experiment's or a network's. Raises UserError without either."""
    from cifar.config.resolve import resolve_config

    layers = gather_layers(pairs, experiment=experiment)
    if not experiment and not any(pair.startswith("model=") for pair in pairs):
        raise UserError("name a network, as in: python -m cifar profile resnet20; or an experiment: --experiment worksheet1")
    return resolve_config(*(values for _, values in layers))


def _count_others(device: torch.device) -> str:
    """The other processes on this GPU, in words; "" if there are none, or if that cannot be known."""
    from cifar.system.environment import gpu_uuid
    from cifar.system.sampler import find_gpu

    gpu = find_gpu(uuid) if (uuid := gpu_uuid(device)) else None
    others = len((gpu.list_processes() if gpu else None) or ()) - 1
    return "" if others < 1 else "another process" if others == 1 else f"each of {others} other processes"


def _store_latency(record: RunDir, report: LatencyReport) -> None:
    """Write the latency of one image into the run's summary, which nobody else writes to meanwhile."""
    from cifar.system.environment import device_name

    best, threads = (
        report.find_fastest(1),
        describe_device(report.device).removeprefix("cpu") if report.device.type == "cpu" else "",
    )
    with record.own("timed"):
        summary = {key: value for key, value in record.read_json("summary").items() if not key.startswith("latency_")}
        measured: Mapping[str, Any] = {
            "latency_seconds": best.median,
            "latency_p5_seconds": best.p5,
            "latency_p95_seconds": best.p95,
            "latency_n": best.num_calls,
            "latency_device": f"{device_name(report.device)}{threads}, {report.precision}, {best.how}",
        }
        record.write_json("summary", {**summary, **measured})


def _print_stored(record: RunDir, report: LatencyReport) -> None:
    from cifar.integrations.wandb.mirror import read_run_url

    best = report.find_fastest(1)
    echo(f"\nrun {record.id} has it now: {format_latency(best.median)} for one image ({best.how}), n = {best.num_calls}")
    if read_run_url(record):
        echo(f"W&B does not; send it with: python -m cifar push {record.id}")


def _describe(report: LatencyReport, config: Settings) -> dict[str, Any]:
    """For JSON. All times are in seconds."""
    return {
        "device": str(report.device),
        "device_name": describe_device(report.device),
        "precision": report.precision,
        "channels_last": config.channels_last,
        "latencies": [
            {
                "batch_size": each.batch_size,
                "how": each.how,
                "n": each.num_calls,
                "median": each.median,
                "p5": each.p5,
                "p95": each.p95,
                "images_per_second": each.images_per_second,
            }
            for each in report.latencies
        ],
    }


def _describe_conditions(report: LatencyReport, config: Settings) -> str:
    layout = ", channels last" if config.channels_last else ""
    return f"{describe_device(report.device)}, {report.precision}{layout}; images are on the device, evaluation mode"


def describe_device(device: torch.device) -> str:
    """A device in words."""
    import torch

    threads = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {threads} thread{'s' * (threads > 1)}"
