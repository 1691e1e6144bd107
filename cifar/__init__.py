"""CIFAR-10 experiments: a sweep file -> trials -> accuracy against FLOPs. The command line is `python -m cifar`.

In a notebook:

    cifar.runs("SWEEP")        # a table of its runs: swept keys, accuracies, MACs
    cifar.load("RUN")          # a run's trained model, ready to be asked
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # both are imported when they are used: `import cifar` costs nothing
    from torch import nn

__version__ = "0.1.0"


class Table(list[dict[str, Any]]):
    """Rows that notebooks draw; `pandas.DataFrame(table)` takes it as it is."""

    def _repr_html_(self) -> str:
        from html import escape

        columns = list(dict.fromkeys(name for row in self for name in row))
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(str(row.get(n, '')))}</td>" for n in columns) + "</tr>" for row in self)
        return f"<table><tr>{head}</tr>{body}</table>"


def load(run: str | Path, runs_dir: str | Path | None = None) -> nn.Module:
    """The model of a finished run (id, start of an id, name or path) on the CPU, in evaluation mode.

    It takes images (B, 3, 32, 32) normalised as the run's `normalize` says: `cifar.data.normalize(uint8, kind)`.
    """
    import torch

    from cifar import config, record, registry
    from cifar.errors import UserError

    found = record.find(str(run), record.runs_dir(Path(runs_dir) if runs_dir else None))
    weights = found.path / "weights.pt"
    if not weights.exists():
        raise UserError(f"run {found.id} has no weights ({found.state}); `python -m cifar train --resume {found.id}` goes on with it")
    settings = config.resolve(found.read("config"))
    model: nn.Module = registry.models[settings.model].build(**settings.part("model"))
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def runs(sweep: str = "", runs_dir: str | Path | None = None) -> Table:
    """A row for each run of a sweep (all runs without one), oldest first: what was swept, and what came out."""
    from cifar import record

    table = Table()
    for found in record.all_records(record.runs_dir(Path(runs_dir) if runs_dir else None)):
        run = found.read("run")
        if sweep in ("", run.get("sweep")):
            config, cost = found.read("config"), run.get("cost", {})
            swept = {key: config.get(key) for key in run.get("swept", [])}
            named = {"run": found.id, "name": run.get("name"), "state": found.state, "dataset": run.get("dataset")}
            named |= {"model": config.get("model"), "macs": cost.get("macs"), "params": cost.get("params")}
            table.append({**named, **swept, **found.read("summary")})
    return table
