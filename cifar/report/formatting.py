"""Numbers and values as text, for the report, the figures and the tables, and the parsing of a number of MACs."""

from __future__ import annotations

import math
from typing import Any

from cifar.errors import UserError
from cifar.system.names import escape_controls


def format_value(value: Any) -> str:
    """A configuration value or the content of a table cell, with at most four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else escape_controls(str(value))


def pluralize(n: int, word: str) -> str:
    """(1, "run") -> "1 run", (3, "run") -> "3 runs"."""
    return f"{n} {word}{'' if n == 1 else 's'}"


def format_macs(macs: float) -> str:
    """4.08e7 -> "40.8 MMACs"."""
    size, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if macs >= s), (1.0, ""))
    return f"{macs / size:.3g} {prefix}MACs"


def format_mega_macs(macs: float) -> str:
    """4.08e7 -> "40.8", for a column that is headed MMACs."""
    return f"{macs / 1e6:,.4g}"


def format_mega_params(params: int) -> str:
    """272474 -> "0.272", for a column in millions."""
    return f"{params / 1e6:.3g}"


def format_percent(fraction: float | None) -> str:
    """0.91234 -> "91.2"."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def parse_macs(text: str) -> float:
    """ "50M" -> 5e7. The suffixes k, M and G and plain numbers (`5e7`) are understood. Raises UserError for anything else."""
    scale = {"k": 1e3, "m": 1e6, "g": 1e9}.get(text.strip()[-1:].lower())
    try:
        value = float(text.strip()[:-1]) * scale if scale else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"'{text}' is not a number of multiply-adds; write 50M, 1.2G or 5e7")
    return value


def format_power(value: float) -> str:
    """As a power of ten where a plain number would be long: 1e-3 -> 10⁻³, 3e-3 -> 3·10⁻³, 20 -> 20."""
    if value <= 0 or 1e-2 <= value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10**exponent
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if abs(factor - 1) < 1e-6 else f"{factor:.3g}·10{raised}"


def shorten_text(text: str, max_length: int) -> str:
    """On one line, cut to `max_length` characters, the last of which is then "…"."""
    text = escape_controls(" ".join(text.split()))
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
