"""Values of runs that train in a second."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "dataset": "stand-in", "model": "conv", "width": 8, "epochs": 2, "batch_size": 64, "train_size": 512, "val_size": 200,
    "probe_every": 3, "threads": 1, "device": "cpu",
}  # fmt: skip
FULL: dict[str, Any] = {**TINY, "mixup": 0.2, "ema": 0.99, "cutout": 8, "optimizer": "sgd", "lr": 0.05, "schedule": "onecycle"}
# Everything that is drawn for a step: operations, erased boxes, dropped branches, mixing.
RECIPES: dict[str, Any] = {
    **TINY, "model": "resnet8", "width": 2, "se": 16, "drop_path": 0.5, "augment_policy": "randaugment", "random_erasing": 0.5,
    "cutmix": 1.0, "train_size": 320, "optimizer": "sgd", "lr": 0.05, "schedule": "onecycle",
}  # fmt: skip
