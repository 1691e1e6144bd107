"""CIFAR-10: found or downloaded, verified, split, augmented, and made into batches.

What needs PyTorch is imported when it is first asked for. So the files can be read while PyTorch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cifar.data.cifar10 import (
    Dataset10,
    find_cifar10,
    find_or_download,
    load_dataset,
    read_ahead,
    resolve_auto,
    split_indices,
)
from cifar.system.disk import cache_folder
from cifar.tracking.predictions import CLASSES

if TYPE_CHECKING:
    from cifar.data.augment import MEAN, STD, Augment, crop, cutout, draw_mixing, flip, mix, normalize
    from cifar.data.loader import BatchFormat, EpochOptions, Loader
    from cifar.data.torch_dataset import CIFAR10Custom, make_dataloader

    dataloader = make_dataloader

load, split = load_dataset, split_indices  # old names, for notebooks
obtain, locate = find_or_download, find_cifar10

_WITH_TORCH = {
    **dict.fromkeys(("MEAN", "STD", "Augment", "crop", "cutout", "draw_mixing", "flip", "mix", "normalize"), "augment"),
    **dict.fromkeys(("BatchFormat", "EpochOptions", "Loader"), "loader"),
    **dict.fromkeys(("CIFAR10Custom", "make_dataloader"), "torch_dataset"),
}  # name -> the file that has it


def __getattr__(name: str) -> Any:
    if name == "dataloader":  # an old name, for notebooks
        name = "make_dataloader"
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'cifar.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cifar.data.{_WITH_TORCH[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WITH_TORCH, "dataloader"})


__all__ = [
    "CLASSES",
    "MEAN",
    "STD",
    "Augment",
    "BatchFormat",
    "CIFAR10Custom",
    "Dataset10",
    "EpochOptions",
    "Loader",
    "cache_folder",
    "crop",
    "cutout",
    "draw_mixing",
    "find_cifar10",
    "find_or_download",
    "flip",
    "load_dataset",
    "make_dataloader",
    "mix",
    "normalize",
    "read_ahead",
    "resolve_auto",
    "split_indices",
]
