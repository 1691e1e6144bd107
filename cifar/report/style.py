"""How every figure of a report looks, and the one place that turns a registered figure into PNG or SVG.

A figure is a class registered under a name (`registry.figures`), one file in figures/ or in a plug-in's figures/:

    @figures.register("my_figure")
    class MyFigure:
        scope = "sweep"                          # select() is given a Comparison; "run": it is given a Run
        title = "What it shows"
        caption = "How to read it."              # optional; order = 50 (optional) sorts figures on the page
        def select(self, subject): ...           # -> data, or Nothing("why")
        def draw(self, data, figure): ...        # on an empty matplotlib Figure; no arithmetic
        def size(self, data): return 7.2, 4.4    # optional: width and height in inches
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar.registry import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2a37", "#6b7785", "#e3e7ec", "#ffffff"
BLUE, ORANGE, RED, GREEN, AMBER = "#2f6fde", "#e07b2a", "#d2413f", "#2b9a66", "#ffe9b8"
DIM = "#a3adb8"  # what is beaten
# in the page these follow the reader's light or dark theme; series colours are readable on both
THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
RAMP = ("#5b8def", "#3aa6b9", "#3fae7a", "#a3a93a", "#e0a030", "#e0703a", "#cf4b6e")  # cheap -> costly; distinct in print
SIZE = (7.2, 4.4)
DPI = 160  # laid out as it is saved: hinted text is 2 % wider at this than at matplotlib's 100
_FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans")


@dataclass(frozen=True)
class Nothing:
    """What select() returns where there is nothing to draw."""

    why: str


@dataclass(frozen=True)
class Drawn:
    """A figure, and why it is empty or failed (else "")."""

    figure: Figure
    problem: str = ""
    failed: bool = False
    cut: float = 0.0  # inches at its top that hold title and subtitle, which a page says by itself


def order(entry: Entry) -> tuple[bool, int, str]:
    """Sorts figures: of sweeps before those of runs, then as each says."""
    maker: Any = entry.builder
    return maker.scope != "sweep", getattr(maker, "order", 50), entry.name


def scope(entry: Entry) -> str:
    maker: Any = entry.builder
    return str(maker.scope)


def rc() -> Any:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return {
        "font.family": [*(font for font in _FONTS if font in installed), "DejaVu Sans"],
        "font.size": 9,
        "text.parse_math": False,  # a "$" in a run's name is a dollar
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,  # "+1.504e1" in a corner is not read
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.facecolor": "none",
        "figure.facecolor": PAPER,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
        "svg.fonttype": "path",
    }


def render(entry: Entry, subject: Any) -> Drawn:
    """Select and draw one registered figure on a Comparison or a Run. It never raises: a failure is drawn and returned."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def fresh(size: tuple[float, float]) -> tuple[Figure, float]:
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, _head(figure, maker.title, subject.subtitle, subject.banner)

    with matplotlib.rc_context(rc()), _quiet():
        try:
            maker = entry.build()
            data = maker.select(subject)
            if isinstance(data, Nothing):
                figure, cut = fresh((SIZE[0], 2.2))
                _say(figure, f"nothing to show: {data.why}")
                return Drawn(figure, data.why, cut=cut)
            figure, cut = fresh(maker.size(data) if hasattr(maker, "size") else SIZE)
            maker.draw(data, figure)
            lay_out(figure)
            figure.set_layout_engine("none")  # each of the files it is saved to needs not do it again
            return Drawn(figure, cut=cut)
        except Exception as error:  # one figure (perhaps a plug-in's) must not cost the report
            problem = f"figure '{entry.name}' failed ({type(error).__name__}: {error}); mend {entry.file}"
            figure = Figure(figsize=(SIZE[0], 2.2), layout="constrained")
            _head(figure, "", "", subject.banner)
            _say(figure, problem)
            return Drawn(figure, problem, failed=True)


def lay_out(figure: Figure) -> None:
    """Settle where everything goes. figure.draw_without_rendering() goes through all of it once more."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with _saving(figure, dpi):
        FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def svg(figure: Figure, salt: str) -> str:
    """An SVG whose hovered points show their tips; `salt` makes its ids unique on a page and equal every time."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with _saving(figure, figure.dpi, salt):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # type: ignore[no-untyped-call]
    text = buffer.getvalue()
    return re.sub(r'<g id="tip:([^"]*)">', r'<g class="tip"><title>\1</title>', text)


