"""Networks that are far too large are refused while they are built, before they fill the memory or take minutes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cifar import registry
from cifar.cli.app import main
from cifar.errors import UserError
from cifar.models.limits import MAX_MODULES, MAX_PARAMETERS, limit_size


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        ("conv", {"depth": 100_000}, "layers"),
        pytest.param("resnet", {"depth": 100_004}, "layers", marks=pytest.mark.slow),
        pytest.param("vit", {"depth": 10_000_000}, "layers", marks=pytest.mark.slow),
        ("conv", {"width": 100_000}, "parameters|too large"),
        ("worksheet1", {"width": 2**40}, "parameters|too large"),
        ("densenet_bc", {"growth": 10**9}, "parameters|too large"),
    ],
)
def test_what_is_far_too_large_is_one_sentence(model: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said), limit_size(model):
        registry.models[model].build(**values)


@pytest.mark.slow
def test_what_the_literature_has_is_built() -> None:
    with limit_size("resnet"), torch.device("meta"):  # without the memory
        layers = sum(1 for _ in registry.models["resnet"].build(depth=1202).modules())
    assert 5000 < layers < MAX_MODULES


def test_the_bounds_end_with_the_block() -> None:
    with limit_size("one"):
        pass
    with torch.device("meta"):
        assert sum(p.numel() for p in nn.Linear(2**20, 2**10).parameters()) > MAX_PARAMETERS
    assert len(nn.ModuleList(nn.Identity() for _ in range(MAX_MODULES + 1))) == MAX_MODULES + 1


def test_another_error_of_a_builder_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), limit_size("one"):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="mat1"), limit_size("one"):
        nn.Linear(2, 3)(torch.zeros(5, 5))


@pytest.mark.slow
def test_a_depth_of_a_hundred_thousand_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=conv", "depth=100000", "dataset=stand-in", "--dry-run"]) == 2
    assert "more than 8,000 layers" in capsys.readouterr().err
