"""The fraction of each layer's weights whose gradient is exactly zero, for example behind ReLUs that are always off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cifar.probes import collect_gradients, weight_layers
from cifar.registry import probes


def zero_fractions(grads: list[Tensor]) -> Tensor:
    """Fraction of exact zeros, (layers,)."""
    return torch.stack([(grad == 0).float().mean() for grad in grads])


zeros = zero_fractions  # old name, for plug-ins


def measure_zeros(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Fraction of exact zeros in each layer, (layers,), and in all layers together, a 0-d tensor."""
    fractions = zero_fractions(grads)
    num_weights = sum(grad.numel() for grad in grads)
    parts = [fraction * (grad.numel() / num_weights) for fraction, grad in zip(fractions.unbind(), grads, strict=True)]
    return fractions, torch.stack(parts).sum()


@probes.register("zero_gradients")
class ZeroGradients:
    """Fraction of exact zeros in the gradient of each layer's weight, and of all of them together."""

    labels: ClassVar = {
        "gradient_zeros": ("zero gradients", "share"),
        "train/zero_gradients": ("zero gradients of all layers", "share"),
    }

    is_of_all_gradients: ClassVar = True  # `compute` takes the gradients of all weights, and nothing else

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        layers = weight_layers(parameters)
        self.layers, self.names, self.compute = list(layers), list(layers.values()), measure_zeros

    def after_backward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.names:
            return {}
        fractions, total = self.compute(collect_gradients(parameters, self.names))
        return {"gradient_zeros": fractions, "train/zero_gradients": total}
