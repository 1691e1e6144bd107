"""Writes a report: reads runs, compares them, draws the figures, and writes the page, the CSV and the JSON file.

matplotlib is imported when the first figure is drawn. torch is never imported.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar import registry
from cifar.errors import UserError
from cifar.report import html as pages
from cifar.report import style
from cifar.report.aggregate import Comparison, Point, compare_runs
from cifar.report.beside import share_beside, start_asked
from cifar.report.explorer.document import MANY_RUNS, build_document
from cifar.report.explorer.page import render_explorer
from cifar.report.formatting import (
    format_mega_macs,
    format_mega_params,
    format_percent,
    format_value,
    pluralize,
)
from cifar.report.front import front_probabilities
from cifar.report.importance import import_forests, list_settings, rate_settings
from cifar.report.load import RunCollection, collect_runs, load_run
from cifar.system.durations import format_duration
from cifar.system.memory import pause_garbage_collection
from cifar.system.redact import mask_secrets
from cifar.tracking.run_dir import write_atomic

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


# Columns of report.csv, beside MACs and seconds.
COST_COLUMNS = ("train_flops", "joules", "weights_bytes", "latency_seconds", "teacher_flops", "teacher_train_flops")
MAX_INLINE_BYTES = 120_000  # of a figure as SVG on the page; a larger one is a picture there
SHOWN_BY_EXPLORER = ("accuracy_vs_macs", "accuracy_vs_params", "learning_curves")  # figures


@dataclass(frozen=True)
class ReportResult:
    """What a report consists of: files, a table for the terminal (all cells are text), and sentences, the answer first."""

    paths: tuple[Path, ...]
    title: str
    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    notes: tuple[str, ...]
    banner: str
    comparison: Comparison
    sweep: str = ""  # id of the local sweep, if the report is about one

    @property
    def page(self) -> Path:
        return next(path for path in self.paths if path.suffix == ".html")


def write_report(
    names: Sequence[str] = (),
    *,
    runs: Path,
    out: Path | None = None,
    split: str = "val",
    budget: float | None = None,
    command: str = "",
    cost_unit: str = "macs",
    kept: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ReportResult:
    """Compare the named runs and sweeps and write the report into `out`. No name: the newest sweep, or else all runs.

    `out` is by default report/ (for the test split report-test/) in the sweep's folder, in the run's folder if there is one
    run only, or in `runs`. If nothing can be compared, the result has no columns. `cost_unit`: "macs" or "flops", for the axis
    and the table. `kept`: runs whose full curves and heat maps stay on a page of many. `progress` is called with (runs
    read, runs in all) while runs are read from W&B.

    Raises UserError for an unknown name, and if `out` cannot be written.
    """
    with pause_garbage_collection(), contextlib.ExitStack() as copies:
        ask: list[_Ask] = []

        def start_importance(num_runs: int) -> None:
            if num_runs >= MANY_RUNS:  # it imports scikit-learn while runs are read
                ask.append(copies.enter_context(start_asked(import_forests, rate_settings)))

        collection = collect_runs(names, runs, progress, on_start=start_importance)
        comparison = compare_runs(
            collection.runs, split=split, budget=budget, title=collection.title, damaged=collection.damaged, cost_unit=cost_unit
        )
        kept_ids = _find_kept(kept, collection)
        out = out or _default_folder(collection, runs, split)
        options = ["--split", "test"] if split == "test" else []
        options += ["--budget", f"{budget / 1e6:g}M"] if budget else []
        options += ["--x", cost_unit] if cost_unit != "macs" else []
        options += [word for name in kept for word in ("--keep", name)]
        command = command or shlex.join(["python", "-m", "cifar", "report", *names, *options])
        explore = functools.partial(_make_explorer, comparison, collection, runs, kept_ids, ask[0] if ask else _rate_here)
        return _write_files(collection, comparison, explore, out, command)


_Drawn = tuple[list[pages.Section], list[Path], list[str]]
_Ask = Callable[..., Callable[[], dict[str, Any] | None]]


def _rate_here(*arguments: Any) -> Callable[[], dict[str, Any] | None]:
    return functools.partial(rate_settings, *arguments)


def _write_files(
    collection: RunCollection, comparison: Comparison, explore: Callable[[], str], out: Path, command: str
) -> ReportResult:
    """Write all files of a report into `out`. explore: makes the section of the explorer, while figures are drawn beside it."""
    notes = [*pages.write_sentences(comparison), *_progress_notes(collection, comparison)]
    draw = functools.partial(_draw_figure, collection, comparison, out)
    entries = sorted(registry.figures, key=style.sort_key)
    shares = share_beside if len(collection.runs) >= MANY_RUNS else _work_here
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / "report.html", out / "report.csv", out / "report.json"]
        with shares(draw, entries) as finish_figures:
            explorer = explore()
            facts = _list_facts(comparison)
            table = _format_csv(facts) if facts else ""
            document = format_json(mask_secrets(_build_json(comparison, facts), mask_keys=False))
            figures = finish_figures()
        sections = [section for figure in figures for section in figure[0]]
        drawn = [path for figure in figures for path in figure[1]]
        notes += [f"{problem}." for problem in registry.figures.problems]
        notes += [note for figure in figures for note in figure[2]]
        masked_notes = format_json(mask_secrets(notes, mask_keys=False), 1)
        write_atomic(paths[2], f'{document[:-2]},\n "notes": {masked_notes}\n}}'.encode())
        if table:
            write_atomic(paths[1], table.encode())
        else:
            paths.pop(1).unlink(missing_ok=True)
        provenance = pages.describe_provenance(comparison, collection.runs, command)
        html = pages.render_page(
            comparison, sections, question=collection.question, notes=notes, provenance=provenance, explorer=explorer
        )
        write_atomic(paths[0], html.encode())
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {out} ({error.strerror or error}); name another place with --out"
        ) from error
    rows = [_format_row(comparison, point) for point in comparison.points]
    title = " – ".join(part for part in (comparison.banner, comparison.subtitle) if part)
    columns = tuple(rows[0]) if rows else ()
    return ReportResult((*paths, *drawn), title, columns, rows, tuple(notes), comparison.banner, comparison, collection.sweep)


def import_figures() -> None:
    """Import all figures and matplotlib, so that the first drawing does not take that second."""
    importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib.backends.backend_agg")

    registry.figures.load()


def draw_pictures(run_folder: Path) -> list[Path]:
    """Draw one run's figures into RUN/pictures/NAME.png. Figures that have nothing to show are left out."""
    run = load_run(Path(run_folder))
    paths = []
    for entry in registry.figures:  # `from cifar.registry import figures` would be hidden by the sub-package of that name
        if style.get_scope(entry) != "run" or style.describe_class_problem(entry):
            continue
        drawn = style.render_figure(entry, run)
        if not drawn.problem or drawn.has_failed:
            paths.append(run.path / "pictures" / f"{entry.name}.png")
            paths[-1].parent.mkdir(exist_ok=True)
            write_atomic(paths[-1], style.encode_png(drawn.figure, dpi=120))
    return paths


