"""Draws workspace.png and sweep_page.png: what a person finds on W&B, from what the tests' W&B server was sent.

    CIFAR_DATA=FOLDER python docs/draw_workspace.py

It trains a ResNet-20 for eight epochs of 4,000 images, and a sweep of nine short runs, against that server. The first picture
has a panel for each logged key that is not hidden, as W&B has. The second one has two charts of a sweep's page that need
accuracy and multiply-adds. W&B's own page looks different; names, panels, columns and curves are those that it gets.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import matplotlib.image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from cifar.report.palette import BLUE, DIM, GRID, INK, MUTED
from helpers.protocol import Run, Server
from helpers.workspace import automatic_panels, custom_charts

ROOT = Path(__file__).resolve().parent.parent
BACKGROUND = "#f2f3f5"
WIDTH, MARGIN, GAP, DPI = 15.0, 0.2, 0.12, 100  # inches, and pixels an inch
HEADING, TITLE = 0.34, 0.3  # heights of a section's name and of a panel's

WORDS = (
    "model=resnet20",
    "epochs=8",
    "train_size=4000",
    "val_size=1000",
    "optimizer=sgd",
    "lr=0.1",
    "schedule=cosine",
    "test=final",
)
SWEEP = """name: rates
description: Which network, at which learning rate?
method: grid
metric: {name: val/acc, goal: maximize}
parameters:
  model: {values: [conv4, conv8, conv16]}
  lr: {values: [0.01, 0.1, 1.0]}
  optimizer: {value: sgd}
  schedule: {value: cosine}
  epochs: {value: 3}
  train_size: {value: 5000}
  val_size: {value: 1000}
