"""What the commands about many runs do: sweeps, their agents, reports. Each returns an exit code."""

from __future__ import annotations

import contextlib
import os
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar.cli.console import console, counting, obtain, say, table, waiting, warn_of_stand_in
from cifar.config import resolve as configuration
from cifar.errors import UserError
from cifar.integrations.wandb.settings import mode_from_environment
from cifar.tracking import run_dir as records
from cifar.tracking.run_dir import runs_dir as runs_folder

if TYPE_CHECKING:
    from cifar.sweeps.local import Local


def sweep(
    file: Path,
    pairs: Sequence[str],
    dataset: str | None,
    count: int | None,
    workers: int | None,
    sweep_seed: int,
    storage: str | None,
    data_dir: Path | None,
    runs_dir: Path | None,
    wandb: str,
    no_agent: bool,
    dry_run: bool,
    draw: bool,
    fleet: dict[str, Any],
) -> int:
    """Read and check a sweep file, create the sweep, run it, draw it."""
    from cifar.agent import worker_process as crew
    from cifar.sweeps import spec as sweeps

    with contextlib.ExitStack() as early:
        if not (no_agent or dry_run):
            _alone()
            early.enter_context(crew.early())
        runs = runs_folder(runs_dir)
        hosted = mode_from_environment(wandb) == "online" and not (storage or os.environ.get("CIFAR_STORAGE"))
        read = sweeps.read(file)
        fixed = {**configuration.parse_pairs(pairs), **({"dataset": dataset} if dataset else {})}
        asked = dict(fixed)
        with waiting("checking every trial ..."):
            try:
                fixed["dataset"] = sweeps.check(read, fixed, sweep_seed, count or (read.run_cap or 20 if hosted else None))
            except UserError as error:
                raise UserError(f"{file}: {error}") from None
        if dry_run:
            return _plan(sweeps.dry_run, read, fixed, sweep_seed, count)
        with waiting("importing PyTorch ..."):
            from cifar.sweeps import local
        fixed["dataset"] = _prepared(fixed["dataset"], data_dir)
        if hosted:
            from cifar.integrations.wandb import backend as on_wandb

            with waiting("creating the sweep on W&B ..."):
                url = on_wandb.create(read, runs, fixed=asked)
            sweep_id = on_wandb.parts_of(url)[2]
            say(f"sweep {sweep_id}: {read.name}, {read.method}, on W&B: {url}")
            return _run_and_draw(url, sweep_id, no_agent, draw, count, workers, storage, data_dir, runs_dir, wandb, fleet)
        sweep_id = local.create(
            read, runs, fixed=fixed, data_dir=data_dir, url=storage or "", sweep_seed=sweep_seed, count=count
        )
        say(f"sweep {sweep_id}: {read.name}, {read.method}, in {runs / 'sweeps' / sweep_id}")
        return _run_and_draw(sweep_id, sweep_id, no_agent, draw, count, workers, storage, data_dir, runs_dir, wandb, fleet)


def _prepared(dataset: str, data_dir: Path | None) -> str:
    """Settle `auto`, and have the images at hand, before anything is made. Damaged files are named."""
    from cifar import data

    if dataset == "auto":
        with waiting("looking for CIFAR-10 ..."):
            dataset, reason = data.resolve_auto(data_dir)
        say(f"dataset: {reason}")
    if dataset == "cifar10":
        obtain(data_dir, [])
    else:
        warn_of_stand_in()
    with waiting(f"reading {dataset} ..."):
        data.load(dataset, data_dir)  # the stand-in is made once
    return dataset


def _run_and_draw(name: str, sweep_id: str, no_agent: bool, draw: bool, count: int | None, *options: Any) -> int:
    if no_agent:
        say(f"run it with: python -m cifar agent {name}")
        return 0
    code = agent(name, count, *options)
    if draw and code < 128:
        code = max(code, report([sweep_id], "val", "", None, options[3], False))
    return code


def _plan(look: Any, read: Any, fixed: dict[str, Any], sweep_seed: int, count: int | None) -> int:
    from cifar.sweeps import spec as sweeps

    with waiting("timing a step of each network ..."):
        plan = look(read, fixed, sweep_seed=sweep_seed, count=count)
    columns = ("cell", "model", "values", "MMACs", "parameters", "epochs", "seconds")
    rows = []
    for p in plan:
        seconds = "skipped: max_macs" if p.skipped else f"{p.seconds:.0f}"
        rows.append((p.cell, p.model, sweeps.name_of(p.values, list(p.values)), p.macs / 1e6, p.params, p.epochs, seconds))
    table("", columns, [(*r[:3], f"{r[3]:.2f}", f"{r[4]:,}", *r[5:]) for r in rows], right=("cell", *columns[3:]))
    total = sum(p.seconds for p in plan)
    say(f"\n{len(plan)} trials, very roughly {total / 60:.1f} minutes of training if one runs after the other")
    return 0


