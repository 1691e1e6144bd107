"""CIFAR-10: found or downloaded, verified, split once, augmented and served in batches."""

from cifar.data.augment import MEAN, STD, Augment, crop, cutout, draw_mixing, flip, mix, normalize
from cifar.data.cifar10 import CLASSES, Dataset10, cache_folder, load, locate, obtain, resolve_auto, split
from cifar.data.loader import CIFAR10Custom, Loader, dataloader

__all__ = [
    "CLASSES",
    "MEAN",
    "STD",
    "Augment",
    "CIFAR10Custom",
    "Dataset10",
    "Loader",
    "cache_folder",
    "crop",
    "cutout",
    "dataloader",
    "draw_mixing",
    "flip",
    "load",
    "locate",
    "mix",
    "normalize",
    "obtain",
    "resolve_auto",
    "split",
]
