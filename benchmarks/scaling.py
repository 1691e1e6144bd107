"""The cost of one more thing: epochs, batch size, width, trials of a sweep, runs in a report.

    python -m benchmarks.scaling [--only epochs width]   # about 3 minutes on one H200; a PNG beside the JSON

Worksheet 1 on all training images (on a CPU: on 5,000), each curve in this process but for the trials, which are sweeps of
their own; one more epoch, trial and run by least squares over the curve.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Missing, Result, command, number, parser_of

CURVES: dict[str, tuple[str, str, str]] = {  # name -> label of x, label of y, what one more of it is called
    "epochs": ("epochs", "seconds of training", "one more epoch"),
    "batch size": ("batch size", "images a second", ""),
    "width": ("width of worksheet 1's first layer", "microseconds a step", ""),
    "trials": ("trials of a sweep", "seconds, wall clock", "one more trial (one epoch)"),
    "runs": ("runs in a report", "seconds, wall clock", "one more run in a report"),
}
SIZES = {
    "epochs": [1, 2, 4, 8, 16],
    "batch size": [32, 64, 128, 256, 512, 1024, 2048],
    "width": [8, 16, 32, 64, 128],
    "trials": [1, 2, 4, 8, 16],
    "runs": [10, 50, 200, 1000],
}
SMALL = {"epochs": [1, 2], "batch size": [16, 32], "width": [2, 4], "trials": [1, 2], "runs": [2, 4]}  # --smoke

Points = Iterator[tuple[int, float]]


def epochs(options: argparse.Namespace, ours: Any, sizes: list[int]) -> Points:
    for size in sizes:
        yield size, ours.train(_worksheet(options, epochs=size)).seconds


def batch_size(options: argparse.Namespace, ours: Any, sizes: list[int]) -> Points:
    for size in sizes:
        done = ours.train(_worksheet(options, batch_size=size, epochs=2))
        yield size, done.rows[-1]["system/images_per_second"]


def width(options: argparse.Namespace, ours: Any, sizes: list[int]) -> Points:
    for size in sizes:
        row = ours.train(_worksheet(options, width=size, epochs=2)).rows[-1]
        yield size, 1e6 * row["system/seconds"] / (row["step"] / row["epoch"])


def trials(options: argparse.Namespace, ours: Any, sizes: list[int]) -> Points:
    from benchmarks.ours import cifar

    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="cifar-scaling-") as folder:
            values = _worksheet(options, epochs=1, val_size=1000, device=options.device, dataset=options.dataset)
            fixed = {key: {"value": value} for key, value in values.items() if key not in ("experiment", "test")}
            parameters = {**fixed, "seed": {"values": list(range(size))}}
            file = Path(folder) / "sweep.yaml"
            sweep = {"method": "grid", "metric": {"name": "val/acc", "goal": "maximize"}, "parameters": parameters}
            file.write_text(json.dumps(sweep))
            arguments = ["--no-report", "--wandb", "disabled", "--runs-dir", f"{folder}/runs"]
            yield size, cifar("sweep", str(file), *arguments, cwd=Path(folder))[1]


def runs(options: argparse.Namespace, ours: Any, sizes: list[int]) -> Points:
    """Reports of copies of one run that differ in their seeds and networks' widths."""
    from cifar.report import write_report

    done = ours.train(_worksheet(options, epochs=2, val_size=1000))
    with tempfile.TemporaryDirectory(prefix="cifar-scaling-") as folder:
        place = Path(folder)
        made = 0
        for number, size in enumerate([sizes[0], *sizes]):  # the first of a process imports matplotlib and finds fonts
            while made < size:
                copy = place / "runs" / f"copy{made:05}"
                shutil.copytree(done.record.path, copy, ignore=shutil.ignore_patterns("wandb", "weights.pt", "pictures"))
                for file, changed in (("run", {"id": copy.name}), ("config", {"seed": made // 10, "width": 8 + made % 10})):
                    content = json.loads((copy / f"{file}.json").read_text())
                    (copy / f"{file}.json").write_text(json.dumps({**content, **changed}))
                made += 1
            begun = time.perf_counter()
            write_report([], runs=place / "runs", out=place / f"report{number}")
            if number:
                yield size, time.perf_counter() - begun


def _worksheet(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    small = {"train_size": 5000} if options.small else {}
    return {"model": "worksheet1", "val_size": 0, "test": "never", "batch_size": 128, **small, **more}


MEASURES: dict[str, Callable[[argparse.Namespace, Any, list[int]], Points]] = {
    "epochs": epochs, "batch size": batch_size, "width": width, "trials": trials, "runs": runs,
}  # fmt: skip


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    options.small = result.about["device_type"] == "cpu"
    curves: dict[str, dict[str, list[float]]] = {}
    with Ours(options, result, mirror=False) as ours:
        ours.toy = {"train_size": 128} if options.smoke else None
        ours.train(_worksheet(options, epochs=1))  # what the first training of a process pays
        for name in options.only or CURVES:
            sizes = (SMALL if options.smoke else SIZES)[name]
            try:
                points = list(MEASURES[name](options, ours, sizes))
            except Missing as missing:
                result.skip(name, str(missing))
                continue
            curves[name] = {"x": [x for x, _ in points], "y": [y for _, y in points]}
            _, label, one_more = CURVES[name]
            for x, y in points:
                result.add(f"{name} = {x}", label, "", [y])
            if one_more:
                slope, start = np.polyfit(*curves[name].values(), 1)
                each = result.add("ours", one_more, "ms", [1000 * slope], start_seconds=start)
                result.claim(f"{one_more} (and {number(start)} s to begin with)", each)
    result.about["curves"] = {name: {"labels": CURVES[name][:2], **points} for name, points in curves.items()}
    title = f"{result.about['device']}, {result.about['dataset']}"
    draw(result.about["curves"], title, options.out.with_suffix(".png"))


def draw(curves: dict[str, Any], title: str, path: Path) -> None:
    """A panel a curve, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, max(len(curves), 1), figsize=(3.2 * max(len(curves), 1), 3), squeeze=False)
    for axis, (name, curve) in zip(axes[0], curves.items(), strict=False):
        axis.plot(curve["x"], curve["y"], marker="o", markersize=4)
        axis.set(xscale="log", yscale="log", xlabel=curve["labels"][0], ylabel=curve["labels"][1], title=name)
        axis.set_xticks(curve["x"], [f"{x:g}" for x in curve["x"]])
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.7g}")
        axis.minorticks_off()
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("scaling", __doc__, n=1, what_n="not used: one measurement a point")
    parser.add_argument("--only", nargs="+", choices=list(CURVES), help="some of the curves")
    return command(parser, "curves", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
