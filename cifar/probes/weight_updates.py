"""How far a step moves each layer, relative to the layer: about 1e-3 in a network that learns well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cifar.probes import weight_layers
from cifar.registry import probes


@probes.register("weight_updates")
class WeightUpdates:
    """Norm of the update over the norm of the weight before it, for each layer."""

    labels: ClassVar = {"update_ratio": ("update norm / weight norm", "")}

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        layers = weight_layers(parameters)
        self.layers, self.names = list(layers), list(layers.values())
        self.before: list[Tensor] = []

    def before_update(self, parameters: Mapping[str, Tensor]) -> None:
        self.before = list(torch._foreach_mul([parameters[name].detach() for name in self.names], 1.0))  # copies, all at once

    def after_update(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before, self.before = self.before, []  # freed at once: a second copy of the weights lives for one step only
        if not before:
            return {}
        moved = torch._foreach_sub([parameters[name].detach() for name in self.names], before)
        change, weight = torch.stack(torch._foreach_norm(moved)), torch.stack(torch._foreach_norm(before))
        return {"update_ratio": change / weight.clamp_min(1e-12)}
