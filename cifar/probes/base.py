"""Probes measure gradients and weights during training. They know nothing of configuration or files.

A probe may have any of the methods `after_backward`, `before_update` and `after_update`. Each takes the training parameters
by name and returns {metric: tensor}: a 0-d tensor is one number, a 1-D tensor has an entry for each of the probe's `layers`.
The values of an epoch are averaged; `reduce = {metric: "max"}` takes the largest instead. NaN stands for "no value", for
example of a ratio to a norm that is zero: it is left out of the average, and an entry without any value is not in the row.

A probe changes nothing: it draws no random numbers and writes to no tensor. On a GPU its calls are captured once and
replayed, in later trials too, so it may keep nothing from one step to the next.

`start` may set an attribute `compute`, a function of tensors alone that does the arithmetic. It is compiled with the step.
The package's own probes of the same gradients are compiled as one function: the gradients are read once, by half the kernels.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from cifar.errors import UserError

if TYPE_CHECKING:
    from cifar.probes.histograms import HistogramRecorder


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
    """Calls the probes in every `every`-th step of an epoch, from its first. The sums on the device are read once an epoch.

    `histograms`, if there is one, counts in the same steps.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        parameters: Mapping[str, Tensor],
        *,
        every: int = 50,
        histograms: HistogramRecorder | None = None,
    ) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.histograms = histograms
        self.every, self.probes = every, list(probes)
        self._totals: dict[str, Tensor] = {}  # metric -> sum or maximum, in the shape of the probe's value
        self._counts: dict[str, Tensor] = {}  # metric -> number of values, in the same shape
        self._neutral: dict[tuple[str, ...], Tensor] = {}  # metrics -> what adds nothing to their totals, (all entries,)
        self._layers: dict[str, list[str]] = {}
        self._device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        self._may_fork = self._device.type == "cuda" and all(_is_ours(probe) for probe in self.probes)
        self._streams: list[torch.cuda.Stream] = []
        self._maximum: set[str] = set()
        for probe in self.probes:
            _check_class(probe)
            probe.start(self.parameters)
            _check_layers(probe)
            for metric in probe.labels:
                if metric in self._layers:
                    raise UserError(f"two probes measure '{metric}'; choose one of them, or rename the metric in the plug-in")
                self._layers[metric] = list(probe.layers)
            self._maximum |= {metric for metric, kind in getattr(probe, "reduce", {}).items() if kind == "max"}

    def compile(self, compiler: Callable[[Any], Any]) -> None:
        """Compile the probes' arithmetic. Uncompiled, its many kernels take longer than the step of a small network."""
        same: list[Any] = [
            probe for probe in self.probes if getattr(type(probe), "is_of_all_gradients", False) and _is_ours(probe)
        ]
        shared = SharedCompute([probe.compute for probe in same], compiler(call_functions)) if len(same) > 1 else None
        for probe in self.probes:
            if shared and probe in same:
                probe.compute = functools.partial(shared, same.index(probe))  # type: ignore[attr-defined]
            elif callable(compute := getattr(probe, "__dict__", {}).get("compute")):
                probe.compute = compiler(compute)  # type: ignore[attr-defined]
            if callable(getattr(probe, "by", None)):  # old name of `compute`, for plug-ins
                probe.by = compiler(probe.by)  # type: ignore[attr-defined]

    def is_due(self, step: int) -> bool:
        """Whether the probes are called in this step. Steps of an epoch are counted from 0."""
        return bool(self.probes) and step % self.every == 0

    @torch.no_grad()
    def after_backward(self) -> None:
        if streams := self._fork():
            with torch.cuda.stream(streams[0]):
                self._call_probes("after_backward")
            with torch.cuda.stream(streams[1]):
                self._call_histograms("after_backward")
        else:
            self._call_probes("after_backward")
            self._call_histograms("after_backward")

    @torch.no_grad()
    def before_update(self) -> None:
        self._call_probes("before_update")  # not beside the update: it keeps what the update changes
        self._call_histograms("before_update")

    @torch.no_grad()
    def after_update(self) -> None:
        if streams := self._fork():
            with torch.cuda.stream(streams[0]):
                self._call_probes("after_update")
            with torch.cuda.stream(streams[1]):
                self._call_histograms("after_update")
            for stream in streams:  # the step's other work waits here: it drops the gradients, and the next step changes all
                torch.cuda.current_stream(self._device).wait_stream(stream)
        else:
            self._call_probes("after_update")
            self._call_histograms("after_update")

    def _fork(self) -> list[torch.cuda.Stream]:
        """While a step is captured: two streams, for the probes and for the histograms, that begin where the current one is.

        In the graph they are branches, which a GPU computes at the same time, and beside the update: each kernel is so small
        that there is room. `after_update` joins them. Elsewhere, and with plug-ins, which may hand tensors from one method to
        the next: none.
        """
        if not self._may_fork or not torch.cuda.is_current_stream_capturing():
            return []
        if not self._streams:
            self._streams = [torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)]
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._streams

    def _call_histograms(self, hook_name: str) -> None:
        if self.histograms:
            getattr(self.histograms, hook_name)(self.parameters)

    def _call_probes(self, hook_name: str) -> None:
        values: dict[str, Tensor] = {}
        for probe in self.probes:
            hook = getattr(probe, hook_name, None)
            measured = (hook(self.parameters) or {}) if hook else {}
            if not isinstance(measured, Mapping):
                raise UserError(_describe(probe, f"{hook_name} returns {type(measured).__name__}; return {{metric: tensor}}"))
            for metric, value in measured.items():
                if metric not in self._totals:
                    self._check_value(probe, metric, value)
                values[metric] = value.detach().float()
        if values:
            self._accumulate_values(values)

    def _check_value(self, probe: Probe, metric: str, value: Any) -> None:
        """Look at the first value of a metric. Raises UserError unless it can be kept."""
        if metric not in probe.labels:
            raise UserError(_describe(probe, f"'{metric}' is measured, but not among its labels: {', '.join(probe.labels)}"))
        if not isinstance(value, Tensor):
            raise UserError(_describe(probe, f"'{metric}' is measured as {type(value).__name__}; return a tensor"))
        num_layers = len(self._layers[metric])
        if value.shape not in ((), (num_layers,)):
            raise UserError(
                _describe(
                    probe,
                    f"'{metric}' has the shape {tuple(value.shape)}; it is () for one number, or ({num_layers},) for "
                    "one of each of its layers",
                )
            )

    def _accumulate_values(self, values: Mapping[str, Tensor]) -> None:
        """Add to the sums what is not NaN. Few kernels for all metrics together, so that probes cost next to nothing."""
        for metric, value in values.items():
            if metric not in self._totals:
                self._totals[metric] = torch.full_like(value, self._initial_value(metric))
                self._counts[metric] = torch.zeros_like(value)
        names = tuple(values)
        if names not in self._neutral:
            self._neutral[names] = torch.cat(
                [torch.full_like(values[name], self._initial_value(name)).flatten() for name in names]
            )
        flat = torch.cat([value.flatten() for value in values.values()])
        is_present = flat == flat  # not NaN; one kernel, where isnan() and its opposite are two
        sizes = [value.numel() for value in values.values()]
        filled = _split(torch.where(is_present, flat, self._neutral[names]), sizes)
        additions = {name: part.view_as(values[name]) for name, part in zip(names, filled, strict=True)}
        for is_maximum in (False, True):
            metrics = [metric for metric in names if (metric in self._maximum) == is_maximum]
            totals, parts = [self._totals[metric] for metric in metrics], [additions[metric] for metric in metrics]
            if metrics:
                torch._foreach_maximum_(totals, parts) if is_maximum else torch._foreach_add_(totals, parts)
        present = _split(is_present.float(), sizes)
        counts = [self._counts[name] for name in names]
        torch._foreach_add_(counts, [part.view_as(count) for part, count in zip(present, counts, strict=True)])

    def _initial_value(self, metric: str) -> float:
        return float("-inf") if metric in self._maximum else 0.0

    def read_and_reset(self) -> dict[str, float]:
        """The epoch's values by `metric` or `metric/layer`; the sums start again. Waits for the device, once."""
        metrics = [metric for metric in self._layers if metric in self._totals]  # the probes' order, in a resumed run too
        if not metrics:
            return {}
        counts = torch.cat([self._counts[metric].flatten() for metric in metrics])
        values = [
            (self._totals[metric] if metric in self._maximum else self._totals[metric] / self._counts[metric]).flatten()
            for metric in metrics
        ]
        numbers = torch.cat([counts, *values]).tolist()
        entries = iter(zip(numbers[: len(counts)], numbers[len(counts) :], strict=True))
        row = {}
        for metric in metrics:
            layers = [f"{metric}/{layer}" for layer in self._layers[metric]]
            for key in layers if self._totals[metric].ndim else [metric]:
                count, value = next(entries)
                if count:
                    row[key] = value
        self._reset_totals()
        return row

    def _reset_totals(self) -> None:
        for metric, total in self._totals.items():
            total.fill_(self._initial_value(metric))
            self._counts[metric].zero_()

    read = read_and_reset  # old name, for plug-ins

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
        for metric, count in self._counts.items():  # in older checkpoints all entries of a metric have one count
            if metric in self._totals and count.shape != self._totals[metric].shape:
                self._counts[metric] = count.expand_as(self._totals[metric]).clone()


