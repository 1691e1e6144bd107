"""Batches. `Loader` keeps the images as one uint8 tensor on the device; `CIFAR10Custom` takes them one by one.

Both draw from the same distribution. The fast path has no worker processes, and never waits for the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifar.data.augment import MEAN, STD, Augment, first_side, normalize
from cifar.errors import UserError


class Loader:
    """Shuffled, augmented batches of `images` (N, 3, H, W) uint8 and `labels` (N,) int64, both on one device.

    The order of epoch e is a function of (seed, e) alone; augmentation draws from `generator`, on the images' device. To
    resume within an epoch: `load(state)`, then `epoch(e, start=next batch)`. Training drops a last short batch; for
    evaluation (no augment, no shuffle) every image comes once, the last batch being short.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        augment: Augment | None = None,
        normalize: str = "half",
        seed: int = 0,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert images.dtype == torch.uint8 and len(images) == len(labels) and images.device == labels.device
        self.images, self.labels, self.device = images.contiguous(), labels, images.device
        self.batch_size, self.augment, self.normalize, self.seed = batch_size, augment, normalize, seed
        self.shuffle = shuffle if shuffle is not None else augment is not None
        self.drop_last = drop_last if drop_last is not None else augment is not None
        self.channels_last, self.dtype = channels_last, dtype
        self.generator = torch.Generator(device=self.device).manual_seed(seed_of("augment", seed))

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        count = len(self.images)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """(N,) int64 on the CPU: the places in the training set, in the order in which `epoch` visits them."""
        if not self.shuffle:
            return torch.arange(len(self.images))
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        return torch.randperm(len(self.images), generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (B, 3, H, W) float, labels (B,)) from batch `start` on."""
        order = self.order(epoch)
        if self.device.type == "cuda":  # only from pinned memory does a copy not wait
            order = order.pin_memory()
        order = order.to(self.device, non_blocking=True)
        for step in range(start, self.steps):
            yield self.batch(order[step * self.batch_size : (step + 1) * self.batch_size], epoch)

    def batch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The batch of `indices` (B,), on the device; augmented if this loader augments."""
        images, labels = self.images.index_select(0, indices), self.labels.index_select(0, indices)
        form: dict[str, Any] = {"dtype": self.dtype, "channels_last": self.channels_last}
        if self.augment is None:
            return normalize(images, self.normalize, **form), labels
        return self.augment(images, indices, epoch, self.generator, **form), labels

    def state(self) -> Tensor:
        """The generator's state, a uint8 tensor on the CPU, as a checkpoint keeps it."""
        return self.generator.get_state()

    def load(self, state: Tensor) -> None:
        """Go on from `state`."""
        self.generator.set_state(state.cpu())


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed from names and numbers; near seeds give unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class CIFAR10Custom(Dataset[tuple[Tensor, int]]):
    """One image at a time, as the worksheets do it: flip, crop with padding, normalisation to [-1, 1].

    Draws come from torch's global generator, which `DataLoader` seeds in each of its workers. With `train=False` images are
    only normalised. `set_epoch` moves an alternating flip on.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | Tensor,
        labels: NDArray[np.int64] | Tensor,
        train: bool,
        augment: Augment | None = None,
    ) -> None:
        self.images, self.labels = torch.as_tensor(images), torch.as_tensor(labels)
        self.train, self.augment, self.current = train, augment or Augment(), 0

    def set_epoch(self, epoch: int) -> None:
        self.current = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, augment = self.images[index], self.augment
        if self.train:
            image = self._augmented(image, index)
        scaled = image.float() / 255
        if augment.normalize == "half":
            scaled = (scaled - 0.5) / 0.5
        else:
            scaled = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return scaled, int(self.labels[index])

    def _augmented(self, image: Tensor, index: int) -> Tensor:
        augment, (_, height, width) = self.augment, image.shape
        if augment.flip == "alternating":
            mirrored = bool((first_side(torch.tensor(index), augment.seed) + self.current) & 1)
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
        return image


def dataloader(
    images: NDArray[np.uint8] | Tensor,
    labels: NDArray[np.int64] | Tensor,
    *,
    train: bool,
    batch_size: int = 128,
    augment: Augment | None = None,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, int]]:
    """The worksheets' way to batches: torch's DataLoader over `CIFAR10Custom`. Training shuffles and drops a short batch."""
    if workers < 0:
        raise UserError(f"workers is {workers}; it is a number of processes, 0 for none")
    return DataLoader(
        CIFAR10Custom(images, labels, train, augment),
        batch_size=batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed_of("dataloader", seed)),
    )
