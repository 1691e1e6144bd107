"""Optimizers: equal to torch's own, resumable to the bit, and Muon's orthogonality."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.config import resolve as config
from cifar.errors import UserError
from cifar.optim import Group, Optimizer, Parameters, find_roles, roles
from cifar.optim.muon import LAUNCH_FLOPS, muon_rule, orthogonalize, orthogonalize_all, orthogonalize_padded, plan_batches
from cifar.optim.sgd import sgd_group
from cifar.registry import optimizers, schedules

MATCHES = {  # ours, torch's own
    "sgd": (
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    ),
    "sgd without nesterov": (
        {"lr": 0.1, "momentum": 0.8, "nesterov": False, "weight_decay": 0.0},
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.8),
    ),
    "sgd without momentum": ({"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}, lambda ps: torch.optim.SGD(ps, lr=0.1)),
    "adam": ({}, lambda ps: torch.optim.Adam(ps)),
    "adam with decay": ({"weight_decay": 1e-2}, lambda ps: torch.optim.Adam(ps, weight_decay=1e-2)),
    "adamw": ({}, lambda ps: torch.optim.AdamW(ps)),
    "adamw with betas": (
        {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1},
        lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
}


class Net(nn.Module):
    """Every role there is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.position = nn.Parameter(torch.zeros(1, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.hidden(x).relu().mean((2, 3))  # (B, 8, H, W) -> (B, 8)
        return self.head(self.middle(x + self.position).relu() * self.scale)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Net, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    model, x, y = Net().to(dtype), torch.randn(16, 3, 6, 6, dtype=dtype), torch.randint(10, (16,))
    return model, lambda net: F.cross_entropy(net(x), y)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case", MATCHES)
def test_matches_torch_over_20_steps_of_a_moving_lr(case: str, dtype: torch.dtype, near: float) -> None:
    keys, reference = MATCHES[case]
    ours, loss = problem(dtype)
    theirs = copy.deepcopy(ours)
    mine = optimizers[case.split()[0]].build(Parameters.from_model(ours), decay_norm_and_bias=True, **keys)
    mine.schedule = schedules["cosine"].build(warmup=0.2)
    other = reference([p for p in theirs.parameters() if p.requires_grad])
    base = other.param_groups[0]["lr"]
    for step in range(20):
        # The reference is measured on our weights too: what is compared is the rule, not the chaos of training.
        loss(ours).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        mine.set_progress(step / 20)
        other.param_groups[0]["lr"] = base * mine.schedule(step / 20)
        mine.step()
        other.step()
        mine.zero_grad()
        assert (weights(ours) - weights(theirs)).abs().max() <= near
    assert mine.lr == pytest.approx(base * mine.schedule(19 / 20))


def test_decay_spares_norms_biases_and_embeddings_unless_asked() -> None:
    for everywhere in (False, True):
        model, _ = problem()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        optimizer = optimizers["adamw"].build(
            Parameters.from_model(model), lr=0.1, weight_decay=0.5, decay_norm_and_bias=everywhere
        )
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.set_progress(0.0)
        optimizer.step()
        for name, p in model.named_parameters():
            decays = name.endswith(("stem.weight", "hidden.weight", "middle.weight", "head.weight")) or everywhere
            expected = 0.95 if decays and name != "frozen" else 1.0
            assert torch.allclose(p, torch.full_like(p, expected)), name


def test_roles() -> None:
    model, _ = problem()
    assert find_roles(model) == {
        "position": "embedding",
        "scale": "norm",
        "stem.weight": "stem",
        "stem.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "bias",
        "hidden.weight": "hidden",
        "middle.weight": "hidden",
        "middle.bias": "bias",
        "head.weight": "head",
        "head.bias": "bias",
    }
    model.stem.weight.requires_grad_(False)
    model.roles = {"stem.bias": "whiten_bias"}
    assert "stem.weight" not in find_roles(model) and find_roles(model)["hidden.weight"] == "hidden"
    assert find_roles(model)["stem.bias"] == "whiten_bias"
    assert find_roles(nn.Linear(2, 3)) == {"weight": "head", "bias": "bias"}


@pytest.mark.parametrize("name", optimizers.names())
def test_descends_a_quadratic(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    torch.manual_seed(0)
    targets = [torch.randn_like(p) for p in model.parameters()]
    for target in targets:  # within reach of an optimizer that keeps the norm of filters
        if target.ndim > 1:
            target.mul_(len(target) ** 0.5 / target.norm())
    entry = optimizers[name]
    # An optimizer of steps of one size goes nowhere in 200 steps where its default is small, as Lion's is.
    rate = {"lr": max(1e-3, entry.keys["lr"].default)} if "lr" in entry.keys else {}
    optimizer = entry.build(Parameters.from_model(model), **rate)
    optimizer.schedule = schedules["linear"].build()

    def distance() -> Tensor:
        return sum((0.5 * (p - t).square().sum() for p, t in zip(model.parameters(), targets, strict=True)), torch.zeros(()))

    first = float(distance().detach())
    for step in range(200):
        optimizer.set_progress(step / 200)
        distance().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(distance().detach()) < 0.95 * first


@pytest.mark.parametrize("name", optimizers.names())
def test_resumes_to_the_bit(name: str) -> None:
    def train(model: Net, loss: Callable[[nn.Module], Tensor], optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.set_progress(step / 10)
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, loss = problem()
    optimizer = optimizers[name].build(Parameters.from_model(model))
    train(model, loss, optimizer, range(5))
    saved = {key: tensor.clone() for key, tensor in optimizer.state().items()}
    halfway = copy.deepcopy(model)
    train(model, loss, optimizer, range(5, 10))

    resumed = optimizers[name].build(Parameters.from_model(halfway))
    addresses = [tensor.data_ptr() for tensor in resumed.state().values()]
    resumed.load(saved)
    assert addresses == [tensor.data_ptr() for tensor in resumed.state().values()], "a captured graph would lose its state"
    train(halfway, loss, resumed, range(5, 10))
    assert torch.equal(weights(model), weights(halfway))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.state().values(), resumed.state().values(), strict=True))


def test_load_refuses_the_state_of_another() -> None:
    model, _ = problem()
    with pytest.raises(AssertionError, match="another optimizer"):
        optimizers["sgd"].build(Parameters.from_model(model)).load(
            optimizers["adam"].build(Parameters.from_model(model)).state()
        )


def test_a_parameter_without_gradient_stays() -> None:
    model, loss = problem()
    optimizer = optimizers["adam"].build(Parameters.from_model(model))
    loss(model).backward()
    model.hidden.weight.grad = None
    before, stem = model.hidden.weight.detach().clone(), model.stem.weight.detach().clone()
    optimizer.set_progress(0.0)
    optimizer.step()
    assert torch.equal(model.hidden.weight, before) and not torch.equal(model.stem.weight, stem)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_an_lr_of_zero_moves_nothing(name: str) -> None:
    model, loss = problem()
    before = weights(model)
    optimizer = optimizers[name].build(Parameters.from_model(model))
    optimizer.schedule = schedules["linear"].build()
    for progress in (1.0, 1.0):
        loss(model).backward()
        optimizer.set_progress(progress)
        optimizer.step()
    assert torch.equal(weights(model), before)


def test_until_ends_a_group_early_and_linearly() -> None:
    p, q = (torch.ones(2, requires_grad=True) for _ in range(2))
    flat = {"lr": 1.0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    optimizer = Optimizer([sgd_group({"p": p}, **flat), sgd_group({"q": q}, **flat, freeze_after=0.5)])
    for progress, moved in ((0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (0.9, 0.0)):
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        before = p.detach().clone(), q.detach().clone()
        optimizer.set_progress(progress)
        optimizer.step()
        assert torch.allclose(before[0] - p, torch.ones(2))
        assert torch.allclose(before[1] - q, torch.full((2,), moved))


# -- Muon ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 27), (64, 16), (32, 32)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(4, *shape), steps=5))
    square = shape[0] == shape[1]  # a random square matrix has singular values near 0, which need more steps
    assert singular.max() < 1.3 and (singular.quantile(0.1) if square else singular.min()) > 0.5


def test_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 40, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ orthogonalize(matrix, steps=5) @ vt.T
    assert (core - core.diag().diag()).abs().max() < 1e-9


def test_batched_is_the_same_as_one_by_one() -> None:
    torch.manual_seed(0)
    filters = [torch.randn(8, 4, 3, 3), torch.randn(6, 8, 3, 3), torch.randn(8, 36), torch.randn(8, 4, 3, 3)]
    filters[3] = filters[3].to(memory_format=torch.channels_last)
    for batched, alone in zip(orthogonalize_all(filters, 3), filters, strict=True):
        assert torch.allclose(batched, orthogonalize(alone.flatten(1), 3).view(alone.shape), atol=1e-5)


def test_different_shapes_share_a_batch_and_are_what_they_are_alone() -> None:
    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (6, 8, 3, 3), (8, 36), (40, 2, 3, 3), (8, 4, 3, 3), (5, 7), (6, 3, 1, 1), (6, 8, 3, 3)]
    filters = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    filters[3:5] = [filters[index].to(memory_format=torch.channels_last) for index in (3, 4)]
    for batches in (tuple((index,) for index in range(8)), ((0, 3, 5), (1,), (2, 4, 6, 7)), (tuple(range(8)),)):
        found = orthogonalize_padded(filters, 3, batches)
        for together, alone in zip(found, filters, strict=True):
            assert together.shape == alone.shape
            assert torch.allclose(together, orthogonalize(alone.flatten(1), 3).view(alone.shape), atol=1e-12)


def test_batches_are_those_that_cost_least() -> None:
    # the 94 % network: all of it costs less than the start of one more batch; a wide layer is left alone
    small = [(64, 24, 3, 3), (64, 64, 3, 3), (256, 64, 3, 3), *[(256, 256, 3, 3)] * 3]
    assert plan_batches([torch.Size(shape) for shape in small]) == (tuple(range(6)),)
    shapes = [torch.Size(shape) for shape in [(512, 4608), (16, 27), (512, 512, 3, 3), (32, 16), (27, 16)]]
    assert plan_batches(shapes) == ((0, 2), (1, 3, 4))

    def cost(batches: Iterable[Sequence[int]]) -> float:
        total = 0.0
        for batch in batches:
            sides = [sorted((shapes[i][0], shapes[i].numel() // shapes[i][0])) for i in batch]
            rows, columns = max(side[0] for side in sides), max(side[1] for side in sides)
            total += LAUNCH_FLOPS + len(batch) * (4 * rows * rows * columns + 2 * rows**3)
        return total

    partitions = [((0, 1, 2, 3, 4),), ((0, 2), (1, 4), (3,)), ((0, 2), (1,), (3,), (4,)), ((0,), (1, 2, 3, 4))]
    assert all(cost(plan_batches(shapes)) < cost(partition) for partition in partitions)


def test_muon_steps_alike_whether_shapes_share_a_batch() -> None:
    results = []
    for batches in (None, ((0, 1),), ((0, 1), (2,))):  # the last is for another number of filters: then it is not used
        torch.manual_seed(0)
        params = [torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(12, 8, 3, 3)]
        state = {"velocity": [torch.zeros_like(p) for p in params]}
        hyper = {"lr": torch.tensor(0.1), "momentum": torch.tensor(0.6)}
        for _ in range(3):
            grads = [torch.randn_like(p) for p in params]
            muon_rule(params, grads, state, hyper, nesterov=True, ns_steps=3, normalize_weights=True, batches=batches)
        results.append(params)
    for other in results[1:]:
        for expected, found in zip(results[0], other, strict=True):
            assert torch.allclose(expected, found, atol=1e-5) and found.stride() == expected.stride()
    assert all(map(torch.equal, results[0], results[2]))


def test_a_zero_gradient_moves_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 8), 3), torch.zeros(4, 8))


@pytest.mark.parametrize("nesterov", [False, True])
def test_matches_torchs_muon_on_square_matrices(nesterov: bool) -> None:
    # Theirs takes matrices only and works in bfloat16; a constant lr and no decay, as its definitions of both differ.
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 10, bias=False))
    theirs = copy.deepcopy(ours)
    mine = optimizers["muon"].build(
        Parameters.from_model(ours), lr=0.02, momentum=0.9, nesterov=nesterov, ns_steps=5, normalize_weights=False, head_lr=0.0
    )
    reference = [theirs[0].weight, theirs[1].weight]
    other = torch.optim.Muon(reference, lr=0.02, momentum=0.9, nesterov=nesterov, ns_steps=5, weight_decay=0.0)
    x, y = torch.randn(64, 16), torch.randint(10, (64,))
    for _ in range(10):
        F.cross_entropy(ours(x), y).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()
        mine.set_progress(0.0)
        mine.step()
        other.step()
        mine.zero_grad()
    for p, q, start in zip(ours[:2].parameters(), reference, (16.0, 16.0), strict=True):
        assert (p - q).norm() < 0.05 * 0.02 * 10 * start**0.5


def test_muon_keeps_the_norm_of_filters_before_each_step() -> None:
    model, loss = problem()
    optimizer = optimizers["muon"].build(Parameters.from_model(model), lr=0.0)
    loss(model).backward()
    optimizer.set_progress(0.0)
    optimizer.step()
    assert float(model.hidden.weight.detach().norm()) == pytest.approx(8**0.5, rel=1e-5)


def test_airbenchs_settings_under_a_mean_loss_are_its_own_under_a_sum() -> None:
    # The conversion in muon.py: 2000 times the rate for a 2000th of the gradient, the same decay a step.
    batch, bias_lr, head_lr, decay = 2000, 0.053, 0.67, 2e-6 * 2000
    model, _ = problem(torch.float64)
    model.roles = {"stem.bias": "whiten_bias"}
    theirs = copy.deepcopy(model)
    mine = optimizers["muon"].build(
        Parameters.from_model(model), lr=0.24, momentum=0.6, bias_lr=bias_lr * batch, head_lr=head_lr * batch,
        aux_momentum=0.85, aux_weight_decay=decay, decay_norm_and_bias=True, whiten_until=0.375,
    )  # fmt: skip
    mine.schedule = schedules["linear"].build()
    rates = {"norm.weight": bias_lr, "norm.bias": bias_lr, "stem.bias": bias_lr, "head.weight": head_lr}
    copies = dict(theirs.named_parameters())
    groups = [{"params": [copies[n]], "lr": r, "weight_decay": decay / r, "initial": r} for n, r in rates.items()]
    other = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    for step in range(8):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p) / batch if p.requires_grad else None
            copies[name].grad = p.grad * batch if name in rates and (name != "stem.bias" or step < 3) else None
        for group, name in zip(other.param_groups, rates, strict=True):
            group["lr"] = group["initial"] * (1 - step / (3 if name == "stem.bias" else 8))
        mine.set_progress(step / 8)
        mine.step()
        other.step()
    for name in rates:
        assert torch.allclose(dict(model.named_parameters())[name], copies[name], atol=1e-9), name


