"""A picture of what augmentation does to images, and a check of a dataset's counts, mean and std."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from cifar.config.schema import Settings
from cifar.data import MEAN, STD, Augment, Dataset10
from cifar.errors import UserError

ROWS, COLUMNS, GAP, ZOOM = 8, 12, 2, 3


def find_problems(images: Dataset10) -> list[str]:
    """Sentences about counts, and for CIFAR-10 about mean and std; none where all is well."""
    found = []
    for split, labels, each in (("training", images.train_labels, 5000), ("test", images.test_labels, 1000)):
        counts = np.bincount(labels, minlength=10).tolist()
        if counts != [each] * 10:
            found.append(f"the {split} labels count {counts} by class, not {each} each")
    if images.name == "cifar10":
        pixels = images.train_images.transpose(1, 0, 2, 3).reshape(3, -1)  # (50000, 3, 32, 32) -> (3, N)
        for what, ours, known in (("mean", pixels.mean(1) / 255, MEAN), ("std", pixels.std(1) / 255, STD)):
            if not np.allclose(ours, known, atol=1e-6):
                found.append(f"the {what} by channel is {ours.round(6).tolist()}, not {list(known)}")
    return found


def draw_preview(images: Dataset10, config: Settings, out: Path) -> Path:
    """Write a PNG: a training image a row, first as it is, then as COLUMNS - 1 epochs would show it."""
    import matplotlib.image

    augment = dataclasses.replace(Augment.from_keys(config), normalize="half")
    generator = torch.Generator().manual_seed(config.seed)
    originals = torch.from_numpy(images.train_images[:ROWS])
    shown = [augment(originals, torch.arange(ROWS), epoch, generator) for epoch in range(1, COLUMNS)]  # in [-1, 1], and beyond
    shown = [((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8) for images in shown]
    tiles = torch.stack([originals, *shown], 1).permute(0, 1, 3, 4, 2).numpy()  # (rows, columns, 32, 32, 3)
    side = 32 + GAP
    sheet = np.full((ROWS * side + GAP, COLUMNS * side + GAP, 3), 255, np.uint8)
    for row in range(ROWS):
        for column in range(COLUMNS):
            top, left = GAP + row * side, GAP + column * side
            sheet[top : top + 32, left : left + 32] = tiles[row, column]
    try:
        matplotlib.image.imsave(str(out), sheet.repeat(ZOOM, 0).repeat(ZOOM, 1))
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {out} cannot be written ({error}); name another file, such as --out batch.png") from None
    return out.resolve()
