"""Values of runs that train in a second."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "dataset": "stand-in", "model": "conv", "width": 8, "epochs": 2, "batch_size": 64, "train_size": 512, "val_size": 200,
    "probe_every": 3, "threads": 1, "device": "cpu",
}  # fmt: skip
FULL: dict[str, Any] = {**TINY, "mixup": 0.2, "ema": 0.99, "cutout": 8, "optimizer": "sgd", "lr": 0.05, "schedule": "onecycle"}
