"""Networks of searched cells: DARTS and FairDARTS.

Liu et al. 2019 (arXiv:1806.09055), fig. 4 and 5 and appendix A.2, the network that they evaluate on CIFAR-10; Chu et al. 2020
(arXiv:1911.12126). `depth` cells of one kind, but for those at 1/3 and 2/3 of the depth: these are of a second kind, halve the
side and double the channels. A cell sees the outputs of the two cells before it, its states 0 and 1. Each node adds up
operations on earlier states and is the next state. All nodes together are the output. The stem has 3 `width` channels.

Left out: the auxiliary tower, a second classifier that only training uses. `drop_path` follows the rule of the other families
here: it rises with the depth. The authors' rises with the epochs and is equal in all cells. As in DARTS, each operation but the
identity is dropped by itself (in FairDARTS a node). Initialisation: PyTorch's, as the authors'.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cifar.models.blocks import Depth, DropRate, Width, conv_norm, make_drop_path
from cifar.registry import models

Edge = tuple[str, int]  # an operation, and the state that it is applied to
Node = tuple[Edge, ...]
Name = Literal["darts_v1", "darts_v2", "fairdarts_a", "fairdarts_c"]


class Genotype(NamedTuple):
    normal: tuple[Node, ...]
    reduction: tuple[Node, ...]


# fmt: off
GENOTYPES: dict[Name, Genotype] = {
    "darts_v1": Genotype(  # first order, quark0/darts
        normal=(
            (("sep_conv_3x3", 1), ("sep_conv_3x3", 0)),
            (("skip_connect", 0), ("sep_conv_3x3", 1)),
            (("skip_connect", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_3x3", 0), ("skip_connect", 2)),
        ),
        reduction=(
            (("max_pool_3x3", 0), ("max_pool_3x3", 1)),
            (("skip_connect", 2), ("max_pool_3x3", 0)),
            (("max_pool_3x3", 0), ("skip_connect", 2)),
            (("skip_connect", 2), ("avg_pool_3x3", 0)),
        ),
    ),
    "darts_v2": Genotype(  # second order, quark0/darts
        normal=(
            (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_3x3", 1), ("skip_connect", 0)),
            (("skip_connect", 0), ("dil_conv_3x3", 2)),
        ),
        reduction=(
            (("max_pool_3x3", 0), ("max_pool_3x3", 1)),
            (("skip_connect", 2), ("max_pool_3x3", 1)),
            (("max_pool_3x3", 0), ("skip_connect", 2)),
            (("skip_connect", 2), ("max_pool_3x3", 1)),
        ),
    ),
    "fairdarts_a": Genotype(  # xiaomi-automl/FairDARTS; their node 1 of the normal cell has no input, so three are left
        normal=(
            (("sep_conv_3x3", 0), ("sep_conv_5x5", 1)),
            (("max_pool_3x3", 0),),
            (("sep_conv_3x3", 0),),
        ),
        reduction=(
            (("max_pool_3x3", 0), ("avg_pool_3x3", 1)),
            (("avg_pool_3x3", 0), ("dil_conv_5x5", 1)),
            (("avg_pool_3x3", 0), ("sep_conv_5x5", 1)),
            (("skip_connect", 0), ("skip_connect", 1)),
        ),
    ),
    "fairdarts_c": Genotype(  # the same, and an edge from that node is left out
        normal=(
            (("max_pool_3x3", 0), ("sep_conv_5x5", 1)),
            (("dil_conv_3x3", 0), ("dil_conv_5x5", 2)),
            (("sep_conv_3x3", 0),),
        ),
        reduction=(
            (("dil_conv_3x3", 1), ("dil_conv_5x5", 0)),
            (("dil_conv_3x3", 0), ("sep_conv_3x3", 1)),
            (("sep_conv_5x5", 0), ("sep_conv_5x5", 3)),
            (("sep_conv_5x5", 0), ("skip_connect", 1)),
        ),
    ),
}
# fmt: on


def relu_conv_norm(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), *conv_norm(inputs, outputs, 1, activation=None))


def depthwise_separable(channels: int, kernel: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """ReLU, depthwise and pointwise convolution, BatchNorm."""
    depthwise = nn.Conv2d(
        channels, channels, kernel, stride, dilation * (kernel // 2), dilation=dilation, groups=channels, bias=False
    )
    parts: list[nn.Module] = [nn.ReLU(), depthwise, *conv_norm(channels, channels, 1, activation=None)]
    return nn.Sequential(*parts)


class FactorizedReduce(nn.Module):
    """Halves the side: of each 2x2 pixels, half of the channels see the first and the others the last."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.first = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.last = nn.Conv2d(inputs, outputs - outputs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        halves = self.first(x), self.last(x[:, :, 1:, 1:])
        return self.norm(torch.cat(halves, dim=1))  # (B, C, H, W) -> (B, C', H / 2, W / 2)


