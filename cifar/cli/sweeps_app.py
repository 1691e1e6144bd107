"""The door to sweeps that are there already: `python -m cifar sweeps ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cifar.cli.options import RunsDir, Storage

sweeps_app = typer.Typer(help="List, look into, stop, repeat and extend sweeps.")


@sweeps_app.command("list")
def sweeps_list(runs_dir: RunsDir = None) -> int:
    """All sweeps of a runs folder, oldest first."""
    from cifar.cli import sweep as many

    return many.list_sweeps(runs_dir)


@sweeps_app.command("status")
def sweeps_status(
    sweep_id: Annotated[str, typer.Argument(metavar="SWEEP")], storage: Storage = None, runs_dir: RunsDir = None
) -> int:
    """The trials of a sweep and what became of them."""
    from cifar.cli import sweep as many

    return many.sweep_status(sweep_id, storage, runs_dir)


@sweeps_app.command("stop")
def sweeps_stop(
    sweep_id: Annotated[str, typer.Argument(metavar="SWEEP")], storage: Storage = None, runs_dir: RunsDir = None
) -> int:
    """Hand out no more trials; agents end after what they are doing."""
    from cifar.cli import sweep as many

    return many.stop_sweep(sweep_id, storage, runs_dir)


@sweeps_app.command("retry")
def sweeps_retry(
    sweep_id: Annotated[str, typer.Argument(metavar="SWEEP")], storage: Storage = None, runs_dir: RunsDir = None
) -> int:
    """Offer its failed, killed and diverged trials once more."""
    from cifar.cli import sweep as many

    return many.retry_cells(sweep_id, storage, runs_dir)


@sweeps_app.command("extend")
def sweeps_extend(
    sweep_id: Annotated[str, typer.Argument(metavar="SWEEP")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a grid; its cells that are there already are kept")],
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> int:
    """Add the cells of a larger grid; what is done stays done."""
    from cifar.cli import sweep as many

    return many.extend_sweep(sweep_id, file, storage, runs_dir)
