"""The frontier as a picture: our rows beside published points against MACs, and our rows against seconds and joules.

    python experiments/studies/frontier/draw.py [--rows rows.csv] [--out frontier]

Writes frontier.png and frontier.svg beside this file. Ours (rows.csv, made by collect.py): mean test accuracy of the last
epoch, one view, with its 95 % interval from the standard deviation between seeds, pooled over all rows. Published points
(published.csv) have no interval: most are one run, and few say how the epoch was chosen. Ours and theirs are never mixed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator
from scipy import stats

HERE = Path(__file__).parent
TICKS = (70, 75, 80, 85, 90, 92, 94, 95, 96, 97, 98)  # accuracies, %
OURS, FRONT, PLAIN = "#2f6fde", "#d2413f", "#8b95a1"
NAMES = {
    "resnet8": "ResNet-8", "resnet20": "ResNet-20", "airbench": "whitened", "shufflenet_v2_x0_5": "ShuffleNetV2 x0.5",
    "preact_resnet18": "PreActResNet-18", "wrn": "WRN", "wrn_16_4": "WRN-16-4",
    "efficientnet": "EfficientNet",
}  # fmt: skip
LABELLED = (
    "μNAS",
    "ShuffleNetV2 x0.5",
    "CondenseNet-50",
    "CondenseNetV2-110",
    "CondenseNetV2-146",
    "ZenNet-0.5M",
    "SE-ResNet-164",
)


@dataclass(frozen=True)
class Row:
    """A row of ours. Accuracies in percent; seconds and joules of a run, the latter None where not known."""

    family: str
    size: str  # of the network within its family
    mmacs: float
    accuracy: float
    half_width: float  # of its 95 % interval
    seconds: float
    joules: float | None
    is_packed: bool  # trained side by side: seconds are those of the pack, joules a share


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pool(lines: Sequence[dict[str, str]]) -> tuple[float, int]:
    """The standard deviation between seeds, pooled over rows -> (it, its degrees of freedom)."""
    squares = [
        ((int(line["n"]) - 1) * float(line["test_acc_std"]) ** 2, int(line["n"]) - 1) for line in lines if line["test_acc_std"]
    ]
    freedom = sum(number for _, number in squares)
    return (sum(value for value, _ in squares) / freedom) ** 0.5 if freedom else 0.0, freedom


def select_rows(lines: Sequence[dict[str, str]]) -> list[Row]:
    """Our rows, cheapest first: those that scored the test images."""
    lines = [line for line in lines if line["test_acc_mean"]]
    deviation, freedom = pool(lines)
    rows = []
    for line in lines:
        half = float(stats.t.ppf(0.975, freedom)) * deviation / int(line["n"]) ** 0.5 if freedom else 0.0
        width = f", width {line['width']}" if line["width"] else ""
        if line.get("width_multiplier"):
            width = f" x{float(line['width_multiplier']):g}"
        depth = f"-{line['depth']}" if line["model"] == "wrn" else ""
        rows.append(
            Row(
                f"{NAMES.get(line['model'], line['model'])}{depth}",
                width,
                float(line["macs"]) / 1e6,
                float(line["test_acc_mean"]),
                half,
                float(line["seconds_training_mean"]),
                float(line["joules_mean"]) if line["joules_mean"] else None,
                line["together"] not in ("", "1"),
            )
        )
    return sorted(rows, key=lambda row: row.mmacs)


def find_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, accuracy), those that no cheaper point equals in accuracy."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def draw_front(ax: Axes, points: Sequence[tuple[float, float]], colour: str, **style: Any) -> None:
    front = find_front(points)
    if front:
        ends = [*front, (ax.get_xlim()[1], front[-1][1])]
        ax.step(*zip(*[(x, 100 - y) for x, y in ends], strict=True), where="post", color=colour, zorder=1, **style)


def name_rows(rows: Sequence[Row]) -> list[str]:
    """The rows' labels. Neighbours of one family that are close to each other share that of the last."""
    names, sizes = [], ""
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        sizes = f"{sizes.removesuffix(',')}{row.size}" if row.size.startswith(",") else f"{sizes}{row.size}"
        is_close = following is not None and following.family == row.family and following.mmacs < 1.8 * row.mmacs
        names.append("" if is_close else f"{row.family}{sizes}")
        sizes = f"{sizes}," if is_close else ""
    return names


