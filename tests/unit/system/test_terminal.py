"""Tables that fit: no word and no number is broken, columns give way by priority, and what is left out is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar.system.terminal import Column, Short, fit_table, format_shared, shorten_text, text_width, wrap_text

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=30)


@given(TEXT, st.integers(1, 40))
def test_shortened_text_fits(text: str, width: int) -> None:
    shortened = shorten_text(text, width)
    assert text_width(shortened) <= width
    assert shortened == text or (shortened.endswith("…") and text.startswith(shortened[:-1]))


def test_wide_and_combining_characters_are_measured() -> None:
    assert [text_width(text) for text in ("abc", "µ±", "日本", "e\u0301")] == [3, 2, 4, 1]
    assert shorten_text("日本語", 5) == "日本…"


@given(st.lists(TEXT, max_size=8), st.integers(4, 40))
def test_wrapping_loses_nothing(words: list[str], width: int) -> None:
    lines = wrap_text(" ".join(words), width)
    assert all(text_width(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(words)


def test_words_are_whole_and_paths_are_broken_between_folders() -> None:
    assert wrap_text("no key is configured", 10) == ["no key is", "configured"]
    assert wrap_text("at /usr/local/lib/python", 12) == ["at", "/usr/local/", "lib/python"]
    assert wrap_text("one\ntwo", 10) == ["one", "two"]


COLUMNS = [
    Column("name", min_width=8),
    Column("n", is_number=True, can_be_shared=True),
    Column("count", is_number=True),
    Column("rate", is_number=True, drop_order=2, is_extra=True),
    Column("time", is_number=True, drop_order=1),
    Column("why", min_width=10, wraps=True),
]
ROWS = [
    ["a-rather-long-name", 3, Short("11,173,962", "11.2 M"), "1,234", "40 s", "its worker was killed by the kernel"],
    ["b", 3, Short("9,999", "10 k"), "7", "2.3 h", None],
]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_no_line_is_too_wide_and_no_number_is_broken(width: int) -> None:
    table = fit_table(COLUMNS, ROWS, width)
    assert max(map(text_width, table.lines)) <= width
    text = "\n".join(table.lines)
    for name, cells in {"rate": ["1,234", "7"], "time": ["40 s", "2.3 h"]}.items():
        assert (name in table.dropped) != all(cell in text for cell in cells)
    assert "11,173,962" in text or "11.2 M" in text


def test_what_gives_way_first() -> None:
    whole = fit_table(COLUMNS, ROWS, 200)
    assert whole.shared == {"n": "3"} and not whole.dropped and "11,173,962" in whole.lines[1]
    assert format_shared(whole.shared) == "in all: n 3" and format_shared({}) == ""
    natural = max(map(text_width, whole.lines))
    shorter = fit_table(COLUMNS, ROWS, natural - 1)
    assert "11.2 M" in shorter.lines[1] and not shorter.dropped
    extra = fit_table(COLUMNS, ROWS, natural - 6)
    assert extra.dropped == ["rate"] and "its worker was killed by the kernel" in extra.lines[1]
    wrapped = fit_table(COLUMNS, ROWS, 44)
    assert wrapped.dropped == ["rate"] and len(wrapped.rows[0]) > 1 and len(wrapped.rows[1]) == 1
    narrow = fit_table(COLUMNS, ROWS, 30)
    assert narrow.dropped == ["rate", "time"] and "a-" in narrow.lines[1] and "…" in narrow.lines[1]


def test_a_pipe_gets_all_of_it() -> None:
    table = fit_table(COLUMNS, ROWS, None)
    assert not table.shared and not table.dropped and len(table.lines) == 3
    assert table.lines[0].split() == ["name", "n", "count", "rate", "time", "why"]
    assert "a-rather-long-name" in table.lines[1] and table.lines[1].endswith("its worker was killed by the kernel")


def test_a_column_that_is_empty_is_no_column() -> None:
    assert fit_table([Column("a"), Column("± 95 %", can_be_shared=True)], [["x", "–"], ["y", "–"]], 80).lines == ["a", "x", "y"]
    assert fit_table([Column("a"), Column("b")], [["x", None], ["y", ""]], 80).lines == ["a", "x", "y"]
    assert fit_table([Column("a"), Column("b")], [], 80).lines == ["a  b"]
