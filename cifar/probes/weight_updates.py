"""How large a step is relative to each layer's weight: about 1e-3 in a network that learns well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cifar.probes import weight_layers
from cifar.registry import probes

ZERO_NORM = 1e-12  # a norm up to this one is that of zeros and of rounding errors


def update_ratios(weights: list[Tensor], before: list[Tensor]) -> Tensor:
    """Norm of each weight's change over the norm of the weight before the step, (layers,).

    NaN, which stands for no value, where the weights are zero, as in a layer that starts at zero.
    """
    change = [torch.linalg.vector_norm(weight - old) for weight, old in zip(weights, before, strict=True)]
    norm = torch.stack([torch.linalg.vector_norm(old) for old in before])
    return torch.where(norm > ZERO_NORM, torch.stack(change) / norm, torch.nan)


moved = update_ratios  # old name, for plug-ins


@probes.register("weight_updates")
class WeightUpdates:
    """Norm of the update over the norm of the weight before it, for each layer."""

    labels: ClassVar = {"update_ratio": ("update norm / weight norm", "")}

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        layers = weight_layers(parameters)
        self.layers, self.names, self.compute = list(layers), list(layers.values()), update_ratios
        self.before: list[Tensor] = []

    def before_update(self, parameters: Mapping[str, Tensor]) -> None:
        self.before = [parameters[name].detach().clone() for name in self.names]

    def after_update(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before, self.before = self.before, []  # freed at once: the copy of the weights lives for one step only
        if not before:
            return {}
        return {"update_ratio": self.compute([parameters[name].detach() for name in self.names], before)}
