"""Options that several commands have: their types, names and help."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cifar.cli.completion import complete_experiment, complete_pair, complete_sweep
from cifar.errors import UserError
from cifar.system.names import check_name
from cifar.system.variables import read_variable

SAVE_DIFF = "CIFAR_SAVE_DIFF"  # as cifar.system.environment reads it
ARTIFACTS = "CIFAR_ARTIFACTS"  # as cifar.integrations.wandb.artifacts reads it


def refuse_empty(ctx: typer.Context, param: typer.CallbackParam, value: str) -> str:
    """An option that names something and is given empty names nothing: a variable was not set. Raises UserError."""
    source = ctx.get_parameter_source(param.name or "")
    if source is not None and source.name == "COMMANDLINE":
        check_name(value, param.opts[0])
    return value


Pairs = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="values, as in `lr=3e-4 epochs=3`", autocompletion=complete_pair),
]
Experiment = Annotated[
    str,
    typer.Option(
        "--experiment",
        "-e",
        metavar="NAME",
        help="a file in experiments/, or a path",
        autocompletion=complete_experiment,
        callback=refuse_empty,
    ),
]
Dataset = Annotated[
    Literal["cifar10", "stand-in", "auto"] | None,
    typer.Option("--dataset", help="auto: CIFAR-10 where it can be had within 10 s, else generated stand-in images"),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="where CIFAR-10 is or goes: a folder or the archive; else $CIFAR_DATA"),
]
RunsDir = Annotated[
    Path | None, typer.Option("--runs-dir", metavar="DIR", help="where runs are written; else $CIFAR_RUNS, else ./runs")
]
Wandb = Annotated[
    Literal["auto", "online", "offline", "disabled"],
    typer.Option("--wandb", help="auto: online where a key is configured, else offline"),
]


def _apply_artifacts(ctx: typer.Context, value: str | None) -> str | None:
    """Let this process and those that it starts follow `--artifacts`, until the command ends."""
    before = read_variable(ARTIFACTS)
    if before not in ("", "on", "off"):
        raise UserError(f"{ARTIFACTS} is '{before}'; write on or off, or unset it")
    if value and not ctx.resilient_parsing:
        os.environ[ARTIFACTS] = value
        ctx.call_on_close(lambda: os.environ.update({ARTIFACTS: before}))
    return value


Artifacts = Annotated[
    Literal["on", "off"] | None,
    typer.Option(
        "--artifacts",
        help="weights, predictions and the use of the dataset as W&B artifacts; else $CIFAR_ARTIFACTS, else on",
        callback=_apply_artifacts,
    ),
]


def _apply_save_diff(ctx: typer.Context, value: bool) -> bool:
    """Let this process and those that it starts follow `--save-diff`, until the command ends."""
    before = read_variable(SAVE_DIFF)
    if before not in ("", "on", "off"):
        raise UserError(f"{SAVE_DIFF} is '{before}'; write on or off, or unset it")
    if value and not ctx.resilient_parsing:
        os.environ[SAVE_DIFF] = "on"
        ctx.call_on_close(lambda: os.environ.update({SAVE_DIFF: before}))
    return value


SaveDiff = Annotated[
    bool,
    typer.Option(
        "--save-diff",
        help="keep the uncommitted changes of the code with the run, also on W&B; else $CIFAR_SAVE_DIFF",
        callback=_apply_save_diff,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a fixed value for every trial; repeatable", autocompletion=complete_pair),
]
Count = Annotated[int | None, typer.Option("--count", min=1, metavar="N", help="end after N trials of this agent")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, metavar="N", help="trials at a time [default: what fits]")]


def _refuse_password(url: str | None) -> str | None:
    if url is not None and not url.strip():
        raise UserError("--storage is empty: give a URL (a variable that is not set, perhaps), or leave the option out")
    if url and re.search(r"://[^/@:]*:[^@]+@|[?&][^=&]*pass[^=&]*=", url):
        raise UserError(
            "--storage holds a password, which others can read in the list of processes; export CIFAR_STORAGE=URL instead"
        )
    return url


Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Optuna storage; else $CIFAR_STORAGE, which alone takes a password; else a SQLite file",
        callback=_refuse_password,
    ),
]
Gpus = Annotated[
    str, typer.Option("--gpus", metavar="all|0,1", help="workers on these GPUs; those in use by others are skipped and named")
]
PerGpu = Annotated[int, typer.Option("--per-gpu", min=1, metavar="K", help="workers on each GPU of --gpus")]
Pack = Annotated[
    str,
    typer.Option("--pack", metavar="auto|K|off", help="trials of one network side by side in a worker [auto: on GPUs]"),
]
CompileAhead = Annotated[
    str,
    typer.Option(
        "--compile-ahead",
        metavar="auto|N|off",
        help="processes on idle cores that compile the next trials' networks; auto: on GPUs, where compile is on",
    ),
]
TimeLimit = Annotated[
    str, typer.Option("--time-limit", metavar="TIME", help="wall time, as in 50m or 2h: what runs at its end is given back")
]
Split = Annotated[Literal["val", "test"], typer.Option("--split", help="test: a report of the runs that scored the test set")]
SweepId = Annotated[str, typer.Argument(metavar="SWEEP", autocompletion=complete_sweep)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document, and messages to stderr")]


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is made from its file."""

    dataset: str | None = None  # wins over the file's
    overrides: Sequence[str] = ()  # KEY=VALUE of --set: fixed values, which win over the file's
    seed: int = 0  # of random suggestions
    dry_run: bool = False  # print the trials, make nothing
    draw: bool = True  # draw the report at the end