def _default_folder(collection: RunCollection, runs: Path, split: str) -> Path:
    place = runs
    if collection.sweep:
        place = runs / "sweeps" / collection.sweep
    elif collection.is_single_run and not collection.wandb_name:
        place = collection.runs[0].path
    wandb_name = collection.wandb_name.partition("://")[2] or collection.wandb_name
    wandb_folder = re.sub(r"[^\w.-]+", "_", wandb_name)  # "" unless the runs come from W&B
    return place / ("report-test" if split == "test" else "report") / wandb_folder


def _find_kept(names: Sequence[str], collection: RunCollection) -> list[str]:
    """The ids of the runs that `--keep` names, by id, the start of an id, or name. Raises UserError."""
    found = []
    for name in names:
        matches = [run.id for run in collection.runs if run.id == name or run.name == name]
        matches = matches or [run.id for run in collection.runs if run.id.startswith(name)]
        if not matches:
            raise UserError(f"--keep {name}: no run of this report has that id or name")
        found += matches
    return found


def _make_explorer(comparison: Comparison, collection: RunCollection, runs: Path, kept_ids: Sequence[str], rate: _Ask) -> str:
    """The section of the explorer; "" where there is nothing to compare."""
    if collection.is_single_run or not comparison.points:
        return ""
    wait_for_importance = rate(*list_settings(comparison))
    points = [point for point in comparison.points if point.num_views == 1]
    chances = front_probabilities([point.macs for point in points], [point.accuracies for point in points]) or ()
    document = build_document(comparison, collection.runs, runs_folder=runs, kept_ids=kept_ids, probabilities=chances)
    listed = {run.id for run in comparison.runs}
    importance = wait_for_importance()
    return render_explorer(document, importance=importance, num_apart=sum(run.id not in listed for run in collection.runs))


@contextlib.contextmanager
def _work_here(
    work: Callable[[registry.Entry], _Drawn], items: Sequence[registry.Entry]
) -> Iterator[Callable[[], list[_Drawn]]]:
    yield lambda: list(map(work, items))


