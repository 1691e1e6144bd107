"""The colours of the figures and of the page."""

from __future__ import annotations

from collections.abc import Iterable

INK, MUTED, GRID, PAPER = "#1f2a37", "#6b7785", "#e3e7ec", "#ffffff"
BLUE, ORANGE, RED, GREEN, AMBER = "#2f6fde", "#e07b2a", "#d2413f", "#2b9a66", "#ffe9b8"
DIM = "#a3adb8"  # dominated points
# On the page these colours follow the reader's light or dark theme. The others are readable on both.
THEME_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
RAMP = (
    "#5b8def",
    "#3aa6b9",
    "#3fae7a",
    "#a3a93a",
    "#e0a030",
    "#e0703a",
    "#cf4b6e",
)  # cheap to expensive; distinct in print


def ramp_colours(num_colours: int, places: Iterable[int] | None = None) -> list[str]:
    """Colours along the ramp, for points in the order of their cost. places: of these only, of many."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("ramp", RAMP)
    return [to_hex(ramp(i / max(num_colours - 1, 1))) for i in (range(num_colours) if places is None else places)]
