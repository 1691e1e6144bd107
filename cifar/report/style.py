"""The style of the figures, and the rendering of a registered figure as PNG or SVG.

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
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

from cifar.registry import Entry
from cifar.report.formatting import format_power, shorten_text
from cifar.report.labels import (
    PointLabel,
    label_line_ends,
    label_points,
    lay_out_figure,
    separate_labels,
    set_epoch_axis,
    set_layer_ticks,
    set_log_axis,
)
from cifar.report.palette import (
    AMBER,
    BLUE,
    DIM,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    RAMP,
    RED,
    THEME_VARIABLES,
    ramp_colours,
)
from cifar.system.redact import redact
from cifar.system.user_code import describe_error, pass_interrupt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (7.2, 4.4)
DPI = 160  # for the layout as for the file: hinted text is 2 % wider at 160 than at matplotlib's default of 100
_FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans")


@dataclass(frozen=True)
class Nothing:
    """What select() returns if there is nothing to draw."""

    why: str


@dataclass(frozen=True)
class DrawnFigure:
    """A figure. `problem` says why it is empty or failed; it is "" if all is well."""

    figure: Figure
    problem: str = ""
    has_failed: bool = False
    header_inches: float = 0.0  # of title and subtitle at its top, which the page writes as text


def sort_key(entry: Entry) -> tuple[bool, float, str]:
    """The order of figures: those of a sweep before those of a run, then by their `order`."""
    order = getattr(entry.builder, "order", 50)
    return get_scope(entry) != "sweep", order if isinstance(order, int | float) else 50, entry.name


def get_scope(entry: Entry) -> str:
    return str(getattr(entry.builder, "scope", ""))


def describe_class_problem(entry: Entry) -> str:
    """What the class of a figure lacks, as a sentence; "" if it has all."""
    if get_scope(entry) not in ("sweep", "run"):
        return f'figure \'{entry.name}\' has no scope, and is left out; write scope = "run" or "sweep" in {entry.file}'
    missing = [name for name in ("title", "select", "draw") if not hasattr(entry.builder, name)]
    return f"figure '{entry.name}' has no {missing[0]}, and is left out; give it one in {entry.file}" if missing else ""


def matplotlib_settings() -> Any:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return {
        "font.family": [*(font for font in _FONTS if font in installed), "DejaVu Sans"],
        "font.size": 9,
        "text.parse_math": False,  # a "$" in a run's name is a dollar sign
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,  # readers overlook "+1.504e1" in a corner
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


@dataclass(frozen=True)
class Selection:
    """A figure and what it shows, as its select() gives it; `error` is what that raised."""

    maker: Any = None
    data: Any = None
    error: BaseException | None = None


def select_data(entry: Entry, subject: Any) -> Selection:
    """Find out what a registered figure shows of a Comparison or a Run. It never raises."""
    try:
        with _silence_warnings():
            maker = entry.build()
            return Selection(maker, maker.select(subject))
    except BaseException as error:  # perhaps a plug-in's
        pass_interrupt(error)
        return Selection(error=error)


def describe_drawing() -> list[Any]:
    """All that a drawing depends on beside the figure's data: libraries, their settings, the files of the fonts."""
    import matplotlib
    import PIL
    from matplotlib import font_manager, ft2font

    versions = [matplotlib.__version__, ft2font.__freetype_version__, PIL.__version__]
    with matplotlib.rc_context(matplotlib_settings()):
        settings = {name: repr(dict.get(matplotlib.rcParams, name)) for name in sorted(matplotlib.rcParams)}
        families = matplotlib.rcParams["font.family"]
    settings = {name: text for name, text in settings.items() if not name.startswith("backend")}  # ours are fixed
    files = sorted({font.fname for font in font_manager.fontManager.ttflist if font.name in families})
    stats = [os.stat(file) if os.path.exists(file) else None for file in files]
    fonts = [[file, about.st_size, about.st_mtime_ns] for file, about in zip(files, stats, strict=True) if about]
    return [*versions, settings, fonts]


def render_figure(entry: Entry, subject: Any, selection: Selection | None = None) -> DrawnFigure:
    """Draw a registered figure of a Comparison or a Run. It never raises: the figure then shows the error.

    selection: what `select_data` has found, if that was called before.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def make_figure(size: tuple[float, float]) -> tuple[Figure, float]:
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, _draw_header(figure, figure_maker.title, subject.subtitle, subject.banner)

    selection = selection or select_data(entry, subject)
    figure_maker, data = selection.maker, selection.data
    with matplotlib.rc_context(matplotlib_settings()), _silence_warnings():
        try:
            if selection.error:
                raise selection.error
            if isinstance(data, Nothing):
                figure, header_inches = make_figure((SIZE[0], 2.2))
                _draw_message(figure, f"nothing to show: {data.why}")
                return DrawnFigure(figure, data.why, header_inches=header_inches)
            figure, header_inches = make_figure(figure_maker.size(data) if hasattr(figure_maker, "size") else SIZE)
            figure_maker.draw(data, figure)
            lay_out_figure(figure)
            figure.set_layout_engine("none")  # so that saving it does not lay it out again
            return DrawnFigure(figure, header_inches=header_inches)
        except BaseException as error:  # an error in one figure, perhaps a plug-in's, must not end the report
            pass_interrupt(error)
            problem = redact(f"figure '{entry.name}' failed ({describe_error(error)}); correct {entry.file}")
            figure = Figure(figsize=(SIZE[0], 2.2), layout="constrained")
            _draw_header(figure, "", "", subject.banner)
            _draw_message(figure, problem)
            return DrawnFigure(figure, problem, has_failed=True)


def encode_png(figure: Figure, dpi: int = DPI) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with _prepare_canvas(figure, dpi):
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def shrink_picture(png: bytes, factor: float = 0.55, *, top_inches: float = 0.0) -> bytes:
    """A PNG as WebP in less detail, for a page where the same figure as SVG would be large. `top_inches` are cut off."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture = picture.crop((0, round(top_inches * DPI), picture.width, picture.height))
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=60)
    return buffer.getvalue()