def inline(text: str, cut: float = 0.0) -> str:
    """svg() -> the <svg> element for a page, bare, in the page's colours and on its background. `cut`: as in Drawn."""
    points = 72 * cut
    for part, instead in (
        ("title", 'display="none"'),
        ("paper", 'display="none"'),
        ("banner", f'transform="translate(0 {points:g})"'),
    ):
        text = text.replace(f'<g id="head:{part}">', f"<g {instead}>")
    width, height = map(float, re.findall(r' viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    text = re.sub(r' viewBox="[^"]*"', f' viewBox="0 {points:g} {width:g} {height - points:g}"', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    size = f' width="{width:g}pt" height="{height - points:g}pt" role="img"'
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', size, text, count=1)
    for colour, variable in THEMED.items():
        text = text.replace(colour, variable)
    return text


@contextlib.contextmanager
def _saving(figure: Figure, dpi: float, salt: str = "cifar") -> Iterator[None]:
    """Around a canvas's own print_...(): savefig() draws everything once more before that."""
    import matplotlib

    canvas, before = figure.canvas, figure.dpi
    figure.dpi = dpi
    try:
        with matplotlib.rc_context({**rc(), "svg.hashsalt": salt}), _quiet():
            yield
    finally:
        figure.dpi = before
        figure.set_canvas(canvas)


class _quiet(warnings.catch_warnings):
    """A name in a script that the fonts lack is drawn as boxes, and is no reason for a warning."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _head(figure: Figure, title: str, subtitle: str, banner: str) -> float:
    """Title, subtitle and the banner about the data, above the area that is laid out -> inches of the first two."""
    width, height = figure.get_size_inches()
    rows = [(banner, 9, "bold", INK, 0.26), (title, 12, "bold", INK, 0.25), (subtitle, 8.5, "normal", MUTED, 0.2)]
    below = 0.08
    top = below
    total = sum(row[4] for row in rows if row[0]) + (0.12 if title or banner else 0)
    figure.patch.set_gid("head:paper")
    figure.set_size_inches(width, height + total)
    for text, size, weight, colour, inches in rows:
        if text:
            box = {"facecolor": AMBER, "edgecolor": "none", "pad": 3.5} if text is banner else None
            colour = "#5c3c00" if text is banner else colour
            x, y = 0.1 / width, 1 - top / (height + total)
            drawn = figure.text(x, y, short(text, int(width * 16)), size=size, weight=weight, color=colour, va="top", bbox=box)
            drawn.set_gid("head:banner" if text is banner else "head:title")
            top += inches
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 1, 1 - total / (height + total)), w_pad=0.06, h_pad=0.06)  # type: ignore[call-arg]
    return total - (rows[0][4] + 0.12 if banner else 0)


def _say(figure: Figure, text: str) -> None:
    axes = figure.subplots()
    axes.set_axis_off()
    lines = re.findall(r".{1,90}(?:\s|$)|.{1,90}", text)
    axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", color=MUTED, size=10)


def short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


# -- axes --------------------------------------------------------------------------------------------------------------


def colours(n: int) -> list[str]:
    """n colours along the ramp, in the order of the points' cost."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("ramp", RAMP)
    return [to_hex(ramp(i / max(n - 1, 1))) for i in range(n)]


def log_axis(axis: Any, text: Callable[[float], str]) -> None:
    """A logarithmic x or y axis with ticks at 1, 2, 5 where decades are few, written by `text`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis._set_axes_scale("log")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 and high > low else 1
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0, 3.0) if decades < 4 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(LogLocator(subs=tuple(range(2, 10)) if decades < 8 else (1.0,)))
    axis.set_minor_formatter(NullFormatter())
    axis.grid(visible=False, which="minor")


def epoch_axis(axes: Axes, most: int = 6) -> None:
    """Whole epochs along x; of a single epoch that one tick."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def power(value: float) -> str:
    """1e-3 -> 10⁻³, 3e-3 -> 3·10⁻³, 20 -> 20."""
    if value <= 0 or 1e-2 <= value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10**exponent
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if abs(factor - 1) < 1e-6 else f"{factor:.3g}·10{raised}"


def layer_ticks(axis: Any, layers: Sequence[str], most: int = 32) -> None:
    """Layer names along an axis; of very deep networks every k-th."""
    step = max(1, math.ceil(len(layers) / most))
    axis.set_ticks(range(0, len(layers), step), [short(name, 28) for name in layers[::step]])


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], size: float = 7.5) -> None:
    """(x, y, text, colour) -> names in the margin right of a line's end, moved apart where they would overlap."""
    if not ends:
        return
    lay_out(axes.figure)  # type: ignore[arg-type]
    gap = size * 1.25
    scale = axes.figure.dpi / 72  # pixels a point
    order = sorted(ends, key=lambda end: end[1])
    wanted = [axes.transData.transform((x, y))[1] / scale for x, y, _, _ in order]
    places = spread(wanted, gap)
    for (x, y, text, colour), place, want in zip(order, places, wanted, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            short(text, 30), (x, y), (10, place - want), textcoords="offset points",
            color=colour, size=size, va="center", arrowprops=arrow,
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Sorted positions -> positions at least `gap` apart, in the same order, each cluster around its mean."""
    clusters: list[tuple[float, int]] = []  # (sum of wanted positions less their offsets, size)
    for want in wanted:
        total, n = want, 1
        while clusters:
            before, m = clusters[-1]
            if total / n - (before / m + gap * m) >= 0:
                break
            clusters.pop()
            total, n = before + total - n * gap * m, n + m
        clusters.append((total, n))
    return [total / n + gap * i for total, n in clusters for i in range(n)]


@dataclass(frozen=True)
class Mark:
    """A point that wants a name. Marks that come first are placed first; `must`: rather crowded than nameless."""

    x: float
    y: float
    text: str
    colour: str = INK
    must: bool = False
    bold: bool = False


_OFFSETS = [
    (dx * r, dy * r) for r in (8, 14, 22) for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]


def label_points(
    axes: Axes,
    marks: Sequence[Mark],
    paths: Iterable[Sequence[tuple[float, float]]] = (),
    size: float = 7.5,
) -> int:
    """Write names beside points without overlaps, off the given paths. Returns how many found no place."""
    figure: Any = axes.figure
    lay_out(figure)
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent()
    centres = [axes.transData.transform((mark.x, mark.y)) for mark in marks]
    dots = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in centres]
    lines = []
    for path in paths:
        pixels = [axes.transData.transform(xy) for xy in path]
        lines += [(min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])) for a, b in itertools.pairwise(pixels)]
    placed: list[tuple[float, ...]] = []
    left_out = 0
    for mark, (cx, cy) in zip(marks, centres, strict=True):
        note = axes.annotate(
            short(mark.text, 34), (mark.x, mark.y), (0, 0), textcoords="offset points",
            size=size, color=mark.colour, weight="bold" if mark.bold else "normal", zorder=6,
        )  # fmt: skip
        note.set_in_layout(False)
        extent = note.get_window_extent(renderer)
        best: tuple[float, Any, Any] = (math.inf, None, None)
        for i, (dx, dy) in enumerate(_OFFSETS):
            x = cx + dx * scale - (0 if dx > 0 else extent.width if dx < 0 else extent.width / 2)
            y = cy + dy * scale - (0 if dy > 0 else extent.height if dy < 0 else extent.height / 2)
            box = (x, y, x + extent.width, y + extent.height)
            outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
            cost = 30 * outside + 20 * _hits(box, placed, 2) + 10 * _hits(box, dots, 0) + 3 * _hits(box, lines, 0) + 0.1 * i
            best = min(best, (cost, (dx, dy), box), key=lambda choice: choice[0])
        cost, (dx, dy), box = best
        if cost >= 10 and not mark.must:
            note.remove()
            left_out += 1
            continue
        placed.append(box)
        note.set_position((dx, dy))
        note.set(
            ha="left" if dx > 0 else "right" if dx < 0 else "center", va="bottom" if dy > 0 else "top" if dy < 0 else "center"
        )
    return left_out


def _hits(box: tuple[float, ...], others: Iterable[tuple[float, ...]], margin: float) -> int:
    return sum(
        box[0] < o[2] + margin and box[2] > o[0] - margin and box[1] < o[3] + margin and box[3] > o[1] - margin for o in others
    )
