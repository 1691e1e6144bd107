"""What the commands about many runs do: sweeps, their agents, reports. Each returns an exit code."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar import config as configuration
from cifar import record as records
from cifar.errors import UserError
from cifar.record import runs_dir as runs_folder
from cifar.ui import console, obtain, say, table, waiting, warn_of_stand_in
from cifar.wb.mode import mode_from_environment


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
) -> int:
    """Read and check a sweep file, create the sweep, run it, draw it."""
    from cifar import sweep as sweeps

    runs = runs_folder(runs_dir)
    mode_from_environment(wandb)  # says now what is wrong with it
    read = sweeps.read(file)
    fixed = {**configuration.parse_pairs(pairs), **({"dataset": dataset} if dataset else {})}
    with waiting("checking every trial ..."):
        try:
            fixed["dataset"] = sweeps.check(read, fixed, sweep_seed, count)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    if dry_run:
        return _plan(sweeps.dry_run, read, fixed, sweep_seed, count)
    with waiting("importing PyTorch ..."):
        from cifar import data
        from cifar.backends import local
    if fixed["dataset"] == "auto":
        with waiting("looking for CIFAR-10 ..."):
            fixed["dataset"], reason = data.resolve_auto(data_dir)
        say(f"dataset: {reason}")
    if fixed["dataset"] == "cifar10":
        obtain(data_dir, [])
    else:
        warn_of_stand_in()
    with waiting(f"reading {fixed['dataset']} ..."):
        data.load(fixed["dataset"], data_dir)  # damaged files are named before anything is made; the stand-in is made once
    sweep_id = local.create(read, runs, fixed=fixed, data_dir=data_dir, url=storage or "", sweep_seed=sweep_seed, count=count)
    say(f"sweep {sweep_id}: {read.name}, {read.method}, in {runs / 'sweeps' / sweep_id}")
    if no_agent:
        say(f"run it with: python -m cifar agent {sweep_id}")
        return 0
    code = agent(sweep_id, count, workers, storage, data_dir, runs_dir, wandb)
    if draw and code not in (130, 143):
        code = max(code, report([sweep_id], "val", "", None, runs_dir, False))
    return code


def _plan(look: Any, read: Any, fixed: dict[str, Any], sweep_seed: int, count: int | None) -> int:
    from cifar import sweep as sweeps

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
) -> int:
    """Run trials of a sweep until none is open."""
    from cifar import agent as agents

    options: dict[str, Any] = {"count": count, "workers": workers, "data_dir": data_dir, "url": storage or ""}
    return agents.agent(sweep_id, runs_folder(runs_dir), wandb=wandb, console=console, **options)


# -- sweeps ------------------------------------------------------------------------------------------------------------


def list_sweeps(runs_dir: Path | None) -> int:
    """One line a sweep."""
    from cifar.backends import local

    runs = runs_folder(runs_dir)
    rows = []
    for info in local.listing(runs):
        try:
            counts = ", ".join(f"{n} {state}" for state, n in local.Local(info["id"], runs).counts().items())
        except UserError as error:
            counts = str(error)
        rows.append((info["id"], info["name"], info["method"], info["dataset"], counts))
    table("", ("sweep", "name", "method", "dataset", "trials"), rows)
    if not rows:
        say(f"no sweeps in {runs}; `python -m cifar sweep sweeps/quickstart.yaml` makes one")
    return 0


def sweep_status(name: str, storage: str | None, runs_dir: Path | None) -> int:
    """One line a trial."""
    from cifar import sweep as sweeps
    from cifar.backends import local
    from cifar.board import shown

    runs = runs_folder(runs_dir)
    found = local.Local(local.resolve(name, runs), runs, storage or "")
    rows = []
    for cell in found.cells():
        values = sweeps.name_of(cell["values"], found.sweep.swept)
        epoch = records.Record(runs / cell["run_id"]).read("status").get("epoch", "")
        value = "" if cell["value"] is None else shown(cell["value"], found.sweep.metric.name)
        rows.append((cell["cell"], cell["run_id"], values, cell["state"], epoch, value, cell["reason"]))
    columns = ("cell", "run", "values", "state", "epoch", found.sweep.metric.name, "reason")
    table("", columns, rows, right=("cell", "epoch", columns[5]))
    say(f"\n{found.id}: {', '.join(f'{n} {state}' for state, n in found.counts().items())}")
    return 0


def stop_sweep(name: str, storage: str | None, runs_dir: Path | None) -> int:
    """No more trials are handed out."""
    from cifar.backends import local

    runs = runs_folder(runs_dir)
    found = local.Local(local.resolve(name, runs), runs, storage or "")
    found.stop()
    running = found.counts().get("running", 0)
    say(f"sweep {found.id} hands out no more trials" + (f"; the {running} that run are let finish" if running else ""))
    return 0


# -- reports -----------------------------------------------------------------------------------------------------------


def report(names: Sequence[str], split: str, budget: str, out: Path | None, runs_dir: Path | None, show: bool) -> int:
    """Read runs, draw, and say where the drawings are."""
    with waiting("drawing ..."):
        from cifar import report as reports
        from cifar.report.runs import amount

        limit = amount(budget) if budget else None
        result = reports.report(names, runs=runs_folder(runs_dir), out=out, split=split, budget=limit)
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
    if show:
        webbrowser.open(result.page.as_uri())
    return 0