def test_a_step_copies_nothing_to_the_host() -> None:
    # On the meta device a read of any value raises, as it would wait on a GPU.
    for name in optimizers.names():
        model = Net().to("meta")
        optimizer = optimizers[name].build(Parameters.from_model(model))
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.set_progress(0.5)
        optimizer.step()


def test_senseless_values_are_refused_before_anything_runs() -> None:
    for wrong in ({"lr": -0.1}, {"optimizer": "sgd", "momentum": 1.0}, {"optimizer": "muon", "ns_steps": 0}, {"lr": "fast"}):
        with pytest.raises(UserError):
            config.resolve_config({"optimizer": "adam", **wrong})


def test_a_group_of_nothing_is_left_out() -> None:
    p = torch.ones(1, requires_grad=True)
    rule = sgd_group({"p": p}, lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).rule
    assert (
        len(
            Optimizer(
                [Group([], [], rule, {"lr": 1.0}), Group(["p"], [p], rule, {"lr": 1.0, "momentum": 0.0}, ("velocity",))]
            ).groups
        )
        == 1
    )


def test_a_plug_in_written_with_the_old_names_still_works() -> None:
    """They are Group(until=), sgd_group(until=), Parameters.of/named/halves, and methods that a subclass calls or overrides."""
    model, _ = problem(torch.float32)
    parameters = Parameters.of(model)
    decayed, others = parameters.halves(False)
    assert decayed.keys() == parameters.named(["hidden", "stem", "head"]).keys() and roles(model) == parameters.roles

    class Counting(Optimizer):
        def __init__(self, groups: list[Group]) -> None:
            super().__init__(groups)
            self.count = torch.zeros(())

        def step(self) -> None:
            super().step()
            self.count += 1

        def follow(self, at: Tensor) -> None:
            self.followed = at
            super().follow(at)

        def state(self) -> dict[str, Tensor]:
            return {**super().state(), "count": self.count}

    def make() -> Counting:
        group = sgd_group(decayed, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.0, until=0.5)
        return Counting([group, Group(list(others), list(others.values()), group.rule, group.hyper, ("velocity",), until=0.25)])

    optimizer = make()
    assert [group.freeze_after for group in optimizer.groups] == [0.5, 0.25]
    first = optimizer.groups[0]
    assert [group.until for group in optimizer.groups] == [0.5, 0.25]
    for change in ({"freeze_after": 0.75}, {"until": 0.75}):
        assert dataclasses.replace(first, **change).freeze_after == 0.75
    assert optimizer.rates(0.125) == [0.75, 0.5] and optimizer.stopping == [] and not optimizer.rests(0.6)
    optimizer.plan_lrs([0.0, 0.125])
    optimizer.set_lr_from_plan(torch.tensor([1]))
    assert optimizer.followed.item() == 1 and optimizer.lr == 0.75
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert saved["count"] == 1 and saved.keys() == optimizer.state().keys()
    other = make()
    other.load_state_dict(saved)
    assert other.count == 1 and not other.adopt(optimizer)
