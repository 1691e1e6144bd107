"""Dead ends: the share of each layer's weights whose gradient is exactly zero (behind ReLUs that never fire, for example)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cifar.probes import gradients, weight_layers
from cifar.registry import probes


def zeros(grads: list[Tensor]) -> Tensor:
    """Share of exact zeros, (layers,)."""
    return torch.stack([(grad == 0).float().mean() for grad in grads])


@probes.register("zero_gradients")
class ZeroGradients:
    """Share of exact zeros in the gradient of each layer's weight."""

    labels: ClassVar = {"gradient_zeros": ("zero gradients", "share")}

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        layers = weight_layers(parameters)
        self.layers, self.names, self.by = list(layers), list(layers.values()), zeros

    def after_backward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.names:
            return {}
        return {"gradient_zeros": self.by(gradients(parameters, self.names))}
