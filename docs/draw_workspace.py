"""Draws workspace.png: what a person finds on W&B after one run, from what the tests' W&B server was sent.

    CIFAR_DATA=FOLDER python docs/draw_workspace.py

It trains a small network for eight epochs of 5,000 images against that server, and draws a panel of each logged key that is
not hidden, as W&B does. W&B's own page looks different; names, panels and curves are those that it gets.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.protocol import Run, Server
from helpers.workspace import automatic_panels, custom_charts

ROOT = Path(__file__).resolve().parent.parent

WORDS = (
    "model=conv16",
    "epochs=8",
    "train_size=5000",
    "val_size=1000",
    "optimizer=sgd",
    "lr=0.1",
    "schedule=cosine",
    "test=final",
)
SECTIONS = ("train", "val", "system", "charts", "pictures")
COLUMNS = ("state", "val/acc", "best/val/acc", "macs", "flops", "params", "seconds")


def train(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """One run -> what the server has of it, and its pictures by key."""
    with Server() as server:
        environment = {**os.environ, **server.environment(), "HOME": str(folder), "CIFAR_RUNS": str(folder / "runs")}
        command = [sys.executable, "-m", "cifar", "train", "--wandb", "online", *WORDS]
        subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT)}, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (run,) = server.runs.values()
        shown = {**run.history[-1], **run.summary}
        pictures = {key: run.files[value["path"]] for key, value in shown.items() if key.startswith("pictures/")}
        return run, pictures


def draw(run: Run, pictures: dict[str, bytes], chart: dict[str, Any], out: Path) -> None:
    """All panels by section, and the columns of the table of runs."""
    import matplotlib.image
    from matplotlib.figure import Figure

    panels = sorted(automatic_panels(run), key=lambda key: (SECTIONS.index(key.split("/")[0]), key))
    columns = 5
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(15, 2.35 * lines + 1.2), layout="constrained", dpi=80)
    numbers = {name: run.summary.get(name) for name in COLUMNS}
    cells = "    ".join(f"{k} {v:,.4g}" if isinstance(v, float | int) else f"{k} {v}" for k, v in numbers.items())
    head = f"{len(panels)} panels without any set-up, {len(run.summary)} columns of the summary, among them"
    figure.suptitle(f"{head}\n{cells}", size=11)
    for axes, key in zip(figure.subplots(lines, columns).flat, [*panels, *[""] * (lines * columns - len(panels))], strict=True):
        axes.set_title(key, size=9)
        if not key or key in pictures:
            axes.set_axis_off()
        if key in pictures:
            axes.imshow(matplotlib.image.imread(io.BytesIO(pictures[key])))
        elif key in custom_charts(run):
            for series in dict.fromkeys(row[1] for row in chart["data"]):
                points = [(row[0], row[2]) for row in chart["data"] if row[1] == series]
                axes.plot(*zip(*points, strict=True), lw=1, label=series)
            axes.legend(fontsize=5)
        elif key:
            axes.plot(
                [row["epoch"] for row in run.rows if key in row],
                [row[key] for row in run.rows if key in row],
                "o-",
                ms=3,
                lw=1.2,
            )
            axes.tick_params(labelsize=7)
    figure.savefig(out)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, pictures = train(Path(folder))
        chart = json.loads(run.files[run.summary["charts/gradient_norm_by_layer_table"]["path"]])
        draw(run, pictures, chart, ROOT / "docs" / "workspace.png")


if __name__ == "__main__":
    main()
