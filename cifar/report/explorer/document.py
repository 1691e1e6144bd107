"""The data of the page's explorer: what is known of all runs, in columns, small enough for one file with 10,000 runs.

Three parts travel in the page, each compressed: `table` (JSON: points, runs, settings), `curves` (the curves of all runs, in at
most 32 points each, as 16-bit numbers) and `details` (JSON: full curves, heat maps, confusion, of few runs). The program reads
the table first, and the others when they are needed.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar.report.aggregate import Comparison, Point
from cifar.report.config_columns import has_several, list_columns
from cifar.report.figures.predictions import class_names, read_predictions
from cifar.report.load import ExcludedRun, Run
from cifar.report.metric_rows import read_column
from cifar.report.style import Nothing
from cifar.system.names import escape_controls
from cifar.system.redact import redact
from cifar.tracking.run_dir import format_repeat_command, format_repeat_commands

MAX_CURVE_POINTS, MAX_CURVE_POINTS_OF_MANY, MANY_RUNS = 32, 24, 1000  # of a run; of each of more than so many runs
MAX_DETAILED = 30  # of the best points, beside those of the front
MAX_HEAT_EPOCHS = 60
MAX_HEAT_LAYERS = 120
# metric -> steps of one unit. Accuracies of 5,000 images are exact; finer steps would be noise that does not compress.
CURVE_METRICS = {"val/acc": 5e3, "train/acc": 2e3, "train/loss": 1e3, "val/loss": 1e3}
HEAT_METRICS = {"gradient_norm": "gradient norm", "update_ratio": "update norm / weight norm"}
MAX_TAGS = 40
FAST_BYTES = 500_000  # from which on the last percent of compression would take as long as all of it
MAX_MISTAKES = 6  # pictures of a run
# Costs that only some runs have in their summary: key -> (what it is, its unit). Where no run has one, it is no axis.
MEASURED_COSTS = {
    "train_flops": ("FLOPs of the training", "FLOPs"),
    "joules": ("energy of a run", "J"),
    "latency_seconds": ("latency of one image", "s"),
    "weights_bytes": ("size of the weights", "B"),
    "teacher_flops": ("FLOPs of the teachers", "FLOPs"),
}
MISSING = 0xFFFF  # a 16-bit number that stands for no value
_FAMILY = re.compile(r"[A-Za-z]+?(?:_[A-Za-z]{2,})*(?:_v\d+|(?=\d|_|-|$))")


@dataclass(frozen=True)
class Document:
    """The parts as text (base64 of gzip)."""

    table: str
    curves: str
    details: str

    def __len__(self) -> int:
        return len(self.table) + len(self.curves) + len(self.details)


def build_document(
    comparison: Comparison,
    runs: Iterable[Run],
    *,
    runs_folder: Any = None,
    kept_ids: Iterable[str] = (),
    probabilities: Sequence[float] = (),
) -> Document:
    """Everything that the explorer shows. `runs`: all that were read, also those that are not compared.

    kept_ids: runs whose details are kept beside those of the front and of the best. probabilities: of each point that has one
    view to be on the front.
    """
    points = [point for point in comparison.points if point.num_views == 1]
    listed = {run.id: (run, index) for index, point in enumerate(points) for run in point.runs}
    others = [run for run in runs if run.id not in listed]
    costs = [key for key in MEASURED_COSTS if any(_round(run.summary.get(key), 9) for run, _ in listed.values())]
    also = find_other_differences(points, comparison.distinguishing_keys)
    ordered = [run for run, _ in listed.values()] + others
    detailed = _choose_detailed(points, others, set(kept_ids))
    chances = dict(zip(map(id, points), probabilities, strict=False))
    num_curve_points = MAX_CURVE_POINTS if len(ordered) <= MANY_RUNS else MAX_CURVE_POINTS_OF_MANY
    table: dict[str, Any] = {
        "version": 1,
        "title": comparison.title,
        "banner": comparison.banner,
        "split": comparison.split,
        "x": comparison.cost_unit,
        "budget": comparison.budget and comparison.budget * comparison.cost_factor,
        "costs": [{"key": key, "label": MEASURED_COSTS[key][0], "unit": MEASURED_COSTS[key][1]} for key in costs],
        "keys": [_describe_key(key, points) for key in comparison.distinguishing_keys],
        "also": also,
        "points": {
            "label": [point.label for point in points],
            "model": [point.model for point in points],
            "family": [name_family(point.model) for point in points],
            "macs": [point.macs for point in points],
            "params": [point.params for point in points],
            "lost": [point.num_lost for point in points],
            "chance": [_round(chances.get(id(point)), 3) for point in points],
            "values": {
                **{key: _plain_all([point.values.get(key) for point in points]) for key in comparison.distinguishing_keys},
                **{key: _plain_all([point.runs[0].config.get(key) for point in points]) for key in also},
            },
        },
        "runs": _list_runs(ordered, {run_id: index for run_id, (_, index) in listed.items()}, comparison.excluded, runs_folder),
        "curves": {"metrics": list(CURVE_METRICS), "scales": list(CURVE_METRICS.values()), "points": num_curve_points},
    }
    table["tags"] = tags = list_tags(ordered)
    if tags:
        numbers = {tag: number for number, tag in enumerate(tags)}
        table["runs"]["tags"] = [sorted({numbers[tag] for tag in map(_clean, run.tags) if tag in numbers}) for run in ordered]
    for key in costs:
        table["runs"][key] = [_round(run.cost(key), 9) for run in ordered]
    first_seeds = {point.runs[0].id for point in points}
    details = {
        run.id: describe_details(run, with_pictures=run.id not in listed or run.id in first_seeds)
        for run in ordered
        if run.id in detailed
    }
    return Document(_pack_json(table), _pack(_encode_curves(ordered, num_curve_points)), _pack_json(details))


def name_family(model: str) -> str:
    """The part of a network's name before its size: resnet20 -> resnet, shufflenet_v2_x0.5 -> shufflenet_v2."""
    match = _FAMILY.match(model)
    return match.group() if match else model


