"""Writes a report: reads runs, compares them, draws the figures, and writes the page, the CSV and the JSON file.

matplotlib is imported when the first figure is drawn. torch is never imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
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
from cifar.report.beside import share_beside, start_beside
from cifar.report.digest import compute_digest, digest_program, find_versions
from cifar.report.drawing import FigureResult, FigureWriter
from cifar.report.explorer.document import MANY_RUNS, Document, build_document
from cifar.report.explorer.page import render_explorer
from cifar.report.facts import format_csv, format_json, list_facts, write_json
from cifar.report.formatting import (
    format_mega_macs,
    format_mega_params,
    format_percent,
    format_value,
    pluralize,
)
from cifar.report.front import front_probabilities
from cifar.report.importance import is_rating, list_settings, rate_settings
from cifar.report.load import RunCollection, collect_runs, load_run
from cifar.report.made import Made, open_made
from cifar.system.durations import format_duration
from cifar.system.files import is_regular_file
from cifar.system.memory import pause_garbage_collection
from cifar.system.redact import mask_secrets
from cifar.system.variables import read_words
from cifar.tracking.run_dir import CACHE_FOLDER, MADE_FILE, write_atomic


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
    with pause_garbage_collection(), _describe_drawing_beside([runs, *map(Path, names)]) as wait_for_drawing:
        collection = collect_runs(names, runs, progress)
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
        explore = functools.partial(_explore, comparison, collection, runs, kept_ids)
        made = open_made([run.path for run in collection.runs])
        writer = FigureWriter(collection, comparison, out, made, wait_for_drawing() if made.is_kept else None)
        return _write_files(collection, comparison, explore, writer, command)


@contextlib.contextmanager
def _describe_drawing_beside(folders: Sequence[Path]) -> Iterator[Callable[[], Any]]:
    """`style.describe_drawing` while runs are read, where it may spare the import of matplotlib: no figure may have changed.

    -> a function that gives it, or None where it is not known yet. A plug-in could change what matplotlib does.
    """
    has_figures = any(is_regular_file(folder / CACHE_FOLDER / MADE_FILE) for folder in folders)
    is_worth = has_figures and not read_words("CIFAR_PLUGINS", os.pathsep)
    with start_beside(style.describe_drawing) if is_worth else contextlib.nullcontext(lambda: None) as wait:
        yield wait


def _write_files(
    collection: RunCollection,
    comparison: Comparison,
    explore: Callable[[], Document | None],
    writer: FigureWriter,
    command: str,
) -> ReportResult:
    """Write all files of a report. explore: makes the data of the explorer, while all else is made beside it."""
    notes = [*pages.write_sentences(comparison), *_progress_notes(collection, comparison)]
    out, made = writer.out, writer.made
    tasks: list[Callable[[], Any]] = [
        *(functools.partial(writer.write, entry) for entry in sorted(registry.figures, key=style.sort_key)),
        functools.partial(pages.describe_provenance, comparison, collection.runs, command),
        functools.partial(_make_tables, comparison),
        functools.partial(_rate_settings, collection, comparison, made),
    ]
    shares = share_beside if len(collection.runs) >= MANY_RUNS else _work_here
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / "report.html", out / "report.csv", out / "report.json"]
        with shares(tasks) as finish:
            explored = explore()
            figures: list[FigureResult]
            *figures, provenance, (table, document), (importance, importance_key) = finish()
        for figure in figures:
            made.keep(figure.key, figure.made)
        made.keep(importance_key, importance)
        made.write()
        sections = [section for figure in figures for section in figure.sections]
        drawn = [path for figure in figures for path in figure.paths]
        notes += [f"{problem}." for problem in registry.figures.problems]
        notes += [note for figure in figures for note in figure.notes]
        masked_notes = format_json(mask_secrets(notes, mask_keys=False), 1)
        write_atomic(paths[2], f'{document},\n "notes": {masked_notes}\n}}'.encode())
        if table:
            write_atomic(paths[1], table.encode())
        else:
            paths.pop(1).unlink(missing_ok=True)
        listed = {run.id for run in comparison.runs}
        num_apart = sum(run.id not in listed for run in collection.runs)
        explorer = render_explorer(explored, importance=importance, num_apart=num_apart) if explored else ""
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


def _explore(comparison: Comparison, collection: RunCollection, runs: Path, kept_ids: Sequence[str]) -> Document | None:
    """The data of the explorer; None where there is nothing to compare."""
    if collection.is_single_run or not comparison.points:
        return None
    points = [point for point in comparison.points if point.num_views == 1]
    chances = front_probabilities([point.macs for point in points], [point.accuracies for point in points]) or ()
    return build_document(comparison, collection.runs, runs_folder=runs, kept_ids=kept_ids, probabilities=chances)


def _make_tables(comparison: Comparison) -> tuple[str, str]:
    """report.csv, "" without points; and report.json without its last part, the notes."""
    facts = list_facts(comparison)
    return format_csv(facts) if facts else "", write_json(comparison, facts)


def _rate_settings(collection: RunCollection, comparison: Comparison, made: Made) -> tuple[dict[str, Any] | None, str]:
    """The importance of settings, as an earlier report has computed it from the same; and what it is kept by."""
    if collection.is_single_run or not comparison.points:
        return None, ""
    settings = list_settings(comparison)
    key = made.is_kept and compute_digest("importance", settings, digest_program(), find_versions("scikit-learn", "scipy"))
    known = made.find(key or "")
    return known if is_rating(known) else rate_settings(*settings), key or ""


@contextlib.contextmanager
def _work_here(tasks: Sequence[Callable[[], Any]]) -> Iterator[Callable[[], list[Any]]]:
    yield lambda: [task() for task in tasks]


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