def encode_svg(figure: Figure, salt: str) -> str:
    """As SVG, with tooltips of points. `salt` makes its ids unique on a page and the same in every run."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with _prepare_canvas(figure, figure.dpi, salt):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r'<g id="tip:([^"]*)">', r'<g class="tip"><title>\1</title>', text)


def inline_svg(text: str, header_inches: float = 0.0, title: str = "") -> str:
    """The <svg> element for a page, from `encode_svg`'s text: without the header, in the page's colours, transparent.

    title: what a screen reader says of it.
    """
    points = 72 * header_inches
    for part, attribute in (
        ("title", 'display="none"'),
        ("paper", 'display="none"'),
        ("banner", f'transform="translate(0 {points:g})"'),
    ):
        text = text.replace(f'<g id="head:{part}">', f"<g {attribute}>")
    width, height = map(float, re.findall(r' viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    text = re.sub(r' viewBox="[^"]*"', f' viewBox="0 {points:g} {width:g} {height - points:g}"', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    size = f' width="{width:g}pt" height="{height - points:g}pt" role="img" aria-label="{escape_html(title or "figure")}"'
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', size, text, count=1)
    for colour, variable in THEME_VARIABLES.items():
        text = text.replace(colour, variable)
    return text


@contextlib.contextmanager
def _prepare_canvas(figure: Figure, dpi: float, salt: str = "cifar") -> Iterator[None]:
    """Settings for a canvas's own print_...(), which is used because savefig() draws everything once more before it."""
    import matplotlib

    canvas, old_dpi = figure.canvas, figure.dpi
    figure.dpi = dpi
    try:
        with matplotlib.rc_context({**matplotlib_settings(), "svg.hashsalt": salt}), _silence_warnings():
            yield
    finally:
        figure.dpi = old_dpi
        figure.set_canvas(canvas)


class _silence_warnings(warnings.catch_warnings):
    """No warnings of matplotlib, for example about letters that the fonts lack; those are drawn as boxes."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _draw_header(figure: Figure, title: str, subtitle: str, banner: str) -> float:
    """Write banner, title and subtitle above the area of the layout -> height of title and subtitle in inches."""
    width, height = figure.get_size_inches()
    rows = [(banner, 9, "bold", INK, 0.26), (title, 12, "bold", INK, 0.25), (subtitle, 8.5, "normal", MUTED, 0.2)]
    top = 0.08
    total = sum(row[4] for row in rows if row[0]) + (0.12 if title or banner else 0)
    figure.patch.set_gid("head:paper")
    figure.set_size_inches(width, height + total)
    for text, size, weight, colour, inches in rows:
        if text:
            box = {"facecolor": AMBER, "edgecolor": "none", "pad": 3.5} if text is banner else None
            colour = "#5c3c00" if text is banner else colour
            x, y = 0.1 / width, 1 - top / (height + total)
            drawn = figure.text(
                x, y, shorten_text(text, int(width * 16)), size=size, weight=weight, color=colour, va="top", bbox=box
            )
            drawn.set_gid("head:banner" if text is banner else "head:title")
            top += inches
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 1, 1 - total / (height + total)), w_pad=0.06, h_pad=0.06)  # type: ignore[call-arg]
    return total - (rows[0][4] + 0.12 if banner else 0)


def _draw_message(figure: Figure, text: str) -> None:
    axes = figure.subplots()
    axes.set_axis_off()
    lines = re.findall(r".{1,90}(?:\s|$)|.{1,90}", text)
    axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", color=MUTED, size=10)


# -- old names, for plug-ins ---------------------------------------------------------------------------------------------

Drawn, order, scope, rc, render = DrawnFigure, sort_key, get_scope, matplotlib_settings, render_figure
png, svg, inline, lay_out = encode_png, encode_svg, inline_svg, lay_out_figure
colours, THEMED, short, power = ramp_colours, THEME_VARIABLES, shorten_text, format_power
log_axis, end_labels, spread = set_log_axis, label_line_ends, separate_labels


def epoch_axis(axes: Axes, most: int = 6) -> None:
    set_epoch_axis(axes, most)


def layer_ticks(axis: Any, layers: Sequence[str], most: int = 32) -> None:
    set_layer_ticks(axis, layers, most)


class Mark(PointLabel):
    def __init__(self, x: float, y: float, text: str, colour: str = INK, must: bool = False, bold: bool = False) -> None:
        super().__init__(x, y, text, colour, must, bold)

    @property
    def must(self) -> bool:
        return self.is_required

    @property
    def bold(self) -> bool:
        return self.is_bold


__all__ = [
    "AMBER", "BLUE", "DIM", "DPI", "GREEN", "GRID", "INK", "MUTED", "ORANGE", "PAPER", "RAMP", "RED", "SIZE",
    "DrawnFigure", "Nothing", "PointLabel", "encode_png", "encode_svg", "get_scope", "inline_svg", "label_points",
    "matplotlib_settings", "render_figure", "sort_key",
]  # fmt: skip