def draw_rows(ax: Axes, rows: Sequence[Row], costs: Sequence[float], *, has_names: bool) -> None:
    for row, cost, name in zip(rows, costs, name_rows(rows), strict=True):
        ax.errorbar(
            cost, 100 - row.accuracy, yerr=row.half_width, fmt="o", markersize=6, color=OURS, capsize=2.5, elinewidth=1.2,
            markerfacecolor=OURS if has_names or not row.is_packed else "white", zorder=4,
        )  # fmt: skip
        if has_names:
            ax.annotate(
                name, (cost, 100 - row.accuracy), xytext=(7, -10), ha="left", textcoords="offset points", fontsize=7.5,
                color=OURS, zorder=5, path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
        else:
            ax.annotate(
                f"{row.mmacs:.{0 if row.mmacs > 10 else 1}f}", (cost, 100 - row.accuracy), xytext=(0, 7),
                textcoords="offset points", fontsize=7, ha="center", color="#6b7785",
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip


def draw_accuracy_axis(ax: Axes, lowest: float) -> None:
    """Accuracies on a logarithmic axis of errors: from 97 to 98 % is as far as from 70 to 80."""
    ax.set_yscale("log")
    ax.set_ylim(100 - max(60.0, lowest - 3), 100 - 98.2)
    ticks = [tick for tick in TICKS if tick > lowest - 3]
    ax.set_yticks([100 - tick for tick in ticks], [f"{tick}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xscale("log")
    ax.grid(color="#e3e7ec", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def draw(rows: Sequence[Row], published: Sequence[dict[str, str]], about: str) -> plt.Figure:
    figure = plt.figure(figsize=(12.5, 5.6), dpi=110, layout="constrained")
    main, *others = figure.subplot_mosaic([["macs", "macs", "seconds"], ["macs", "macs", "joules"]]).values()
    lowest = min([row.accuracy for row in rows] + [float(line["test_acc"]) for line in published])
    draw_accuracy_axis(main, lowest)
    main.set_xlim(0.3, 800)
    for group, colour, marker, label in (
        ("plain", PLAIN, "x", "published, plain networks"),
        ("front", FRONT, "^", "published, the best"),
    ):
        points = [(float(line["mmacs"]), float(line["test_acc"])) for line in published if line["group"] == group]
        main.plot(
            *zip(*[(x, 100 - y) for x, y in points], strict=True), marker, color=colour, markersize=5.5, markerfacecolor="none",
            linestyle="none", label=label, zorder=2,
        )  # fmt: skip
    draw_front(
        main, [(float(line["mmacs"]), float(line["test_acc"])) for line in published], FRONT, linewidth=0.9, linestyle=":"
    )
    for line in published:
        if line["network"] in LABELLED and line["group"] == "front":
            below_ours = 5 < float(line["mmacs"]) < 20  # our line passes on the left of these
            main.annotate(
                line["network"], (float(line["mmacs"]), 100 - float(line["test_acc"])),
                xytext=(5, -9) if below_ours else (-4, 5), ha="left" if below_ours or float(line["mmacs"]) < 1 else "right",
                textcoords="offset points", fontsize=7, color=FRONT,
            )  # fmt: skip
    draw_rows(main, rows, [row.mmacs for row in rows], has_names=True)
    draw_front(main, [(row.mmacs, row.accuracy) for row in rows], OURS, linewidth=1.4)
    main.plot([], [], "o", color=OURS, label="ours: mean and 95 % interval")
    main.set_xlabel("million multiply-adds of an image")
    main.set_ylabel("test accuracy, %")
    main.set_xticks([0.5, 1, 3, 10, 30, 100, 300, 600], ["0.5", "1", "3", "10", "30", "100", "300", "600"])
    main.minorticks_off()
    main.legend(loc="lower right", frameon=False, fontsize=8.5)
    main.set_title(about, fontsize=9, loc="left", color="#6b7785")
    ours = [row for row in rows if row.joules is not None]
    panels = (
        (rows, [row.seconds for row in rows], "seconds of training on one H200"),
        (ours, [float(row.joules or 0) for row in ours], "joules of the GPU, a run"),
    )
    for ax, (shown, costs, label) in zip(others, panels, strict=True):
        draw_accuracy_axis(ax, min([row.accuracy for row in rows], default=70))
        draw_rows(ax, shown, costs, has_names=False)
        ax.set_xlabel(label)
        ax.set_ylabel("test accuracy, %")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.minorticks_off()
        if costs:
            ax.set_xlim(min(costs) / 1.6, max(costs) * 1.9)
    others[0].set_title("numbers: MMACs; hollow: seeds side by side on the GPU", fontsize=8, loc="left", color="#6b7785")
    return figure


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=HERE / "rows.csv")
    parser.add_argument("--published", type=Path, default=HERE / "published.csv")
    parser.add_argument("--out", type=Path, default=HERE / "frontier", help="path without .png and .svg")
    options = parser.parse_args(words)
    lines = read(options.rows)
    rows = select_rows(lines)
    scored = [line for line in lines if line["test_acc_mean"]]
    deviation, freedom = pool(scored)
    numbers = sorted({line["n"] for line in scored})
    about = (
        f"CIFAR-10, all 50,000 images, last epoch, one view; n = {' or '.join(numbers)}, std {deviation:.2f} ({freedom} d. f.)"
    )
    figure = draw(rows, read(options.published), about)
    matplotlib.rcParams["svg.hashsalt"] = "frontier"  # the same bytes each time
    figure.savefig(options.out.with_suffix(".png"))
    figure.savefig(options.out.with_suffix(".svg"), metadata={"Date": None})
    print(f"{len(rows)} rows -> {options.out.with_suffix('.png')}, {options.out.with_suffix('.svg')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