HOOKS = ("after_backward", "before_update", "after_update")
_OWN_METRICS = ("epoch", "step", "layers", "train", "val", "test", "best", "system", "state")  # keys of every run's rows


class SharedCompute:
    """Several functions of the same tensors, called as one by whoever comes first; the others take their part of its results.

    All of them are called in each step, in their order.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], call: Callable[..., tuple[Any, ...]]) -> None:
        self._functions, self._call, self._results = tuple(functions), call, tuple[Any, ...]()

    def __call__(self, index: int, tensors: Sequence[Tensor]) -> Any:
        if index == 0:
            self._results = self._call(self._functions, tensors)
        result = self._results[index]
        if index == len(self._functions) - 1:
            self._results = ()  # nothing is kept from one step to the next
        return result


def call_functions(functions: Sequence[Callable[..., Any]], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The result of each function for the same tensors."""
    return tuple(function(tensors) for function in functions)


def _is_ours(probe: object) -> bool:
    return type(probe).__module__.startswith("cifar.probes.")


def _describe(probe: object, problem: str) -> str:
    file = getattr(sys.modules.get(type(probe).__module__), "__file__", None)
    return f"probe {type(probe).__name__}" + f" ({file})" * bool(file) + f": {problem}"


def _check_class(probe: Any) -> None:
    """Raises UserError where the class of a probe lacks something."""
    labels, reduce = getattr(probe, "labels", None), getattr(probe, "reduce", {})
    if not isinstance(labels, Mapping) or not all(
        isinstance(label, tuple | list) and len(label) == 2 and all(isinstance(part, str) for part in label)
        for label in labels.values()
    ):
        raise UserError(_describe(probe, 'it needs labels = {"metric": ("label", "unit")}'))
    is_ours = _is_ours(probe)  # these have totals as train/METRIC
    for metric in labels:
        if not isinstance(metric, str) or not metric or (metric.partition("/")[0] in _OWN_METRICS and not is_ours):
            raise UserError(_describe(probe, f"{metric!r} is no name for a metric of a probe; choose another"))
    if not isinstance(reduce, Mapping) or not set(reduce) <= set(labels) or not set(reduce.values()) <= {"max", "mean"}:
        raise UserError(_describe(probe, f'reduce is {reduce!r}; write {{"metric": "max"}} with a metric of its labels'))
    if not callable(getattr(probe, "start", None)):
        raise UserError(_describe(probe, "it needs a method start(parameters)"))
    if not any(callable(getattr(probe, hook, None)) for hook in HOOKS):
        raise UserError(_describe(probe, f"it measures nothing; give it a method {', '.join(HOOKS[:-1])} or {HOOKS[-1]}"))


def _check_layers(probe: Any) -> None:
    layers = getattr(probe, "layers", None)
    if not isinstance(layers, Iterable) or isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers):
        raise UserError(_describe(probe, "start(parameters) has to set `layers`, a list of names"))
    if len(set(layers)) < len(list(layers)):
        raise UserError(_describe(probe, "two of its layers have the same name"))


def _split(flat: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return torch.split(flat, list(sizes))  # type: ignore[no-any-return, unused-ignore]


Watcher = ProbeRunner  # old name, for plug-ins
