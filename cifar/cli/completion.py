"""Shell completion: names of experiments, sweeps, runs and registered parts. Imports no PyTorch and opens no database."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import typer

from cifar.errors import UserError
from cifar.system.files import read_text
from cifar.system.names import is_id
from cifar.system.variables import read_words

# key=value -> the variable of cifar.registry that its names are registered with, and the folder below cifar/
_PARTS = {
    "model": ("models", "models"),
    "optimizer": ("optimizers", "optim"),
    "schedule": ("schedules", "optim"),
    "probes": ("probes", "probes"),
}
_PACKAGE = Path(__file__).resolve().parents[1]


def complete_experiment(incomplete: str) -> list[str]:
    """Names of `experiments/`, and YAML files of this machine."""
    from cifar.config.shipped import shipped_names

    return [*shipped_names("experiments"), *_list_yaml_files(incomplete)]


def complete_sweep_file(incomplete: str) -> list[str]:
    """Names of `sweeps/`, and YAML files of this machine."""
    from cifar.config.shipped import shipped_names

    return [*shipped_names("sweeps"), *_list_yaml_files(incomplete)]


def complete_sweep(ctx: typer.Context) -> list[str]:
    """Ids of the sweeps of the runs folder."""
    return sorted(path.name for path in (_find_runs_dir(ctx) / "sweeps").glob("*/") if is_id(path.name))


def complete_run(ctx: typer.Context) -> list[str]:
    """Ids of the runs of the runs folder."""
    return sorted(path.parent.name for path in _find_runs_dir(ctx).glob("*/run.json") if is_id(path.parent.name))


def complete_pretrained() -> list[str]:
    """Names of the pretrained networks."""
    from cifar.tracking.pretrained import list_pretrained_names

    return list_pretrained_names()


def complete_run_or_pretrained(ctx: typer.Context) -> list[str]:
    return [*complete_run(ctx), *complete_pretrained()]


def complete_sweep_or_run(ctx: typer.Context) -> list[str]:
    return [*complete_sweep(ctx), *complete_run(ctx)]


def complete_model() -> list[str]:
    return list_registered_names("model")


def complete_pair(ctx: typer.Context, incomplete: str) -> list[str]:
    """KEY=VALUE where the value is a registered name: `model=r` -> model=resnet20, ...

    zsh and fish complete the whole word. bash takes it for three words (model, =, r) and completes the last one.
    """
    words = [*(ctx.params.get("pairs") or []), incomplete]
    if len(words) > 1 and words[-2] == "=":
        del words[-2]
    if len(words) > 1 and words[-2] in _PARTS:
        return list_registered_names(words[-2])
    key = incomplete.partition("=")[0]
    if "=" in incomplete:
        return [f"{key}={name}" for name in list_registered_names(key)] if key in _PARTS else []
    return [f"{part}=" for part in _PARTS]


def list_registered_names(part: str) -> list[str]:
    """Names of models, optimizers, ..., of plug-ins too, read from the source text: importing it would import PyTorch."""
    variable, folder = _PARTS[part]
    plugins = [Path(name) for name in read_words("CIFAR_PLUGINS", os.pathsep)]
    folders = [_PACKAGE / folder, *(plugin / name for plugin in plugins for name in (folder, variable))]
    pattern = re.compile(rf"^@(?:registry\.)?{variable}\.register\(\s*[\"']([^\"']+)", re.M)
    names = set()
    for file in (file for each in folders for file in each.glob("*.py")):
        with contextlib.suppress(UserError):
            names.update(pattern.findall(read_text(file)))
    return sorted(names)


def _find_runs_dir(ctx: typer.Context) -> Path:
    from cifar.tracking.run_dir import resolve_runs_dir

    return resolve_runs_dir(ctx.params.get("runs_dir"))


def _list_yaml_files(incomplete: str) -> list[str]:
    """YAML files and folders in the folder that has been typed up to now."""
    typed = incomplete[: incomplete.rfind("/") + 1]
    folder = Path(typed or ".").expanduser()
    if not folder.is_dir():
        return []
    shown = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(
        f"{typed}{path.name}{'/' * path.is_dir()}" for path in shown if path.is_dir() or path.suffix in (".yaml", ".yml")
    )
