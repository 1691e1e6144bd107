"""Intervals over seeds stay where accuracies can be, and two seeds are shown as what they are: two numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cifar import registry
from cifar.report import write_report
from cifar.report.aggregate import Comparison, Point, compare_runs
from cifar.report.load import load_run
from cifar.report.style import render_figure
from helpers.fake_runs import write

ACCURACIES = {
    "one": (0.7,),
    "two": (0.70, 0.74),
    "three": (0.70, 0.72, 0.74),
    "near_one": (0.90, 0.99, 0.999),
    "near_zero": (0.0, 0.01, 0.2),
}
T_2 = 4.302653  # Student's t, 97.5 %, 2 degrees of freedom
FIGURE = next(entry for entry in registry.figures if entry.name == "accuracy_vs_macs")


@pytest.fixture
def compared(tmp_path: Path) -> Comparison:
    for lr, (name, accuracies) in enumerate(ACCURACIES.items(), start=1):
        for seed, accuracy in enumerate(accuracies):
            write(tmp_path, f"{name}-{seed}", seed=seed, accuracy=accuracy, lr=float(lr), layers=1)
    return compare_runs([load_run(path) for path in sorted(tmp_path.glob("*-*"))], title="seeds")


@pytest.fixture
def points(compared: Comparison) -> dict[str, Point]:
    return {name: next(p for p in compared.points if p.values["lr"] == n) for n, name in enumerate(ACCURACIES, start=1)}


def test_an_interval_takes_three_seeds(points: dict[str, Point]) -> None:
    assert points["one"].interval is None and points["two"].interval is None and points["two"].ci_half_width is None
    assert points["two"].seed_accuracies == (0.70, 0.74) and points["three"].seed_accuracies == ()
    assert points["two"].std == pytest.approx(0.02 * 2**0.5) and points["two"].mean == pytest.approx(0.72)
    half = T_2 * 0.02 / 3**0.5
    assert points["three"].interval == pytest.approx((0.72 - half, 0.72 + half))


def test_an_interval_ends_where_accuracies_end(points: dict[str, Point]) -> None:
    low, high = points["near_one"].interval or (0, 0)
    assert high == 1.0 and low == pytest.approx(0.963 - T_2 * 0.0547449 / 3**0.5, abs=1e-6)
    low, high = points["near_zero"].interval or (0, 0)
    assert low == 0.0 and high == pytest.approx(0.07 + T_2 * 0.1126943 / 3**0.5, abs=1e-6)


def test_they_are_written_as_they_are(points: dict[str, Point]) -> None:
    texts = {name: point.accuracy_text for name, point in points.items()}
    assert texts == {
        "one": "70.0 % (n = 1)",
        "two": "72.0 % (n = 2: 70.0, 74.0)",
        "three": "72.0 ± 5.0 % (n = 3)",
        "near_one": "96.3 -13.6 +3.7 % (n = 3)",
        "near_zero": "7.0 -7.0 +28.0 % (n = 3)",
    }
    assert [point.interval_text for point in points.values()] == ["–", "70.0, 74.0", "5.0", "-13.6 +3.7", "-7.0 +28.0"]


def test_no_bar_of_the_figure_leaves_the_range(compared: Comparison) -> None:
    data = FIGURE.builder().select(compared)
    bars = {dot.label: (dot.bar, dot.seeds) for dot in data.dots}
    assert bars["lr=1"] == (None, ()) and bars["lr=2"] == (None, (70.0, 74.0))
    assert bars["lr=4"][0][1] == 100.0 and bars["lr=5"][0][0] == 0.0
    drawn = render_figure(FIGURE, compared)
    assert not drawn.problem
    axes = drawn.figure.axes[0]
    ends = [y for bar in axes.collections for segment in bar.get_segments() for _, y in segment]
    assert len(ends) == 6 and min(ends) == 0.0 and max(ends) == 100.0
    small = [line for line in axes.lines if line.get_markersize() < 4 and len(line.get_ydata()) == 2]
    assert [list(line.get_ydata()) for line in small] == [[70.0, 74.0]]


def test_page_csv_and_json_say_the_same(compared: Comparison, tmp_path: Path) -> None:
    result = write_report([], runs=tmp_path, out=tmp_path / "out")
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {point["label"]: point for point in document["points"]}
    assert found["lr=2"]["interval95_half"] is None and found["lr=2"]["accuracies"] == [0.70, 0.74]
    assert found["lr=4"]["interval95_high"] == 1.0 and found["lr=5"]["interval95_low"] == 0.0
    assert found["lr=3"]["interval95_half"] == pytest.approx(T_2 * 0.02 / 3**0.5, rel=1e-5)
    with open(tmp_path / "out" / "report.csv") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert rows["lr=2"]["accuracies"] == "0.7 0.74" and rows["lr=2"]["interval95_low"] == ""
    page = result.page.read_text()
    assert ">70.0, 74.0</td>" in page and ">-13.6 +3.7</td>" in page and "With two seeds both accuracies" in page
    assert {row["± 95 %"] for row in result.rows} == {"–", "70.0, 74.0", "5.0", "-13.6 +3.7", "-7.0 +28.0"}
    assert any(note.startswith("Two seeds make no useful interval") for note in result.notes)
