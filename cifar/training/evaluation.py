"""Evaluation: the logits of every image, test-time augmentation, and the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.data.augment import is_channels_last

EVAL_BATCH_SIZES = {"cpu": 125}  # the default took a CPU up to twice as long (LOG.md)
DEFAULT_EVAL_BATCH_SIZE = 1000

Batches = Iterable[tuple[Tensor, Tensor]]
LogitsFunction = Callable[[Tensor], Tensor]


def compute_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's forward pass. A plain function, so that torch.compile compiles it once for all models of a kind."""
    return model(images)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    autocast: AbstractContextManager[None],
    views: str = "none",
    compiled_model: LogitsFunction | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (N, 10) float32 and labels (N,) of all images, on the device.

    `views` is a key of VIEWS. `compiled_model`, where given, computes the logits in the model's place.
    """
    model.eval()
    _, average_views = VIEWS[views]
    logits, labels = [], []
    for images, targets in batches:
        with autocast:
            logits.append(average_views(compiled_model or model, images).float())
        labels.append(targets)
    return torch.cat(logits), torch.cat(labels)


@torch.inference_mode()
def evaluate_unsure_views(
    model: nn.Module,
    batches: Batches,
    *,
    autocast: AbstractContextManager[None],
    views: str,
    share: float,
    compiled_model: LogitsFunction | None = None,
) -> tuple[Tensor, Tensor]:
    """`evaluate`, where only the images that one view leaves unsure get all views; the others keep the logits of one view.

    Unsure is the `share` of the images with the smallest margins (see `find_unsure`). No label is looked at. An unsure image's
    logits are those that `evaluate` gives it with `views`.
    """
    inputs, labels = zip(*batches, strict=True)
    logits, _ = evaluate(model, zip(inputs, labels, strict=True), autocast=autocast, compiled_model=compiled_model)
    unsure = find_unsure(logits, share)
    images, size, count = torch.cat(inputs), len(inputs[0]), len(unsure)
    num_padded = -(-count // size) * size  # a compiler would make a program of its own for a short batch
    slots = unsure.repeat(-(-num_padded // count))[:num_padded]
    memory_format = torch.channels_last if is_channels_last(images) else torch.contiguous_format
    chosen = (
        (
            images.index_select(0, slots[start : start + size]).contiguous(memory_format=memory_format),
            slots[start : start + size],
        )
        for start in range(0, len(slots), size)
    )
    all_views, _ = evaluate(model, chosen, autocast=autocast, views=views, compiled_model=compiled_model)
    return logits.index_copy(0, unsure, all_views[:count]), torch.cat(labels)


def find_unsure(logits: Tensor, share: float) -> Tensor:
    """Indices (ceil(share * N),) of the images (N, 10) whose two largest probabilities are nearest to each other."""
    largest = logits.softmax(1).topk(2).values
    return (largest[:, 0] - largest[:, 1]).topk(max(1, math.ceil(share * len(logits) - 1e-9)), largest=False).indices


def count_views(views: str, share: float = 1.0) -> int:
    """Forward passes for an image, rounded up: the mean, where only a share of the images gets all views."""
    num_views = VIEWS[views][0]
    return num_views if share >= 1 or num_views == 1 else min(num_views, math.ceil(1 + share * num_views))


def compute_loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean cross-entropy, accuracy as a fraction). Waits for the device."""
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def _average_flips(model: LogitsFunction, images: Tensor) -> Tensor:
    return 0.5 * (model(images) + model(images.flip(-1)))


def _average_flips_and_shifts(model: LogitsFunction, images: Tensor) -> Tensor:
    # Half the weight on the unshifted image, half on two views shifted by one pixel along the diagonal (cifar10-airbench).
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    size = images.shape[-1]
    shifted = _average_flips(model, padded[..., :size, :size]) + _average_flips(model, padded[..., 2:, 2:])
    return 0.5 * _average_flips(model, images) + 0.25 * shifted


VIEWS: dict[str, tuple[int, Callable[[LogitsFunction, Tensor], Tensor]]] = {
    "none": (1, lambda model, images: model(images)),
    "flip": (2, _average_flips),
    "flip+shift": (6, _average_flips_and_shifts),
}  # name -> (forward passes per image, function that gives the mean logits)
