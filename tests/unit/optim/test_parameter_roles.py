"""Roles follow the type of the owning module: what decays, what Muon takes, and what is unclear."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from cifar.optim import Parameters, find_roles
from cifar.optim.parameter_roles import describe_unclear, find_unclear
from cifar.registry import models, optimizers


def old_weight_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises the new one; many networks have the old one
        return nn.utils.weight_norm(module, name)


class LayerNorm2d(nn.Module):
    """As in ConvNeXt: a norm that is no class of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8, 4, 4)), nn.Parameter(torch.zeros(8, 4, 4))


class WithParameter(nn.Module):
    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            setattr(self, name, nn.Parameter(tensor))


CASES = [  # a module behind a stem and before a head -> the roles of its parameters, in their order
    (lambda: nn.LayerNorm([8, 4, 4]), ["norm", "bias"]),
    (lambda: nn.GroupNorm(2, 8), ["norm", "bias"]),
    (lambda: nn.InstanceNorm3d(8, affine=True), ["norm", "bias"]),
    (LayerNorm2d, ["norm", "bias"]),
    (lambda: nn.PReLU(8), ["norm"]),
    (lambda: nn.LSTM(4, 4), ["hidden", "hidden", "bias", "bias"]),
    (lambda: nn.LSTM(4, 4, bias=False, proj_size=2), ["hidden", "hidden", "hidden"]),
    (lambda: nn.GRUCell(4, 4), ["hidden", "hidden", "bias", "bias"]),
    (lambda: nn.Bilinear(4, 4, 4), ["hidden", "bias"]),
    (lambda: nn.ConvTranspose2d(4, 4, 2), ["hidden", "bias"]),
    (lambda: nn.Conv3d(4, 4, 2), ["hidden", "bias"]),
    (lambda: nn.Embedding(4, 4), ["embedding"]),
    (lambda: nn.EmbeddingBag(4, 4), ["embedding"]),
    (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        ["hidden", "bias", "embedding", "embedding", "hidden", "bias"],
    ),
    (lambda: nn.MultiheadAttention(4, 2, kdim=3, bias=False), ["hidden", "hidden", "hidden", "hidden"]),
    (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), ["bias", "magnitude", "hidden"]),
    (lambda: parametrizations.weight_norm(nn.LSTM(4, 4, bias=False), "weight_hh_l0"), ["hidden", "magnitude", "hidden"]),
    (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), ["bias", "hidden"]),
    (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), ["bias", "hidden"]),
    (lambda: old_weight_norm(nn.Conv2d(4, 4, 3)), ["bias", "magnitude", "hidden"]),
    (lambda: old_weight_norm(nn.GRU(4, 4, bias=False), "weight_hh_l0"), ["hidden", "magnitude", "hidden"]),
    (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), ["bias", "hidden"]),
    (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), ["bias", "hidden"]),
    (lambda: WithParameter(pos_embed=torch.zeros(1, 64, 4), positions=torch.zeros(64, 4)), ["embedding", "embedding"]),
    (lambda: WithParameter(cls_token=torch.zeros(1, 1, 4), latents=torch.zeros(1, 5, 4)), ["embedding", "embedding"]),
    (lambda: WithParameter(layer_scale=torch.ones(4, 1, 1), temperature=torch.ones(2, 1, 1)), ["norm", "norm"]),
    (lambda: WithParameter(gamma=torch.ones(4), logit=torch.ones(()), shift=torch.ones(4)), ["norm", "norm", "norm"]),
    (lambda: WithParameter(weight=torch.ones(4, 4), bias=torch.ones(1, 4)), ["hidden", "bias"]),
    (lambda: WithParameter(weight=torch.ones(1, 4, 1, 1)), ["norm"]),  # a scale, whatever its name
    (lambda: WithParameter(relative_position_bias_table=torch.ones(9, 4)), ["embedding"]),
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_roles_by_type(index: int) -> None:
    make, expected = CASES[index]
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "middle": make(), "head": nn.Linear(4, 10)})
    roles = find_roles(model)
    assert [role for name, role in roles.items() if name.startswith("middle.")] == expected
    assert (roles["stem.weight"], roles["head.weight"], find_unclear(model)) == ("stem", "head", [])


def test_norms_never_decay_and_recurrent_and_parametrised_weights_do() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.LayerNorm([8, 30, 30]), nn.LSTM(4, 4), nn.Linear(4, 10)
    )
    decayed, others = Parameters.from_model(model).split_by_decay(False)
    assert set(decayed) == {
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
        "2.weight_ih_l0",
        "2.weight_hh_l0",
        "3.weight",
    }
    assert set(others) == {"0.bias", "1.weight", "1.bias", "2.bias_ih_l0", "2.bias_hh_l0", "3.bias"}


def test_the_head_is_what_has_ten_outputs() -> None:
    only_convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1))
    assert find_roles(only_convolutions)["1.weight"] == "head"
    auxiliary = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "head": nn.Linear(8, 10), "squeeze": nn.Linear(8, 4)})
    roles = find_roles(auxiliary)
    assert (roles["head.weight"], roles["squeeze.weight"]) == ("head", "hidden")
    normed = nn.Sequential(nn.Conv2d(3, 8, 3), parametrizations.weight_norm(nn.Linear(8, 10)))
    assert find_roles(normed)["1.parametrizations.weight.original1"] == "head"


def test_what_is_unclear_decays_is_no_filter_of_muon_and_is_said() -> None:
    model = WithParameter(filter=torch.randn(3, 32, 17, 2), norm_of=torch.ones(4))
    model.matrices = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
    assert find_unclear(model) == ["filter", "matrices.0"]
    said = describe_unclear(model)
    assert "'filter' (3, 32, 17, 2)" in said and "roles = {'filter': 'hidden'}" in said and "matrices.0" in said
    parameters = Parameters.from_model(model)
    assert set(parameters.split_by_decay(False)[0]) == {"filter", "matrices.0"}
    rules = {name: group.rule for group in optimizers["muon"].build(parameters).groups for name in group.names}
    assert {name for name, rule in rules.items() if "muon_rule" in str(rule)} == set()
    model.roles = {"filter": "hidden", "matrices.0": "embedding"}
    assert describe_unclear(model) == "" and find_roles(model)["filter"] == "hidden"


def test_muon_trains_a_weight_normed_network_with_a_recurrence() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
            self.conv = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
            self.lstm, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.stem(x)).flatten(2).mT  # (B, C, H, W) -> (B, T, C)
            return self.head(self.lstm(x)[0].mean(1))

    model, images, labels = Net(), torch.randn(8, 3, 8, 8), torch.arange(8)
    optimizer = optimizers["muon"].build(Parameters.from_model(model), lr=0.02)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    magnitude = model.conv.parametrizations.weight.original0
    assert magnitude.detach().norm().item() != pytest.approx(2.0, rel=1e-4), "Muon would have made it a matrix of unit columns"


def test_no_built_in_network_has_an_unclear_parameter() -> None:
    for name in (
        "vit",
        "airbench94",
        "resnet20",
        "convmixer",
        "mobilenet_v2",
        "shufflenet_v2",
        "densenet_bc",
        "worksheet1",
        "darts_v2",
        "fairdarts_a",
        "mobilenet_v3",
    ):
        with torch.device("meta"):
            assert not find_unclear(models[name].build()), name
