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


def shifted_by_vectors(s: Any, x: Tensor) -> Tensor:
    """A convolution over rows, with a filter for each column, as shifted products."""
    padded = F.pad(x, (0, 0, 1, 1))
    filtered = sum(padded[..., i : i + 32, :] * s.w[i, :32] for i in range(3))
    return filtered.mean((2, 3)).repeat(1, 4)[:, :10]  # type: ignore[no-any-return, union-attr]


def column_by_column(s: Any, x: Tensor) -> Tensor:
    total = x.new_zeros(len(x), 10)
    for index in range(64):
        total = torch.addcmul(total, flat(x)[:, index : index + 1], s.w[:, index])
    return total


def halved(s: Any, x: Tensor) -> Tensor:
    """The sum as additions of halves."""
    products = flat(x)[:, None] * s.w
    while products.shape[2] > 3:
        first, second = products.chunk(2, 2)
        products = first + second
    return products[..., 0] + products[..., 1] + products[..., 2]


def decaying_state(s: Any, x: Tensor) -> Tensor:
    """A recurrence whose matrix is diagonal."""
    state = x.new_zeros(len(x), 96)
    for row in x.permute(2, 0, 1, 3).flatten(2):
        state = state * s.w[0, :96] + row * s.w[1, :96]
    return state[:, :10]


def bag_of_products(s: Any, x: Tensor) -> Tensor:
    places = torch.arange(30_720).view(10, 3072)
    return torch.stack([F.embedding_bag(places, (image * s.w).flatten()[:, None], mode="sum")[:, 0] for image in flat(x)])


def put_together(s: Any, x: Tensor) -> Tensor:
    places = torch.arange(10).repeat_interleave(3072)
    products = (flat(x)[:, None] * s.w).flatten(1)
    return torch.stack([torch.zeros(10).index_put((places,), each, accumulate=True) for each in products])


def shrunk(s: Any, x: Tensor) -> Tensor:
    products = (flat(x)[:, None] * s.w).view(len(x), 10, 48, 64)
    return F.interpolate(products, size=(1, 1), mode="bilinear", antialias=True).flatten(1)


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
    "square of a sum": lambda s, x: (flat(x)[:, None] + s.w).square().sum(2) - flat(x).square().sum(1, keepdim=True),
    "sum of a bag": bag_of_products,
    "put together": put_together,
    "shrunk": shrunk,
}
OTHERS: dict[str, tuple[Run, int]] = {  # with the number of operations that are not counted, all by hand
    "shifted": (shifted_by_vectors, 3 * 3072),
    "column by column": (column_by_column, 63 * 10),
    "halved": (halved, 3069 * 10 + 2 * 10),
    "decaying state": (decaying_state, 31 * 96),
    "adder": (lambda s, x: -(flat(x)[:, None] - s.w).abs().sum(2), 30_720),  # Chen et al. 2020, AdderNet
    "adder by a loss": (
        lambda s, x: F.mse_loss(flat(x)[:, None].expand(-1, 10, -1), s.w.expand(len(x), -1, -1), reduction="none").mean(2),
        30_720,
    ),
    "signs": (lambda s, x: torch.where(s.w > 0, flat(x)[:, None], -flat(x)[:, None]).sum(2), 30_720),
    "choice": (lambda s, x: flat(x)[:, None].expand(-1, 10, -1).masked_fill(s.w > 0, 0).sum(2), 30_720),
    "largest sum": (lambda s, x: (flat(x)[:, None] + s.w).amax(2), 30_720),
    "sum of logarithms": (lambda s, x: torch.logsumexp(flat(x)[:, None] + s.w, 2), 30_720),
    "largest product": (lambda s, x: (flat(x)[:, None] * s.w).amax(2), 30_720),
    "variance of products": (lambda s, x: (flat(x)[:, None] * s.w).var(2), 30_720),
    "product of all": (lambda s, x: (1 + flat(x)[:, None] * s.w).prod(2), 30_720),
    "normalised": (lambda s, x: F.softmax(flat(x)[:, None] * s.w, 2)[..., 0], 30_720),
}


@pytest.mark.parametrize("name", DISGUISED)
def test_a_product_in_disguise_is_unverified(name: str) -> None:
    cost = flops.measure_cost(Net(DISGUISED[name], w=weight(10, 3072)))
    assert not cost.verified and ("which is a matrix product" in cost.note or "30,720 multiply-adds" in cost.note or
                                  "3,072 multiply-adds" in cost.note), cost.note  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_pairs_that_are_reduced_in_another_way_are_unverified(name: str) -> None:
    run, num_operations = OTHERS[name]
    cost = flops.measure_cost(Net(run, w=weight(10, 3072)))
    assert not cost.verified and f" need {num_operations:,} " in cost.note and cost.macs == 0, cost.note


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


