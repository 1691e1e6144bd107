"""Commands about this machine: `gc`, `doctor`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from cifar.cli.console import echo, print_json, print_table, redirect_messages, spinner
from cifar.cli.options import DataDir, Json, RunsDir
from cifar.errors import name_program
from cifar.system.terminal import Column
from cifar.tracking.run_dir import resolve_runs_dir

MIB = 2**20


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, delete nothing")] = False,
    days: Annotated[float, typer.Option("--days", min=0, help="unfinished runs go when untouched for so long")] = 30,
    finished: Annotated[bool, typer.Option("--finished", help="finished runs that old go too")] = False,
    runs_dir: RunsDir = None,
) -> int:
    """Tidy the runs folder: checkpoints of ended runs, torn files, runs that nobody went on with, the cache of reports."""
    from cifar.tracking.cleanup import find_leftovers, remove_leftover

    runs = resolve_runs_dir(runs_dir)
    damaged: list[str] = []
    leftovers = find_leftovers(runs, days=days, finished=finished, damaged=damaged)
    removed = []
    for leftover in leftovers:
        if not dry_run and (obstacle := remove_leftover(leftover)):
            echo(f"kept  {leftover.path}  ({obstacle})")
            continue
        verb = "would remove" if dry_run else "removed"
        echo(f"{verb}  {leftover.path}  ({leftover.reason}, {leftover.size / MIB:.1f} MiB)")
        removed.append(leftover)
    for sentence in damaged:
        echo(f"left alone  {sentence}")
    total = sum(leftover.size for leftover in removed) / MIB
    things = "1 thing" if len(removed) == 1 else f"{len(removed)} things"
    echo(f"{things}, {total:.1f} MiB {'could be freed' if dry_run else 'freed'} in {runs}")
    return 0


def doctor(data_dir: DataDir = None, runs_dir: RunsDir = None, as_json: Json = False) -> int:
    """What is found here (data, GPU, W&B, versions, disk), and what to do about the rest."""
    from cifar.cli.doctor import examine_machine

    with redirect_messages(as_json), spinner("looking ..."):
        checks = list(examine_machine(resolve_runs_dir(runs_dir), data_dir))
    has_problem = any(check.state == "bad" for check in checks)
    if as_json:
        # {"ok": bool, "checks": [{"name", "state": ok|note|bad, "found", "advice"}, ...]}
        print_json({"ok": not has_problem, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        marks = {"ok": "ok", "note": "-", "bad": "BAD"}
        rows = [(check.name, marks[check.state], check.found, name_program(check.advice)) for check in checks]
        print_table(
            "",
            (
                Column("what"),
                Column(""),
                Column("found", min_width=24, wraps=True),
                Column("what to do", min_width=24, wraps=True),
            ),
            rows,
        )
    return 1 if has_problem else 0
