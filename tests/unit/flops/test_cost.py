"""Cost against closed forms and hand counts; and counts that must not be believed are said to be unverified."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar import flops
from cifar.registry import models


def conv_macs(inputs: int, outputs: int, kernel: int, side: int) -> int:
    return inputs * outputs * kernel**2 * side**2


# -- closed forms, written from the papers' tables -------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "width"), [(8, 16), (20, 8), (26, 12)])
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
def test_resnet_closed_form(depth: int, width: int, shortcut: str) -> None:
    n, w = (depth - 2) // 6, width
    macs = conv_macs(3, w, 3, 32) + 4 * w * 10
    params = 27 * w + 2 * w + 40 * w + 10
    for stage, side in enumerate((32, 16, 8)):
        c = w * 2**stage
        first = c if stage == 0 else c // 2
        macs += conv_macs(first, c, 3, side) + (2 * n - 1) * conv_macs(c, c, 3, side)
        params += 9 * first * c + (2 * n - 1) * 9 * c * c + 2 * n * 2 * c
        if stage and shortcut == "projection":
            macs += conv_macs(c // 2, c, 1, side)
            params += c // 2 * c + 2 * c
    measured = flops.measure_cost(models["resnet"].build(depth=depth, width=width, shortcut=shortcut))
    assert (measured.macs, measured.params) == (macs, params)


@pytest.mark.parametrize(("width", "depth", "patch"), [(32, 1, 8), (64, 3, 4), (96, 2, 4)])
def test_vit_closed_form(width: int, depth: int, patch: int) -> None:
    tokens = (32 // patch) ** 2
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2  # projections, attention, MLP
    patches = tokens * 3 * patch**2 * width
    measured = flops.measure_cost(models["vit"].build(width=width, depth=depth, patch_size=patch))
    assert measured.macs == patches + depth * layer + 10 * width
    products = [row for row in measured.layers if row.kind == "product"]
    assert [row.macs for row in products] == [depth * 2 * tokens**2 * width]


@pytest.mark.parametrize(("width", "depth"), [(4, 1), (8, 3), (24, 2)])
def test_conv_closed_form(width: int, depth: int) -> None:
    w = width
    stage = conv_macs(w, 2 * w, 3, 16) + (depth - 1) * conv_macs(2 * w, 2 * w, 3, 8)
    stage += conv_macs(2 * w, 4 * w, 3, 8) + (depth - 1) * conv_macs(4 * w, 4 * w, 3, 4)
    measured = flops.measure_cost(models["conv"].build(width=w, depth=depth))
    assert measured.macs == conv_macs(3, w, 3, 32) + stage + 40 * w
    assert measured.macs == 27_648 * w + (9_216 + 4_608 * (depth - 1)) * w * w + 40 * w  # as its file says


def test_worksheet1_layer_by_layer() -> None:
    measured = flops.measure_cost(models["worksheet1"].build())
    rows = [(r.name, r.kind, r.macs, r.params, r.activations, r.output_shape) for r in measured.layers]
    assert rows == [
        ("conv1", "conv", 27 * 32 * 1024, 27 * 32 + 32, 32 * 1024, (1, 32, 32, 32)),
        ("conv2", "conv", 288 * 64 * 256, 288 * 64 + 64, 64 * 256, (1, 64, 16, 16)),
        ("fc1", "linear", 4096 * 256, 4096 * 256 + 256, 256, (1, 256)),
        ("fc2", "linear", 2560, 2570, 10, (1, 10)),
    ]
    assert (measured.macs, measured.flops, measured.activations) == (6_654_464, 13_308_928, 49_418)
    assert measured.norm_ops == 0


def test_widths_of_grouped_convolutions_and_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
    measured = flops.measure_cost(model)
    assert measured.macs == 1 * 6 * 9 * 1024 and measured.activations == 6 * 1024
    assert measured.norm_ops > 0 and [row.macs for row in measured.layers] == [measured.macs, 0]


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("worksheet1", "width", (8, 32, 33)),
        ("worksheet2", "width", (8, 16, 24)),
        ("conv", "width", (2, 4, 8)),
        ("conv", "depth", (1, 2, 5)),
        ("vgg", "depth", (11, 13, 16, 19)),
        ("vgg11", "width", (8, 16, 32)),
        ("resnet", "depth", (8, 14, 20)),
        ("resnet8", "width", (4, 16, 20)),
        ("preact_resnet", "depth", (10, 18)),
        ("preact_resnet18", "width", (8, 16)),
        ("wrn", "depth", (10, 16)),
        ("wrn", "width", (16, 32)),
        ("densenet_bc", "depth", (10, 22, 40)),
        ("densenet_bc", "growth", (4, 12)),
        ("mobilenet_v2", "width_multiplier", (0.1, 0.5, 0.75)),
        ("mobilenet_v3_small", "width_multiplier", (0.1, 0.5, 0.75)),
        pytest.param("fairdarts_a", "width", (1, 2, 5), marks=pytest.mark.slow),
        ("shufflenet_v2", "width_multiplier", (0.5, 1.0, 1.5)),
        ("convmixer", "width", (16, 32)),
        ("convmixer", "depth", (1, 4)),
        ("convmixer", "kernel_size", (3, 5, 9)),
        ("vit", "width", (32, 64)),
        ("vit", "depth", (1, 2)),
        ("airbench", "width", (8, 16)),
        ("airbench", "depth", (1, 2, 3)),
        ("airbench96", "width", (8, 16)),
    ],
)
def test_a_bigger_knob_costs_more(name: str, key: str, values: tuple[Any, ...]) -> None:
    measured = [flops.measure_cost(models[name].build(**{key: value})) for value in values]
    assert all(m.verified for m in measured), [m.note for m in measured]
    assert [m.macs for m in measured] == sorted({m.macs for m in measured})
    assert [m.params for m in measured] == sorted({m.params for m in measured})


# -- what must not be believed --------------------------------------------------------------------------------------


class FunctionalConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.weight).mean((2, 3))


class LibraryAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_a_functional_convolution_is_unverified() -> None:
    measured = flops.measure_cost(FunctionalConvolution())
    assert not measured.verified
    assert "the model itself 0 and 518,400" in measured.note  # 8 * 8 * 9 * 30 * 30


@pytest.mark.parametrize("frozen", [False, True])
def test_library_attention_is_unverified(frozen: bool) -> None:
    measured = flops.measure_cost(LibraryAttention().requires_grad_(not frozen))
    assert not measured.verified and "attention is an nn.MultiheadAttention" in measured.note


def test_a_wrong_rule_is_unverified() -> None:
    def half(module: Any, inputs: Any, output: Any) -> None:
        module.total_ops += output.numel() * module.in_features // 2

    measured = flops.measure_cost(models["worksheet1"].build(), rules={nn.Linear: half})
    assert not measured.verified and "fc1 524,288 and 1,048,576" in measured.note


def test_a_wrong_rule_of_thops_own_is_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(module: Any, inputs: Any, output: Any) -> None:
        module.total_ops += 0

    monkeypatch.setitem(flops.register_hooks, nn.Conv2d, nothing)
    assert not flops.measure_cost(models["worksheet1"].build()).verified


def test_a_functional_linear_layer_is_counted() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 3072))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(1), self.weight)

    measured = flops.measure_cost(Functional())
    assert (measured.macs, measured.verified) == (30_720, True)


# -- measuring is a look, not a touch ------------------------------------------------------------------------------


def test_measuring_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = models["resnet8"].build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        first = flops.measure_cost(model)
    assert first == flops.measure_cost(model) and first.verified
    assert torch.equal(random, torch.get_rng_state())
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "total_ops" in vars(m) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert capfd.readouterr() == ("", "")


def test_frozen_and_half_precision_models_cost_the_same() -> None:
    expected = flops.measure_cost(models["vit"].build(width=32, depth=1))
    model = models["vit"].build(width=32, depth=1).to(torch.bfloat16).requires_grad_(False)
    assert flops.measure_cost(model) == expected


def test_as_dict_is_json() -> None:
    measured = flops.measure_cost(models["conv4"].build())
    values = measured.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {f.name for f in dataclasses.fields(flops.Cost)} - {"layers"} | {"flops"}
    assert len(measured.as_dict(layers=True)["layers"]) == len(measured.layers)


def test_time_is_positive_and_grows_with_the_network() -> None:
    small, large = (flops.measure_microseconds_per_image(models[name].build(), batch=8) for name in ("conv4", "resnet56"))
    assert 0 < small < large
