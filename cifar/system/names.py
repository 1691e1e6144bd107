"""Ids and names: what may be the name of a folder, and what is safe to print."""

from __future__ import annotations

import functools
import re

from cifar.errors import UserError

MAX_ID_LENGTH = 128
RESERVED_IDS = ("sweeps", "report", "report-test")  # folders of ours beside the runs

# Characters that move a terminal's cursor, end its line or turn the order of what is read: controls (C0, C1, DEL), marks of
# direction, line separators; and halves of characters, which cannot be printed.
_UNSAFE_CLASS = (
    "\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufff9-\\ufffb"
)


def escape_controls(text: str, *, keeps_lines: bool = False) -> str:
    """Text whose control characters are written out (`\\x1b`), so that a terminal shows them and does not obey.

    keeps_lines: newlines and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return _compile_unsafe(keeps_lines).sub(_write_out, text)


@functools.cache
def _compile_unsafe(keeps_lines: bool) -> re.Pattern[str]:
    return re.compile(f"(?![\\n\\t])[{_UNSAFE_CLASS}]" if keeps_lines else f"[{_UNSAFE_CLASS}]")


def _write_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    named = {9: "\\t", 10: "\\n", 13: "\\r"}.get(code)
    return named or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def escape_in_json(text: str) -> str:
    """A JSON text whose unsafe characters are escapes of JSON (`\\u009b`). Its values are the same."""
    return _compile_unsafe(True).sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def is_id(text: str) -> bool:
    """Whether a text may be the id of a run or a sweep, which is the name of a folder."""
    return bool(re.fullmatch(r"[^\W_][\w.=@+ -]*|_[\w.=@+ -]+", text)) and len(text) <= MAX_ID_LENGTH and text == text.strip()


def check_name(text: str, what: str) -> str:
    """The name that a user gave, which may not be empty: as the start of an id, it would fit everything. Raises UserError."""
    if not text.strip():
        raise UserError(f"{what} is empty: give an id or a name (a variable that is not set, perhaps)")
    return text


def check_id(text: str, what: str) -> str:
    """The id, if it can be the name of a folder and of nothing outside. Raises UserError. `what`: as in "the sweep"."""
    check_name(text, what)
    if not is_id(text) or text in RESERVED_IDS:
        shown = escape_controls(text[:MAX_ID_LENGTH])
        raise UserError(
            f"{what} is '{shown}', which is no id: an id begins with a letter or a digit, "
            f"and has letters, digits, '-', '_' and '.', at most {MAX_ID_LENGTH} in all"
        )
    return text
