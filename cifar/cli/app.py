"""The door: commands and their options. What they do is in commands.py, imported when it is needed."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cifar.cli.options import (
    Count,
    DataDir,
    Dataset,
    Experiment,
    Gpus,
    Pack,
    Pairs,
    PerGpu,
    RunsDir,
    Set,
    Split,
    Storage,
    TimeLimit,
    Wandb,
    Workers,
)
from cifar.cli.sweeps_app import sweeps_app
from cifar.errors import UserError

app = typer.Typer(
    name="cifar",
    help="CIFAR-10 experiments: a sweep file becomes trials, trials become a picture of accuracy against FLOPs.",
    epilog="Start with `python -m cifar sweep sweeps/quickstart.yaml`; `python -m cifar doctor` says what is missing.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.add_typer(sweeps_app, name="sweeps")


@app.command(context_settings={"ignore_unknown_options": True})  # W&B's ${args} writes --lr=0.1
def train(
    pairs: Pairs = None,
    experiment: Experiment = "",
    from_run: Annotated[str, typer.Option("--from", metavar="RUN", help="start from the values of a run: repeats it")] = "",
    resume: Annotated[str, typer.Option("--resume", metavar="RUN", help="go on with an interrupted run")] = "",
    trial: Annotated[Path | None, typer.Option("--trial", metavar="FILE.json", help="values of a W&B trial, typed")] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
    wandb: Wandb = "auto",
    name: Annotated[str, typer.Option("--name", help="what the run is called [default: made of its keys]")] = "",
    tags: Annotated[str, typer.Option("--tags", metavar="A,B", help="words to find it by")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the configuration and its cost, train nothing")] = False,
) -> int:
    """Train one network and write down everything about it.

    Examples:

    `python -m cifar train --experiment worksheet1`

    `python -m cifar train model=resnet20 optimizer=sgd lr=0.1 schedule=cosine epochs=5`

    `python -m cifar train --from a1b2c3d4 seed=1`
    """
    from cifar.cli import train as commands

    layers = commands.layers(from_run, experiment, trial, dataset, pairs or [], runs_dir)
    if dry_run and not resume:
        return commands.show_config(layers, with_cost=True)
    if resume:
        if dry_run:
            raise UserError(f"--dry-run is for new runs; `python -m cifar config --from {resume}` shows what a run is made of")
        return commands.resume(resume, bool(pairs or experiment or from_run or trial), data_dir, runs_dir, wandb)
    swept = commands.layer_named(layers, "--trial")
    return commands.train(
        layers, list(swept), data_dir, runs_dir, wandb, name, [t.strip() for t in tags.split(",") if t.strip()]
    )


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a sweep YAML as W&B takes it")],
    set_: Set = None,
    dataset: Dataset = None,
    count: Count = None,
    workers: Workers = None,
    sweep_seed: Annotated[int, typer.Option("--sweep-seed", min=0, help="of random suggestions")] = 0,
    storage: Storage = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
    wandb: Wandb = "auto",
    no_agent: Annotated[bool, typer.Option("--no-agent", help="create it, print its id, run nothing")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the trials, their MACs and an estimate of time")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="draw the report at the end")] = True,
    gpus: Gpus = "",
    per_gpu: PerGpu = 1,
    pack: Pack = "auto",
    time_limit: TimeLimit = "",
) -> int:
    """Create a sweep, run its trials, draw the report. Logged in to W&B, the sweep is made there, unless --storage is given.

    Examples:

    `python -m cifar sweep sweeps/quickstart.yaml`

    `python -m cifar sweep sweeps/architectures.yaml --workers 2 --set epochs=10`

    `python -m cifar sweep sweeps/worksheet1_tuning.yaml --no-agent`, then `python -m cifar agent ID` in any terminal
    """
    from cifar.cli import sweep as many

    return many.sweep(
        file,
        set_ or [],
        dataset,
        count,
        workers,
        sweep_seed,
        storage,
        data_dir,
        runs_dir,
        wandb,
        no_agent,
        dry_run,
        report,
        _fleet(gpus, per_gpu, pack, time_limit, workers),
    )


@app.command()
def agent(
    sweep_id: Annotated[
        str, typer.Argument(metavar="SWEEP", help="its id; on W&B also project/id, entity/project/id or the URL of its page")
    ],
    count: Count = None,
    workers: Workers = None,
    storage: Storage = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
    wandb: Wandb = "auto",
    gpus: Gpus = "",
    per_gpu: PerGpu = 1,
    pack: Pack = "auto",
    time_limit: TimeLimit = "",
) -> int:
    """Join a sweep from another terminal; ends when no trial is open.

    Examples:

    `python -m cifar agent 3k9x2m1p --workers 2`

    `python -m cifar agent https://wandb.ai/me/cifar/sweeps/3k9x2m1p`

    `python -m cifar agent 3k9x2m1p --gpus all --per-gpu 2 --time-limit 50m`
    """
    from cifar.cli import sweep as many

    fleet = _fleet(gpus, per_gpu, pack, time_limit, workers)
    return many.agent(sweep_id, count, workers, storage, data_dir, runs_dir, wandb, fleet)


def _fleet(gpus: str, per_gpu: int, pack: str, time_limit: str, workers: int | None) -> dict[str, Any]:
    """Options of the agent, checked before anything heavy is imported."""
    from cifar.agent.packing import checked
    from cifar.system.signals import seconds_of

    if gpus and workers:
        raise UserError("--workers and --gpus both say how many workers there are; on GPUs give --gpus and --per-gpu")
    limit = {"time_limit": seconds_of(time_limit)} if time_limit else {}
    return {"gpus": gpus, "per_gpu": per_gpu, "pack": checked(pack), **limit}


@app.command()
def report(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="RUN|SWEEP|ENTITY/PROJECT[/SWEEP]", help="[default: the newest sweep]")
    ] = None,
    split: Split = "val",
    budget: Annotated[str, typer.Option("--budget", metavar="MACS", help="name the best below it: 50M, 1.2G, 5e7")] = "",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where the page and the figures go")] = None,
    runs_dir: RunsDir = None,
    open_: Annotated[bool, typer.Option("--open", help="show the page in a browser")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="make a report and a workspace on W&B, too")] = False,
) -> int:
    """Read runs and draw accuracy against FLOPs: a page, figures, a table. Runs are here, or on W&B.

    Examples:

    `python -m cifar report`

    `python -m cifar report 3k9x2m1p --budget 50M`

    `python -m cifar report --split test`

    `python -m cifar report me/cifar/x7k2m1pq --publish`
    """
    from cifar.cli import sweep as many

    return many.report(names or [], split, budget, out, runs_dir, open_, publish)


@app.command()
def push(
    name: Annotated[str, typer.Argument(metavar="SWEEP|RUN", help="a sweep's id or name, or a run's")],
    project: Annotated[str, typer.Option("--project", help="on W&B [default: the file's, else the runs']")] = "",
    entity: Annotated[str, typer.Option("--entity", help="user or team [default: yours]")] = "",
    runs_dir: RunsDir = None,
) -> int:
    """Make a local sweep a sweep on W&B, with all its runs; send what W&B lacks of a run. Again: only what is new.

    Example: `python -m cifar push 3k9x2m1p --project cifar`
    """
    from cifar.cli import sweep as many

    return many.push(name, project, entity, runs_dir)


@app.command()
def models(
    time: Annotated[bool, typer.Option("--time/--no-time", help="measure a forward pass of each")] = True,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps")] = "auto",
) -> int:
    """All networks: parameters, MACs, time an image, and whether two counters agree."""
    from cifar.cli import inspect as inspection

    return inspection.models(time, device)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="a network's name [default: the experiment's]")] = "",
    pairs: Pairs = None,
    experiment: Experiment = "",
    time: Annotated[bool, typer.Option("--time", help="where the time of a training step goes, kernel by kernel")] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="steps to time")] = 50,
    together: Annotated[int, typer.Option("--together", min=1, metavar="K", help="trials side by side, as in a pack")] = 1,
    data_dir: DataDir = None,
) -> int:
    """The layers of a network and what each costs; with --time, what a training step spends its time on.

    Examples:

    `python -m cifar profile resnet width=32`

    `python -m cifar profile --time --experiment worksheet1 batch_size=256`
    """
    from cifar.cli import inspect as inspection

    words = [word for word in (model, *(pairs or [])) if word]
    named = [] if "=" in model else words[:1]  # KEY=VALUE comes first where the experiment names the network
    found = [*([f"model={named[0]}"] if named else []), *words[len(named) :]]
    if time:
        return inspection.profile_time(experiment, found, steps, together, data_dir)
    return inspection.profile(experiment, found)


@app.command()
def data(
    pairs: Pairs = None,
    show: Annotated[bool, typer.Option("--show", help="write a picture of augmented training images")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="where --show writes")] = Path("augmented.png"),
    verify: Annotated[
        bool, typer.Option("--verify", help="compare mean, std and class counts with what they have to be")
    ] = False,
    mirror: Annotated[
        list[str] | None, typer.Option("--mirror", metavar="URL", help="try this address first; repeatable")
    ] = None,
    experiment: Experiment = "",
    dataset: Dataset = None,
    data_dir: DataDir = None,
) -> int:
    """Find CIFAR-10, or download it, and check its bytes.

    Example: `python -m cifar data --show flip=alternating cutout=8`
    """
    from cifar.cli import inspect as inspection

    return inspection.data(pairs or [], show, out, verify, mirror or [], experiment, dataset, data_dir)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    split: Split = "val",
    tta: Annotated[Literal["none", "flip", "flip+shift"], typer.Option("--tta", help="views averaged: 1, 2 or 6")] = "none",
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
) -> int:
    """Score a finished run's weights again; its record stays as it is."""
    from cifar.cli import train as commands

    return commands.evaluate(run, split, tta, data_dir, runs_dir)


