"""Histograms on W&B: what the record has, in the rows of their epochs, live, by push and by wandb sync."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cifar.integrations.wandb.mirror import Mirror
from cifar.tracking.histograms import append_histograms
from cifar.tracking.run_dir import RunDir
from helpers.leet import end_record, make_record, row, wandb_files, write_checkpoint
from helpers.protocol import Server

EDGES = {0.5: [-0.5, -0.25, -0.125], 0.75: [-0.75, -0.375, -0.1875]}  # top -> the first ones on W&B
LAYERS = ("layers.0.conv1", "head")


def line(epoch: int) -> dict[str, Any]:
    def histogram(top: float, first: int) -> dict[str, Any]:
        return {"top": top, "counts": [epoch, 100, first, 0, *([0] * 28), 7, 5, *([0] * 30)]}  # pairs are added up on W&B

    return {
        "epoch": epoch,
        "steps": 2,
        "gradients": {layer: histogram(0.5, n) for n, layer in enumerate(LAYERS)},
        "updates": {layer: histogram(0.75, n + 10) for n, layer in enumerate(LAYERS)},
    }


def add_epoch(record: RunDir, epoch: int, *, with_histograms: bool = True) -> None:
    if with_histograms:
        append_histograms(record, line(epoch))
    record.append_row(row(epoch))


def found(history: list[dict[str, Any]]) -> dict[int, dict[str, tuple[float, list[int]]]]:
    """Epoch -> name -> (the largest edge, the first counts), of what a server has."""
    rows: dict[int, dict[str, tuple[float, list[int]]]] = {}
    for each in history:
        histograms = {key: value for key, value in each.items() if isinstance(value, dict) and value["_type"] == "histogram"}
        for value in histograms.values():
            assert len(value["values"]) == 32 and len(value["bins"]) == 33 and value["bins"] == sorted(set(value["bins"]))
            assert value["bins"][16] == 0 and value["bins"][:3] == EDGES[value["bins"][-1]]
            assert value["values"][16] == 12 and sum(value["values"][2:]) == 12
        rows[each["epoch"]] = {key: (value["bins"][-1], value["values"][:2]) for key, value in histograms.items()}
    return rows


def wanted(*epochs: int) -> dict[int, dict[str, tuple[float, list[int]]]]:
    return {
        epoch: {
            name: (top, [epoch + 100, first])
            for name, top, first in (
                ("gradients/layers.0.conv1", 0.5, 0),
                ("gradients/head", 0.5, 1),
                ("updates/layers.0.conv1", 0.75, 10),
                ("updates/head", 0.75, 11),
            )
        }
        for epoch in epochs
    }


@pytest.mark.slow
def test_they_are_in_the_rows_of_their_epochs(server: Server, tmp_path: Path) -> None:
    record = make_record(tmp_path, "hist0001", epochs=4)
    mirror = Mirror(record, "online")
    for epoch in range(1, 5):
        add_epoch(record, epoch, with_histograms=epoch != 2)
        write_checkpoint(record)
        assert mirror.sync() == 1
    end_record(record)
    assert mirror.finish()
    run = server.runs["hist0001"]
    assert found(run.history) == {**wanted(1, 3, 4), 2: {}}
    assert run.rows == list(record.read_rows())  # nothing of it is taken for a number
    assert not [key for key in run.summary if key.startswith(("gradients", "updates"))]
    defined = {
        each.get("1"): each for each in run.raw_config["_wandb"]["value"]["m"]
    }  # 1: name, 6: options, of which 2: hidden
    assert all(2 in defined[key]["6"] for key in wanted(1)[1])


@pytest.mark.slow
def test_offline_then_sync_and_live_give_the_same(server: Server, tmp_path: Path) -> None:
    for run_id, mode in (("hist0002", "online"), ("hist0003", "offline")):
        record = make_record(tmp_path, run_id, epochs=3)
        for epoch in (1, 2, 3):
            add_epoch(record, epoch)
        end_record(record)
        assert Mirror(record, mode).finish()
    (file,) = wandb_files(record)
    command = [sys.executable, "-m", "wandb", "sync", str(file.parent)]
    subprocess.run(command, check=True, capture_output=True, timeout=60, env={**os.environ, "WANDB_MODE": "online"})
    histories = [server.runs[run_id].history for run_id in ("hist0002", "hist0003")]
    assert found(histories[0]) == found(histories[1]) == wanted(1, 2, 3)


@pytest.mark.slow
def test_those_of_epochs_that_are_trained_again_are_the_new_ones(server: Server, tmp_path: Path) -> None:
    record = make_record(tmp_path, "hist0004", epochs=3)
    mirror = Mirror(record, "online")
    add_epoch(record, 1)
    write_checkpoint(record)
    length = record.metrics_bytes()
    add_epoch(record, 2)
    mirror.sync()  # sends the first row, and sees both lines
    record.truncate_metrics(length)
    append_histograms(record, {**line(2), "steps": 123456, "gradients": {"head": line(2)["gradients"]["head"]}})
    record.append_row(row(2))
    add_epoch(record, 3)
    end_record(record)
    assert mirror.finish()
    again = {name: value for name, value in wanted(2)[2].items() if name != "gradients/layers.0.conv1"}
    assert found(server.runs["hist0004"].history) == {**wanted(1, 3), 2: again}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"[]\n", b'{"epoch":2,"gradients":{"a":5}}\n', b'{"epoch":2,\x00\n'], ids=repr)
def test_a_damaged_file_costs_the_histograms_only(server: Server, tmp_path: Path, damage: bytes) -> None:
    record = make_record(tmp_path, "hist0005", epochs=2)
    add_epoch(record, 1)
    with open(record.path / "histograms.jsonl", "ab") as file:
        file.write(damage)
    add_epoch(record, 2, with_histograms=False)
    end_record(record)
    messages: list[str] = []
    assert Mirror(record, "online", messages.append).finish()
    assert found(server.runs["hist0005"].history) == {**wanted(1), 2: {}}
    assert len(messages) == (damage != b"[]\n") and all("histograms.jsonl is damaged" in message for message in messages)


@pytest.mark.slow
def test_a_number_of_the_same_name_stays(server: Server, tmp_path: Path) -> None:
    """A plug-in's probe may measure `gradients`."""
    record = make_record(tmp_path, "hist0006", epochs=1)
    append_histograms(record, line(1))
    record.append_row({**row(1), "gradients/head": 0.25})
    end_record(record)
    assert Mirror(record, "online").finish()
    (only,) = server.runs["hist0006"].history
    assert only["gradients/head"] == 0.25 and only["updates/head"]["_type"] == "histogram"
    assert json.dumps(only)