def find_other_differences(points: Sequence[Point], keys: Sequence[str]) -> list[str]:
    """The settings in which points differ, too, beside those that tell them apart."""
    columns = list_columns([point.runs[0].config for point in points])
    known = {*keys, "seed", "experiment"}
    return [name for name, values in columns.items() if name not in known and has_several(values)]


def list_tags(runs: Sequence[Run]) -> list[str]:
    """The tags that some of the runs have and others have not, without those that name the run's network or dataset."""
    counts = Counter(tag for run in runs for tag in {*map(_clean, run.tags)} - {run.model, run.dataset, ""})
    return sorted(tag for tag, count in counts.most_common(MAX_TAGS) if count < len(runs))


def _choose_detailed(points: Sequence[Point], others: Sequence[Run], kept: set[str]) -> set[str]:
    best = sorted(points, key=lambda point: -point.mean)[:MAX_DETAILED]
    chosen = {run.id for point in [*best, *(point for point in points if point.on_front)] for run in point.runs}
    broken = [run.id for run in others if run.state in ("diverged", "failed")][:MAX_DETAILED]
    return chosen | set(broken) | kept


def _describe_key(key: str, points: Sequence[Point]) -> dict[str, Any]:
    values = [value for point in points if (value := point.values.get(key)) is not None]
    is_number = bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    is_log = is_number and min(values) > 0 and max(values) / min(values) >= 30
    return {"name": key, "number": is_number, "log": is_log}


def _list_runs(
    runs: Sequence[Run], points: Mapping[str, int], excluded: Sequence[ExcludedRun], runs_folder: Any
) -> dict[str, list[Any]]:
    why = {run.id: f"{run.kind}: {run.reason}" for run in excluded}

    tests = [run.accuracies_by_views("test") for run in runs]
    return {
        "id": [run.id for run in runs],
        "name": [_clean(run.name) for run in runs],
        "point": [points.get(run.id, -1) for run in runs],
        "seed": [_plain(run.config.get("seed")) for run in runs],
        "state": [run.state for run in runs],
        "why": [_clean(why.get(run.id, "")) for run in runs],
        "epoch": [run.epoch or len(run.rows) for run in runs],
        "epochs": [run.epochs for run in runs],
        "val": [_round(run.accuracies_by_views("val").get(1), 6) for run in runs],
        "test": [_round(found.get(1), 6) for found in tests],
        "views": [max(found, default=1) for found in tests],
        "test_views": [_round(found.get(max(found, default=1)), 6) for found in tests],
        "seconds": [_round(run.seconds, 3) for run in runs],
        "images": [run.num_images for run in runs],
        "command": _list_commands(runs, runs_folder),
        "folder": ["" if run.is_rebuilt else str(run.path) for run in runs],
        "url": [_read_url(run) for run in runs],
    }


