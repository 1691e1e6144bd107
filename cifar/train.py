"""The maths of training: an epoch of steps, and an evaluation. Tensors only: no configuration, no CIFAR-10, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]


class Optimizer(Protocol):
    def set_progress(self, progress: float) -> None: ...
    def step(self) -> None: ...
    def zero_grad(self) -> None: ...


class Watcher(Protocol):
    """Looks at gradients after the backward pass and at weights around the update; never changes them."""

    def wants(self, step: int) -> bool: ...
    def after_backward(self) -> None: ...
    def before_update(self) -> None: ...
    def after_update(self) -> None: ...


class Team(Protocol):
    """The processes that train one network together."""

    def share(self, *batch: Tensor) -> tuple[Tensor, ...]: ...
    def average_gradients(self, model: nn.Module) -> None: ...


class Meter:
    """Loss and accuracy of an epoch, summed on the device, read once."""

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(3, dtype=wide, device=device)  # loss, correct, images

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """loss: 0-d mean over the batch; logits: (B, 10); labels: (B,)."""
        count = labels.shape[0]
        self.sums[0] += loss.detach() * count
        self.sums[1] += (logits.detach().argmax(1) == labels).sum()
        self.sums[2] += count

    def read(self) -> tuple[float, float]:
        """(mean loss, accuracy as a fraction), and start again. The one place where the host waits for the device."""
        loss, correct, images = self.sums.tolist()
        self.sums.zero_()
        return loss / max(images, 1), correct / max(images, 1)


class Average:
    """Exponential moving average of weights and buffers, in a second model that is evaluated in the first one's place.

    The decay warms up as (1 + t) / (10 + t), so that the first, random weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, averaged: nn.Module, decay: float) -> None:
        self.model, self.averaged, self.decay, self.updates = model, averaged, decay, 0
        pairs = list(zip(averaged.state_dict().values(), model.state_dict().values(), strict=True))
        self.smooth = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_([ours for ours, _ in self.smooth], [theirs for _, theirs in self.smooth], 1 - decay)
        for ours, theirs in self.counters:
            ours.copy_(theirs)
        self.updates += 1


def train_epoch(
    model: nn.Module,
    batches: Batches,
    *,
    first: int,
    optimizer: Optimizer,
    progress: Callable[[int], float],
    criterion: Callable[[Tensor, Tensor], Tensor],
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    autocast: AbstractContextManager[None],
    meter: Meter,
    team: Team,
    watcher: Watcher,
    average: Average | None,
    after_step: Callable[[int, Tensor], bool],
) -> bool:
    """Steps over `batches`, the first of which is number `first` of the epoch. False where `after_step` said to end."""
    model.train()
    for index, (images, labels) in enumerate(batches, start=first):
        inputs, targets = mix(images, labels) if mix else (images, labels)
        inputs, targets, labels = team.share(inputs, targets, labels)
        optimizer.set_progress(progress(index))
        with autocast:
            logits = model(inputs)  # (B, 3, 32, 32) -> (B, 10)
        loss = criterion(logits.float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        team.average_gradients(model)

        look = watcher.wants(index)
        if look:
            watcher.after_backward()
            watcher.before_update()
        optimizer.step()
        if look:
            watcher.after_update()

        optimizer.zero_grad()
        if average:
            average.update()
        meter.add(loss, logits, labels)
        if not after_step(index, loss):
            return False
    return True


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Batches, *, autocast: AbstractContextManager[None], views: str = "none"
) -> tuple[Tensor, Tensor]:
    """Every image once -> logits (N, 10) float32 and labels (N,), on the device."""
    model.eval()
    logits, labels = [], []
    for images, targets in batches:
        with autocast:
            logits.append(VIEWS[views][1](model, images).float())
        labels.append(targets)
    return torch.cat(logits), torch.cat(labels)


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean cross-entropy, accuracy as a fraction)."""
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def _mirrored(model: nn.Module, images: Tensor) -> Tensor:
    return 0.5 * (model(images) + model(images.flip(-1)))  # type: ignore[no-any-return]


def _mirrored_and_shifted(model: nn.Module, images: Tensor) -> Tensor:
    # Half the weight on the centre, half on two views shifted by a pixel along the diagonal, as cifar10-airbench does.
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    size = images.shape[-1]
    shifted = _mirrored(model, padded[..., :size, :size]) + _mirrored(model, padded[..., 2:, 2:])
    return 0.5 * _mirrored(model, images) + 0.25 * shifted


VIEWS: dict[str, tuple[int, Callable[[nn.Module, Tensor], Tensor]]] = {
    "none": (1, lambda model, images: model(images)),
    "flip": (2, _mirrored),
    "flip+shift": (6, _mirrored_and_shifted),
}  # name -> (forward passes an image, logits)
