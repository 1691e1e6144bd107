"""Batches. `Loader` keeps the images as one uint8 tensor on the device; `CIFAR10Custom` takes them one by one.

Both draw from the same distribution. The fast path has no worker processes, and never waits for the device.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifar.data.augment import MEAN, STD, AtOnce, Augment, Draws, draw_mixing, first_side, normalize
from cifar.errors import UserError
from cifar.system.devices import cores

PIECE = 10_000  # images that a GPU augments at once, a compromise between launches and memory; compiled, it takes all of them


class Plan(NamedTuple):
    """What an epoch will show, on the CPU: a function of (seed, epoch) alone, the same for every device."""

    order: Tensor  # (steps * B,) int64: places in the data set; (N,) where the epoch's images are picked from it
    draws: Draws  # of each of them
    mixing: Tensor | None  # (steps, 3): see draw_mixing


class Loader:
    """Shuffled, augmented batches of `images` (N, 3, H, W) uint8 and `labels` (N,) int64, both on one device.

    `begin(epoch)`, then `take()` gives the batch that `at` says: a tensor on the device, so that a captured step finds its
    own batch. On a GPU `begin` makes the whole epoch at once, in the place of the last one; elsewhere `take` makes the batch,
    where a CPU has more cores than threads are asked for, while the network runs on the one before.
    With `keep` < 1 an epoch takes, in its order, that share of the images whose loss was largest when last seen, as `note` was
    told; those never seen count as largest. (Selective backpropagation with stale losses, Jiang et al. 2019, arXiv:1910.00762,
    draws by the loss's percentile; here the largest are taken.)
    To resume within an epoch, begin it at a later step. Training drops a last short batch; for evaluation (no augment, no
    shuffle) every image comes once, the last batch being short.
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
        mixing: float = 0.0,
        keep: float = 1.0,
    ) -> None:
        assert images.dtype == torch.uint8 and len(images) == len(labels) and images.device == labels.device
        self.images, self.labels, self.device = images.contiguous(), labels, images.device
        self.batch_size, self.augment, self.normalize, self.seed = batch_size, augment, normalize, seed
        self.shuffle = shuffle if shuffle is not None else augment is not None
        self.drop_last = drop_last if drop_last is not None else augment is not None
        self.channels_last, self.dtype, self.alpha = channels_last, dtype, mixing
        self.keep, self.picks = keep, keep < 1
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)  # the step of the epoch that comes next
        self.number = 0  # of the epoch that has begun
        self.drawn: Tensor | None = None  # (steps, 3): of the epoch, what `mix` wants
        self._plans: dict[int, Plan] = {}
        self.at_once: AtOnce | None = None  # how a GPU makes many batches, where that has been compiled
        self.store: tuple[Tensor, Tensor] | None = None  # the whole epoch: (steps, B, ...) and (steps, B)
        self._coming: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None  # a step, and its batch in the making
        self._ahead: tuple[int, Future[Plan]] | None = None  # an epoch, and its plan in the making
        if self.picks:
            assert self.augment is not None and self.drop_last
            count = self.steps * batch_size
            self._losses = torch.full((len(images),), torch.inf, device=self.device)  # of each image, when it was last seen
            self._slots = torch.zeros(count, dtype=torch.int64, device=self.device)  # what is picked: places in the order,
            self._places = torch.zeros_like(self._slots)  # and in the data set

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        count = round(self.keep * len(self.images))
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """(N,) int64 on the CPU: the places in the training set, in the order in which `epoch` visits them."""
        if not self.shuffle:
            return torch.arange(len(self.images))
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        return torch.randperm(len(self.images), generator=generator)

    def reseed(self, seed: int) -> None:
        """Start over as a loader of that seed."""
        self._drop()
        if self._ahead:
            self._ahead[1].exception()  # waits
            self._ahead = None
        self.seed, self.number, self._plans = seed, 0, {}
        if self.picks:
            self._losses.fill_(torch.inf)
            self._slots.zero_()
        self.augment = replace(self.augment, seed=seed) if self.augment else None

    def plan(self, epoch: int) -> Plan:
        """Of an epoch; worked out once, also ahead of it."""
        if epoch not in self._plans:
            ahead, self._ahead = self._ahead, None
            made = ahead[1].result() if ahead and ahead[0] == epoch else self._planned(epoch)
            self._plans = {n: plan for n, plan in self._plans.items() if n == self.number}
            self._plans[epoch] = made
        return self._plans[epoch]

    def look_ahead(self, epoch: int) -> None:
        """Work out the plan of an epoch in a thread, while this one has other things to do."""
        if epoch not in self._plans and not self._ahead:
            self._ahead = epoch, _beside().submit(self._planned, epoch)

    def _planned(self, epoch: int) -> Plan:
        order = self.order(epoch)[: None if self.picks else self.steps * self.batch_size]
        generator = torch.Generator().manual_seed(seed_of("augment", self.seed, epoch))
        augment = self.augment or Augment(flip="none", crop=0)
        draws = augment.draw(len(order), generator, self.images.shape[2])
        mixing = draw_mixing(self.steps, self.alpha, generator) if self.alpha else None
        if self.device.type == "cuda":  # from pinned memory a copy waits for nothing
            order, draws = order.pin_memory(), Draws(*(None if drawn is None else drawn.pin_memory() for drawn in draws))
        return Plan(order, draws, mixing)

    def begin(self, epoch: int, start: int = 0) -> None:
        """From here on batches are those of `epoch`, from step `start` on. Never waits for the device."""
        self._drop()
        self.number = epoch
        plan = self.plan(epoch)
        self.at.fill_(start)
        if self.picks:
            self._pick(plan, start)
        if plan.mixing is not None:
            self.drawn = torch.empty_like(plan.mixing, device=self.device) if self.drawn is None else self.drawn
            copy_to_device(self.drawn, plan.mixing)
        if self.device.type == "cuda" and self.augment is not None:
            self._fill(start)

    def _pick(self, plan: Plan, start: int) -> None:
        order = on_device(plan.order, self.device)
        if not start:  # in the middle of an epoch they are what `load` has brought
            hardest = self._losses.index_select(0, order).argsort(descending=True, stable=True)
            self._slots.copy_(hardest[: len(self._slots)].sort().values)
        self._places.copy_(order.index_select(0, self._slots))

    def note(self, losses: Tensor) -> None:
        """The losses (B,) of the images of step `at`."""
        places = self._places.view(self.steps, self.batch_size).index_select(0, self.at)[0]
        self._losses.index_copy_(0, places, losses.float())

    def state(self) -> dict[str, Tensor]:
        """What batches depend on beside seed and epoch: live tensors, nothing without `keep`."""
        return {"losses": self._losses, "slots": self._slots} if self.picks else {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Copies a `state()` in place; before `begin`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def take(self) -> tuple[Tensor, Tensor]:
        """(images (B, 3, H, W) float, labels (B,)) of step `at`. `at` is moved on by whoever takes the step."""
        if self.store is not None:
            return picked(*self.store, self.at, self.channels_last)
        step, coming = int(self.at), self._coming
        made = coming[1].result() if coming and coming[0] == step else self.batch(step)
        self._coming = None
        if self.device.type == "cpu" and step + 1 < self.steps and torch.get_num_threads() < cores():
            # a function of what `begin` settled: the same wherever it is made
            self._coming = step + 1, _beside().submit(self.batch, step + 1)
        return made

    def _drop(self) -> None:
        """Whatever is in the making belongs to an epoch that is over."""
        if self._coming:
            self._coming[1].exception()  # waits
            self._coming = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (B, 3, H, W) float, labels (B,)) from batch `start` on."""
        assert not self.picks, "what has been picked is known by `begin`"
        self.number = epoch
        for step in range(start, self.steps):
            yield self.batch(step)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step of the epoch that has begun, on the device; augmented if this loader augments."""
        return self._made(slice(step * self.batch_size, (step + 1) * self.batch_size))

    def _made(self, slots: slice) -> tuple[Tensor, Tensor]:
        if self.augment is None and not self.shuffle:
            images, labels = self.images[slots], self.labels[slots]
        else:
            plan = self.plan(self.number)
            indices = self._places[slots] if self.picks else on_device(plan.order[slots], self.device)
            labels = self.labels.index_select(0, indices)
            if self.augment is not None:
                drawn = plan.draws if self.picks else plan.draws.at(slots)
                draws = Draws(*(None if each is None else on_device(each, self.device) for each in drawn))
                draws = draws.at(self._slots[slots]) if self.picks else draws
                if self.at_once is not None:
                    made = self.augment.at_once(self.images, indices, self.number, draws, self.dtype, self.at_once)
                    return made.permute(0, 3, 1, 2), labels
                images = self.augment.apply(self.images.index_select(0, indices), indices, self.number, draws)
            else:
                images = self.images.index_select(0, indices)
        kind = self.augment.normalize if self.augment else self.normalize
        return normalize(images, kind, dtype=self.dtype, channels_last=self.channels_last), labels

    def _fill(self, start: int) -> None:
        """Make every batch of the epoch, in large pieces, where those of the last one were."""
        if self.store is None:
            _, channels, height, width = self.images.shape
            shape = (height, width, channels) if self.channels_last else (channels, height, width)
            images = torch.zeros((self.steps, self.batch_size, *shape), dtype=self.dtype, device=self.device)
            labels = torch.zeros((self.steps, self.batch_size), dtype=self.labels.dtype, device=self.device)
            self.store = images, labels
        images, labels = self.store
        most = max(1, PIECE // self.batch_size)
        if self.at_once is not None:  # compiled for one size
            start, most = 0, self.steps
        for step in range(start, self.steps, most):
            end = min(step + most, self.steps)
            made, classes = self._made(slice(step * self.batch_size, end * self.batch_size))
            made = made.permute(0, 2, 3, 1) if self.channels_last else made
            images[step:end].copy_(made.reshape(images[step:end].shape))
            labels[step:end].copy_(classes.view(labels[step:end].shape))


@functools.cache
def _beside() -> ThreadPoolExecutor:
    """A thread that makes batches while the others compute; one is enough for any network."""
    return ThreadPoolExecutor(1, "batches", initializer=lambda: torch.set_num_threads(1))


def quiet() -> None:
    """Wait until nothing is in the making: a capture does not bear another thread's calls to the GPU."""
    _beside().submit(lambda: None).result()


def picked(images: Tensor, labels: Tensor, at: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Batch `at` (1,) of a stored epoch, as a network takes it."""
    chosen = images.index_select(0, at)[0]
    return chosen.permute(0, 3, 1, 2) if channels_last else chosen, labels.index_select(0, at)[0]


def copy_to_device(target: Tensor, source: Tensor) -> None:
    """Copy a CPU tensor in place. From pinned memory a copy to a GPU waits for nothing."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=target.is_cuda)


def on_device(source: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for it."""
    return source.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else source.to(device)


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
