"""The maths of training: a step, and an evaluation. Tensors only: no configuration, no CIFAR-10, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]


class Source(Protocol):
    """Batches of an epoch, by the step that `at` (1,) says."""

    at: Tensor
    batch_size: int
    picks: bool  # the images of an epoch by their losses, so it has to know them

    def take(self) -> tuple[Tensor, Tensor]: ...
    def note(self, losses: Tensor) -> None: ...


class Optimizer(Protocol):
    @property
    def stopping(self) -> Sequence[Tensor]: ...
    def follow(self, at: Tensor) -> None: ...
    def step(self) -> None: ...
    def zero_grad(self) -> None: ...


class Watcher(Protocol):
    """Looks at gradients after the backward pass and at weights around the update; never changes them."""

    def after_backward(self) -> None: ...
    def before_update(self) -> None: ...
    def after_update(self) -> None: ...


class Team(Protocol):
    """The processes that train one network together."""

    size: int

    def share(self, *batch: Tensor) -> tuple[Tensor, ...]: ...
    def average_gradients(self, model: nn.Module) -> None: ...


class Meter:
    """Loss and accuracy of an epoch, summed on the device, read once."""

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(3, dtype=wide, device=device)  # loss, correct, images
        self.last = torch.zeros(())  # the loss of the step before; on a GPU nobody looks, as that would wait
        self.add_up = add_up

    def add(self, loss: Tensor, correct: Tensor, count: int, at: Tensor) -> None:
        """loss: 0-d mean over the batch of `count` images, of which `correct` (0-d) were told right. Moves `at` on."""
        if loss.device.type == "cpu":
            self.last = loss.detach()
        self.add_up(self.sums, at, loss.detach(), correct, count)

    def read(self) -> tuple[float, float]:
        """(mean loss, accuracy as a fraction), and start again. The one place where the host waits for the device."""
        loss, correct, images = self.sums.tolist()
        self.sums.zero_()
        return loss / max(images, 1), correct / max(images, 1)


def add_up(sums: Tensor, at: Tensor, loss: Tensor, correct: Tensor, count: int) -> None:
    """A step's part of an epoch's sums, and one step more, in place; one addition, and apart from `Meter`, for a compiler."""
    at.add_(1)
    sums.add_(torch.stack((loss.to(sums.dtype) * count, correct.to(sums.dtype), torch.full_like(sums[2], count))))


class Average:
    """Exponential moving average of weights and buffers, in a second model that is evaluated in the first one's place.

    The decay warms up as (1 + t) / (10 + t), so that the first, random weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, averaged: nn.Module, decay: float) -> None:
        self.model, self.averaged, self.decay = model, averaged, decay
        pairs = list(zip(averaged.state_dict().values(), model.state_dict().values(), strict=True))
        self.smooth = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.updates = torch.zeros((), device=pairs[0][0].device)  # float32 counts to 16 million

    @torch.no_grad()
    def update(self) -> None:
        share = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        ours, theirs = [pair[0] for pair in self.smooth], [pair[1] for pair in self.smooth]
        change = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(ours, change)
        for counter, its in self.counters:
            counter.copy_(its)
        self.updates += 1


Forward = tuple[Tensor, Tensor, Tensor | None]


def forward(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    labels: Tensor,
    smoothing: Tensor | None,
    bf16: bool,
    apart: bool = False,
    rest: bool = False,
) -> Forward:
    """(mean cross-entropy with smoothed targets, number of images told right), both 0-d, and each image's loss (B,) if `apart`.

    images (B, 3, H, W); targets are labels (B,) or rows of shares (B, classes). `smoothing` (0-d) is the share of a target
    that is spread over all classes (Szegedy et al. 2016, sec. 7), None for none. A function of its own for torch.compile.
    `rest` says that some parameters want no gradients now.
    """
    if rest:
        pass  # reading it makes it a condition of what is compiled; torch 2.11 does not look at the parameters' requires_grad
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = model(images)  # (B, 3, H, W) -> (B, 10)
    logits = logits.float()
    correct = (logits.detach().argmax(1) == labels).sum()
    if apart:
        each = F.cross_entropy(logits, targets, reduction="none")
        if smoothing is not None:
            each = torch.lerp(each, -F.log_softmax(logits, 1).mean(1), smoothing)
        return each.mean(), correct, each.detach()
    loss = F.cross_entropy(logits, targets)
    if smoothing is not None:
        loss = torch.lerp(loss, -F.log_softmax(logits, 1).mean(), smoothing)  # the latter: equal shares of all classes
    return loss, correct, None


