"""Instruments: tensors in, named tensors out. A probe looks at gradients and weights, never at configuration or files.

A probe may have any of `after_backward`, `before_update` and `after_update`. They take the training parameters by name and
return {metric: tensor}: a 0-d tensor is one number, a 1-D tensor has an entry for each of the probe's `layers`. Values of
one epoch are averaged, or as `reduce = {metric: "max"}` says. Looking changes nothing: no randomness, nothing in place.
On a GPU a look is captured once and replayed, for later trials too: a probe keeps nothing from one look to the next there.
A probe's `by`, where there is one, is a function of tensors alone that does its arithmetic; where a step is compiled, so is it.
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
    layers: list[str]  # set by start, in network order

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Before training: the parameters that train, by name."""


def weight_layers(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> name of its weight (a filter or a matrix), in network order; a layer is the name without '.weight'."""
    return {name.removesuffix(".weight"): name for name, p in parameters.items() if p.ndim >= 2 and p.requires_grad}


def gradients(parameters: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The gradients of the named parameters; zeros for one that got none in this step."""
    found = []
    for name in names:
        gradient = parameters[name].grad
        found.append(torch.zeros_like(parameters[name]) if gradient is None else gradient.detach())
    return found


class Watcher:
    """Calls the probes every `every` steps of an epoch, from its first; sums on the device, read once an epoch."""

    def __init__(self, probes: Sequence[Probe], parameters: Mapping[str, Tensor], *, every: int = 50) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.every, self.probes = every, list(probes)
        self._totals: dict[str, Tensor] = {}  # metric -> sum or maximum of the looks, as the probe's value is shaped
        self._counts: dict[str, Tensor] = {}  # metric -> looks
        self._layers: dict[str, list[str]] = {}
        self._maximum: set[str] = set()
        for probe in self.probes:
            probe.start(self.parameters)
            for metric in probe.labels:
                if metric in self._layers:
                    raise UserError(f"two probes measure '{metric}'; choose one of them, or rename the metric in the plug-in")
                self._layers[metric] = probe.layers
            self._maximum |= {metric for metric, how in getattr(probe, "reduce", {}).items() if how == "max"}

    def compile(self, compiler: Callable[[Any], Any]) -> None:
        """Fuse what the probes compute, which takes longer than a small network's step where every kernel is launched."""
        for probe in self.probes:
            if callable(getattr(probe, "by", None)):
                probe.by = compiler(probe.by)  # type: ignore[attr-defined]

    def wants(self, step: int) -> bool:
        """Whether to look at this step; steps of an epoch are counted from 0."""
        return bool(self.probes) and step % self.every == 0

    def after_backward(self) -> None:
        self._call("after_backward")

    def before_update(self) -> None:
        self._call("before_update")

    def after_update(self) -> None:
        self._call("after_update")

    @torch.no_grad()
    def _call(self, moment: str) -> None:
        seen: dict[str, Tensor] = {}
        for probe in self.probes:
            look = getattr(probe, moment, None)
            for metric, value in ((look(self.parameters) or {}) if look else {}).items():
                assert metric in probe.labels, f"{type(probe).__name__} gives '{metric}' no label"
                seen[metric] = value.detach().float()
        if seen:
            self._add(seen)

    def _add(self, seen: Mapping[str, Tensor]) -> None:
        """Few kernels for all metrics, as a look is to cost next to nothing."""
        for metric, value in seen.items():
            if metric not in self._totals:
                self._totals[metric] = torch.full_like(value, self._empty(metric))
                self._counts[metric] = value.new_zeros(())
        for largest in (False, True):
            metrics = [metric for metric in seen if (metric in self._maximum) == largest]
            totals, values = [self._totals[metric] for metric in metrics], [seen[metric] for metric in metrics]
            if metrics:
                torch._foreach_maximum_(totals, values) if largest else torch._foreach_add_(totals, values)
        torch._foreach_add_([self._counts[metric] for metric in seen], 1)

    def _empty(self, metric: str) -> float:
        return float("-inf") if metric in self._maximum else 0.0

    def read(self) -> dict[str, float]:
        """The epoch's values, `metric` or `metric/layer`, and start again. The host waits here, once."""
        metrics = [metric for metric in self._layers if metric in self._totals]  # in the probes' order, resumed or not
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
        self._clear()
        return row

    def _clear(self) -> None:
        for metric, total in self._totals.items():
            total.fill_(self._empty(metric))
            self._counts[metric].zero_()

    def labels(self) -> dict[str, dict[str, str]]:
        """Metric -> its label and unit, for the record."""
        return {m: {"label": label, "unit": unit} for probe in self.probes for m, (label, unit) in probe.labels.items()}

    def state(self) -> dict[str, Tensor]:
        """The epoch so far, for a checkpoint: live tensors; clone what has to stay."""
        return {f"total/{m}": t for m, t in self._totals.items()} | {f"count/{m}": t for m, t in self._counts.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Takes up a `state()` again; empty is the beginning of an epoch."""
        self._clear()
        device = next(iter(self.parameters.values())).device
        for name, tensor in saved.items():
            kind, _, metric = name.partition("/")
            kept = self._totals if kind == "total" else self._counts
            if metric in kept:
                kept[metric].copy_(tensor)
            else:
                kept[metric] = tensor.detach().to(device, copy=True)