def rotate_positions(s: Any, x: Tensor) -> Tensor:
    """Su et al. 2021: two products with constants, added."""
    tokens = s.conv(x).flatten(2).transpose(1, 2)
    angles = torch.outer(torch.arange(1024.0), torch.arange(8.0))
    return s.head((tokens * angles.cos() + tokens.flip(2) * angles.sin()).relu().mean(1))


class Spline(nn.Module):
    """Liu et al. 2024: every input by B-splines, which are products of the image's values with each other."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base, self.splines = nn.Linear(inputs, outputs), nn.Linear(8 * inputs, outputs)
        self.grid = torch.linspace(-2, 2, 12)

    def forward(self, x: Tensor) -> Tensor:
        z, grid = x.unsqueeze(-1), self.grid
        basis = ((z >= grid[:-1]) & (z < grid[1:])).to(x)
        for k in range(1, 4):
            left = (z - grid[: -k - 1]) / (grid[k:-1] - grid[: -k - 1])
            basis = left * basis[..., :-1] + (grid[k + 1 :] - z) / (grid[k + 1 :] - grid[1:-k]) * basis[..., 1:]
        return self.base(F.silu(x)) + self.splines(basis.flatten(1))  # type: ignore[no-any-return]


def relate_neighbours(s: Any, x: Tensor) -> Tensor:
    """Han et al. 2022: the largest differences to the five most similar patches."""
    patches = s.patches(x).flatten(2).transpose(1, 2)  # (B, 64, 32)
    nearest = (patches @ patches.mT).topk(5, -1)[1]
    found = patches[:, None].expand(-1, 64, -1, -1).gather(2, nearest[..., None].expand(-1, -1, -1, 32))
    largest = (found - patches[:, :, None]).amax(2)
    return s.mix(torch.cat([patches, largest], -1)).mean(1)


def additive_attention(s: Any, x: Tensor) -> Tensor:
    """Bahdanau et al. 2015."""
    patches = s.patches(x).flatten(2).transpose(1, 2)
    scores = s.score((s.query(patches)[:, :, None] + s.query(patches)[:, None]).tanh())[..., 0]
    return s.out((scores.softmax(-1) @ patches).mean(1))


def from_a_vector(s: Any, x: Tensor) -> Tensor:
    """Tokens are made of one vector, normalised, and go through a layer."""
    tokens = s.conv(x).mean((2, 3))[:, None] * s.tokens + s.tokens
    return s.head(s.mixed(F.layer_norm(tokens, (8,))).relu().amax(1)[:, :8])


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
    "rotated positions": (rotate_positions, CONV + HEAD),
    "splines": (lambda s, x: s.spline2(s.spline(flat(x))), 9 * (3072 * 32 + 32 * 10)),
    "neighbours": (relate_neighbours, 64 * 48 * 32 + 64 * 64 * 32 + 64 * 64 * 10),
    "additive attention": (additive_attention, 64 * 48 * 32 + 2 * 64 * 32 * 32 + 64 * 64 * 32 + 64 * 64 * 32 + 320),
    "from a vector": (from_a_vector, CONV + 4 * 8 * 32 + HEAD),
    "masked": (lambda s, x: s.head(s.conv(torch.where(x > 0, x, 0 * x)).mean((2, 3))), CONV + HEAD),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_pointwise_products_stay_verified(name: str) -> None:
    run, macs = ORDINARY[name]
    parts = {"conv": nn.Conv2d(3, 8, 3, padding=1), "conv5": nn.Conv2d(3, 8, 5, padding=2), "one": nn.Conv2d(8, 1, 1)}
    linear = {"fc": nn.Linear(3, 16), "head": nn.Linear(8, 10), "wide": nn.Linear(64, 10), "point": nn.Conv2d(8, 8, 1)}
    patches = {"patches": nn.Conv2d(3, 32, 4, 4), "query": nn.Linear(32, 32), "score": nn.Linear(32, 1)}
    others = {"mix": nn.Linear(64, 10), "out": nn.Linear(32, 10), "mixed": nn.Linear(8, 32), "tokens": weight(4, 8)}
    splines = {"spline": Spline(3072, 32), "spline2": Spline(32, 10)}
    parts |= patches | others | splines  # type: ignore[operator]
    cost = flops.measure_cost(Net(run, **parts, **linear, mean=weight(3, 1, 1), std=weight(3, 1, 1)))
    assert (cost.macs, cost.verified) == (macs, True), cost.note
