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


@probes.register("zero_gradients")
class ZeroGradients:
    """Fraction of exact zeros in the gradient of each layer's weight."""

    labels: ClassVar = {"gradient_zeros": ("zero gradients", "share")}

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        layers = weight_layers(parameters)
        self.layers, self.names, self.compute = list(layers), list(layers.values()), zero_fractions

    def after_backward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.names:
            return {}
        return {"gradient_zeros": self.compute(collect_gradients(parameters, self.names))}
