"""Reads runs; writes a table, figures and a page. matplotlib is imported when something is drawn, torch never."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar import registry
from cifar.errors import UserError
from cifar.report import html as pages
from cifar.report import style
from cifar.report.aggregate import Comparison, compare
from cifar.report.load import Collection, collect, count, load, seconds_text, show
from cifar.report.table import Table
from cifar.tracking.run_dir import write_atomic


@dataclass(frozen=True)
class Result:
    """What a report left: files, a table for the terminal (cells are text), and sentences, the answer first."""

    paths: tuple[Path, ...]
    title: str
    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    notes: tuple[str, ...]
    banner: str
    comparison: Comparison
    sweep: str = ""  # the local sweep, where it is of one

    @property
    def page(self) -> Path:
        return next(path for path in self.paths if path.suffix == ".html")


def report(
    names: Sequence[str] = (),
    *,
    runs: Path,
    out: Path | None = None,
    split: str = "val",
    budget: float | None = None,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Compare the named runs and sweeps (none: the newest sweep, or else all runs) and write the report into `out`.

    `out` is by default report/ (of the test split report-test/) in the sweep's folder, in the run's where it is one run, or
    in `runs`. Where nothing is compared, the result has no columns. `progress` hears of (runs read, runs in all) where they
    come from W&B.

    Raises UserError for an unknown name, and where `out` cannot be written.
    """
    found = collect(names, runs, progress)
    comparison = compare(found.runs, split=split, budget=budget, title=found.title, damaged=found.damaged)
    elsewhere = re.sub(r"[^\w.-]+", "_", found.place.partition("://")[2] or found.place)  # of a place on W&B
    out = out or _home(found, runs) / ("report-test" if split == "test" else "report") / elsewhere
    options = ["--split", "test"] if split == "test" else []
    options += ["--budget", f"{budget / 1e6:g}M"] if budget else []
    notes = [*pages.sentences(comparison), *_progress(found, comparison)]
    command = command or shlex.join(["python", "-m", "cifar", "report", *names, *options])
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / "report.html", out / "report.csv", out / "report.json"]
        sections, drawn = _draw(found, comparison, out, notes)
        write_atomic(paths[2], json.dumps(_json(comparison, notes), indent=1).encode())
        if comparison.points:
            write_atomic(paths[1], _csv(comparison).encode())
        else:
            paths.pop(1).unlink(missing_ok=True)
        made = pages.provenance(comparison, found.runs, command)
        html = pages.page(comparison, sections, question=found.question, notes=notes, made=made)
        write_atomic(paths[0], html.encode())
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {out} ({error.strerror or error}); name another place with --out"
        ) from error
    rows = [_row(comparison, point) for point in comparison.points]
    title = " – ".join(part for part in (comparison.banner, comparison.subtitle) if part)
    columns = tuple(rows[0]) if rows else ()
    return Result((*paths, *drawn), title, columns, rows, tuple(notes), comparison.banner, comparison, found.sweep)


def pictures(run_folder: Path) -> list[Path]:
    """Draw one run's figures into RUN/pictures/NAME.png; those that have nothing to show are left out."""
    run = load(Path(run_folder))
    paths = []
    for entry in registry.figures:  # not imported by name: the sub-package is called so too
        if style.scope(entry) != "run":
            continue
        drawn = style.render(entry, run)
        if not drawn.problem or drawn.failed:
            paths.append(run.path / "pictures" / f"{entry.name}.png")
            paths[-1].parent.mkdir(exist_ok=True)
            write_atomic(paths[-1], style.png(drawn.figure, dpi=120))
    return paths


def _home(found: Collection, runs: Path) -> Path:
    return runs / "sweeps" / found.sweep if found.sweep else found.runs[0].path if found.alone and not found.place else runs


