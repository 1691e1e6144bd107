"""Text that fits a terminal: shortened with an ellipsis, wrapped at words, and tables whose columns give way by priority."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar.system.names import escape_controls
from cifar.system.redact import redact

GAP = 2  # spaces between two columns
NO_VALUES = ("", "–", "-")  # cells that say nothing
MIN_TEXT_WIDTH = 6  # characters of a text column that are kept where nothing else helps


@dataclass(frozen=True)
class Column:
    """A column of a table, and how it may change where the terminal is too narrow. Without any of it, it never does."""

    name: str
    is_number: bool = False  # right-aligned; a number is never cut
    drop_order: int = 0  # the column with the highest is left out first; 0: never
    is_extra: bool = False  # it is left out before any text is cut
    min_width: int = 0  # text is cut with an ellipsis down to this width, prose is wrapped in it; 0: neither
    wraps: bool = False  # prose: wrapped at words, over several lines
    can_be_shared: bool = False  # where all rows have one value, it is said once below the table


@dataclass(frozen=True)
class Short:
    """A cell with a shorter form: 11,173,962 and 11.2 M."""

    full: str
    short: str

    def __str__(self) -> str:
        return self.full


@dataclass(frozen=True)
class FittedTable:
    """A table as lines of text, and what does not stand in it."""

    header: str
    rows: list[list[str]]  # the lines of each row
    shared: dict[str, str]  # column -> the value that all rows have
    dropped: list[str]  # columns that found no room

    @property
    def lines(self) -> list[str]:
        return [self.header, *(line for row in self.rows for line in row)]


def text_width(text: str) -> int:
    """Columns of the terminal that a text takes: 2 for a wide East Asian character, 0 for a combining one."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten_text(text: str, width: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `width` columns."""
    if len(text) <= width and text.isascii() and text.isprintable():  # as nearly all are
        return text
    text = escape_controls(" ".join(text.splitlines()))
    if text_width(text) <= width:
        return text
    while text and text_width(text) > width - 1:
        text = text[:-1]
    return f"{text.rstrip()}…" if width > 0 else ""


def wrap_text(text: str, width: int, *, breaks_words: bool = True) -> list[str]:
    """Lines of at most `width` columns, broken at spaces.

    A longer word, such as a path, is broken after / - _ or anywhere; without `breaks_words` it is a line that is too long.
    """
    if text_width(text) <= width and "\n" not in text and not text.startswith(" "):
        return [text]
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if text_width(joined) <= width:
                line = joined
                continue
            lines += [line] if line else []
            while breaks_words and text_width(word) > width:
                head = _longest_head(word, width)
                lines.append(head)
                word = word[len(head) :]
            line = word
        lines.append(line)
    return lines


def _longest_head(word: str, width: int) -> str:
    """The beginning of a word that is wider than `width`, up to the last place where it may be broken."""
    end = next(n for n in range(1, len(word) + 1) if text_width(word[: n + 1]) > width)
    mark = max(word.rfind(mark, 0, end) for mark in "/-_,:=")
    return word[: mark + 1] if mark > 0 else word[:end]


def fit_table(columns: Sequence[Column], rows: Sequence[Sequence[Any]], width: int | None) -> FittedTable:
    """Lay out a table in `width` columns of the terminal. None: whole, however wide, as in a pipe.

    What gives way, in this order: columns that say nothing, or one thing in all rows; long forms of numbers; extra columns;
    prose is wrapped and text cut, both down to their least width; columns, by their `drop_order`; at last all text.
    """
    clean = functools.cache(_clean_text)  # a table of thousands of rows has few different cells
    texts = [["" if cell is None else clean(str(cell)) for cell in row] for row in rows]
    if width is None:
        widths = _natural_widths(columns, texts, range(len(columns)))
        return _lay_out(columns, texts, widths, {}, [])
    shared = _find_shared(columns, texts)
    kept = [index for index, column in enumerate(columns) if column.name not in shared and _says_something(texts, index)]
    if _total(_natural_widths(columns, texts, kept)) > width:
        texts = [
            [cell.short if isinstance(cell, Short) else text for cell, text in zip(row, line, strict=True)]
            for row, line in zip(rows, texts, strict=True)
        ]
    dropped: list[int] = []
    while True:
        natural = _natural_widths(columns, texts, kept)
        least = {index: _least_width(columns[index], size) for index, size in natural.items()}
        extras = [index for index in kept if columns[index].is_extra]
        candidates = extras or [index for index in kept if columns[index].drop_order]
        if _total(natural if extras else least) <= width or not candidates:
            break
        dropped.append(max(candidates, key=lambda index: (columns[index].drop_order, index)))
        kept.remove(dropped[-1])
    widths = _share_room(natural, least, width) if _total(least) <= width else _squeeze_text(columns, least, width)
    return _lay_out(
        columns,
        texts,
        widths,
        {name: text for name, text in shared.items() if text not in NO_VALUES},
        [columns[i].name for i in sorted(dropped)],
    )


