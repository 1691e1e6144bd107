"""Energy, latency and operations as text."""

from __future__ import annotations


def format_joules(joules: float | None) -> str:
    """12345 -> "12.3 kJ"."""
    if joules is None:
        return "–"
    size, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if joules >= 0.9995 * s), (1.0, ""))
    return f"{joules / size:.3g} {prefix}J"


def format_latency(seconds: float | None) -> str:
    """1.234e-3 -> "1.23 ms"."""
    if seconds is None:
        return "–"
    return f"{1e6 * seconds:.3g} µs" if seconds < 0.9995e-3 else f"{1e3 * seconds:.3g} ms"


def format_operations(flops: float) -> str:
    """1.23e15 -> "1.23 PFLOPs"."""
    size, prefix = next(((s, p) for s, p in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")) if flops >= s), (1e6, "M"))
    return f"{flops / size:.3g} {prefix}FLOPs"
