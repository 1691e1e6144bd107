"""A log has what a terminal would show in the end: bars resolved, colours gone, each line once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar.system.terminal_lines import MAX_LINE, TerminalLines


def lines_of(*pieces: str) -> list[str]:
    terminal = TerminalLines()
    return [line for piece in pieces for line in terminal.push(piece)] + terminal.finish()


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\n\n three", ["one", "", " three"]),
        ("\r 10 %|#   |\r 50 %|##  |\r100 %|####|\ndone\n", ["100 %|####|", "done"]),  # tqdm
        ("long text\rshort\n", ["shorttext"]),  # as in a terminal: nothing erases the rest
        ("long text\r\x1b[Kshort\n", ["short"]),
        ("\r\x1b[2K\x1b[35mepoch\x1b[0m 1/2 ━━━\r\x1b[2Kepoch 1: 50 %\n", ["epoch 1: 50 %"]),  # rich
        ("\x1b[?25l\x1b]0;title\x07text\x1b[?25h\n", ["text"]),
        ("windows\r\nlines\r\n", ["windows", "lines"]),
        ("ab\b\bcd\n", ["cd"]),
        ("a\tb\x07\n", ["a\tb\\x07"]),
        ("12345\x1b[3D", ["12345"]),  # moves that are not followed change nothing
        ("abc\x1b[1K", [""][:0]),
        ("", []),
        ("\x1b", ["\\x1b"][:0]),
    ],
)
def test_what_is_left_of_a_line(printed: str, shown: list[str]) -> None:
    assert lines_of(printed) == shown
    assert lines_of(*printed) == shown, "also character by character"


@given(st.text(alphabet="ab \n\r\b\x1b[2K", max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_pieces_change_nothing(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(text)]
    assert lines_of(*(text[start:end] for start, end in itertools.pairwise(edges))) == lines_of(text)


def test_a_line_without_end_is_cut() -> None:
    terminal = TerminalLines()
    for _ in range(100):
        assert terminal.push("x" * 1000) == []
    (line,) = terminal.push("\n")
    assert line.startswith("x" * MAX_LINE) and line.endswith("more characters)") and len(line) < MAX_LINE + 50
    assert lines_of("y" * (MAX_LINE + 7) + "\n") == ["y" * MAX_LINE + " ... (7 more characters)"]
