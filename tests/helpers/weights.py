"""Digests of what a run has left, to compare runs to the bit."""

from __future__ import annotations

import hashlib
import json

import torch

from cifar.tracking.run_dir import RunDir


def hash_weights(record: RunDir) -> str:
    """SHA-256 of the final weights: their names, types, shapes and bits."""
    found = hashlib.sha256()
    for name, value in sorted(torch.load(record.path / "weights.pt", weights_only=True).items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def hash_run(record: RunDir) -> tuple[str, str]:
    """SHA-256 of the final weights, and of the histograms and the metrics, `system/` (times, memory) aside."""
    rows = [{k: v for k, v in row.items() if not k.startswith("system/")} for row in record.read_rows()]
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    histograms = record.path / "histograms.jsonl"
    measured = json.dumps(rows).encode() + (histograms.read_bytes() if histograms.exists() else b"")
    return hash_weights(record), hashlib.sha256(measured).hexdigest()
