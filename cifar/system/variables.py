"""Environment variables: the one place that reads them. A value of the wrong kind is one sentence that names the variable."""

from __future__ import annotations

import math
import os
from pathlib import Path

from cifar.errors import UserError
from cifar.system.files import check_text, shorten_repr


def read_variable(name: str, default: str = "") -> str:
    """A variable's text; an empty one counts as not set. Raises UserError for bytes that are no text."""
    text = os.environ.get(name) or default
    try:
        check_text(text)
    except ValueError:
        raise UserError(f"{name} is {shorten_repr(text)}, which is not UTF-8 text; correct or unset it") from None
    return text


def read_words(name: str, separator: str | None = None) -> list[str]:
    """A variable's words, without empty ones. None separates at any space."""
    return [word for word in read_variable(name).split(separator) if word]


def read_path(name: str, default: str | Path) -> Path:
    """A path, where `~` is the home folder."""
    try:
        return Path(read_variable(name) or default).expanduser()
    except RuntimeError:  # ~name of no such user
        raise UserError(f"{name} is '{read_variable(name)}', but there is no such user; correct or unset it") from None


def read_number(name: str, default: float, *, low: float, high: float) -> float:
    """A number from `low` to `high`. Raises UserError."""
    text = read_variable(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UserError(f"{name} is {shorten_repr(text)}; write a number from {low:g} to {high:g}, or unset it")
    return value


def read_whole_number(name: str, default: int, *, low: int, high: int) -> int:
    """A whole number from `low` to `high`. Raises UserError."""
    text = read_variable(name).strip()
    digits = text.removeprefix("-")
    is_whole = digits.isascii() and digits.isdigit() and len(digits) < 20
    if text and not (is_whole and low <= int(text) <= high):
        raise UserError(f"{name} is {shorten_repr(text)}; write a whole number from {low} to {high}, or unset it")
    return int(text) if text else default
