"""Lazy modules, networks that cannot be copied, and random states."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifar import cost as old_name
from cifar import flops
from helpers.zoo import NETWORKS, Net


def make_lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(10))


def materialize(seed: int) -> nn.Sequential:
    model = make_lazy()
    flops.materialize_lazy_modules(model, seed)
    return model


def test_the_seed_alone_makes_lazy_weights() -> None:
    first = materialize(3).state_dict()
    torch.manual_seed(99)
    random_state = torch.get_rng_state(), random.getstate()
    again, other = materialize(3).state_dict(), materialize(4).state_dict()
    assert torch.equal(torch.get_rng_state(), random_state[0]) and random.getstate() == random_state[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not first["1.running_mean"].any() and first["1.running_var"].eq(1).all() and first["1.num_batches_tracked"] == 0


def test_materialised_modules_are_ordinary_ones_in_their_old_mode() -> None:
    model = materialize(0)
    assert [type(module) for module in model if list(module.parameters())] == [nn.Conv2d, nn.BatchNorm2d, nn.Linear]
    assert all(module.training for module in model.modules())
    frozen = make_lazy().eval()
    flops.materialize_lazy_modules(frozen)
    assert not any(module.training for module in frozen.modules())


def test_a_network_without_lazy_modules_is_not_called() -> None:
    def fail(s: Any, x: Tensor) -> Tensor:
        raise AssertionError

    flops.materialize_lazy_modules(Net(fail, linear=nn.Linear(2, 2)))


def test_lazy_networks_are_measured() -> None:
    cost = flops.measure_cost(make_lazy())
    assert (cost.macs, cost.verified) == (27 * 4 * 900 + 4 * 900 * 10, True)
    assert cost.params == 27 * 4 + 4 + 8 + 36_010
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(10))
    assert flops.measure_cost(model).macs == cost.macs
    assert isinstance(model[0], nn.LazyConv2d) and isinstance(model[2], nn.LazyLinear), "a copy was measured"


class Uncopyable(nn.Module):
    """Cannot be copied; counts its calls, averages its features and replaces a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 10)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))

    def __deepcopy__(self, memo: Any) -> nn.Module:
        raise TypeError("no copies")

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).mean((2, 3))
        self.calls.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * features.mean(0)
        return self.head(features + torch.rand(()) * 0)


def test_what_cannot_be_copied_is_measured_and_left_as_it_was() -> None:
    model = Uncopyable().train()
    model.head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    cost = flops.measure_cost(model)
    assert (cost.macs, cost.verified) == (27 * 8 * 900 + 80, True), cost.note
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training and model.conv.training and not model.head.training
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])
    assert flops.measure_microseconds_per_image(model, batch=2) > 0


@pytest.mark.parametrize("name", ["weight_normed_by_hooks", "lazy", "integer_and_boolean"])
def test_every_network_that_is_counted_can_be_timed(name: str) -> None:
    assert flops.measure_microseconds_per_image(NETWORKS[name].build(), batch=2) > 0


def test_a_network_without_parameters() -> None:
    cost = flops.measure_cost(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert (cost.macs, cost.params, cost.verified) == (0, 0, True)


def test_the_old_name_of_the_module() -> None:
    assert old_name.measure is flops.measure_cost and old_name.Cost is flops.Cost
    assert old_name.microseconds_per_image is flops.measure_microseconds_per_image
