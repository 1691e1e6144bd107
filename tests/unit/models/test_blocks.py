"""Stochastic depth and squeeze-and-excitation, against torchvision's and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cifar.errors import UserError
from cifar.models.blocks import DropPath, SqueezeExcitation, make_drop_path
from cifar.registry import models


def test_a_dropped_branch_is_torchvisions() -> None:
    theirs: Any = pytest.importorskip("torchvision.ops").StochasticDepth(0.3, "row").train()
    x = torch.rand(20_000, 2, 1, 1) + 1
    ours, expected = DropPath(0.3).train()(x), theirs(x)
    for result in (ours, expected):
        assert abs(float((result == 0).all((1, 2, 3)).float().mean()) - 0.3) < 0.015  # 4.6 standard deviations
        kept = (result != 0).all((1, 2, 3))
        torch.testing.assert_close(result[kept], x[kept] / 0.7)
    torch.testing.assert_close(ours.mean(), x.mean(), rtol=0.03, atol=0)
    assert torch.equal(DropPath(0.3).eval()(x), x)


def test_planned_scales_decide_and_other_numbers_of_images_are_drawn() -> None:
    layer = DropPath(0.5).train()
    layer.scales = torch.tensor([0.0, 2.0, 2.0])
    x = torch.rand(3, 4, 2, 2, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and not y[0].any() and torch.equal(y[1:], 2 * x[1:])
    torch.manual_seed(0)
    assert layer(torch.ones(5, 1, 1, 1)).shape == (5, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "values", "num_blocks"),
    [
        ("resnet20", {}, 9),
        ("wrn", {"width": 4}, 6),
        ("preact_resnet18", {"width": 4}, 8),
        ("airbench96", {"width": 8}, 3),
        ("airbench", {"depth": 3, "width": 8}, 3),
    ],
)
def test_rates_rise_linearly_to_the_last_block(name: str, values: dict[str, Any], num_blocks: int) -> None:
    assert not [m for m in models[name].build(**values).modules() if isinstance(m, DropPath)]
    torch.manual_seed(0)
    model = models[name].build(**values, drop_path=0.4)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.4 * (i + 1) / num_blocks for i in range(num_blocks)])
    assert make_drop_path(0.0, 0, 3) is None
    torch.manual_seed(0)
    plain, x = models[name].build(**values).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(x), model.eval()(x)), "the same weights, and nothing dropped in evaluation"


def test_a_dropped_block_is_its_shortcut() -> None:
    model = models["resnet8"].build(drop_path=0.5).train()
    block: Any = model.blocks[1]
    block.drop_path.scales = torch.zeros(2)
    x = torch.randn(2, 16, 32, 32)
    torch.testing.assert_close(block(x), torch.relu(block.shortcut(x)))


def test_networks_without_shortcuts_refuse_it() -> None:
    with pytest.raises(UserError, match="depth 3"):
        models["airbench"].build(depth=2, drop_path=0.1)


def test_squeeze_and_excitation_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = SqueezeExcitation(32, 16), torch.randn(3, 32, 4, 5)
    assert [tuple(p.shape) for p in layer.parameters()] == [(2, 32), (2,), (32, 2), (32,)]
    for image, result in zip(x, layer(x), strict=True):
        hidden = (layer.squeeze.weight @ image.mean((1, 2)) + layer.squeeze.bias).clamp(min=0)
        gate = 1 / (1 + (-(layer.excite.weight @ hidden + layer.excite.bias)).exp())
        torch.testing.assert_close(result, image * gate[:, None, None])
    assert SqueezeExcitation(4, 16).squeeze.out_features == 1


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_4", "preact_resnet18", "bottleneck_resnet"])
def test_the_families_take_it_at_the_end_of_each_branch(name: str) -> None:
    plain, model = models[name].build(), models[name].build(se=16)
    inserted = [m for m in model.modules() if isinstance(m, SqueezeExcitation)]
    assert len(inserted) == len(model.blocks) and not [m for m in plain.modules() if isinstance(m, SqueezeExcitation)]
    assert all(isinstance(layer, nn.Linear) for m in inserted for layer in m.children())
    added = sum(2 * c * max(1, c // 16) + max(1, c // 16) + c for c in (m.excite.out_features for m in inserted))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + added
