"""What report.csv and report.json say of the points."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

from cifar.report.aggregate import Comparison
from cifar.system.redact import mask_secrets

# Columns of report.csv, beside MACs and seconds.
COST_COLUMNS = ("train_flops", "joules", "weights_bytes", "latency_seconds", "teacher_flops", "teacher_train_flops")
FORMULA_STARTS = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    "\N{FULLWIDTH EQUALS SIGN}",
    "\N{FULLWIDTH PLUS SIGN}",
    "\uff0d",
    "\uff20",
)


def list_facts(comparison: Comparison) -> list[dict[str, Any]]:
    """The points for report.csv and report.json. Accuracies are fractions, costs are MACs of one image, times seconds."""
    return [
        {
            "label": point.label,
            **point.values,
            "dataset": comparison.banner or "CIFAR-10",
            "macs": point.macs,
            "flops": 2 * point.macs,
            "params": point.params,
            "views": point.num_views,
            "n": point.num_seeds,
            "seeds_not_finished": point.num_lost,
            f"{comparison.split}/acc": point.mean,
            "std": point.std,
            "interval95_half": point.ci_half_width,
            "interval95_low": point.interval[0] if point.interval else None,
            "interval95_high": point.interval[1] if point.interval else None,
            "accuracies": list(point.accuracies),
            "seconds": point.seconds,
            **{name: point.mean_cost(name) for name in COST_COLUMNS},
            "pack_size": point.pack_size,
            "teacher": str(point.runs[0].config.get("teacher") or ""),
            "front": point.on_front,
            "runs": [run.id for run in point.runs],
        }
        for point in comparison.points
    ]


def format_csv(facts: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    lists = ("runs", "accuracies")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(format_csv_cell, facts[0]))
    for row in facts:
        joined = {name: " ".join(map(str, row[name])) for name in lists}
        writer.writerow(map(format_csv_cell, {**row, **joined}.values()))
    return text.getvalue()


def format_csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one has a ' before it. Numbers stay numbers.

    The characters are those of OWASP's page on CSV injection, with their full-width forms.
    """
    return _guard_text(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=4096)
def _guard_text(value: str) -> str:
    if not value.lstrip(" ").startswith(FORMULA_STARTS):
        return value
    with contextlib.suppress(ValueError):
        float(value)
        return value
    return f"'{value}"


def format_json(value: Any, level: int = 0) -> str:
    """`json.dumps(value, indent=1)`, which leaves the quick encoder for a slow one, in a quarter of the time."""
    if type(value) is str:
        return json.encoder.encode_basestring_ascii(value)
    if not value or not isinstance(value, dict | list):
        return json.dumps(value)
    start, end = ("{", "}") if isinstance(value, dict) else ("[", "]")
    margin = "\n" + " " * (level + 1)
    quick = _make_encoder(f",{margin}")
    is_dict, names = isinstance(value, dict), [*value]
    content = [*value.values()] if isinstance(value, dict) else value
    nested = [place for place, inner in enumerate(content) if isinstance(inner, dict | list)]
    parts, done = list[str](), 0
    for place in [*nested, len(content)]:
        if plain := content[done:place]:  # what lies between two nested values, as a whole
            parts.append(quick(dict(zip(names[done:place], plain, strict=True)) if is_dict else plain)[1:-1])
        if place < len(content):
            parts.append((f"{json.dumps(names[place])}: " if is_dict else "") + format_json(content[place], level + 1))
        done = place + 1
    return f"{start}{margin}{f',{margin}'.join(parts)}{margin[:-1]}{end}"


@functools.cache
def _make_encoder(separator: str) -> Callable[[Any], str]:
    return json.JSONEncoder(separators=(separator, ": ")).encode


def write_json(comparison: Comparison, facts: list[dict[str, Any]]) -> str:
    """report.json without secrets and without its last part, the notes: up to its last brace."""
    best = comparison.best
    first = {
        "schema": 1,
        "title": comparison.title,
        "dataset": comparison.banner or "CIFAR-10",
        "split": comparison.split,
        "budget": comparison.budget,
        "shared": comparison.shared_config,
        "seeds": comparison.seeds,
        "best": best.label if best else None,
        "rank_correlation": comparison.macs_rank_correlation,
    }
    apart = [{"id": run.id, "name": run.name, "kind": run.kind, "reason": run.reason} for run in comparison.excluded]
    texts = [format_json(mask_secrets(part, mask_keys=False)) for part in (first, {"apart": apart})]
    points = format_json_rows(mask_rows(facts), 1)
    return f'{texts[0][:-2]},\n "points": {points},{texts[1][1:-2]}'


def mask_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`mask_secrets` of rows with the same names: by columns, most of which hold numbers."""
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    masked = [
        values if set(map(type, values)) <= _NUMBERS else mask_secrets(values, mask_keys=False) for values in columns.values()
    ]
    names = [next(iter(mask_secrets({name: 0}, mask_keys=False))) for name in columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*masked, strict=True)]


def format_json_rows(rows: list[dict[str, Any]], level: int) -> str:
    """`format_json` of rows with the same names: by columns, in a quarter of the time."""
    if not rows:
        return "[]"
    margin = "\n" + " " * (level + 1)
    columns = [_format_column([row[name] for row in rows], level + 2) for name in rows[0]]
    starts = [f"{margin} {json.dumps(name)}: " for name in rows[0]]
    texts = (",".join(map(operator.add, starts, values)) for values in zip(*columns, strict=True))
    return "[" + ",".join(f"{margin}{{{text}{margin}}}" for text in texts) + f"{margin[:-1]}]"


def _format_column(values: list[Any], level: int) -> list[str]:
    if set(map(type, values)) <= _NUMBERS:
        return json.dumps(values)[1:-1].split(", ")
    return [format_json(value, level) for value in values]


_NUMBERS = {int, float, bool, type(None)}
