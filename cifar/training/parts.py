"""The parts of a run, built from its configuration: network, optimizer with its schedule, probes.

A part may be a plug-in, so what a builder returns is looked at here. Raises UserError with what it has to return.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cifar import optim, registry
from cifar.config import resolve as configuration
from cifar.config.schema import Settings
from cifar.errors import UserError
from cifar.flops import materialize_lazy_modules
from cifar.models.limits import limit_size
from cifar.optim.optimizer import OPTIMIZER_METHODS
from cifar.optim.schedules import Schedule
from cifar.probes import ProbeRunner
from cifar.probes.histograms import HistogramRecorder
from cifar.registry import Entry


def selected_entries(config: Settings) -> dict[str, Entry]:
    """The registered parts of a configuration: "model", "optimizer", "schedule" and "probe NAME"."""
    entries = {
        "model": registry.models[config.model],
        "optimizer": registry.optimizers[config.optimizer],
        "schedule": registry.schedules[config.schedule],
    }
    return entries | {f"probe {name}": registry.probes[name] for name in configuration.parse_probe_names(config.probes)}


def identify_code(config: Settings) -> tuple[Any, ...]:
    """What the run's parts are made by, its schedule aside. Equal for two configurations whose parts are of the same code.

    A name alone does not say that: in a notebook a plug-in may have been imported again.
    """
    entries = selected_entries(config)
    return tuple(
        (part, entry.name, (entry.file, entry.digest) if entry.digest else entry.builder)
        for part, entry in entries.items()
        if part != "schedule"
    )


def describe_plugins(config: Settings) -> dict[str, dict[str, str]]:
    """For run.json: the plug-in files that a run uses, by part, each as it was imported."""
    return {
        part: {"name": entry.name, "file": entry.file, "sha256": entry.digest}
        for part, entry in selected_entries(config).items()
        if entry.digest
    }


def find_changed_files(recorded: Any) -> dict[str, str]:
    """Part -> plug-in file, of those that have changed since run.json was written. What is gone is not among them.

    recorded: run.json's "plugins"; runs of earlier versions have none.
    """
    kinds = {"model": registry.models, "optimizer": registry.optimizers, "schedule": registry.schedules}
    changed: dict[str, str] = {}
    for part, about in recorded.items() if isinstance(recorded, Mapping) else ():
        if not isinstance(about, Mapping):
            continue
        entry = kinds.get(part, registry.probes).find(str(about.get("name", "")))
        if entry and entry.digest and about.get("sha256") and entry.digest != about["sha256"]:
            changed[part] = entry.file
    return changed


def build_model(config: Settings) -> nn.Module:
    """The network on the CPU, with random weights from torch's generator."""
    entry = registry.models[config.model]
    with limit_size(config.model):
        model = entry.build(**config.kwargs_for("model"))
    if not isinstance(model, nn.Module):
        raise UserError(f"model '{entry.name}' ({entry.file}) is built as {_name_type(model)}; return a torch.nn.Module")
    materialize_lazy_modules(model, config.seed)
    return model


def copy_model(model: nn.Module, config: Settings, memory_format: torch.memory_format) -> nn.Module:
    """A second network with the same weights. Some cannot be copied (old weight_norm, say); those are built once more."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError):
        device, python_state = next(iter(model.parameters())).device, random.getstate()
        with torch.random.fork_rng(devices=[]):
            twin = build_model(config).to(device, memory_format=memory_format)  # type: ignore[call-overload]
        random.setstate(python_state)
        twin.load_state_dict(model.state_dict())
        return cast(nn.Module, twin)


def build_optimizer(config: Settings, model: nn.Module) -> optim.Optimizer:
    """The optimizer of the network's parameters. Its lr is constant until it gets a schedule."""
    entry = registry.optimizers[config.optimizer]
    optimizer: optim.Optimizer = entry.build(optim.Parameters.from_model(model), **config.kwargs_for("optimizer"))
    where = f"optimizer '{entry.name}' ({entry.file})"
    if isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"{where} is built as {_name_type(optimizer)}, whose steps cannot be captured or kept; return a "
            "cifar.optim.Optimizer of groups with an update rule (docs/extending.md, 'An optimizer')"
        )
    if not isinstance(optimizer, optim.Optimizer):
        missing = [name for name in OPTIMIZER_METHODS if not hasattr(optimizer, name)]
        if missing:
            raise UserError(
                f"{where} is built as {_name_type(optimizer)}, which has no {', '.join(missing[:4])}; return a "
                "cifar.optim.Optimizer (docs/extending.md, 'An optimizer')"
            )
    return optimizer


def build_schedule(config: Settings) -> Schedule:
    """What lr is multiplied by, as a function of the training's progress."""
    entry = registry.schedules[config.schedule]
    schedule: Schedule = entry.build(**config.kwargs_for("schedule"))
    if not callable(schedule):
        raise UserError(
            f"schedule '{entry.name}' ({entry.file}) is built as {_name_type(schedule)}; return a function from the progress "
            "of the training, 0 to 1, to what lr is multiplied by"
        )
    return schedule


def build_probe_runner(config: Settings, model: nn.Module) -> ProbeRunner:
    """The probes, at the start of a run."""
    names = configuration.parse_probe_names(config.probes)
    probes = [registry.probes[name].build(**config.kwargs_for(name)) for name in names]
    parameters = dict(model.named_parameters())
    wants_histograms = bool(probes) and config.histograms != "off"
    return ProbeRunner(
        probes,
        parameters,
        every=config.probe_every,
        histograms=HistogramRecorder(parameters) if wants_histograms else None,
    )


def describe_output_problem(output: Any, num_images: int) -> str:
    """What is wrong with a network's output for so many images; "" if it is (B, 10) floating-point logits."""
    advice = f"it has to be a floating-point tensor (B, 10), here ({num_images}, 10)"
    if not isinstance(output, Tensor):
        return f"its output is {_name_type(output)}; {advice}"
    if output.shape != (num_images, 10):
        return f"its output has the shape {tuple(output.shape)}; {advice}"
    if not output.is_floating_point():
        return f"its output is of {output.dtype}; {advice}"
    return ""


def _name_type(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value)
    return f"a {kind.__module__.removeprefix('builtins').rstrip('.')}.{kind.__qualname__}".replace("a .", "a ")
