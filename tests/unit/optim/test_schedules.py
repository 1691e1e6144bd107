"""Schedules: shapes, ends and bounds, against their definitions and torch's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from cifar.config import resolve as config
from cifar.errors import UserError
from cifar.optim import schedules as S
from cifar.registry import schedules

GRID = [step / 1000 for step in range(1001)]
FALLING = {"cosine": S.cosine, "linear": S.linear}
WARMED = {"constant": S.constant, **FALLING, "step": S.step}


@pytest.mark.parametrize("name", schedules.names())
def test_every_schedule_stays_within_zero_and_one_and_moves_at_once(name: str) -> None:
    multiplier = schedules[name].build()
    values = [multiplier(progress) for progress in GRID]
    assert all(0 <= value <= 1 for value in values)
    assert values[0] > 0, "the first step has to learn"
    assert max(values) == 1


@pytest.mark.parametrize("name", WARMED)
def test_warmup_rises_from_above_zero_to_one(name: str) -> None:
    multiplier = WARMED[name](warmup=0.2)
    rise = [multiplier(progress) for progress in GRID if progress < 0.2]
    assert 0 < rise[0] < 0.05
    assert all(a < b for a, b in itertools.pairwise(rise))
    assert multiplier(0.2) == pytest.approx(1.0)


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_falls_from_one_to_final_lr(name: str, warmup: float) -> None:
    multiplier = FALLING[name](warmup=warmup, final_lr=0.1)
    fall = [multiplier(progress) for progress in GRID if progress >= warmup]
    assert fall[0] == pytest.approx(1.0) and fall[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(fall))
    assert multiplier((1 + warmup) / 2) == pytest.approx(0.55)  # both are point-symmetric about the middle


def test_linear_is_one_minus_progress() -> None:
    assert [S.linear()(progress) for progress in GRID] == pytest.approx([1 - progress for progress in GRID])


@pytest.mark.parametrize("build", [S.triangular, S.onecycle])
@pytest.mark.parametrize("peak_at", [0.0, 0.25, 0.7])
def test_one_peak(build, peak_at: float) -> None:
    multiplier = build(peak_at=peak_at, start_lr=0.2, final_lr=0.07)
    values = [multiplier(progress) for progress in GRID]
    top = values.index(max(values))
    assert GRID[top] == peak_at and values[top] == pytest.approx(1.0)
    assert values[0] == pytest.approx(0.2 if peak_at else 1.0) and values[-1] == pytest.approx(0.07)
    assert values[: top + 1] == sorted(values[: top + 1]) and values[top:] == sorted(values[top:], reverse=True)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_onecycle_is_torchs() -> None:
    steps = 200
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(theirs, 1.0, total_steps=steps, pct_start=0.3, cycle_momentum=False)
    # Theirs ends its rise at step 0.3 * steps - 1 and its fall at the last step: ours, read at the same points.
    ours = S.onecycle()
    peak = 0.3 * steps - 1
    for step in range(steps):
        progress = 0.3 * step / peak if step <= peak else 0.3 + 0.7 * (step - peak) / (steps - 1 - peak)
        assert ours(progress) == pytest.approx(cycle.get_last_lr()[0], abs=1e-9)
        if step < steps - 1:
            cycle.step()


def test_step_drops_at_each_milestone() -> None:
    multiplier = S.step(milestones="0.3,0.6,0.8", gamma=0.2)
    assert [multiplier(p) for p in (0.0, 0.29, 0.3, 0.59, 0.6, 0.8, 1.0)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.008, 0.008])


@pytest.mark.parametrize(("written", "read"), [(0.5, "0.5"), ("0.5, 0.75", "0.5,0.75"), ([0.5, 0.75], "0.5,0.75")])
def test_milestones_may_be_written_as_yaml_reads_them(written: object, read: str) -> None:
    assert config.resolve_config({"schedule": "step", "milestones": written}).kwargs_for("schedule")["milestones"] == read


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "step", "milestones": "0.75,0.5"},
        {"schedule": "step", "milestones": "soon"},
        {"schedule": "step", "milestones": "30"},
        {"schedule": "cosine", "warmup": 1.0},
        {"schedule": "cosine", "final_lr": -0.1},
    ],
)
def test_senseless_values_are_refused_before_anything_runs(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        config.resolve_config(wrong)
