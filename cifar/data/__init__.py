"""CIFAR-10: found or downloaded, verified, split, augmented, and made into batches."""

from cifar.data.augment import MEAN, STD, Augment, crop, cutout, draw_mixing, flip, mix, normalize
from cifar.data.cifar10 import (
    Dataset10,
    find_cifar10,
    find_or_download,
    load_dataset,
    resolve_auto,
    split_indices,
)
from cifar.data.loader import BatchFormat, EpochOptions, Loader
from cifar.data.torch_dataset import CIFAR10Custom, make_dataloader
from cifar.system.disk import cache_folder
from cifar.tracking.predictions import CLASSES

dataloader, load, split = make_dataloader, load_dataset, split_indices  # old names, for notebooks
obtain, locate = find_or_download, find_cifar10

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
    "resolve_auto",
    "split_indices",
]
