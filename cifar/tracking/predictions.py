"""predictions.npz in a run's folder: what the final evaluation predicted for each image, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar.system.files import read_arrays

FILE = "predictions.npz"
MAX_BYTES = 2**27  # unpacked; of 10,000 images it has less than a megabyte
NUM_CLASSES = 10
# in the order of the labels: Krizhevsky 2009, "Learning multiple layers of features from tiny images"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_predictions(folder: Path) -> dict[str, Any]:
    """index, label, predicted and confidence, each (images,); worst_index (k,), worst_images (k, 3, 32, 32); perhaps split.

    Raises MissingFileError, UnreadableFileError, and ValueError for a damaged file or one that is no evaluation.
    """
    arrays = read_arrays(folder / FILE, MAX_BYTES)
    missing = {"index", "label", "predicted", "confidence", "worst_index", "worst_images"} - arrays.keys()
    if missing:
        raise ValueError(f"it lacks {min(missing)}")
    label, predicted, images = arrays["label"], arrays["predicted"], arrays["worst_images"]
    is_listed = all(arrays[name].shape == label.shape for name in ("index", "predicted", "confidence"))
    is_whole = all(arrays[name].dtype.kind in "iu" for name in ("index", "label", "predicted", "worst_index"))
    is_right = is_listed and is_whole and label.ndim == 1 and arrays["confidence"].dtype.kind == "f"
    is_right = is_right and images.shape == (len(arrays["worst_index"]), 3, 32, 32) and images.dtype.kind == "u"
    if not is_right or not all(((values >= 0) & (values < NUM_CLASSES)).all() for values in (label, predicted)):
        raise ValueError("it is no evaluation of ten classes")
    return arrays


def name_classes(dataset: str) -> Sequence[str]:
    """The names of the classes, in the order of the labels; the stand-in has its own, which are counted here."""
    return CLASSES if dataset == "cifar10" else [f"class {i}" for i in range(NUM_CLASSES)]
