"""Costs beside MACs: what a report says of energy, latency and training FLOPs, of new records and of old ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cifar.errors import UserError
from cifar.report import write_report
from cifar.report.load import load_run
from cifar.report.table import runs_table
from cifar.system.amounts import format_joules, format_latency, format_operations
from helpers.fake_runs import write


def write_runs(folder: Path, *measured: dict[str, Any] | None) -> None:
    """Two seeds of one network, and one of another, each with these costs."""
    names = (("a0", "resnet20", 0), ("a1", "resnet20", 1), ("b0", "worksheet1", 0))
    for (name, model, seed), costs in zip(names, measured, strict=True):
        write(folder, name, model=model, seed=seed, epochs=2, layers=1, swept=("model", "seed"), measured=costs)


def test_a_run_has_the_costs_that_were_measured(tmp_path: Path) -> None:
    write_runs(tmp_path, {"joules": 3000.0, "pack_size": 4, "latency_seconds": 4e-4}, {}, {})
    run, bare = load_run(tmp_path / "a0"), load_run(tmp_path / "a1")
    assert (run.cost("joules"), run.cost("latency_seconds"), run.pack_size) == (3000.0, 4e-4, 4)
    assert (bare.cost("joules"), bare.cost("latency_seconds"), bare.pack_size) == (None, None, 1)
    assert runs_table([run])[0]["joules"] == 3000.0


@pytest.mark.slow
def test_points_have_the_means_of_those_that_were_measured(tmp_path: Path) -> None:
    costs: dict[str, Any] = {"train_flops": 5e12, "joules": 1000.0, "weights_bytes": 1_100_000, "latency_seconds": 4e-4}
    write_runs(tmp_path, costs, {"joules": 3000.0, "pack_size": 4}, {})
    report = write_report([], runs=tmp_path)
    small, large = report.rows
    assert (large["energy a run"], large["latency"]) == ("2 kJ", "400 µs")
    assert (small["energy a run"], small["latency"]) == ("–", "–")
    assert any("1 run of these trained side by side" in note for note in report.notes)
    with open(tmp_path / "report" / "report.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["resnet20"]["joules"]) == 2000.0 and rows["worksheet1"]["joules"] == ""
    assert float(rows["resnet20"]["weights_bytes"]) == 1_100_000 and rows["resnet20"]["pack_size"] == "4"
    points = json.loads((tmp_path / "report" / "report.json").read_text())["points"]
    assert [point["latency_seconds"] for point in points] == [None, 4e-4]
    html = (tmp_path / "report" / "report.html").read_text()
    assert "energy a run" in html and "2 kJ" in html


@pytest.mark.slow
def test_old_records_have_training_flops_and_no_new_columns(tmp_path: Path) -> None:
    write_runs(tmp_path, None, None, None)
    report = write_report([], runs=tmp_path)
    assert not {"energy a run", "latency"} & set(report.columns)
    run = load_run(tmp_path / "b0")
    assert run.train_flops == 6 * 6_654_464 * 2 * 351 * 128, "2 epochs of 351 steps of 128 images"
    assert run.cost("joules") is None and run.pack_size == 1
    table = runs_table([run])
    assert table[0]["train_flops"] == run.train_flops and "joules" not in table[0]


def test_a_cost_that_is_no_number_is_damage(tmp_path: Path) -> None:
    write_runs(tmp_path, {"joules": float("nan")}, None, None)
    with pytest.raises(UserError, match="joules is nan, not a finite number from 0"):
        load_run(tmp_path / "a0")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (format_joules(None), "–"),
        (format_joules(0.0), "0 J"),
        (format_joules(999.6), "1 kJ"),
        (format_joules(12_345.0), "12.3 kJ"),
        (format_joules(2.5e6), "2.5 MJ"),
        (format_latency(None), "–"),
        (format_latency(9.999e-4), "1 ms"),
        (format_latency(1.234e-4), "123 µs"),
        (format_operations(1.6e15), "1.6 PFLOPs"),
        (format_operations(2e5), "0.2 MFLOPs"),
    ],
)
def test_amounts_have_three_digits(text: str, wanted: str) -> None:
    assert text == wanted
