"""Evaluation: the logits of every image, test-time augmentation, and the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
