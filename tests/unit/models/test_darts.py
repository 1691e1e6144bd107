"""Networks of searched cells: published costs, and operations, wiring and dropped paths by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar import flops
from cifar.models import darts
from cifar.models.blocks import DropPath
from cifar.registry import models

NAMES = {f"{kind}_{sides}" for kind in ("max_pool", "avg_pool", "sep_conv", "dil_conv") for sides in ("3x3", "5x5")}
NAMES = NAMES - {"max_pool_5x5", "avg_pool_5x5"} | {"skip_connect"}


def count_tower(outputs: int) -> int:
    """Parameters of the authors' auxiliary tower on a cell of so many channels: 1x1 to 128, 2x2 to 768, two norms, linear."""
    return outputs * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 10 + 10


@pytest.mark.slow
def test_costs_are_published_ones_with_and_without_the_auxiliary_tower() -> None:
    """quark0/darts: 3.349 M parameters. xiaomi-automl/FairDARTS: 528 M of DARTS_V2; a 2.83 M; c 2.59 M and 400 M. These are
    cut, not rounded. c is counted without the tower, and a with it. Of c their counter adds one pooling only, the last.
    """
    (v2, v2_macs), (a, _), (c, c_macs) = (
        (sum(p.numel() for p in network.parameters()), flops.measure_cost(network).macs)
        for network in (models["darts"].build(genotype=name) for name in ("darts_v2", "fairdarts_a", "fairdarts_c"))
    )
    assert (round(v2 / 1e6, 3), v2_macs // 10**6) == (3.349, 528)
    assert (a + count_tower(4 * 4 * 36)) // 10**4 == 283 and c // 10**4 == 259
    global_pooling = (8 * 8 + 1) * 3 * 4 * 36
    assert (c_macs + global_pooling) // 10**6 == 400


@pytest.mark.parametrize("stride", [1, 2])
def test_operations_keep_the_channels_and_divide_the_side(stride: int) -> None:
    assert {name for g in darts.GENOTYPES.values() for nodes in g for node in nodes for name, _ in node} == NAMES
    for name in NAMES:
        assert darts.make_operation(name, 4, stride)(torch.randn(2, 4, 8, 8)).shape == (2, 4, 8 // stride, 8 // stride), name


@pytest.mark.parametrize(
    ("name", "reach"),
    [
        ("skip_connect", [0]),
        ("avg_pool_3x3", [-1, 0, 1]),
        ("sep_conv_3x3", range(-2, 3)),  # two convolutions
        ("sep_conv_5x5", range(-4, 5)),
        ("dil_conv_3x3", [-2, 0, 2]),
        ("dil_conv_5x5", [-4, -2, 0, 2, 4]),
    ],
)
def test_an_operation_sees_the_pixels_that_its_name_says(name: str, reach: Any) -> None:
    torch.manual_seed(0)
    operation = darts.make_operation(name, 2, 1).double().eval()
    for parameter in operation.parameters():
        parameter.data.abs_()  # so that no ReLU hides a pixel
    x = torch.rand(1, 2, 16, 16, dtype=torch.double, requires_grad=True)
    operation(x)[0, :, 8, 8].sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().sum(0).nonzero().tolist() == [[8 + row, 8 + column] for row in reach for column in reach]


def test_pooling_at_the_border_counts_pixels_of_the_image_only() -> None:
    ones = -torch.ones(1, 2, 5, 5)
    for name in ("avg_pool_3x3", "max_pool_3x3"):
        assert torch.equal(darts.make_operation(name, 2, 1)(ones), ones), name


def test_a_separable_convolution_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = darts.depthwise_separable(3, 3, 2).eval(), torch.randn(2, 3, 6, 6)
    depthwise, pointwise = (module.weight for module in layer if isinstance(module, nn.Conv2d))
    padded = nn.functional.pad(x.relu(), (1, 1, 1, 1))
    for row in range(3):
        for column in range(3):
            patch = padded[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            seen = (patch * depthwise[:, 0]).sum((2, 3))
            expected = seen @ pointwise[:, :, 0, 0].T / (1 + 1e-5) ** 0.5
            torch.testing.assert_close(layer(x)[:, :, row, column], expected)


def test_a_factorized_reduction_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = darts.FactorizedReduce(3, 4).eval(), torch.randn(2, 3, 6, 6)
    for row in range(3):
        for column in range(3):
            first, last = (x[:, :, 2 * row + i, 2 * column + i].relu() for i in (0, 1))
            expected = torch.cat([first @ layer.first.weight[:, :, 0, 0].T, last @ layer.last.weight[:, :, 0, 0].T], 1)
            torch.testing.assert_close(layer(x)[:, :, row, column], expected / (1 + 1e-5) ** 0.5)


def test_a_cell_adds_up_its_edges_and_appends_its_nodes() -> None:
    torch.manual_seed(0)
    nodes: tuple[darts.Node, ...] = (
        (("skip_connect", 0), ("max_pool_3x3", 1)),
        (("skip_connect", 1),),
        (("avg_pool_3x3", 2), ("skip_connect", 3)),
    )
    cell = darts.Cell(nodes, 6, 5, 4, reduces=False, halves_older=True).eval()
    older, newer = torch.randn(2, 6, 8, 8), torch.randn(2, 5, 4, 4)
    x, y = cell.older(older), cell.newer(newer)
    first = x + nn.functional.max_pool2d(y, 3, 1, 1)
    third = nn.functional.avg_pool2d(first, 3, 1, 1, count_include_pad=False) + y
    torch.testing.assert_close(cell(older, newer), torch.cat([first, y, third], 1))


def test_reducing_cells_stand_at_a_third_and_two_thirds() -> None:
    network = models["fairdarts_a"].build(width=1)
    sides: list[int] = []
    for cell in network.cells:
        cell.register_forward_hook(lambda module, given, output: sides.append(output.shape[-1]))
    network(torch.randn(2, 3, 32, 32))
    assert sides == [32] * 6 + [16] * 7 + [8] * 7
    assert [network.cells[i].outputs for i in (0, 6, 7, 13, 14)] == [3, 8, 6, 16, 12]
    for depth in (1, 2, 3):
        assert models["darts_v2"].build(width=1, depth=depth)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("name", "counts"), [("darts_v2", [6, 5, 5]), ("fairdarts_a", [4, 8, 8])])
def test_paths_are_dropped_after_each_operation_but_the_identity(name: str, counts: list[int]) -> None:
    """A skip connection that halves the side is no identity."""
    model = models[name].build(width=2, depth=3, drop_path=0.3)
    rates = [[module.rate for module in cell.modules() if isinstance(module, DropPath)] for cell in model.cells]
    assert [len(found) for found in rates] == counts
    for found, rate in zip(rates, (0.1, 0.2, 0.3), strict=True):
        assert found == pytest.approx([rate] * len(found))


def test_a_dropped_edge_leaves_the_other() -> None:
    torch.manual_seed(0)
    cell: Any = darts.Cell(darts.GENOTYPES["darts_v2"].normal, 4, 4, 2, reduces=False, halves_older=False)
    cell.add_drop_path(0.5, 0, 1)
    for module in cell.modules():
        if isinstance(module, DropPath):
            module.scales = torch.zeros(2)
    x = torch.randn(2, 4, 8, 8)

    def node(index: int) -> Tensor:
        return cell(x, x)[:, 2 * index : 2 * index + 2]

    assert not node(0).any() and torch.equal(node(2), cell.older(x)) and torch.equal(node(3), cell.older(x))
