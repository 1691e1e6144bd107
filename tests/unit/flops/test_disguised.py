"""Matrix products that are written as pointwise products and sums are found; gating, positions and the like are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar import flops
from helpers.zoo import Net, weight

Run = Callable[[Any, Tensor], Tensor]


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def into_a_buffer(s: Any, x: Tensor) -> Tensor:
    products = torch.zeros(len(x), 3072, 10)
    for index in range(10):
        products[:, :, index] = flat(x) * s.w[index]
    return products.sum(1)


def scattered(s: Any, x: Tensor) -> Tensor:
    products = (flat(x)[:, None] * s.w).flatten(1)
    return x.new_zeros(len(x), 10).scatter_add(1, torch.arange(10).repeat_interleave(3072).expand(len(x), -1), products)


DISGUISED: dict[str, Run] = {  # each is a linear layer of (10, 3072), or as much work
    "sum": lambda s, x: (flat(x)[:, None] * s.w).sum(2),
    "mean": lambda s, x: (flat(x)[:, None] * s.w).mean(2),
    "pooling": lambda s, x: F.adaptive_avg_pool1d(flat(x)[:, None] * s.w, 1)[..., 0],
    "cumulative sum": lambda s, x: (flat(x)[:, None] * s.w).cumsum(2)[..., -1],
    "scattered": scattered,
    "division": lambda s, x: (flat(x)[:, None] / s.w).sum(2),
    "with an addition": lambda s, x: torch.addcmul(s.w, flat(x)[:, None], s.w).sum(2),
    "into another tensor": lambda s, x: torch.mul(flat(x)[:, None], s.w, out=torch.empty(len(x), 10, 3072)).sum(2),
    "in place": lambda s, x: flat(x)[:, None].repeat(1, 10, 1).mul_(s.w).sum(2),
    "expanded before": lambda s, x: (flat(x)[:, None].expand(-1, 10, -1).contiguous() * s.w).sum(2),
    "through a function": lambda s, x: F.leaky_relu(flat(x)[:, None] * s.w, 0.5).sum(2),
    "part by part": into_a_buffer,
    "row by row": lambda s, x: torch.stack([(flat(x) * row).sum(1) for row in s.w], 1),
    "cosines": lambda s, x: F.cosine_similarity(flat(x)[:, None], s.w, dim=2),
    "vector products": lambda s, x: torch.linalg.vecdot(flat(x)[:, None], s.w),
    "distances": lambda s, x: (flat(x)[:, None] - s.w).pow(2).sum(2),
    "distances by a norm": lambda s, x: (flat(x)[:, None] - s.w).norm(dim=2),
    "distances by a function": lambda s, x: F.pairwise_distance(flat(x)[:, None], s.w),
}


@pytest.mark.parametrize("name", DISGUISED)
def test_a_product_in_disguise_is_unverified(name: str) -> None:
    cost = flops.measure_cost(Net(DISGUISED[name], w=weight(10, 3072)))
    assert not cost.verified and ("which is a matrix product" in cost.note or "30,720 multiply-adds" in cost.note or
                                  "3,072 multiply-adds" in cost.note), cost.note  # fmt: skip


def select_kernels(s: Any, x: Tensor) -> Tensor:
    """Li et al. 2019."""
    branches = torch.stack([s.conv(x), s.conv5(x)], 1)
    attention = s.fc(x.mean((2, 3))).view(-1, 2, 8).softmax(1)
    return s.head((branches * attention[..., None, None]).sum(1).mean((2, 3)))


def attend_to_coordinates(s: Any, x: Tensor) -> Tensor:
    """Hou et al. 2021."""
    x = s.conv(x)
    y = x * s.point(x.mean(3, keepdim=True)).sigmoid() * s.point(x.mean(2, keepdim=True)).sigmoid()
    return s.head(y.mean((2, 3)))


def add_positions(s: Any, x: Tensor) -> Tensor:
    tokens = s.conv(x).flatten(2).transpose(1, 2)
    positions = torch.outer(torch.arange(1024.0), torch.arange(8.0)).sin()
    return s.head((tokens + positions).mean(1))


def pool_by_attention(s: Any, x: Tensor) -> Tensor:
    x = s.conv(x)
    return s.head((x.flatten(2) * s.one(x).flatten(2).softmax(-1)).sum(-1))


CONV, HEAD, ONE = 27 * 8 * 1024, 80, 8 * 1024
ORDINARY: dict[str, tuple[Run, int]] = {
    "selected kernels": (select_kernels, CONV + 75 * 8 * 1024 + 48 + HEAD),
    "coordinate attention": (attend_to_coordinates, CONV + 2 * 32 * 64 + HEAD),
    "positions": (add_positions, CONV + HEAD),
    "attention pooling": (pool_by_attention, CONV + ONE + HEAD),
    "normalised by hand": (lambda s, x: s.head(s.conv((x - s.mean) / s.std).mean((2, 3))), CONV + HEAD),
    "upsampled gate": (
        lambda s, x: s.head((F.interpolate(s.one(s.conv(x)[..., ::2, ::2]), scale_factor=2) * s.conv(x)).mean((2, 3))),
        2 * CONV + 8 * 256 + HEAD,
    ),
    "outer product": (
        lambda s, x: s.wide((s.conv(x).mean((2, 3))[:, :, None] * s.conv(x).amax((2, 3))[:, None]).flatten(1)),
        2 * CONV + 640,
    ),
    "masked": (lambda s, x: s.head(s.conv(torch.where(x > 0, x, 0 * x)).mean((2, 3))), CONV + HEAD),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_pointwise_products_stay_verified(name: str) -> None:
    run, macs = ORDINARY[name]
    parts = {"conv": nn.Conv2d(3, 8, 3, padding=1), "conv5": nn.Conv2d(3, 8, 5, padding=2), "one": nn.Conv2d(8, 1, 1)}
    linear = {"fc": nn.Linear(3, 16), "head": nn.Linear(8, 10), "wide": nn.Linear(64, 10), "point": nn.Conv2d(8, 8, 1)}
    cost = flops.measure_cost(Net(run, **parts, **linear, mean=weight(3, 1, 1), std=weight(3, 1, 1)))
    assert (cost.macs, cost.verified) == (macs, True), cost.note