def agent(
    sweep_id: str,
    count: int | None,
    workers: int | None,
    storage: str | None,
    data_dir: Path | None,
    runs_dir: Path | None,
    wandb: str,
    fleet: dict[str, Any],
) -> int:
    """Run trials of a sweep until none is open."""
    from cifar.agent import worker_process as crew

    _alone()
    options: dict[str, Any] = {"count": count, "workers": workers, "data_dir": data_dir, "url": storage or "", **fleet}
    with crew.early():
        from cifar.agent import agent as agents

        return agents.agent(sweep_id, runs_folder(runs_dir), wandb=wandb, console=console, **options)


def _alone() -> None:
    """An agent starts its own processes. Those of torchrun would each be one, and each of their trials wait for the others."""
    if (size := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise UserError(
            f"WORLD_SIZE is {size}: an agent starts its own processes, so start it once and without torchrun "
            "(--gpus all uses every GPU; one run on several GPUs: torchrun -m cifar train); else unset WORLD_SIZE"
        )


def _local(name: str, storage: str | None, runs_dir: Path | None) -> Local:
    """A sweep of this machine, by its id, its name or the start of its id."""
    from cifar.sweeps import local

    runs = runs_folder(runs_dir)
    sweep_id = local.resolve(name, runs)
    folder = runs / "sweeps" / sweep_id
    if (folder / "wandb.json").exists() and not (folder / "sweep.json").exists():
        place = _place(folder)
        raise UserError(f"sweep {sweep_id} is W&B's: look at it and stop it there; `python -m cifar report {place}` reads it")
    return local.Local(sweep_id, runs, storage or "")


def _place(folder: Path) -> str:
    """Where on W&B the sweep of this folder is."""
    known = records.read_json(folder / "wandb.json")
    return "/".join(str(known.get(part, "")) for part in ("entity", "project", "id"))


# -- sweeps ------------------------------------------------------------------------------------------------------------


def list_sweeps(runs_dir: Path | None) -> int:
    """One line a sweep."""
    from cifar.sweeps import local

    runs = runs_folder(runs_dir)
    rows = []
    for info in local.listing(runs):
        try:
            counts = ", ".join(f"{n} {state}" for state, n in local.Local(info["id"], runs).counts().items())
        except UserError as error:
            counts = str(error)
        rows.append((info["id"], info["name"], info["method"], info["dataset"], counts))
    for folder in sorted((runs / "sweeps").glob("*/wandb.json")):
        if not (folder.parent / "sweep.json").exists():
            rows.append((folder.parent.name, "", "on W&B", "", _place(folder.parent)))
    table("", ("sweep", "name", "method", "dataset", "trials"), rows)
    if not rows:
        say(f"no sweeps in {runs}; `python -m cifar sweep sweeps/quickstart.yaml` makes one")
    return 0


def sweep_status(name: str, storage: str | None, runs_dir: Path | None) -> int:
    """One line a trial."""
    from cifar.agent.dashboard import shown
    from cifar.sweeps import spec as sweeps

    runs, found = runs_folder(runs_dir), _local(name, storage, runs_dir)
    names, rows = [metric.name for metric in found.sweep.metrics], []
    for cell in found.cells():
        values = sweeps.name_of(cell["values"], found.sweep.swept)
        epoch = records.Record(runs / cell["run_id"]).read("status").get("epoch", "")
        known = dict(zip(names, cell["objectives"], strict=False)) or {found.sweep.metric.name: cell["value"]}
        scores = ["" if known.get(name) is None else shown(known[name], name) for name in names]
        rows.append((cell["cell"], cell["run_id"], values, cell["state"], epoch, *scores, cell["reason"]))
    columns = ("cell", "run", "values", "state", "epoch", *names, "reason")
    table("", columns, rows, right=("cell", "epoch", *names))
    say(f"\n{found.id}: {', '.join(f'{n} {state}' for state, n in found.counts().items())}")
    return 0


def stop_sweep(name: str, storage: str | None, runs_dir: Path | None) -> int:
    """No more trials are handed out."""
    found = _local(name, storage, runs_dir)
    found.stop()
    running = found.counts().get("running", 0)
    say(f"sweep {found.id} hands out no more trials" + (f"; the {running} that run are let finish" if running else ""))
    return 0


def push(name: str, project: str, entity: str, runs_dir: Path | None) -> int:
    """A local sweep becomes one on W&B; of a run, or of a sweep that W&B has, what is missing there is sent."""
    from cifar.integrations.wandb import upload as pushing
    from cifar.sweeps import local

    runs = runs_folder(runs_dir)
    sweep_id = local.resolve(name, runs)
    folder = runs / "sweeps" / sweep_id
    mine = [record for record in records.all_records(runs) if record.read("run").get("sweep") == sweep_id]
    if not (folder / "sweep.json").exists():
        mine = mine or [records.find(name, runs)]
        ended = [record for record in mine if record.state in records.END_STATES]
        with counting(f"sending {name} to W&B", "runs") as progress:
            sent = pushing.push_runs(ended, entity=entity, project=project, progress=progress, say=say)
        say(f"{len(ended)} run{'s' * (len(ended) != 1)} of {name} on W&B ({sent} sent now)")
        _say_open([record.id for record in mine if record not in ended])
        return 0
    with counting(f"sending {sweep_id} to W&B", "runs") as progress:
        pushed = pushing.push(folder, mine, entity=entity, project=project, progress=progress, say=say)
    say(f"{len(mine) - len(pushed.open)} runs of {sweep_id} are on W&B ({pushed.sent} sent now): {pushed.url}")
    _say_open(pushed.open)
    return 0


def _say_open(ids: Sequence[str]) -> None:
    if ids:
        say(f"not ended yet, push again later: {', '.join(ids)}")


def retry_cells(name: str, storage: str | None, runs_dir: Path | None) -> int:
    """Failed, killed and diverged cells wait again."""
    from cifar.sweeps import amend

    found = _local(name, storage, runs_dir)
    count = amend.retry(found)
    return _amended(found.id, count, "to be tried again")


def extend_sweep(name: str, file: Path, storage: str | None, runs_dir: Path | None) -> int:
    """The cells of another grid join those of a sweep."""
    from cifar.sweeps import amend

    found = _local(name, storage, runs_dir)
    with waiting("checking every trial ..."):
        count = amend.extend(found, file)
    return _amended(found.id, count, "added")


def _amended(sweep_id: str, count: int, what: str) -> int:
    say(f"sweep {sweep_id}: {count} cell{'s' * (count != 1)} {what}")
    if count:
        say(f"run {'it' if count == 1 else 'them'} with: python -m cifar agent {sweep_id}")
    return 0


# -- reports -----------------------------------------------------------------------------------------------------------


def report(
    names: Sequence[str],
    split: str,
    budget: str,
    out: Path | None,
    runs_dir: Path | None,
    show: bool,
    publish: bool = False,
) -> int:
    """Read runs, draw, and say where the drawings are."""
    with counting("reading from W&B", "runs") as progress:
        from cifar import report as reports
        from cifar.report.load import amount

        limit = amount(budget) if budget else None
        result = reports.report(names, runs=runs_folder(runs_dir), out=out, split=split, budget=limit, progress=progress)
    if result.banner:
        warn_of_stand_in(f"{result.banner}: these accuracies compare with nothing else.")
    numbers = [column for column in result.columns if column not in ("network", "front")]
    if result.rows:
        table(result.title, result.columns, [[row.get(c) for c in result.columns] for row in result.rows], right=numbers)
        say()
    for note in result.notes:
        say(note)
    for path in result.paths:
        if path.suffix != ".svg":  # beside each PNG
            say(f"{path.suffix[1:]:<5} {path}")
    if publish:
        with waiting("publishing on W&B ..."):
            published = _publish(names, result, runs_folder(runs_dir), split)
        say(f"on W&B: report {published.report}")
        say(f"     workspace {published.workspace}")
    if show:
        webbrowser.open(result.page.as_uri())
    return 0


def _publish(names: Sequence[str], result: Any, runs: Path, split: str) -> Any:
    from cifar.integrations.wandb import report as publishing
    from cifar.integrations.wandb.download import place_of
    from cifar.integrations.wandb.upload import place_of_sweep

    place = place_of(names[0]) if len(names) == 1 and "/" in names[0] else None
    place = place or (place_of_sweep(runs / "sweeps" / result.sweep) if result.sweep else None)
    if place is None:
        raise UserError("--publish needs one place on W&B: name ENTITY/PROJECT[/SWEEP], or `push` the sweep first")
    best = result.comparison.best
    run = best.runs[0] if best else None
    metric = next((m for m in ("gradient_norm", "gradient_mean") if run and run.layers(m)), "")
    content = publishing.Content(
        title=" – ".join(part for part in (result.banner, result.comparison.title) if part),
        sentences=result.notes,
        columns=result.columns,
        rows=result.rows,
        runs=[run.id for point in result.comparison.points for run in point.runs],
        split=split,
        layers=[f"{metric}/{layer}" for layer in run.layers(metric)] if run and metric else [],
    )
    return publishing.publish(place, content, result.page.parent / "published.json")