def _draw_figure(collection: RunCollection, comparison: Comparison, out: Path, entry: registry.Entry) -> _Drawn:
    """Draw a figure into `out` -> (its section of the page, its files, problems).

    A single run is shown by the figures of a run, everything else by those of a sweep.
    """
    if problem := style.describe_class_problem(entry):
        return [], [], [f"{problem}."]
    is_of_run = style.get_scope(entry) == "run"
    subject = collection.runs[0] if collection.is_single_run else comparison
    is_wanted = is_of_run == collection.is_single_run and (is_of_run or comparison.has_scores)
    drawn = style.render_figure(entry, subject) if is_wanted else None
    notes = [f"{drawn.problem}."] if drawn and drawn.has_failed else []
    if not drawn or (drawn.problem and entry.name != "accuracy_vs_macs"):
        for suffix in ("png", "svg"):  # an earlier report's file would look like this one's
            (out / f"{entry.name}.{suffix}").unlink(missing_ok=True)
        return [], [], notes
    paths = [out / f"{entry.name}.png", out / f"{entry.name}.svg"]
    png = style.encode_png(drawn.figure)
    write_atomic(paths[0], png)
    vector = style.encode_svg(drawn.figure, entry.name)
    write_atomic(paths[1], vector.encode())
    figure_class: Any = entry.builder
    caption = getattr(figure_class, "caption", "")
    inline = style.inline_svg(vector, drawn.header_inches, figure_class.title)
    if len(inline) > MAX_INLINE_BYTES:
        top = 0.0 if subject.banner else drawn.header_inches  # the page has the title; a banner stays
        inline = pages.render_image(style.shrink_picture(png, top_inches=top), figure_class.title)
    return [pages.Section(figure_class.title, caption, inline, entry.name in SHOWN_BY_EXPLORER)], paths, notes


def _progress_notes(collection: RunCollection, comparison: Comparison) -> list[str]:
    """How far a sweep has come, and a line for each reason for which runs are excluded."""
    notes = []
    num_finished = sum(run.state == "finished" for run in collection.runs)
    num_running = sum(run.state == "running" for run in collection.runs)
    if collection.num_cells and num_finished < collection.num_cells:
        running = f", {num_running} running." if num_running else "."
        notes.append(f"{num_finished} of {pluralize(collection.num_cells, 'trial')} finished{running}")
    if packed := sum(run.pack_size > 1 and run.cost("joules") is not None for run in comparison.runs):
        notes.append(
            f"{pluralize(packed, 'run')} of these trained side by side with others: their joules are shares of what the pack "
            "used, and their seconds are those of the whole pack."
        )
    kinds: dict[str, list[str]] = {}
    for run in comparison.excluded:
        kinds.setdefault(run.kind, []).append(run.name if run.name == run.id else f"{run.name} ({run.id})")
    for kind, names in kinds.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        notes.append(f"Apart, {kind}: {', '.join(names[:5])}{more}.")
    return notes


def _format_row(comparison: Comparison, point: Point) -> dict[str, str]:
    """A point as a row of the table in the terminal."""
    row = {"network": point.network_name}
    row |= {key: format_value(value) for key, value in point.values.items() if key != "model"}
    row |= {
        comparison.cost_column: format_mega_macs(point.macs * comparison.cost_factor),
        "params M": format_mega_params(point.params),
        f"{comparison.split} acc %": format_percent(point.mean),
        "± 95 %": point.interval_text,
        "n": point.num_seeds_text,
        "time a run": format_duration(point.seconds),
        **{each.heading: each.format_value(point.mean_cost(each.name)) for each in comparison.measured_costs},
        "front": "*" if point.on_front else "",
    }
    return row


def _list_facts(comparison: Comparison) -> list[dict[str, Any]]:
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


def _format_csv(facts: Sequence[dict[str, Any]]) -> str:
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


def _build_json(comparison: Comparison, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """report.json without its last part, the notes."""
    best = comparison.best
    return {
        "schema": 1,
        "title": comparison.title,
        "dataset": comparison.banner or "CIFAR-10",
        "split": comparison.split,
        "budget": comparison.budget,
        "shared": comparison.shared_config,
        "seeds": comparison.seeds,
        "best": best.label if best else None,
        "rank_correlation": comparison.macs_rank_correlation,
        "points": facts,
        "apart": [{"id": run.id, "name": run.name, "kind": run.kind, "reason": run.reason} for run in comparison.excluded],
    }