@contextmanager
def _without_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """What comes before the first layer that still learns is not worked out in a backward pass."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@dataclass
class Step:
    """One step of training. It reads and writes tensors in place and asks the host for nothing, so that it can be captured."""

    model: nn.Module
    source: Source
    optimizer: Optimizer
    meter: Meter
    watcher: Watcher
    team: Team
    average: Average | None = None
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    smoothing: Tensor | None = None
    bf16: bool = False
    forward: Callable[..., Forward] = forward
    forward_at: Callable[[bool], Forward] | None = None  # `forward` of the next batch, taking it included

    def __post_init__(self) -> None:
        self.one = torch.ones((), device=self.meter.sums.device)  # the loss's gradient, not made anew in each step

    def __call__(self, look: bool, rest: bool = False) -> None:
        """`look`: whether the watcher looks at this one. `rest`: parameters that have stopped learning get no gradients."""
        self.optimizer.follow(self.source.at)
        with _without_gradients(self.optimizer.stopping if rest else ()):
            loss, correct, losses = self.forward_at(rest) if self.forward_at else self._forward(rest)
            loss.backward(self.one)  # type: ignore[no-untyped-call]
        if losses is not None:
            self.source.note(losses)
        self.team.average_gradients(self.model)

        if look:
            self.watcher.after_backward()
            self.watcher.before_update()
        self.optimizer.step()
        if look:
            self.watcher.after_update()

        self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        self.meter.add(loss, correct, self.source.batch_size // self.team.size, self.source.at)

    def _forward(self, rest: bool) -> Forward:
        images, labels = self.source.take()
        inputs, targets = self.mix(images, labels) if self.mix else (images, labels)
        inputs, targets, labels = self.team.share(inputs, targets, labels)
        return self.forward(self.model, inputs, targets, labels, self.smoothing, self.bf16, self.source.picks, rest)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """A function of its own for torch.compile."""
    return model(images)  # type: ignore[no-any-return]


Logits = Callable[[Tensor], Tensor]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    autocast: AbstractContextManager[None],
    views: str = "none",
    by: Logits | None = None,
) -> tuple[Tensor, Tensor]:
    """Every image once -> logits (N, 10) float32 and labels (N,), on the device. `by`: the model, compiled."""
    model.eval()
    logits, labels = [], []
    for images, targets in batches:
        with autocast:
            logits.append(VIEWS[views][1](by or model, images).float())
        labels.append(targets)
    return torch.cat(logits), torch.cat(labels)


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean cross-entropy, accuracy as a fraction)."""
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def _mirrored(model: Logits, images: Tensor) -> Tensor:
    return 0.5 * (model(images) + model(images.flip(-1)))


def _mirrored_and_shifted(model: Logits, images: Tensor) -> Tensor:
    # Half the weight on the centre, half on two views shifted by a pixel along the diagonal, as cifar10-airbench does.
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    size = images.shape[-1]
    shifted = _mirrored(model, padded[..., :size, :size]) + _mirrored(model, padded[..., 2:, 2:])
    return 0.5 * _mirrored(model, images) + 0.25 * shifted


VIEWS: dict[str, tuple[int, Callable[[Logits, Tensor], Tensor]]] = {
    "none": (1, lambda model, images: model(images)),
    "flip": (2, _mirrored),
    "flip+shift": (6, _mirrored_and_shifted),
}  # name -> (forward passes an image, logits)
