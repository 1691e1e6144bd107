"""How large a step is relative to each layer's weight: about 1e-3 in a network that learns well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cifar.probes import weight_layers
from cifar.registry import probes

ZERO_NORM = 1e-12  # a norm up to this one is that of zeros and of rounding errors


def measure_updates(weights: list[Tensor], before: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Norm of each weight's change over the norm of the weight before the step, (layers,); and the same of all together, ().

    NaN, which stands for no value, where the weights are zero, as in a layer that starts at zero.
    """
    change = torch.stack([torch.linalg.vector_norm(weight - old) for weight, old in zip(weights, before, strict=True)])
    norm = torch.stack([torch.linalg.vector_norm(old) for old in before])
    return _divide_norms(change, norm), _divide_norms(torch.linalg.vector_norm(change), torch.linalg.vector_norm(norm))


def _divide_norms(change: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm > ZERO_NORM, change / norm, torch.nan)


def update_ratios(weights: list[Tensor], before: list[Tensor]) -> Tensor:
    """The first of `measure_updates`: one ratio for each layer, (layers,)."""
    return measure_updates(weights, before)[0]


moved = update_ratios  # old name, for plug-ins


@probes.register("weight_updates")
class WeightUpdates:
    """Norm of the update over the norm of the weight before it, for each layer and for all layers together."""

    labels: ClassVar = {
        "update_ratio": ("update norm / weight norm", ""),
        "train/update_ratio": ("update norm / weight norm of all layers", ""),
    }

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        layers = weight_layers(parameters)
        self.layers, self.names, self.compute = list(layers), list(layers.values()), measure_updates
        self.before: list[Tensor] = []

    def before_update(self, parameters: Mapping[str, Tensor]) -> None:
        weights = [parameters[name].detach() for name in self.names]
        self.before = list(torch._foreach_mul(weights, 1.0)) if weights else []  # copies all of them by one kernel

    def after_update(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before, self.before = self.before, []  # freed at once: the copy of the weights lives for one step only
        if not before:
            return {}
        ratios, total = self.compute([parameters[name].detach() for name in self.names], before)
        return {"update_ratio": ratios, "train/update_ratio": total}