@app.command()
def config(
    pairs: Pairs = None,
    experiment: Experiment = "",
    from_run: Annotated[str, typer.Option("--from", metavar="RUN", help="start from the values of a run")] = "",
    runs_dir: RunsDir = None,
) -> int:
    """Every key, its value, and where that came from.

    Example: `python -m cifar config --experiment worksheet1 optimizer=sgd`
    """
    from cifar.cli import train as commands

    return commands.show_config(commands.layers(from_run, experiment, None, None, pairs or [], runs_dir), with_cost=False)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, delete nothing")] = False,
    days: Annotated[float, typer.Option("--days", min=0, help="unfinished runs go when untouched for so long")] = 30,
    finished: Annotated[bool, typer.Option("--finished", help="finished runs that old go too")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """Tidy the runs folder: checkpoints of ended runs, torn files, runs that nobody went on with."""
    from cifar.cli import inspect as inspection

    return inspection.gc(dry_run, days, finished, runs_dir)


@app.command()
def doctor(data_dir: DataDir = None, runs_dir: RunsDir = None) -> int:
    """What is found here (data, GPU, W&B, versions, disk), and what to do about the rest."""
    from cifar.cli import inspect as inspection

    return inspection.doctor(data_dir, runs_dir)


def main(arguments: list[str] | None = None) -> int:
    """Run a command -> its exit code: 2 with one sentence for bad input, 130 after Ctrl-C. Bugs keep their traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], prog_name="python -m cifar", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except UserError as error:
        return _bad(str(error))
    except OSError as error:
        if error.errno not in _DISK:
            raise
        place = f" at {error.filename}" if error.filename else ""
        return _bad(f"{(error.strerror or 'cannot write').lower()}{place}; {_DISK[error.errno]}")
    except Exception as error:
        message = getattr(error, "format_message", None)  # typer's own usage errors; their class is private
        if message is None:
            raise
        known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands} | {"sweeps"}
        of = f"{arguments[0]} " if arguments and arguments[0] in known else ""
        return _bad(f"{message().rstrip('.')}; see `python -m cifar {of}--help`")
    if code in (130, 138, 143):
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


_ELSEWHERE = "name another place with --runs-dir, or mend this one"
_DISK = {
    errno.ENOSPC: "free some space, or name another place with --runs-dir",
    errno.EDQUOT: "free some space, or name another place with --runs-dir",
    errno.EFBIG: "free some space, or name another place with --runs-dir",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.ENOTDIR: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
}


def _bad(sentence: str) -> int:
    print("error: " + " ".join(sentence.split()), file=sys.stderr)
    return 2


def run() -> None:
    """The entry point `cifar`."""
    # Large tensors in huge pages, where Linux has them: a CPU may spend half a step on the faults of small ones (LOG.md).
    # PyTorch reads this when it first allocates; workers inherit it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.exit(main())
