"""Networks of all kinds: the multiply-adds by hand, or unverified with the name of what was not counted."""

from __future__ import annotations

import pytest
import torch

from cifar import flops
from helpers.zoo import NETWORKS

IMPORT_MUCH = {"deformable", "checkpointed"}  # torchvision, torch.compile: seconds


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in IMPORT_MUCH else ()) for n in NETWORKS])
def test_macs_are_those_by_hand_or_unverified(name: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    random = torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()} if name != "lazy" else {}
    cost = flops.measure_cost(model)
    if network.unverified:
        assert not cost.verified and network.unverified in cost.note
    else:
        assert (cost.macs, cost.verified) == (network.macs, True), cost.note
    assert sum(layer.macs for layer in cost.layers) == cost.macs
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items()), "measuring changed the network"


def test_most_kinds_are_verified() -> None:
    verified = [name for name, network in NETWORKS.items() if not network.unverified]
    assert len(NETWORKS) >= 40 and len(verified) >= 28
    assert {"conv_1d", "conv_3d", "grouped", "weight_normed", "shared", "lstm", "bilinear"} <= set(verified)
