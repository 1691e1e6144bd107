"""Learning-rate schedules: functions from the progress of the training, in [0, 1], to a multiplier of lr.

`warmup`, `peak_at` and `milestones` are fractions of the whole training, so they mean the same for 5 epochs and for 200.
`start_lr` and `final_lr` are fractions of lr, so they mean the same for every lr.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import BeforeValidator, Field

from cifar.registry import schedules

Schedule = Callable[[float], float]
Part = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[float, Field(ge=0, allow_inf_nan=False)]

WARMUP_START = 0.01  # the multiplier of the first step: small, but not zero


def _parse_milestones(value: object) -> str:
    """`0.5`, `"0.5,0.75"` or `[0.5, 0.75]` -> "0.5,0.75": one string, because a sweep's values are scalars."""
    text = ",".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
    parts = [part.strip() for part in text.strip("[] ").split(",") if part.strip()]
    try:
        ordered = [float(part) for part in parts]
    except ValueError:
        ordered = [-1.0]
    if ordered != sorted(ordered) or not all(0 < point < 1 for point in ordered):
        raise ValueError("write rising shares of the training, each between 0 and 1, such as '0.5,0.75'")
    return ",".join(parts)


Milestones = Annotated[str, BeforeValidator(_parse_milestones)]


def _interpolate_linearly(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * min(max(fraction, 0.0), 1.0)


def _interpolate_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def _add_warmup(warmup: float, schedule: Schedule) -> Schedule:
    """Rise linearly to 1 over the fraction `warmup` of the training (Goyal et al. 2017, sec. 2.2), then follow `schedule`."""
    return lambda progress: (
        _interpolate_linearly(WARMUP_START, 1.0, progress / warmup) if progress < warmup else schedule(progress)
    )


@schedules.register("constant")
def constant(*, warmup: Part = 0.0) -> Schedule:
    """lr as given."""
    return _add_warmup(warmup, lambda progress: 1.0)


@schedules.register("cosine")
def cosine(*, warmup: Part = 0.0, final_lr: Level = 0.0) -> Schedule:
    """Half a cosine, from lr down to final_lr (Loshchilov & Hutter 2017, without restarts)."""
    return _add_warmup(warmup, lambda progress: _interpolate_cosine(1.0, final_lr, (progress - warmup) / (1 - warmup)))


@schedules.register("linear")
def linear(*, warmup: Part = 0.0, final_lr: Level = 0.0) -> Schedule:
    """A straight line from lr down to final_lr."""
    return _add_warmup(warmup, lambda progress: _interpolate_linearly(1.0, final_lr, (progress - warmup) / (1 - warmup)))


@schedules.register("triangular")
def triangular(*, peak_at: Part = 0.25, start_lr: Level = 0.2, final_lr: Level = 0.0) -> Schedule:
    """Up in a straight line to lr at peak_at, and down in another (one triangle of Smith 2017)."""
    return lambda progress: (
        _interpolate_linearly(start_lr, 1.0, progress / peak_at)
        if progress < peak_at
        else _interpolate_linearly(1.0, final_lr, (progress - peak_at) / (1 - peak_at))
    )


@schedules.register("onecycle")
def onecycle(*, peak_at: Part = 0.3, start_lr: Level = 0.04, final_lr: Level = 4e-6) -> Schedule:
    """Half a cosine up to lr at peak_at and another down (Smith & Topin 2018; defaults as torch's OneCycleLR). lr only."""
    return lambda progress: (
        _interpolate_cosine(start_lr, 1.0, progress / peak_at)
        if progress < peak_at
        else _interpolate_cosine(1.0, final_lr, (progress - peak_at) / (1 - peak_at))
    )


@schedules.register("step")
def step(*, milestones: Milestones = "0.5,0.75", gamma: Level = 0.1, warmup: Part = 0.0) -> Schedule:
    """lr times gamma at each milestone (defaults: He et al. 2015, sec. 4.2: a tenth at 32k and at 48k of 64k steps)."""
    points = [float(point) for point in _parse_milestones(milestones).split(",") if point]
    return _add_warmup(warmup, lambda progress: gamma ** sum(progress >= point for point in points))
