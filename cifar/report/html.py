"""The report's HTML page. It needs no other file and no network, and every text of a run is escaped."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from typing import Any

from cifar.report.aggregate import Comparison, MeasuredCost, Point, describe_settings
from cifar.report.explorer.page import read_script, read_style
from cifar.report.formatting import (
    format_macs,
    format_mega_macs,
    format_mega_params,
    format_percent,
    format_value,
    pluralize,
)
from cifar.report.load import ExcludedRun, Run
from cifar.system.durations import format_duration
from cifar.system.names import escape_controls
from cifar.system.redact import redact


@dataclass(frozen=True)
class Section:
    """A figure on the page: its title, how to read it, and an <svg> element, which is inserted as it is."""

    title: str
    caption: str
    svg: str
    in_explorer: bool = False  # the explorer shows the same, so that the figure stands here for browsers without scripts only


NO_TEST_SCORES = "No run has a test accuracy; `python -m cifar train ... test=final` makes one."
MAX_LISTED = 30  # points in the table of a page with many
MAX_EXCLUDED = 100  # runs in the table of what is left out
MAX_EXCLUDED_BESIDE = 12  # of more, the explorer's list is enough
MAX_NOTES = 3  # after the answer; the others are folded
MAX_BIASED_LISTED = 5  # points that the sentences name; the table marks all of them

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --page: #f6f7f9; --ink: #1f2a37; --muted: #5d6977; --line: #e3e7ec;
  --edge: #8a95a3; --accent: #2f6fde; --soft: #eef3fc; --warn: #ffe9b8; --warn-ink: #5c3c00; }
@media (prefers-color-scheme: dark) { :root { --paper: #171b21; --page: #101318; --ink: #e4e8ee; --muted: #98a3b1;
  --line: #2b323c; --edge: #6b7787; --accent: #7aa5f5; --soft: #1b2638; --warn: #4a3708; --warn-ink: #ffe2a0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; -webkit-text-size-adjust: 100%;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
p { margin: 0 0 .75rem; }
.lead, .question { color: var(--muted); max-width: 46rem; }
.question { white-space: pre-line; }
.banner { position: sticky; top: 0; z-index: 5; background: var(--warn); color: var(--warn-ink); font-weight: 700;
  text-align: center; padding: .55rem 1rem; }
.answer { border-left: 3px solid var(--accent); background: var(--soft); padding: .8rem 1.1rem; margin: 1.4rem 0;
  border-radius: 0 8px 8px 0; }
.answer p:last-child { margin: 0; }
.answer strong { font-size: 1.08rem; }
.answer summary { cursor: pointer; color: var(--muted); } .answer details p { margin: .5rem 0 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.3rem 1.4rem; margin: 1.2rem 0; }
section svg, section > img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.caption { color: var(--muted); font-size: .87rem; margin: .8rem 0 0; max-width: 52rem; }
.tip { cursor: default; }
.tip:hover { filter: brightness(1.15) drop-shadow(0 0 2px var(--accent)); }
#tip { position: fixed; z-index: 9; display: none; pointer-events: none; white-space: pre-line;
  max-width: 22rem; padding: .45rem .65rem;
  background: var(--ink); color: var(--paper); border-radius: 6px; font-size: .82rem; line-height: 1.4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .89rem; }
th, td { text-align: left; padding: .42rem .8rem .42rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.front td:first-child { font-weight: 600; }
tr.dominated td { color: var(--muted); }
code { font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: 0; font-size: .89rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  :root { color-scheme: light; --paper: #ffffff; --page: #ffffff; --ink: #1f2a37; --muted: #4a5563; --line: #d5dae1;
    --edge: #8a95a3; --accent: #2f6fde; --soft: #eef3fc; --warn: #ffe9b8; --warn-ink: #5c3c00; }
  body { background: none; } main { padding: 0; max-width: none; } .banner { position: static; }
  section, #explorer { border: 0; padding: 0; } figure, tr, .answer, section > svg, section > img { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
  .answer details::details-content { content-visibility: visible; } .answer summary { display: none; }
  #tip { display: none !important; } * { print-color-adjust: exact; }
}
"""

