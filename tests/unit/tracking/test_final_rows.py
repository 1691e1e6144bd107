"""Which rows are final, read from checkpoints of PyTorch and from damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cifar.tracking.final_rows import FinalRows, read_checkpoint_length
from helpers.leet import end_record, make_record, row, write_checkpoint


@pytest.mark.parametrize("length", [0, 1, 255, 70_000, 2**33])
def test_the_length_in_a_checkpoint_of_pytorch(tmp_path: Path, length: int) -> None:
    torch.save({"metrics_bytes": length, "model": {"weight": torch.zeros(3)}}, tmp_path / "checkpoint.pt")
    assert read_checkpoint_length(tmp_path / "checkpoint.pt") == length


def test_a_damaged_checkpoint_makes_nothing_final(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": torch.zeros(3)}, path)
    assert read_checkpoint_length(path) == 0
    torch.save([7, {"metrics_bytes": "x"}], path)
    assert read_checkpoint_length(path) == 0
    whole = path.read_bytes()
    for content in (b"", b"PK\3\4", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        assert read_checkpoint_length(path) == 0
    assert read_checkpoint_length(tmp_path) == 0


def test_final_are_the_rows_of_the_checkpoint_and_all_rows_of_a_conclusive_end(tmp_path: Path) -> None:
    record = make_record(tmp_path, "final001")
    final = FinalRows(record)
    record.append_row(row(1))
    assert final.num_bytes() == 0
    one = record.metrics_bytes()
    write_checkpoint(record)
    record.append_row(row(2))
    assert final.num_bytes() == one
    write_checkpoint(record)
    assert final.num_bytes() == record.metrics_bytes() > one
    record.append_row(row(3))
    end_record(record, "failed")  # it may be retried, and trains epoch 3 again
    assert final.num_bytes() < record.metrics_bytes()
    end_record(record, "diverged")
    assert final.num_bytes() == record.metrics_bytes()
