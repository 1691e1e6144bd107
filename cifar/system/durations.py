"""Durations: read as people write them, written in the unit that fits."""

from __future__ import annotations

import re

from cifar.errors import UserError

_UNITS = (
    ("ms", 1e-3, 0.1),
    ("s", 1.0, 100.0),
    ("min", 60.0, 100 * 60.0),
    ("h", 3600.0, 100 * 3600.0),
    ("d", 86400.0, float("inf")),
)


def format_duration(seconds: float | None) -> str:
    """0.4 -> "0.4 s", 40 -> "40 s", 240 -> "4 min", 8300 -> "2.3 h"; None -> "–". At most one decimal, and below 10 only."""
    if seconds is None:
        return "–"
    if not seconds:
        return "0 s"
    for unit, size, limit in _UNITS:
        count = float(f"{seconds / size:.2g}") if seconds < 9.95 * size else float(round(seconds / size))
        if count * size < limit:
            return f"{count:.1f}".removesuffix(".0") + f" {unit}"
    raise ValueError(f"{seconds} is no duration")


def parse_duration(text: str) -> float:
    """`90s`, `50m`, `2h`, `1h30m`, `1d` or `H:MM:SS` -> seconds. Raises UserError."""
    clock = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text)
    if clock:
        return float(3600 * int(clock[1]) + 60 * int(clock[2]) + int(clock[3]))
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    found = (
        sum(scale * int(part or 0) for scale, part in zip((86400, 3600, 60, 1), parts.groups(), strict=True)) if parts else 0
    )
    if not found:
        raise UserError(f"--time-limit {text}: write 90s, 50m, 2h, 1h30m or 1:30:00")
    return float(found)
