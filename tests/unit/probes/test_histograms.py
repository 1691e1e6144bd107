"""Histograms of gradients and updates: the counts are those of NumPy, and nothing of the training changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.probes.histograms import MAX_LAYERS, HistogramRecorder, choose_layers
from cifar.tracking.histograms import bin_edges

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def count_with_numpy(values: np.ndarray, top: float) -> list[int]:
    """An edge belongs to the bin away from zero, so each side is counted by magnitude. Zeros are on the right."""
    edges = np.array([*bin_edges(top)[32:-1], np.inf])  # NumPy's last bin has its right edge too, which nothing reaches
    right, left = (np.histogram(side, edges)[0].tolist() for side in (values[values >= 0], -values[values < 0]))
    return [*reversed(left), *right]


def record(gradients: Sequence[Tensor], after: Sequence[Tensor] | None = None, steps: int = 1) -> dict[str, Any]:
    """The histograms of these gradients, and of updates from zero to `after`."""
    weights = {f"layer{i}.weight": nn.Parameter(torch.zeros_like(g)) for i, g in enumerate(gradients)}
    recorder = HistogramRecorder(weights)
    for _ in range(steps):
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
            weight.data.zero_()
        recorder.after_backward(weights)
        recorder.before_update(weights)
        for weight, value in zip(weights.values(), after or gradients, strict=True):
            weight.data.copy_(value)
        recorder.after_update(weights)
    found = recorder.read_and_reset()
    assert found is not None and found.pop("steps") == steps
    assert recorder.read_and_reset() is None  # counted anew
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-20, 1e-7, 1.0, 3e20])
def test_the_counts_are_numpys(device: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(*shape, generator=generator) ** 3 * scale).to(device)  # noqa: E731
    gradients = [draw(8, 3, 3, 3).to(memory_format=torch.channels_last), draw(16, 8, 1, 1), draw(40, 30).t(), draw(100, 2)[::2]]
    updates = [draw(*gradient.shape) for gradient in gradients]
    found = record(gradients, updates, steps=2)
    for kind, tensors in (("gradients", gradients), ("updates", updates)):
        assert list(found[kind]) == [f"layer{i}" for i in range(4)]
        for histogram, tensor in zip(found[kind].values(), tensors, strict=True):
            values = tensor.cpu().numpy().ravel()
            assert histogram["counts"] == [2 * n for n in count_with_numpy(values, histogram["top"])]
            edges = bin_edges(histogram["top"])
            assert edges[-2] <= abs(values).max() < edges[-1]


@pytest.mark.parametrize("device", DEVICES)
def test_edges_zeros_and_what_is_not_finite(device: str) -> None:
    def one(*values: float) -> tuple[float, dict[int, int]]:
        layer = record([torch.tensor([values], device=device)])["gradients"]["layer0"]
        return layer["top"], {i - 32: n for i, n in enumerate(layer["counts"]) if n}

    assert one(0.0, -0.0, 0.0) == (1.0, {0: 3})
    assert one(0.5, -0.5, 0.25) == (0.75, {31: 1, -32: 1, 29: 1})  # an edge belongs to the bin away from zero
    assert one(0.74999, -0.49999, 1e-9, -1e-9) == (0.75, {31: 1, -31: 1, 0: 1, -1: 1})
    assert one(float("nan"), float("inf"), -float("inf"), 1.0) == (1.5, {31: 1})
    assert one(float("nan")) == (1.0, {})
    assert one(1e-38, -1e-37) == (2.0**-110, {0: 1, -7: 1})  # 1e-37 is 1.1 * 2^-123
    assert one(3.4e38, -1e38, 1.0) == (2.0**127, {31: 1, -31: 1, 0: 1})  # there is no larger edge; 1e38 is 0.59 * 2^127


def test_other_kinds_of_numbers() -> None:
    double = record([torch.tensor([[0.3, 1e-300]], dtype=torch.float64)])["gradients"]["layer0"]
    assert (double["top"], sum(double["counts"]), double["counts"][32]) == (0.375, 2, 1)
    half = record([torch.full((2, 3), 0.3, dtype=torch.bfloat16)])["updates"]["layer0"]
    assert half["counts"][-1] == 6
    complex_ = record([torch.tensor([[0.3 + 0.01j, -0.3j]], dtype=torch.complex64)])["gradients"]["layer0"]
    assert sum(complex_["counts"]) == 4  # real and imaginary parts


def test_a_layer_without_gradient_counts_zeros_and_one_without_values_nothing() -> None:
    weights = {"a.weight": nn.Parameter(torch.ones(2, 3)), "b.weight": nn.Parameter(torch.ones(0, 3))}
    recorder = HistogramRecorder(weights)
    recorder.after_backward(weights)
    recorder.before_update(weights)
    recorder.after_update(weights)
    found = recorder.read_and_reset()
    assert found
    assert found["gradients"]["a"]["counts"] == found["updates"]["a"]["counts"] == [0] * 32 + [6] + [0] * 31
    assert sum(found["gradients"]["b"]["counts"]) == 0


def test_no_layers_and_very_many() -> None:
    recorder = HistogramRecorder({"bias": nn.Parameter(torch.ones(3))})
    for hook in (recorder.after_backward, recorder.before_update, recorder.after_update):
        hook({})
    assert recorder.read_and_reset() is None
    layers = [f"layer{i}" for i in range(1000)]
    chosen = choose_layers(layers)
    assert len(set(chosen)) == MAX_LAYERS and chosen[0] == "layer0" and chosen[-1] == "layer999"
    assert chosen == sorted(chosen, key=layers.index) and choose_layers(layers[:MAX_LAYERS]) == layers[:MAX_LAYERS]


@pytest.mark.parametrize("device", DEVICES)
def test_each_of_many_layers_has_its_own_counts(device: str) -> None:
    values = [torch.randn(3, 10 + index, device=device) * 2.0 ** (index - 9) for index in range(19)]
    for name, layer in record(values)["gradients"].items():
        own = values[int(name.removeprefix("layer"))]
        assert layer["counts"] == count_with_numpy(own.cpu().numpy().ravel(), layer["top"]), name


def test_an_epoch_that_is_not_looked_at_is_not_counted() -> None:
    weights = {"a.weight": nn.Parameter(torch.ones(2, 3))}
    recorder = HistogramRecorder(weights)
    recorder.is_active = False
    for hook in (recorder.after_backward, recorder.before_update, recorder.after_update):
        hook(weights)
    assert recorder.read_and_reset() is None
    recorder.is_active = True
    recorder.after_backward(weights)
    found = recorder.read_and_reset()
    assert found and found["steps"] == 1 and sum(found["gradients"]["a"]["counts"]) == 6


def test_the_state_goes_on() -> None:
    weights = {"a.weight": nn.Parameter(torch.randn(4, 5))}
    weights["a.weight"].grad = torch.randn(4, 5)
    whole, first, second = (HistogramRecorder(weights) for _ in range(3))
    for recorder in (whole, whole, first):
        recorder.after_backward(weights)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    second.after_backward(weights)
    assert second.read_and_reset() == whole.read_and_reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: a captured count is NOT checked")
def test_counting_can_be_captured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10)).cuda()
    parameters = dict(model.named_parameters())
    F.cross_entropy(model(torch.randn(4, 3, 6, 6, device="cuda")), torch.zeros(4, dtype=torch.long, device="cuda")).backward()
    recorder = HistogramRecorder(parameters)

    def step() -> None:
        recorder.after_backward(parameters)
        recorder.before_update(parameters)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(parameter.grad, alpha=-0.1)  # type: ignore[arg-type]
        recorder.after_update(parameters)

    torch.use_deterministic_algorithms(True)
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    finally:
        torch.use_deterministic_algorithms(False)
    recorder.load_state_dict({})
    for _ in range(3):
        graph.replay()
    found = recorder.read_and_reset()
    assert found and found["steps"] == 3
    gradient = parameters["0.weight"].grad
    assert gradient is not None
    histogram = found["gradients"]["0"]
    counted = count_with_numpy(gradient.cpu().numpy().ravel(), histogram["top"])
    assert histogram["counts"] == [3 * n for n in counted]
    assert sum(found["updates"]["2"]["counts"]) == 3 * 1280
