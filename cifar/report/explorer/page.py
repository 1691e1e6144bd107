"""The explorer's place on the report page: its markup, its style, its program, and its data as blocks that are not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from cifar.report.explorer.document import Document

FOLDER = Path(__file__).parent
HINT = "Move over the points or use the arrow keys; click or Enter opens a point, P pins it, double-click or 0 shows all."
KEY = "Step line: the front. Hollow: one seed. Bars: 95 % intervals. Two dots: both seeds."


@cache
def read_script() -> str:
    """The program, as `web/build.mjs` has built it."""
    return (FOLDER / "explorer.js").read_text(encoding="utf-8")


@cache
def read_style() -> str:
    return (FOLDER / "explorer.css").read_text(encoding="utf-8")


def render_explorer(document: Document, *, importance: Mapping[str, Any] | None = None, num_apart: int = 0) -> str:
    """The section of the explorer. It is hidden until its program has started."""
    apart = f'<button type="button" data-list="apart">not compared ({num_apart})</button>' if num_apart else ""
    return f"""<section id="explorer" hidden aria-label="explorer"><h2>Accuracy against FLOPs</h2>
<div class="controls"></div>
<div class="scatter"><div class="plot" tabindex="0" role="application" aria-roledescription="chart"
 aria-label="Accuracy against cost. Left and right go through the points, up and down along the front, Enter opens, P pins."
 ><canvas class="marks"></canvas><canvas class="overlay"></canvas></div>
<div class="bar drag"><span class="field" role="group" aria-label="what dragging does"><span>drag to</span>
<label><input type="radio" name="drag" value="zoom" checked> zoom</label>
<label><input type="radio" name="drag" value="filter"> filter</label></span>
<button type="button" class="small" data-unzoom hidden>show all</button>
<button type="button" class="small" data-save="svg" data-figure="accuracy">SVG</button>
<button type="button" class="small" data-save="png" data-figure="accuracy">PNG</button>
<button type="button" class="small" data-save="link">copy link to this view</button>
<span class="hint sent" role="status"></span></div>
<p class="hint">{escape(KEY)} <span class="drag">{escape(HINT)}</span></p></div>
<div class="effect" hidden></div>
<div id="explorer-spoken" class="unseen" role="status" aria-live="polite"></div>
<div class="bar compare-bar"></div>
<div class="detail"></div>
<div class="table"><div class="bar"><h3>All points</h3><button type="button" data-list="points">points</button>{apart}
<label><input type="checkbox" class="differing" checked> only what differs</label><span class="count"></span>
<button type="button" class="small" data-save="csv">CSV of what is shown</button></div>
<div class="rows" tabindex="0" role="region" aria-label="table"></div></div>
<div class="parallel"><div class="bar"><h3>Parallel coordinates</h3>
<button type="button" class="small" data-save="svg" data-figure="parallel" aria-label="parallel coordinates as SVG">SVG</button>
<button type="button" class="small" data-save="png" data-figure="parallel" aria-label="parallel coordinates as PNG">PNG</button>
<span class="hint drag">Drag along an axis to filter; a click on it ends the filter. –: the network has no such setting.</span>
</div>
<div class="scroll" tabindex="0" role="region" aria-label="parallel coordinates"><div class="plot">
<canvas aria-hidden="true"></canvas><svg aria-hidden="true"></svg></div></div></div>
{_render_importance(importance)}
</section><div id="explorer-tip" hidden></div>
<script type="text/plain" id="explorer-table">{document.table}</script>
<script type="text/plain" id="explorer-curves">{document.curves}</script>
<script type="text/plain" id="explorer-details">{document.details}</script>"""


def _render_importance(importance: Mapping[str, Any] | None) -> str:
    if not importance:
        return ""
    if not importance.get("shares"):
        return (
            '<div class="importance"><div class="bar"><h3>Importance of settings</h3></div>'
            f'<p class="hint"><span class="of">of all runs</span>: not computed, {escape(str(importance["reason"]))}</p></div>'
        )
    shares: Sequence[Mapping[str, Any]] = importance["shares"]
    top = max(share["high"] for share in shares) or 1.0
    return (
        '<div class="importance"><div class="bar"><h3>Importance of settings</h3></div><p class="hint">Share of the variance '
        f'of accuracy that a setting explains alone, <span class="of">of all runs</span>. {escape(str(importance["note"]))}</p>'
        f"<ol>{''.join(_render_share(share, top) for share in shares)}</ol></div>"
    )


def _render_share(share: Mapping[str, Any], top: float) -> str:
    """One bar: the mean share, and a line over its range."""
    left, width = 100 * share["low"] / top, 100 * (share["high"] - share["low"]) / top
    text = f"{100 * share['mean']:.0f} % ({100 * share['low']:.0f} to {100 * share['high']:.0f})"
    return (
        f"<li><span>{escape(share['key'])}</span><span class='track'><span class='share' "
        f"style='width:{100 * share['mean'] / top:.1f}%'></span><span class='spread' "
        f"style='left:{left:.1f}%;width:{width:.1f}%'></span></span><span>{text}</span></li>"
    )