SCRIPT = """
const box = document.body.appendChild(Object.assign(document.createElement('div'), {id: 'tip'}));
for (const mark of document.querySelectorAll('.tip')) {
  const title = mark.querySelector('title'); const text = title.textContent; title.remove();
  mark.setAttribute('role', 'img'); mark.setAttribute('aria-label', text);
  mark.addEventListener('mousemove', at => { box.textContent = text; box.style.display = 'block';
    box.style.left = Math.min(at.clientX + 14, innerWidth - box.offsetWidth - 8) + 'px';
    box.style.top = Math.min(at.clientY + 14, innerHeight - box.offsetHeight - 8) + 'px'; });
  mark.addEventListener('mouseleave', () => { box.style.display = 'none'; });
}
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.parentElement, table = head.closest('table'), column = head.cellIndex, body = table.tBodies[0];
  const up = head.getAttribute('aria-sort') !== 'ascending';
  for (const other of table.querySelectorAll('th')) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => { const x = key(a), y = key(b), both = x !== '' && y !== '' && !isNaN(x) && !isNaN(y);
    return both ? x - y : x.localeCompare(y); };
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
});
"""


def escape(text: str) -> str:
    """Text for the page: without secrets, markup, and what would turn the order of the letters beside it."""
    return escape_html(escape_controls(redact(text), keeps_lines=True))


def render_page(
    comparison: Comparison,
    sections: Sequence[Section],
    *,
    question: str,
    notes: Sequence[str],
    provenance: Mapping[str, str],
    explorer: str = "",
) -> str:
    """The whole page. `notes`: the report's sentences, the answer first. `provenance`: how it was made, name -> text.

    explorer: the section of the explorer, with its data; "" for a page without it.
    """
    banner = f'<div class="banner" role="alert">{escape(comparison.banner)}</div>' if comparison.banner else ""
    title = " – ".join(part for part in (comparison.banner, comparison.title) if part)
    scripts = [SCRIPT, read_script()] if explorer else [SCRIPT]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts)
    # The policy protects even if a text was not escaped: the browser runs no script but ours and fetches nothing.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}"
    first, other_sections = sections[:1], sections[1:]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{escape(title)}</title><style>{STYLE}{read_style() if explorer else ''}</style></head><body>{banner}<main>",
        f"<h1>{escape(comparison.title)}</h1>",
        f'<p class="lead">{escape(comparison.subtitle.removeprefix(comparison.title + " · "))}</p>',
        f'<p class="question">{escape(question)}</p>' if question else "",
        _render_answer(notes),
        explorer,
        *map(_render_figure, first),
        _render_points(comparison) if comparison.points else "",
        *map(_render_figure, other_sections),
        _render_excluded(comparison.excluded, in_explorer=bool(explorer)) if comparison.excluded else "",
        f"<section><h2>How it was made</h2><dl>{''.join(_render_fact(k, v) for k, v in provenance.items())}</dl></section>",
        "</main>",
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def render_image(webp: bytes, title: str) -> str:
    """A figure as a picture inside the page."""
    return f'<img alt="{escape(title)}" src="data:image/webp;base64,{base64.b64encode(webp).decode()}">'


