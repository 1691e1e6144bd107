"""Durations in the unit that fits. How they are read is tested with the time limit."""

from __future__ import annotations

import pytest

from cifar.system.durations import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0 s"),
        (0.0032, "3.2 ms"),
        (0.04, "40 ms"),
        (0.0999, "0.1 s"),
        (0.4, "0.4 s"),
        (9.96, "10 s"),
        (40, "40 s"),
        (99.4, "99 s"),
        (99.6, "1.7 min"),
        (240, "4 min"),
        (5940, "99 min"),
        (5999, "1.7 h"),
        (8300, "2.3 h"),
        (86400, "24 h"),
        (1e6, "12 d"),
    ],
)
def test_a_duration_has_the_unit_that_fits(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text
