"""Batches by torch's own Dataset and DataLoader, as the worksheets make them: one image at a time."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifar.data.augment import MEAN, STD, Augment, draw_boxes, erase, initial_flips
from cifar.data.loader import derive_seed
from cifar.errors import UserError


class CIFAR10Custom(Dataset[tuple[Tensor, int]]):
    """One image at a time, as the worksheets do it: flip, crop with padding, normalisation to [-1, 1].

    Random numbers come from torch's global generator, which `DataLoader` seeds in each of its workers. With `train=False`
    images are only normalised. An alternating flip needs a `set_epoch` before each epoch.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | Tensor,
        labels: NDArray[np.int64] | Tensor,
        train: bool,
        augment: Augment | None = None,
    ) -> None:
        self.images, self.labels = torch.as_tensor(images), torch.as_tensor(labels)
        self.train, self.augment, self.epoch = train, augment or Augment(), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, augment = self.images[index], self.augment
        if self.train:
            image = self._augment_image(image, index)
        scaled = image.float() / 255
        if self.train:
            scaled = self._jitter_colours(scaled)
        if augment.normalize == "half":
            scaled = (scaled - 0.5) / 0.5
        else:
            scaled = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return scaled, int(self.labels[index])

    def _jitter_colours(self, image: Tensor) -> Tensor:
        augment, mean = self.augment, (torch.tensor(MEAN) * 255).round().view(3, 1, 1) / 255
        if augment.contrast:
            image = mean + (1 + augment.contrast * (2 * torch.rand(()) - 1)) * (image - mean)
        if augment.brightness:
            image = image + augment.brightness * (2 * torch.rand(()) - 1)
        return image

    def _augment_image(self, image: Tensor, index: int) -> Tensor:
        augment, (_, height, width) = self.augment, image.shape
        if policy := augment.policy:
            image = policy.apply(image[None], policy.draw(1, torch.default_generator))[0]
        if augment.flip == "alternating":
            mirrored = bool((initial_flips(torch.tensor(index), augment.seed) + self.epoch) & 1)
        else:
            mirrored = augment.flip == "random" and bool(torch.randint(2, ()))
        if mirrored:
            image = image.flip(2)
        if augment.crop:
            p = augment.crop
            mode = "constant" if augment.crop_padding == "zero" else "reflect"
            image = F.pad(image[None].float(), (p, p, p, p), mode=mode)[0]
            top, left = torch.randint(2 * p + 1, (2,)).tolist()
            image = image[:, top : top + height, left : left + width]
        if augment.cutout:
            row, column = (int(centre) - augment.cutout // 2 for centre in torch.randint(height, (2,)))
            image = image.clone()
            blank = (torch.tensor(MEAN) * 255).round().view(3, 1, 1)
            image[:, max(row, 0) : max(row + augment.cutout, 0), max(column, 0) : max(column + augment.cutout, 0)] = blank
        if augment.random_erasing:
            boxes = draw_boxes(1, augment.random_erasing, height, torch.default_generator)
            image = erase(image.to(torch.uint8)[None], boxes.long())[0]
        return image


def make_dataloader(
    images: NDArray[np.uint8] | Tensor,
    labels: NDArray[np.int64] | Tensor,
    *,
    train: bool,
    batch_size: int = 128,
    augment: Augment | None = None,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, int]]:
    """torch's DataLoader over `CIFAR10Custom`, as in the worksheets. Training shuffles, and drops a last short batch."""
    if workers < 0:
        raise UserError(f"workers is {workers}; it is a number of processes, 0 for none")
    return DataLoader(
        CIFAR10Custom(images, labels, train, augment),
        batch_size=batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        generator=torch.Generator().manual_seed(derive_seed("dataloader", seed)),
    )
