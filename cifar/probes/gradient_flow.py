"""How much gradient reaches each layer: what a network that does not learn is asked first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cifar.probes import gradients, mean_sizes, weight_layers
from cifar.registry import probes


@probes.register("gradient_flow")
class GradientFlow:
    """Mean |gradient|, largest |gradient| and gradient norm of each layer's weight."""

    labels: ClassVar = {
        "gradient_mean": ("mean |gradient|", ""),
        "gradient_max": ("largest |gradient|", ""),
        "gradient_norm": ("gradient norm", ""),
    }
    reduce: ClassVar = {"gradient_max": "max"}

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        layers = weight_layers(parameters)
        self.layers, self.names = list(layers), list(layers.values())

    def after_backward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.names:
            return {}
        grads = gradients(parameters, self.names)
        largest, norm = torch._foreach_norm(grads, float("inf")), torch._foreach_norm(grads)
        return {"gradient_mean": mean_sizes(grads), "gradient_max": torch.stack(largest), "gradient_norm": torch.stack(norm)}
