"""How much gradient reaches each layer: the first thing to look at when a network does not learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cifar.probes import collect_gradients, weight_layers
from cifar.registry import probes


def gradient_statistics(grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of |gradient|, maximum of |gradient| and Euclidean norm, each (layers,)."""
    mean = [grad.abs().mean() for grad in grads]  # norm(1) / size would add a million floats one after the other
    largest, norm = [grad.abs().amax() for grad in grads], [torch.linalg.vector_norm(grad) for grad in grads]
    return torch.stack(mean), torch.stack(largest), torch.stack(norm)


flow = gradient_statistics  # old name, for plug-ins


def measure_gradients(grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `gradient_statistics` gives, and the norm of all these gradients together, a 0-d tensor."""
    mean, largest, norm = gradient_statistics(grads)
    return mean, largest, norm, torch.linalg.vector_norm(norm)


@probes.register("gradient_flow")
class GradientFlow:
    """Mean |gradient|, largest |gradient| and gradient norm of each layer's weight; and the norm over all of them."""

    labels: ClassVar = {
        "gradient_mean": ("mean |gradient|", ""),
        "gradient_max": ("largest |gradient|", ""),
        "gradient_norm": ("gradient norm", ""),
        "train/gradient_norm": ("gradient norm of all layers", ""),
    }
    reduce: ClassVar = {"gradient_max": "max"}

    is_of_all_gradients: ClassVar = True  # `compute` takes the gradients of all weights, and nothing else

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        layers = weight_layers(parameters)
        self.layers, self.names, self.compute = list(layers), list(layers.values()), measure_gradients

    def after_backward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.names:
            return {}
        mean, largest, norm, total = self.compute(collect_gradients(parameters, self.names))
        return {"gradient_mean": mean, "gradient_max": largest, "gradient_norm": norm, "train/gradient_norm": total}
