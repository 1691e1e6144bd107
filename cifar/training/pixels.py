"""A network with the normalisation of its images inside, for those who have pixels: its accuracy, and what is given away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cifar.data.augment import PixelConstants

NUM_CLASSES = 10


class PixelNetwork(nn.Module):
    """Images (B, 3, 32, 32) uint8, red, green, blue -> logits (B, 10). `normalize`: as the network was trained."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, normalize: str) -> None:
        super().__init__()
        constants = PixelConstants.of_kind(normalize, torch.device("cpu"))
        self.network = network
        self.register_buffer("scale", constants.scale.clone())
        self.register_buffer("shift", constants.shift.clone())

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.float() * self.scale - self.shift)
        return logits


@torch.inference_mode()
def count_right(
    predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, batch_size: int = 125
) -> tuple[Tensor, Tensor]:
    """(right answers, images) of each class, (10,) int64 each. `predict`: uint8 images -> logits."""
    right, total = torch.zeros(NUM_CLASSES, dtype=torch.long), torch.zeros(NUM_CLASSES, dtype=torch.long)
    for batch, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        is_right = predict(batch).argmax(1) == targets
        right += targets[is_right].bincount(minlength=NUM_CLASSES)
        total += targets.bincount(minlength=NUM_CLASSES)
    return right, total
