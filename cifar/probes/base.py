"""Probes measure gradients and weights during training. They know nothing of configuration or files.

A probe may have any of the methods `after_backward`, `before_update` and `after_update`. Each takes the training parameters
by name and returns {metric: tensor}: a 0-d tensor is one number, a 1-D tensor has an entry for each of the probe's `layers`.
The values of an epoch are averaged; `reduce = {metric: "max"}` takes the largest instead.

A probe changes nothing: it draws no random numbers and writes to no tensor. On a GPU its calls are captured once and
replayed, in later trials too, so it may keep nothing from one step to the next.

`start` may set an attribute `compute`, a function of tensors alone that does the arithmetic. It is compiled with the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cifar.errors import UserError


class Probe(Protocol):
    """What every probe has."""

    labels: ClassVar[dict[str, tuple[str, str]]]  # metric -> (label, unit)
    layers: list[str]  # set by `start`, in network order

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Called before training, with the parameters that train, by name."""


def weight_layers(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> name of its weight (a filter or a matrix), in network order. The layer's name is that without '.weight'."""
    return {name.removesuffix(".weight"): name for name, p in parameters.items() if p.ndim >= 2 and p.requires_grad}


def collect_gradients(parameters: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The gradients of the named parameters; zeros for a parameter that got none in this step."""
    found = []
    for name in names:
        gradient = parameters[name].grad
        found.append(torch.zeros_like(parameters[name]) if gradient is None else gradient.detach())
    return found


gradients = collect_gradients  # old name, for plug-ins


class ProbeRunner:
    """Calls the probes in every `every`-th step of an epoch, from its first. The sums on the device are read once an epoch."""

    def __init__(self, probes: Sequence[Probe], parameters: Mapping[str, Tensor], *, every: int = 50) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.every, self.probes = every, list(probes)
        self._totals: dict[str, Tensor] = {}  # metric -> sum or maximum, in the shape of the probe's value
        self._counts: dict[str, Tensor] = {}  # metric -> number of values
        self._layers: dict[str, list[str]] = {}
        self._maximum: set[str] = set()
        for probe in self.probes:
            probe.start(self.parameters)
            for metric in probe.labels:
                if metric in self._layers:
                    raise UserError(f"two probes measure '{metric}'; choose one of them, or rename the metric in the plug-in")
                self._layers[metric] = probe.layers
            self._maximum |= {metric for metric, kind in getattr(probe, "reduce", {}).items() if kind == "max"}

    def compile(self, compiler: Callable[[Any], Any]) -> None:
        """Compile the probes' arithmetic. Uncompiled, its many kernels take longer than the step of a small network."""
        for probe in self.probes:
            if callable(compute := getattr(probe, "__dict__", {}).get("compute")):
                probe.compute = compiler(compute)  # type: ignore[attr-defined]
            if callable(getattr(probe, "by", None)):  # old name of `compute`, for plug-ins
                probe.by = compiler(probe.by)  # type: ignore[attr-defined]

    def is_due(self, step: int) -> bool:
        """Whether the probes are called in this step. Steps of an epoch are counted from 0."""
        return bool(self.probes) and step % self.every == 0

    def after_backward(self) -> None:
        self._call_probes("after_backward")

    def before_update(self) -> None:
        self._call_probes("before_update")

    def after_update(self) -> None:
        self._call_probes("after_update")

    @torch.no_grad()
    def _call_probes(self, hook_name: str) -> None:
        values: dict[str, Tensor] = {}
        for probe in self.probes:
            hook = getattr(probe, hook_name, None)
            for metric, value in ((hook(self.parameters) or {}) if hook else {}).items():
                assert metric in probe.labels, f"{type(probe).__name__} gives '{metric}' no label"
                values[metric] = value.detach().float()
        if values:
            self._accumulate_values(values)

    def _accumulate_values(self, values: Mapping[str, Tensor]) -> None:
        """Add to the sums. Few kernels for all metrics together, so that probes cost next to nothing."""
        for metric, value in values.items():
            if metric not in self._totals:
                self._totals[metric] = torch.full_like(value, self._initial_value(metric))
                self._counts[metric] = value.new_zeros(())
        for is_maximum in (False, True):
            metrics = [metric for metric in values if (metric in self._maximum) == is_maximum]
            totals, additions = [self._totals[metric] for metric in metrics], [values[metric] for metric in metrics]
            if metrics:
                torch._foreach_maximum_(totals, additions) if is_maximum else torch._foreach_add_(totals, additions)
        torch._foreach_add_([self._counts[metric] for metric in values], 1)

    def _initial_value(self, metric: str) -> float:
        return float("-inf") if metric in self._maximum else 0.0

    def read_and_reset(self) -> dict[str, float]:
        """The epoch's values by `metric` or `metric/layer`; the sums start again. Waits for the device, once."""
        metrics = [metric for metric in self._layers if metric in self._totals]  # the probes' order, in a resumed run too
        if not metrics:
            return {}
        parts = [torch.stack([self._counts[metric] for metric in metrics])]
        for metric in metrics:
            total = self._totals[metric]
            parts.append((total if metric in self._maximum else total / self._counts[metric]).flatten())
        numbers = torch.cat(parts).tolist()
        counts, values = numbers[: len(metrics)], iter(numbers[len(metrics) :])
        row = {}
        for metric, count in zip(metrics, counts, strict=True):
            layers = [f"{metric}/{layer}" for layer in self._layers[metric]]
            for key in layers if self._totals[metric].ndim else [metric]:
                value = next(values)
                if count:
                    row[key] = value
        self._reset_totals()
        return row

    def _reset_totals(self) -> None:
        for metric, total in self._totals.items():
            total.fill_(self._initial_value(metric))
            self._counts[metric].zero_()

    def metric_labels(self) -> dict[str, dict[str, str]]:
        """Metric -> its label and unit, for labels.json."""
        return {m: {"label": label, "unit": unit} for probe in self.probes for m, (label, unit) in probe.labels.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of the epoch so far, for a checkpoint. These are live tensors: clone what has to stay."""
        return {f"total/{m}": t for m, t in self._totals.items()} | {f"count/{m}": t for m, t in self._counts.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict()`. An empty one is the start of an epoch."""
        self._reset_totals()
        device = next(iter(self.parameters.values())).device
        for name, tensor in saved.items():
            kind, _, metric = name.partition("/")
            tensors = self._totals if kind == "total" else self._counts
            if metric in tensors:
                tensors[metric].copy_(tensor)
            else:
                tensors[metric] = tensor.detach().to(device, copy=True)


Watcher = ProbeRunner  # old name, for plug-ins