def make_operation(name: str, channels: int, stride: int) -> nn.Module:
    """An operation of DARTS's search space by its name there; "same" padding."""
    kind, _, sides = name.rpartition("_")
    if kind == "skip":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    kernel = int(sides[0])
    if kind == "max_pool":
        return nn.MaxPool2d(kernel, stride, kernel // 2)
    if kind == "avg_pool":
        return nn.AvgPool2d(kernel, stride, kernel // 2, count_include_pad=False)
    if kind == "dil_conv":
        return depthwise_separable(channels, kernel, stride, dilation=2)
    assert kind == "sep_conv", name
    return nn.Sequential(depthwise_separable(channels, kernel, stride), depthwise_separable(channels, kernel, 1))


class Cell(nn.Module):
    """Nodes on two states. `older` and `newer` are their channels; an older state of twice the side is halved first."""

    def __init__(
        self, nodes: tuple[Node, ...], older: int, newer: int, channels: int, *, reduces: bool, halves_older: bool
    ) -> None:
        super().__init__()
        self.older = FactorizedReduce(older, channels) if halves_older else relu_conv_norm(older, channels)
        self.newer = relu_conv_norm(newer, channels)
        self.sources = [[source for _, source in node] for node in nodes]
        self.nodes = nn.ModuleList(
            nn.ModuleList(make_operation(name, channels, 2 if reduces and source < 2 else 1) for name, source in node)
            for node in nodes
        )
        self.outputs = channels * len(nodes)

    def add_drop_path(self, rate: float, cell: int, num_cells: int) -> None:
        """After each operation but the identity."""
        for operations in self.nodes:
            assert isinstance(operations, nn.ModuleList)
            for i, operation in enumerate(operations):
                drop_path = make_drop_path(rate, cell, num_cells)
                if drop_path is not None and not isinstance(operation, nn.Identity):
                    operations[i] = nn.Sequential(OrderedDict(operation=operation, drop_path=drop_path))

    def forward(self, older: Tensor, newer: Tensor) -> Tensor:
        states = [self.older(older), self.newer(newer)]
        for operations, sources in zip(self.nodes, self.sources, strict=True):
            assert isinstance(operations, nn.ModuleList)
            first, *others = (operation(states[source]) for operation, source in zip(operations, sources, strict=True))
            for other in others:
                first = first + other
            states.append(first)
        return torch.cat(states[2:], dim=1)  # (B, outputs, H, W); half the sides where the cell reduces


class CellNetwork(nn.Module):
    def __init__(self, *, genotype: Genotype, width: int, depth: int, drop_path: float) -> None:
        super().__init__()
        self.stem = conv_norm(3, 3 * width, activation=None)
        older = newer = 3 * width
        channels, reduced = width, False
        self.cells = nn.ModuleList()
        for i in range(depth):
            reduces = i in (depth // 3, 2 * depth // 3)
            channels = 2 * channels if reduces else channels
            nodes = genotype.reduction if reduces else genotype.normal
            cell = Cell(nodes, older, newer, channels, reduces=reduces, halves_older=reduced)
            cell.add_drop_path(drop_path, i, depth)
            self.cells.append(cell)
            older, newer, reduced = newer, cell.outputs, reduces
        self.head = nn.Linear(newer, 10)

    def forward(self, x: Tensor) -> Tensor:
        older = newer = self.stem(x)
        for cell in self.cells:
            older, newer = newer, cell(older, newer)  # (B, 3, 32, 32) -> (B, 4 width times nodes, 8, 8)
        return self.head(newer.mean((2, 3)))


@models.register("fairdarts_a", genotype="fairdarts_a")
@models.register("darts_v2", genotype="darts_v2")
@models.register("darts")
def darts(*, genotype: Name = "darts_v2", width: Width = 36, depth: Depth = 20, drop_path: DropRate = 0.0) -> nn.Module:
    """Network of searched cells (DARTS, FairDARTS): `depth` cells, width to 4 width channels a node."""
    return CellNetwork(genotype=GENOTYPES[genotype], width=width, depth=depth, drop_path=drop_path)
