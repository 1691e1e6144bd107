"""How much gradient reaches each layer: what a network that does not learn is asked first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cifar.probes import gradients, weight_layers
from cifar.registry import probes


def flow(grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, largest and root of the sum of squares of |gradient|, each (layers,)."""
    mean = [grad.abs().mean() for grad in grads]  # not norm(1) / size, which sums a million floats one after the other
    largest, norm = [grad.abs().amax() for grad in grads], [torch.linalg.vector_norm(grad) for grad in grads]
    return torch.stack(mean), torch.stack(largest), torch.stack(norm)


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
        self.layers, self.names, self.by = list(layers), list(layers.values()), flow

    def after_backward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.names:
            return {}
        mean, largest, norm = self.by(gradients(parameters, self.names))
        return {"gradient_mean": mean, "gradient_max": largest, "gradient_norm": norm}