"""
SECTIONS = (("train",), ("val", "system", "charts"), ("pictures",))  # side by side in a line
COLUMNS = ("state", "val/acc", "best/val/acc", "test/acc", "macs", "flops", "params", "seconds", "images_per_second")
UNITS = {
    "loss": "nats",
    "acc": "fraction",
    "zero_gradients": "fraction",
    "memory_gib": "GiB",
    "seconds": "s",
}


# -- what the server is sent -------------------------------------------------------------------------------------------


def run_command(server: Server, folder: Path, *words: str) -> None:
    """`python -m cifar WORDS` against this server, with a home and a runs folder of its own."""
    environment = {**os.environ, **server.environment(), "HOME": str(folder), "CIFAR_RUNS": str(folder / "runs")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "cifar", *words]
    subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def train(folder: Path) -> tuple[Run, dict[str, bytes]]:
    """One run -> what the server has of it, and its pictures by key."""
    with Server() as server:
        run_command(server, folder, "train", "--wandb", "online", *WORDS)
        (run,) = server.runs.values()
        shown = {**run.history[-1], **run.summary}
        pictures = {key: run.files[value["path"]] for key, value in shown.items() if key.startswith("pictures/")}
        return run, pictures


def train_sweep(folder: Path) -> list[Run]:
    """A sweep on the server -> its runs there."""
    (folder / "rates.yaml").write_text(SWEEP)
    with Server() as server:
        run_command(server, folder, "sweep", str(folder / "rates.yaml"), "--no-report", "--workers", "1")
        return [server.runs[run_id] for run_id in server.only_sweep().runs]


# -- pictures ----------------------------------------------------------------------------------------------------------


class Page:
    """Panels on a page. Lengths are inches from the top left corner."""

    def __init__(self, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=BACKGROUND)

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        style = {"size": 9, "color": INK, "va": "center", **style}
        self.figure.text(x / WIDTH, 1 - y / self.height, text, **style)

    def add_card(self, x: float, y: float, width: float, height: float, title: str = "", unit: str = "") -> None:
        corner, size = (x / WIDTH, 1 - (y + height) / self.height), (width / WIDTH, height / self.height)
        options = {"boxstyle": "round,pad=0,rounding_size=0.003", "mutation_aspect": WIDTH / self.height}
        self.figure.add_artist(FancyBboxPatch(corner, *size, fc="white", ec=GRID, lw=0.8, zorder=-1, **options))
        self.write(x + 0.1, y + TITLE / 2 + 0.03, title, size=8.5, weight="bold")
        self.write(x + width - 0.1, y + TITLE / 2 + 0.03, unit, size=7.5, color=MUTED, ha="right")

    def add_axes(self, x: float, y: float, width: float, height: float) -> Axes:
        return self.figure.add_axes((x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height))

    def save(self, out: Path) -> None:
        """Write it with 256 colours: a third of the size, and no difference to see."""
        from PIL import Image

        content = io.BytesIO()
        self.figure.savefig(content)
        Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


def set_style(axes: Axes) -> None:
    axes.tick_params(labelsize=7, colors=DIM, length=2)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def format_number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value < 1 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def draw_table(page: Page, y: float, height: float, runs: Sequence[Run]) -> None:
    """The table of runs."""
    page.add_card(MARGIN, y, WIDTH - 2 * MARGIN, height)
    columns = [key for key in COLUMNS if any(key in run.summary for run in runs)]
    names = ("Name", *columns)
    step = (WIDTH - 2 * MARGIN - 0.2) / (len(names) + 0.6)
    for line, cells in enumerate([names, *([run.display_name, *map(run.summary.get, columns)] for run in runs)]):
        for column, cell in enumerate(cells):
            x = MARGIN + 0.15 + step * (column + 0.6 * (column > 0))
            style = {"color": MUTED, "size": 8.5} if line == 0 else {"weight": "bold" if column == 0 else "normal"}
            page.write(x, y + 0.2 + 0.26 * line, cell if line == 0 else format_number(cell), **style)


def draw_line(page: Page, box: tuple[float, float, float, float], run: Run, key: str) -> None:
    """A metric over epochs."""
    x, y, width, height = box
    page.add_card(*box, key, UNITS.get(key.partition("/")[2], ""))
    axes = page.add_axes(x + 0.5, y + TITLE + 0.08, width - 0.62, height - TITLE - 0.48)
    rows = [row for row in run.rows if key in row]
    axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], "o-", color=BLUE, ms=2.5, lw=1.3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    set_style(axes)
    axes.set_xlabel("epoch", size=7, color=MUTED, labelpad=1)


def draw_chart(page: Page, box: tuple[float, float, float, float], key: str, table: dict[str, Any]) -> None:
    """The custom chart: a line for each of some epochs, over the layers from input to output."""
    x, y, width, height = box
    page.add_card(*box, key, "log10 of the norm")
    axes = page.add_axes(x + 0.5, y + TITLE + 0.08, width - 1.32, height - TITLE - 0.48)
    names = list(dict.fromkeys(row[1] for row in table["data"]))
    for number, name in enumerate(names):
        points = [(row[0], row[2]) for row in table["data"] if row[1] == name]
        shade = 0.25 + 0.75 * number / max(len(names) - 1, 1)
        axes.plot(*zip(*points, strict=True), lw=1.2, color=BLUE, alpha=shade, label=name)
    axes.legend(fontsize=6.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1, labelcolor=DIM)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    set_style(axes)
    axes.set_xlabel("layer", size=7, color=MUTED, labelpad=1)


def split_evenly(sizes: Sequence[float]) -> int:
    """Where to cut a list in two, so that the sums of both parts are as equal as they can be."""
    return min(range(1, len(sizes)), key=lambda cut: abs(sum(sizes[:cut]) - sum(sizes[cut:])))


def draw_workspace(run: Run, pictures: dict[str, bytes], chart: dict[str, Any], out: Path) -> None:
    """All panels by section, and the table of runs."""
    images = {key: matplotlib.image.imread(io.BytesIO(content)) for key, content in sorted(pictures.items())}
    shapes = [image.shape[1] / image.shape[0] for image in images.values()]
    cut = split_evenly(shapes)
    lines = [list(zip(images, shapes, strict=True))[part] for part in (slice(0, cut), slice(cut, None))]
    inner, line_height = WIDTH - 2 * MARGIN, 1.95
    heights = [
        (inner - GAP * (len(line) - 1) - 0.2 * len(line)) / sum(shape for _, shape in line) + TITLE + 0.15 for line in lines
    ]
    page = Page(0.5 + 0.75 + 3 * HEADING + 2 * (line_height + GAP) + sum(heights) + 2 * GAP + MARGIN)
    panels = automatic_panels(run)
    head = f"Workspace: {len(panels)} panels and {len(run.summary)} columns of the summary, without any set-up"
    page.write(MARGIN, 0.27, head, size=13, weight="bold")
    draw_table(page, 0.5, 0.65, [run])
    y = 0.5 + 0.75
    for names in SECTIONS[:-1]:
        keys = [key for name in names for key in sorted(panels) if key.startswith(f"{name}/")]
        wide = 2 * any(key in custom_charts(run) for key in keys) or 0
        step = (inner + GAP) / (len(keys) + wide * 0.5)
        x, seen = MARGIN, set[str]()
        for key in keys:
            if (name := key.partition("/")[0]) not in seen:
                page.write(x + 0.02, y + HEADING / 2, name, size=10.5, weight="bold")
                seen.add(name)
            is_chart = key in custom_charts(run)
            width = step * (2 if is_chart else 1) - GAP
            box = (x, y + HEADING, width, line_height)
            if is_chart:
                draw_chart(page, box, key, chart)
            else:
                draw_line(page, box, run, key)
            x += width + GAP
        y += HEADING + line_height + GAP
    page.write(MARGIN + 0.02, y + HEADING / 2, "pictures", size=10.5, weight="bold")
    y += HEADING
    for line, height in zip(lines, heights, strict=True):
        x = MARGIN
        for key, shape in line:
            width = (height - TITLE - 0.15) * shape
            page.add_card(x, y, width + 0.2, height, key)
            axes = page.add_axes(x + 0.1, y + TITLE + 0.05, width, height - TITLE - 0.15)
            axes.imshow(images[key], aspect="auto", interpolation="antialiased")
            axes.set_axis_off()
            x += width + 0.2 + GAP
        y += height + GAP
    page.save(out)


def draw_sweep_page(runs: Sequence[Run], out: Path) -> None:
    """The sweep's own page: parallel coordinates, accuracy over multiply-adds, the table of runs."""
    from matplotlib import colormaps

    page = Page(4.9 + 0.26 * len(runs))
    page.write(MARGIN, 0.27, f"The page of a sweep: {len(runs)} runs", size=13, weight="bold")
    accuracies = [run.summary["val/acc"] for run in runs]
    low, high = min(accuracies), max(accuracies)
    ramp = colormaps["viridis"]
    colours = [ramp(0.9 * (acc - low) / (high - low or 1)) for acc in accuracies]
    wide, top, height = 9.3, 0.5, 3.6
    page.add_card(MARGIN, top, wide, height, "parallel coordinates")
    draw_coordinates(page, (MARGIN, top, wide, height), runs, colours)

    x, width = MARGIN + wide + GAP, WIDTH - 2 * MARGIN - wide - GAP
    page.add_card(x, top, width, height, "val/acc over macs", "fraction")
    axes = page.add_axes(x + 0.55, top + TITLE + 0.1, width - 0.75, height - TITLE - 0.6)
    axes.scatter([run.config["macs"] / 1e6 for run in runs], accuracies, c=colours, s=36, zorder=3)
    set_style(axes)
    axes.set_xlim(left=0)
    axes.set_xlabel("macs, in millions (from the configuration)", size=7.5, color=MUTED)
    ordered = sorted(runs, key=lambda run: -run.summary["val/acc"])
    draw_table(page, top + height + GAP, 0.39 + 0.26 * len(runs), ordered)
    page.save(out)