def _draw(found: Collection, comparison: Comparison, out: Path, notes: list[str]) -> tuple[list[pages.Section], list[Path]]:
    """Files and page sections of every figure; of a single run its own figures too. Problems become notes."""
    sections, paths = [], []
    for entry in sorted(registry.figures, key=style.order):
        of_run = style.scope(entry) == "run"
        subject = found.runs[0] if found.alone else comparison
        drawn = style.render(entry, subject) if of_run == found.alone and (of_run or comparison.tested) else None
        if drawn and drawn.failed:
            notes.append(f"{drawn.problem}.")
        if not drawn or (drawn.problem and entry.name != "accuracy_vs_macs"):
            for suffix in ("png", "svg"):  # of an earlier report: it would be taken for this one's
                (out / f"{entry.name}.{suffix}").unlink(missing_ok=True)
            continue
        paths += [out / f"{entry.name}.png", out / f"{entry.name}.svg"]
        write_atomic(paths[-2], style.png(drawn.figure))
        vector = style.svg(drawn.figure, entry.name)
        write_atomic(paths[-1], vector.encode())
        maker: Any = entry.builder
        sections.append(pages.Section(maker.title, getattr(maker, "caption", ""), style.inline(vector, drawn.cut)))
    return sections, paths


def _progress(found: Collection, comparison: Comparison) -> list[str]:
    """What stands apart, in a line for each reason, and how far a sweep has come."""
    notes = []
    if found.cells and sum(run.state == "finished" for run in found.runs) < found.cells:
        done = sum(run.state == "finished" for run in found.runs)
        going = sum(run.state == "running" for run in found.runs)
        notes.append(f"{done} of {count(found.cells, 'trial')} finished" + (f", {going} running." if going else "."))
    kinds: dict[str, list[str]] = {}
    for run in comparison.apart:
        kinds.setdefault(run.kind, []).append(run.name if run.name == run.id else f"{run.name} ({run.id})")
    for kind, names in kinds.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        notes.append(f"Apart, {kind}: {', '.join(names[:5])}{more}.")
    return notes


def _row(comparison: Comparison, point: Any) -> dict[str, str]:
    row = {"network": point.model + (f" ({point.views} views)" if point.views > 1 else "")}
    row |= {key: show(value) for key, value in point.values.items() if key != "model"}
    row |= {
        "MMACs": f"{point.macs / 1e6:,.4g}",
        "params M": f"{point.params / 1e6:.3g}",
        f"{comparison.split} acc %": f"{100 * point.mean:.1f}",
        "± 95 %": "–" if point.half is None else f"{100 * point.half:.1f}",
        "n": point.n_text,
        "s a run": seconds_text(point.seconds),
        "front": "*" if point.on_front else "",
    }
    return row


def _facts(comparison: Comparison) -> list[dict[str, Any]]:
    """The points as plain data: fractions, MACs, seconds."""
    return [
        {
            "label": point.label,
            **point.values,
            "dataset": comparison.banner or "CIFAR-10",
            "macs": point.macs,
            "flops": 2 * point.macs,
            "params": point.params,
            "views": point.views,
            "n": point.n,
            "seeds_not_finished": point.lost,
            f"{comparison.split}/acc": point.mean,
            "std": point.std,
            "interval95_half": point.half,
            "seconds": point.seconds,
            "front": point.on_front,
            "runs": [run.id for run in point.runs],
        }
        for point in comparison.points
    ]


def _csv(comparison: Comparison) -> str:
    text = io.StringIO()
    facts = _facts(comparison)
    writer = csv.DictWriter(text, list(facts[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "runs": " ".join(row["runs"])} for row in facts)
    return text.getvalue()


def _json(comparison: Comparison, notes: Sequence[str]) -> dict[str, Any]:
    best = comparison.best
    return {
        "schema": 1,
        "title": comparison.title,
        "dataset": comparison.banner or "CIFAR-10",
        "split": comparison.split,
        "budget": comparison.budget,
        "shared": comparison.shared,
        "seeds": comparison.seeds,
        "best": best.label if best else None,
        "rank_correlation": comparison.correlation,
        "points": _facts(comparison),
        "apart": [{"id": run.id, "name": run.name, "kind": run.kind, "reason": run.reason} for run in comparison.apart],
        "notes": list(notes),
    }


__all__ = ["Result", "Table", "pictures", "report"]