def _list_commands(runs: Sequence[Run], runs_folder: Any) -> list[str]:
    if runs_folder:
        commands = format_repeat_commands((run.path for run in runs), runs_folder)
    else:
        commands = (format_repeat_command(run.path, run.path.parent) for run in runs)
    return [_clean(run.own_command) if run.is_rebuilt else command for run, command in zip(runs, commands, strict=True)]


def _read_url(run: Run) -> str:
    try:
        with open(f"{run.path}/wandb/url.txt", encoding="utf-8", errors="replace") as file:
            url = file.read().strip()[:400]
    except OSError:
        return ""
    return url if re.fullmatch(r"https?://[^\s\"'<>]+", url) else ""


# -- curves ------------------------------------------------------------------------------------------------------------


def sample_rows(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """At most `count` rows at equal distances, the first and the last among them."""
    return [rows[place] for place in _sample_places(len(rows), count)]


@functools.lru_cache(maxsize=1024)  # many runs have the same length
def _sample_places(num_rows: int, count: int) -> list[int]:
    if num_rows <= count:
        return list(range(num_rows))
    return [round(i * (num_rows - 1) / (count - 1)) for i in range(count)]


@functools.lru_cache(maxsize=1024)
def _sample_array(num_rows: int, count: int) -> NDArray[np.int64]:
    return np.array(_sample_places(num_rows, count), np.int64)


def _encode_curves(runs: Sequence[Run], num_points: int) -> bytes:
    """Blocks of 16-bit numbers: the number of points of each run, then the epochs of all runs, then each metric of all runs.

    A value is the difference to the one before it in its run, with the sign in the lowest bit. A block has its low bytes first
    and its high bytes, which are mostly zero, after them. All of it so that it compresses well.
    """
    places = [_sample_array(len(run.rows), num_points) for run in runs]
    epochs = np.concatenate([np.zeros(0), *(_read_values(run.rows, "epoch", at) for run, at in zip(runs, places, strict=True))])
    blocks = [np.array(list(map(len, places)), np.int64)]
    columns = [np.minimum(np.nan_to_num(epochs), MISSING - 1).astype(np.int64)]
    for metric, scale in CURVE_METRICS.items():
        values = [_read_values(run.rows, metric, at) for run, at in zip(runs, places, strict=True)]
        columns.append(_quantise(np.concatenate([np.zeros(0), *values]), scale))
    firsts = np.cumsum(blocks[0])[:-1]
    for column in columns:
        differences = np.diff(column, prepend=0)
        is_first = np.concatenate([[0], firsts[firsts < len(column)]]) if len(column) else firsts[:0]
        differences[is_first] = column[is_first]  # a run begins from 0
        wrapped = ((differences + 2**15) & MISSING) - 2**15  # the shorter way round
        blocks.append(np.where(wrapped < 0, -2 * wrapped - 1, 2 * wrapped))
    return b"".join(block.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes() for block in blocks)


def _read_values(rows: Sequence[Mapping[str, Any]], name: str, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """The numbers of that name in some rows; NaN where there is none."""
    column = read_column(rows, name)
    if column is not None:
        return column[places]
    values = (rows[place].get(name) for place in places.tolist())
    return np.array([float(value) if isinstance(value, int | float) else math.nan for value in values], np.float64)


def _quantise(values: NDArray[np.float64], scale: float) -> NDArray[np.int64]:
    """Whole numbers of steps, at least 0. MISSING for what is no number."""
    with np.errstate(over="ignore"):
        steps = np.rint(values * scale)
    has_place = np.isfinite(steps) & (steps < MISSING)  # a loss above 65 has no place in 16 bits, and no other stands for it
    return np.where(has_place, np.maximum(np.where(has_place, steps, 0), 0), MISSING).astype(np.int64)


# -- details -----------------------------------------------------------------------------------------------------------


def describe_details(run: Run, *, with_pictures: bool = True) -> dict[str, Any]:
    """Full curves of one run, and its heat maps and confusion matrix, as far as its folder has them.

    The curves are whole numbers of steps, as CURVE_METRICS says, each as the difference to the known one before it; None
    stands for no value.
    """
    curves = {
        metric: _take_differences(_count_steps(row.get(metric), scale) for row in run.rows)
        for metric, scale in CURVE_METRICS.items()
        if metric in run.metric_keys
    }
    found: dict[str, Any] = {"epochs": [row.get("epoch") for row in run.rows], "curves": curves, "heat": {}}
    if not with_pictures:
        return found
    for metric, label in HEAT_METRICS.items():
        if heat := _describe_heat(run, metric, label):
            found["heat"][metric] = heat
    predictions = read_predictions(run)
    if not isinstance(predictions, Nothing):
        counts = np.zeros((10, 10), np.int64)
        np.add.at(counts, (predictions["label"].astype(int), predictions["predicted"].astype(int)), 1)
        found["confusion"] = {
            "classes": list(class_names(run)),
            "counts": counts.tolist(),
            "split": str(predictions.get("split", "val")),
        }
        found["mistakes"] = _describe_mistakes(predictions)
    return found


def _describe_mistakes(predictions: Mapping[str, Any]) -> dict[str, Any]:
    """The worst mistakes: their true and their predicted class, the confidence, and their pictures side by side as WebP."""
    from PIL import Image

    places = {int(index): place for place, index in enumerate(predictions["index"])}
    worst = [(k, places[int(i)]) for k, i in enumerate(predictions["worst_index"]) if int(i) in places][:MAX_MISTAKES]
    if not worst:
        return {}
    pixels = np.concatenate([predictions["worst_images"][k].transpose(1, 2, 0) for k, _ in worst], axis=1)  # (32, 32 n, 3)
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "webp", quality=70, method=6)
    return {
        "true": [int(predictions["label"][place]) for _, place in worst],
        "predicted": [int(predictions["predicted"][place]) for _, place in worst],
        "confidence": [_round(float(predictions["confidence"][place]), 4) for _, place in worst],
        "pixels": base64.b64encode(content.getvalue()).decode(),
    }


def _count_steps(value: Any, scale: float) -> int | None:
    return round(value * scale) if isinstance(value, int | float) and math.isfinite(float(value) * scale) else None


def _take_differences(values: Iterable[int | None]) -> list[int | None]:
    found: list[int | None] = []
    before = 0
    for value in values:
        found.append(None if value is None else value - before)
        before = before if value is None else value
    return found


def _describe_heat(run: Run, metric: str, label: str) -> dict[str, Any] | None:
    """log10 of a metric by layer and epoch, in 255 steps between its extremes; 0 stands for no value."""
    layers = run.layers_with(metric)
    rows = [row for row in run.rows if any(f"{metric}/{layer}" in row for layer in layers)]
    if not rows or not layers:
        return None
    sampled = sample_rows(rows, MAX_HEAT_EPOCHS)
    shown = [layers[round(i * (len(layers) - 1) / (MAX_HEAT_LAYERS - 1))] for i in range(MAX_HEAT_LAYERS)]
    shown = layers if len(layers) <= MAX_HEAT_LAYERS else shown
    values = np.array([[_logarithm(row.get(f"{metric}/{layer}")) for row in sampled] for layer in shown])
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    steps = 1 + np.nan_to_num(254 * (values - low) / ((high - low) or 1.0)).round()
    cells = np.where(np.isfinite(values), np.clip(steps, 1, 255), 0).astype(np.uint8)
    return {
        "label": label,
        "layers": shown,
        "epochs": [row.get("epoch") for row in sampled],
        "low": low,
        "high": high,
        "cells": base64.b64encode(cells.tobytes()).decode(),
    }


def _logarithm(value: Any) -> float:
    is_positive = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return math.log10(value) if is_positive else math.nan


# -- texts and numbers -------------------------------------------------------------------------------------------------


def _round(value: Any, digits: int) -> float | None:
    return round(float(value), digits) if isinstance(value, int | float) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers and None stay, everything else is text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, int) else _clean(str(value))


def _plain_all(values: list[Any]) -> list[Any]:
    if set(map(type, values)) <= {int, float} and all(map(math.isfinite, values)):
        return values  # most often, and quicker
    return list(map(_plain, values))


def _clean(text: str) -> str:
    return escape_controls(redact(text))


def _pack_json(value: Any) -> str:
    return _pack(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def _pack(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9 if len(content) < FAST_BYTES else 6, mtime=0)).decode()