def draw_coordinates(page: Page, box: tuple[float, float, float, float], runs: Sequence[Run], colours: Sequence[Any]) -> None:
    """A vertical axis for each key, and a line for each run."""
    x, y, width, height = box
    axes = page.add_axes(x + 0.9, y + TITLE + 0.5, width - 1.7, height - TITLE - 0.75)
    axes.set_axis_off()
    keys = ("model", "lr", "macs", "val/acc")
    places: list[list[float]] = []
    for number, key in enumerate(keys):
        values = [run.config[key] if key in run.config else run.summary[key] for run in runs]
        known = sorted(set(values), key=lambda value: (len(str(value)), value) if isinstance(value, str) else (0, value))
        if key == "val/acc":
            low, high = min(values), max(values)
            marks = {f"{low + (high - low) * i / 4:.3f}": i / 4 for i in range(5)}
            places.append([(value - low) / (high - low or 1) for value in values])
        else:
            scale = [math.log(value) for value in known] if not isinstance(known[0], str) else list(range(len(known)))
            where = {value: (at - scale[0]) / (scale[-1] - scale[0] or 1) for value, at in zip(known, scale, strict=True)}
            marks = {format_number(value) if key == "macs" else str(value): at for value, at in where.items()}
            places.append([where[value] for value in values])
        axes.axvline(number, color=DIM, lw=1, clip_on=False)
        axes.text(number, 1.1, key, ha="center", size=9, weight="bold", color=INK)
        for text, at in marks.items():
            is_last = number == len(keys) - 1
            side, align = (0.04, "left") if is_last else (-0.04, "right")
            box_style = {"fc": "white", "ec": "none", "pad": 1.0}
            axes.text(number + side, at, text, ha=align, va="center", size=8, color=INK, zorder=4, bbox=box_style)
    for run_places, colour in zip(zip(*places, strict=True), colours, strict=True):
        axes.plot(range(len(keys)), run_places, color=colour, lw=1.8)
    axes.set_xlim(0, len(keys) - 1)
    axes.set_ylim(-0.02, 1.02)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, pictures = train(Path(folder))
        chart = json.loads(run.files[run.summary["charts/gradient_norm_by_layer_table"]["path"]])
        draw_workspace(run, pictures, chart, ROOT / "docs" / "workspace.png")
    with tempfile.TemporaryDirectory() as folder:
        draw_sweep_page(train_sweep(Path(folder)), ROOT / "docs" / "sweep_page.png")


if __name__ == "__main__":
    main()