def _clean_text(text: str) -> str:
    return escape_controls(redact(text), keeps_lines=True)


def format_shared(shared: Mapping[str, str]) -> str:
    """What all rows have in common, in words; empty where there is nothing."""
    return f"in all: {', '.join(f'{name} {value}' for name, value in shared.items())}" if shared else ""


def _find_shared(columns: Sequence[Column], texts: Sequence[Sequence[str]]) -> dict[str, str]:
    if len(texts) < 2:
        return {}
    return {
        column.name: texts[0][index]
        for index, column in enumerate(columns)
        if column.can_be_shared and len({row[index] for row in texts}) == 1
    }


def _says_something(texts: Sequence[Sequence[str]], index: int) -> bool:
    return not texts or any(row[index] not in NO_VALUES for row in texts)


def _natural_widths(columns: Sequence[Column], texts: Sequence[Sequence[str]], kept: Iterable[int]) -> dict[int, int]:
    return {index: max(map(_widest_line, {columns[index].name, *(row[index] for row in texts)})) for index in kept}


def _widest_line(text: str) -> int:
    return max(map(text_width, text.split("\n")))


def _least_width(column: Column, natural: int) -> int:
    return min(natural, column.min_width) if column.min_width else natural


def _total(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + GAP * max(0, len(widths) - 1)


def _share_room(natural: Mapping[int, int], least: Mapping[int, int], width: int) -> dict[int, int]:
    """Give the room that is left to the columns that want more, to the narrowest first, so that all get about as much."""
    widths = dict(least)
    while (room := width - _total(widths)) > 0 and (wanting := [i for i in widths if widths[i] < natural[i]]):
        narrowest = min(wanting, key=lambda index: widths[index])
        widths[narrowest] += 1 if room else 0
    return widths


def _squeeze_text(columns: Sequence[Column], least: Mapping[int, int], width: int) -> dict[int, int]:
    """The last resort in a very narrow terminal: the widest texts are cut. Numbers are kept, though lines get too wide."""
    widths = dict(least)
    while _total(widths) > width:
        texts = [index for index in widths if not columns[index].is_number and widths[index] > MIN_TEXT_WIDTH]
        if not texts:
            break
        widths[max(texts, key=lambda index: widths[index])] -= 1
    return widths


def _lay_out(
    columns: Sequence[Column],
    texts: Sequence[Sequence[str]],
    widths: Mapping[int, int],
    shared: dict[str, str],
    dropped: list[str],
) -> FittedTable:
    def pad(index: int, text: str) -> str:
        padding = " " * (widths[index] - text_width(text))
        return padding + text if columns[index].is_number else text + padding

    @functools.cache
    def lay_out_cell(index: int, text: str) -> list[str]:
        """The lines of a cell, each as wide as its column."""
        lines = wrap_text(text, widths[index]) if columns[index].wraps else [shorten_text(text, widths[index])]
        return [pad(index, line) for line in lines]

    def join(parts: Iterable[str]) -> str:
        return (" " * GAP).join(parts).rstrip()

    empty = {index: pad(index, "") for index in widths}
    header = join(pad(index, shorten_text(columns[index].name, size)) for index, size in widths.items())
    laid_out = []
    for row in texts:
        cells = [lay_out_cell(index, row[index]) for index in widths]
        height = max(map(len, cells), default=0)
        if height == 1:
            laid_out.append([join(lines[0] for lines in cells)])
            continue
        parts = list(zip(cells, empty.values(), strict=True))
        laid_out.append([join(lines[n] if n < len(lines) else blank for lines, blank in parts) for n in range(height)])
    return FittedTable(header, laid_out, shared, dropped)
