"""Draws the figures of a report into its folder. One that is there already, made from the same, is not drawn again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar.registry import Entry
from cifar.report import html as pages
from cifar.report import style
from cifar.report.aggregate import Comparison
from cifar.report.digest import compute_digest, digest_program
from cifar.report.load import RunCollection
from cifar.report.made import Made, digest_content, read_same
from cifar.tracking.run_dir import write_atomic

MAX_INLINE_BYTES = 120_000  # of a figure as SVG on the page; a larger one is a picture there
SHOWN_BY_EXPLORER = ("accuracy_vs_macs", "accuracy_vs_params", "learning_curves")  # figures


@dataclass(frozen=True)
class FigureResult:
    """What has become of a figure: its sections of the page (one or none), its files, problems, and what to keep of it."""

    sections: tuple[pages.Section, ...] = ()
    paths: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    key: str = ""  # what it is kept by; "" if nothing is kept
    made: dict[str, Any] | None = None


@dataclass(frozen=True)
class Picture:
    """The files of a figure, and the height of its header in inches."""

    png: bytes
    svg: bytes
    header_inches: float


class FigureWriter:
    """Draws figures of one report into `out`. A single run is shown by the figures of a run, all else by those of a sweep.

    drawing: what `style.describe_drawing` says, if that is known.
    """

    def __init__(
        self, collection: RunCollection, comparison: Comparison, out: Path, made: Made, drawing: list[Any] | None = None
    ) -> None:
        self._is_single_run, self._drawing = collection.is_single_run, drawing
        self.out, self.made = out, made
        self._subject = collection.runs[0] if collection.is_single_run else comparison
        self._has_scores = collection.is_single_run or comparison.has_scores

    def write(self, entry: Entry) -> FigureResult:
        """Draw a figure, unless its files are there already."""
        if problem := style.describe_class_problem(entry):
            return FigureResult(notes=(f"{problem}.",))
        paths = (self.out / f"{entry.name}.png", self.out / f"{entry.name}.svg")
        is_wanted = self._has_scores and (style.get_scope(entry) == "run") == self._is_single_run
        selection = style.select_data(entry, self._subject) if is_wanted else None
        key = self._find_key(entry, selection) if selection else ""
        if picture := self._find_picture(key, paths):
            return self._describe(entry, picture, paths, key)
        drawn = style.render_figure(entry, self._subject, selection) if selection else None
        notes = (f"{drawn.problem}.",) if drawn and drawn.has_failed else ()
        if not drawn or (drawn.problem and entry.name != "accuracy_vs_macs"):
            for path in paths:  # an earlier report's file would look like this one's
                path.unlink(missing_ok=True)
            return FigureResult(notes=notes)
        png = style.encode_png(drawn.figure)
        write_atomic(paths[0], png)
        svg = style.encode_svg(drawn.figure, entry.name).encode()
        write_atomic(paths[1], svg)
        result = self._describe(entry, Picture(png, svg, drawn.header_inches), paths, "" if drawn.problem else key)
        return replace(result, notes=notes)

    def _find_key(self, entry: Entry, selection: style.Selection) -> str:
        """A digest of all that the figure is made from; "" for one that nobody knows that of, as of a plug-in's."""
        if not self.made.is_kept or entry.is_plugin or selection.error:
            return ""
        subject = (self._subject.subtitle, self._subject.banner)
        drawing = self._drawing or style.describe_drawing()
        return compute_digest(entry.name, selection.data, subject, digest_program(), drawing)

    def _find_picture(self, key: str, paths: tuple[Path, Path]) -> Picture | None:
        """The files as they were made from the same; None if one of them is another now."""
        made = self.made.find(key)
        if type(made) is not dict or type(made.get("header_inches")) is not float:
            return None
        png, svg = (read_same(path, made.get(path.suffix)) for path in paths)
        return Picture(png, svg, made["header_inches"]) if png is not None and svg is not None else None

    def _describe(self, entry: Entry, picture: Picture, paths: tuple[Path, Path], key: str) -> FigureResult:
        figure_class: Any = entry.builder
        inline = style.inline_svg(picture.svg.decode(), picture.header_inches, figure_class.title)
        if len(inline) > MAX_INLINE_BYTES:
            top = 0.0 if self._subject.banner else picture.header_inches  # the page has the title; a banner stays
            inline = pages.render_image(style.shrink_picture(picture.png, top_inches=top), figure_class.title)
        caption = getattr(figure_class, "caption", "")
        section = pages.Section(figure_class.title, caption, inline, entry.name in SHOWN_BY_EXPLORER)
        made = {
            ".png": digest_content(picture.png),
            ".svg": digest_content(picture.svg),
            "header_inches": picture.header_inches,
        }
        return FigureResult((section,), paths, key=key, made=made)
