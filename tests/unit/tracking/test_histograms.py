"""histograms.jsonl: which epochs it has, what its bins are, and that it is cut with the rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cifar.errors import UserError
from cifar.tracking import histograms
from cifar.tracking.histograms import append_histograms, bin_edges, is_looked_at, read_histograms
from cifar.tracking.run_dir import RunDir


@pytest.fixture
def record(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "abc", {"cost": {"macs": 1, "params": 1, "verified": True}}, {"epochs": 4})


def line(epoch: int, layers: tuple[str, ...] = ("conv1",)) -> dict[str, Any]:
    layer = {"top": 0.5, "counts": [0] * 32 + [7] + [0] * 31}
    return {"epoch": epoch, "steps": 2, "gradients": dict.fromkeys(layers, layer), "updates": dict.fromkeys(layers, layer)}


def looked_at(epochs: int, histograms: str = "on") -> list[int]:
    return [epoch for epoch in range(1, epochs + 1) if is_looked_at(epoch, epochs, histograms)]


def test_the_first_and_the_last_epoch_and_twenty_between_are_looked_at() -> None:
    assert looked_at(1) == [1] and looked_at(22) == list(range(1, 23)) and looked_at(25, "off") == []
    assert looked_at(64) == list(range(1, 65, 3))
    assert looked_at(200, "every") == list(range(1, 201))
    for epochs in (23, 25, 100, 1000, 10**6):
        gaps = [
            1 + round(k * (epochs - 1) / 21) for k in range(22)
        ]  # no fraction is exactly a half here, so `round` has no choice
        found = [epoch for epoch in {*gaps, *range(1, 40), epochs - 1} if is_looked_at(epoch, epochs, "on")]
        assert sorted(found) == gaps and gaps[0] == 1 and gaps[-1] == epochs


def test_the_edges_halve_each_power_of_two() -> None:
    edges = bin_edges(0.5)
    assert len(edges) == 65 and edges[32] == 0 and edges == [-edge for edge in reversed(edges)]
    assert edges[-5:] == [0.125, 0.1875, 0.25, 0.375, 0.5]
    assert edges[33] == 0.75 * 2**-16 and edges == sorted(set(edges))  # 31 halves below 0.5
    assert bin_edges(0.375)[-3:] == [0.1875, 0.25, 0.375]
    for top in (histograms.MIN_TOP, histograms.MAX_TOP):
        edges = bin_edges(top)
        assert edges == sorted(set(edges)) and edges[-1] == top


def test_what_is_written_is_read(record: RunDir) -> None:
    assert list(read_histograms(record)) == []
    for epoch in (1, 3):
        assert append_histograms(record, line(epoch))
    with open(record.path / "histograms.jsonl", "ab") as file:
        file.write(b'{"epoch":4,')  # is being written
    assert list(read_histograms(record)) == [line(1), line(3)]


def test_they_are_cut_with_the_rows(record: RunDir) -> None:
    """Also a line whose row was never written, and one that was torn."""
    lengths = [0]
    for epoch in (1, 2, 3):
        append_histograms(record, line(epoch))
        record.append_row({"epoch": epoch})
        lengths.append(record.metrics_bytes())
    append_histograms(record, line(4))
    with open(record.path / "histograms.jsonl", "ab") as file:
        file.write(b'{"epoch":2,"st')
    for last in (3, 2, 0):
        record.truncate_metrics(lengths[last])
        assert [found["epoch"] for found in read_histograms(record)] == list(range(1, last + 1))
    assert (record.path / "histograms.jsonl").read_bytes() == b""


def test_the_file_has_a_bound(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(json.dumps(line(1), separators=(",", ":"))) + 1
    monkeypatch.setattr(histograms, "MAX_BYTES", 2 * size)
    assert [append_histograms(record, line(epoch)) for epoch in (1, 2, 3)] == [True, True, False]
    assert [found["epoch"] for found in read_histograms(record)] == [1, 2]


def test_a_layer_name_has_no_secret(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "correct-horse-battery")
    append_histograms(record, line(1, ("branches.correct-horse-battery",)))
    assert b"correct-horse" not in (record.path / "histograms.jsonl").read_bytes()
    assert list(read_histograms(record)) == [line(1, ("branches.***",))]


@pytest.mark.parametrize(
    "damage",
    [
        {"epoch": "1"},
        {"epoch": True},
        {"epoch": 0},
        {"gradients": []},
        {"gradients": {"conv1": {"top": 0.5, "counts": [1] * 63}}},
        {"gradients": {"conv1": {"top": 0.5, "counts": [1.5] * 64}}},
        {"gradients": {"conv1": {"top": 0.5, "counts": [-1] * 64}}},
        {"updates": {"conv1": {"top": 0.3, "counts": [1] * 64}}},
        {"updates": {"conv1": {"top": 1e300, "counts": [1] * 64}}},
        {"updates": {"conv1": {"top": float("nan"), "counts": [1] * 64}}},
        {"updates": {"conv1": {"top": "0.5", "counts": [1] * 64}}},
        {"updates": {"conv1": None}},
    ],
    ids=str,
)
def test_damage_is_one_sentence(record: RunDir, damage: dict[str, Any]) -> None:
    (record.path / "histograms.jsonl").write_text(json.dumps(line(1)) + "\n" + json.dumps({**line(2), **damage}) + "\n")
    with pytest.raises(UserError, match=r"histograms.jsonl is damaged \(line 2: .*delete it"):
        list(read_histograms(record))


def test_no_file_in_its_place_is_found_before_training(record: RunDir) -> None:
    os.mkfifo(record.path / "histograms.jsonl")
    with pytest.raises(UserError, match="not a file"):
        record.check_resumable()
    with pytest.raises(UserError, match="a named pipe"):
        list(read_histograms(record))