def _render_answer(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    others = [f"<p>{escape(note)}</p>" for note in notes[1:]]
    folded = others[MAX_NOTES:] if len(others) > MAX_NOTES + 1 else []
    more = f"<details><summary>{len(folded)} more notes</summary>{''.join(folded)}</details>" if folded else ""
    shown = "".join(others[: len(others) - len(folded)])
    return f'<div class="answer"><p><strong>{escape(notes[0])}</strong></p>{shown}{more}</div>'


def _render_figure(section: Section) -> str:
    caption = f'<p class="caption">{escape(section.caption)}</p>' if section.caption else ""
    kind = ' class="without-scripts"' if section.in_explorer else ""
    return f"<section{kind}><h2>{escape(section.title)}</h2>{section.svg}{caption}</section>"


def _render_points(comparison: Comparison) -> str:
    keys = [key for key in comparison.distinguishing_keys if key != "model"]
    numbers = ["MMACs", "params, M", f"{comparison.split} accuracy, %", "± 95 %", "n", "time a run"]
    numbers += [each.heading for each in comparison.measured_costs]
    head = _render_header_row(
        [("network", False), *((key, False) for key in keys), *((name, True) for name in numbers), ("", False)]
    )
    body = []
    listed = _choose_listed(comparison)
    for point in listed:
        cells = [
            _render_cell(point.network_name),
            *(_render_cell(format_value(point.values.get(k)), _number_or_none(point.values.get(k))) for k in keys),
        ]
        cells += [
            _render_cell(format_mega_macs(point.macs), point.macs),
            _render_cell(format_mega_params(point.params), point.params),
            _render_cell(format_percent(point.mean), point.mean),
            _render_cell(point.interval_text, -1 if point.ci_half_width is None else point.ci_half_width),
            _render_cell(point.num_seeds_text, point.num_seeds),
            _render_cell(format_duration(point.seconds), -1 if point.seconds is None else point.seconds),
            *(_render_measured_cost(point, each) for each in comparison.measured_costs),
            _render_cell("front" if point.on_front else ""),
        ]
        body.append(f'<tr class="{"front" if point.on_front else "dominated"}">{"".join(cells)}</tr>')
    title = " – ".join(part for part in (comparison.banner, "All points") if part)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    note = (
        "Accuracy of the last epoch, mean over n seeds. A click on a heading sorts. "
        "Grey: another point has at least this accuracy for at most these multiply-adds."
    )
    if any(point.interval for point in comparison.points):
        note += " The interval ends at 0 and 100 %, which no accuracy passes."
    if any(point.seed_accuracies for point in comparison.points):
        note += " With two seeds both accuracies stand in its place."
    if any(point.num_lost for point in comparison.points):
        note += " n = 1 of 3: two more seeds came to an end without a result, and are not in the mean."
    if len(listed) < len(comparison.points):
        left_out = len(comparison.points) - len(listed)
        note += f" The front and the best {MAX_LISTED}; report.csv and the explorer have the other {left_out}, too."
    return f'<section class="without-scripts"><h2>{escape(title)}</h2>{table}<p class="caption">{note}</p></section>'


def _render_measured_cost(point: Point, column: MeasuredCost) -> str:
    cost = point.mean_cost(column.name)
    return _render_cell(column.format_value(cost), -1 if cost is None else cost)


def _choose_listed(comparison: Comparison) -> list[Point]:
    """The points of the table: all, or of many the front and the best ones."""
    if len(comparison.points) <= 4 * MAX_LISTED:
        return list(comparison.points)
    best = {id(point) for point in sorted(comparison.points, key=lambda point: -point.mean)[:MAX_LISTED]}
    return [point for point in comparison.points if point.on_front or id(point) in best]


def _render_excluded(excluded: Sequence[ExcludedRun], *, in_explorer: bool = False) -> str:
    rows = "".join(
        f"<tr>{''.join(map(_render_cell, (run.name, run.id if run.id != run.name else '', run.kind, run.reason)))}</tr>"
        for run in excluded[:MAX_EXCLUDED]
    )
    more = f" {len(excluded) - MAX_EXCLUDED} more are in report.json." if len(excluded) > MAX_EXCLUDED else ""
    kind = ' class="without-scripts"' if in_explorer and len(excluded) > MAX_EXCLUDED_BESIDE else ""
    head = _render_header_row([("run", False), ("id", False), ("state", False), ("why", False)])
    return (
        f"<section{kind}><h2>What is left out</h2><p class='caption'>Not in the figures and never the best."
        f"{more}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _render_header_row(columns: Iterable[tuple[str, bool]]) -> str:
    return "".join(
        f"<th{' class=number' if number else ''}>{f'<button>{escape(name)}</button>' if name else ''}</th>"
        for name, number in columns
    )


def _render_cell(text: str, value: float | None = None) -> str:
    return f"<td>{escape(text)}</td>" if value is None else f'<td class="number" data-value="{value!r}">{escape(text)}</td>'


def _number_or_none(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _render_fact(name: str, value: str) -> str:
    return f"<dt>{escape(name)}</dt><dd>{f'<code>{escape(value)}</code>' if name == 'command' else escape(value)}</dd>"


def describe_provenance(comparison: Comparison, runs: Iterable[Run], command: str) -> dict[str, str]:
    """How the report was made: name -> text. The facts come from the configurations and environments of the runs."""
    runs = list(comparison.runs or runs)

    environments: dict[int, tuple[Any, list[Run]]] = {}  # by id: many runs have one in common
    for run in runs:
        environments.setdefault(id(run.environment), (run.environment, []))[1].append(run)

    def list_distinct(*keys: str) -> str:
        found: dict[str, int] = {}
        for value, own_runs in environments.values():
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value not in (None, "", {}):
                found[format_value(value)] = found.get(format_value(value), 0) + len(own_runs)
        texts = [text if len(found) == 1 else f"{text} ({pluralize(n, 'run')})" for text, n in found.items()]
        return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")

    torch, python, commit, data = (
        list_distinct("versions", "torch"),
        list_distinct("versions", "python"),
        list_distinct("git", "commit"),
        list_distinct("data_fingerprint"),
    )
    seconds = sum(run.seconds or 0 for run in runs)
    timed = pluralize(sum(1 for run in runs if run.seconds), "run")
    days = sorted({time.strftime("%Y-%m-%d", time.gmtime(run.created)) for run in runs if run.created})
    facts = {
        "command": command,
        "held fixed" if len(comparison.points) > 1 else "settings": describe_settings(comparison),
        "differs as well": ", ".join(comparison.differing_keys),
        "drawn": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "runs of": " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
        "dataset": ", ".join(dict.fromkeys(run.banner or "CIFAR-10, the official files" for run in runs)),
        "data fingerprint": re.sub(r"\b([0-9a-f]{16})[0-9a-f]+", r"\1…", data),
        "device": list_distinct("device"),
        "threads": list_distinct("threads"),
        "versions": "; ".join(f"{name} {text}" for name, text in (("Python", python), ("torch", torch)) if text),
        "code": re.sub(r"\b([0-9a-f]{10})[0-9a-f]+", r"\1", commit)
        + (", with local changes" if "true" in list_distinct("git", "dirty") else ""),
        "training time": f"{format_duration(seconds)} over {timed}" if seconds else "",
    }
    return {name: text for name, text in facts.items() if text}


def write_sentences(comparison: Comparison) -> list[str]:
    """The report in sentences. The first one says which point is the best."""
    best, budget = comparison.best, comparison.budget
    under_budget = f" under {format_macs(budget)}" if budget else ""
    if best:
        notes = [
            f"Best{under_budget}: {best.label}, {comparison.split} accuracy {best.accuracy_text} at {format_macs(best.macs)}."
        ]
    elif comparison.front and budget:
        cheapest = comparison.front[0]
        notes = [
            f"No point needs at most {format_macs(budget)}; the cheapest is {cheapest.label} with {format_macs(cheapest.macs)}."
        ]
    elif comparison.points:
        notes = ["No point has a single view of an image, and several views do not compare with one: nothing is the best."]
    else:
        notes = ["No finished run to compare yet." if comparison.has_scores else NO_TEST_SCORES]
    if comparison.num_test_only:
        have = f"{pluralize(comparison.num_test_only, 'run')} without validation images"
        notes.append(f"Not compared here: {have}, with a test accuracy; --split test compares these.")
    xs = [point.macs for point in comparison.points if point.num_views == 1]
    if len(xs) > 2 and (rho := comparison.macs_rank_correlation) is not None:
        spread = f"over a factor {xs[-1] / xs[0]:.3g} in MACs" if xs[0] else ""
        notes.append(f"Rank correlation of MACs and accuracy: {rho:.2f} (Spearman, {len(xs)} points {spread}).")
    if comparison.points and all(point.num_seeds == 1 for point in comparison.points):
        notes.append("One seed a point: differences of a point or so may be luck; repeat with seed: {values: [0, 1, 2]}.")
    if any(point.seed_accuracies for point in comparison.points):
        notes.append(
            "Two seeds make no useful interval (Student's t is 12.7): both accuracies are shown; three seeds make one."
        )
    biased = [point for point in comparison.configurations if point.num_lost]
    for point in biased[:MAX_BIASED_LISTED]:
        gone = f"{point.num_lost} of {pluralize(point.num_seeds + point.num_lost, 'seed')} of {point.label} did not finish"
        notes.append(f"{gone}: its mean is over the rest and may be biased.")
    if len(biased) > MAX_BIASED_LISTED:
        more = pluralize(len(biased) - MAX_BIASED_LISTED, "more point")
        notes.append(f"{more} have seeds that did not finish, too: column n of the table says how many.")
    return notes
