"""Probes: right numbers, taken at the right moments, without a trace in the training they watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.optim import Parameters
from cifar.probes import ProbeRunner, Watcher, gradients, weight_layers
from cifar.probes.base import call_functions
from cifar.probes.gradient_flow import GradientFlow, flow, measure_gradients
from cifar.probes.weight_updates import measure_updates
from cifar.probes.zero_gradients import ZeroGradients, measure_zeros
from cifar.registry import optimizers, probes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10)
    )


def make_probe_runner(model: nn.Module, names: list[str] | None = None, every: int = 1) -> ProbeRunner:
    chosen = probes.names() if names is None else names
    return ProbeRunner([probes[name].build() for name in chosen], dict(model.named_parameters()), every=every)


def train(model: nn.Module, watch: ProbeRunner, steps: int = 12, optimizer: str = "sgd") -> list[float]:
    opt = optimizers[optimizer].build(Parameters.from_model(model))
    torch.manual_seed(1)
    losses = []
    for step in range(steps):
        loss = F.cross_entropy(model(torch.randn(16, 3, 6, 6)), torch.randint(10, (16,)))
        opt.set_progress(step / steps)
        loss.backward()
        look = watch.is_due(step)
        if look:
            watch.after_backward()
            watch.before_update()
        opt.step()
        if look:
            watch.after_update()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_probes_change_nothing(optimizer: str) -> None:
    bare, watched = network(), network()
    watch = make_probe_runner(watched, every=2)
    assert train(bare, make_probe_runner(bare, []), optimizer=optimizer) == train(watched, watch, optimizer=optimizer)
    for a, b in zip(bare.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert watch.read_and_reset()


def test_values_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    watch = make_probe_runner(model)
    first, second = model[0].weight, model[1].weight
    looks = [([[1.0, -2.0], [0.0, 0.0]], [[3.0, 4.0]]), ([[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0]])]
    for a, b in looks:
        with torch.no_grad():
            first.copy_(torch.eye(2)), second.copy_(torch.tensor([[3.0, 4.0]]))  # norms sqrt(2) and 5
        first.grad, second.grad = torch.tensor(a), torch.tensor(b)
        watch.after_backward()
        watch.before_update()
        with torch.no_grad():
            first.sub_(first.grad)
            second.mul_(1.5)
        watch.after_update()
    root = 2**0.5
    assert watch.read_and_reset() == pytest.approx(
        {
            "gradient_mean/0": (3 / 4 + 3 / 4) / 2,
            "gradient_mean/1": 3.5 / 2,
            "gradient_max/0": 3.0,
            "gradient_max/1": 4.0,
            "gradient_norm/0": (5**0.5 + 3) / 2,
            "gradient_norm/1": 2.5,
            "gradient_zeros/0": (0.5 + 0.75) / 2,
            "gradient_zeros/1": 0.5,
            "update_ratio/0": (5**0.5 / root + 3 / root) / 2,
            "update_ratio/1": 0.5,
            # of the six weights together: the mean over two steps, of the whole gradient's and of the whole update's norm
            "train/gradient_norm": (30**0.5 + 3) / 2,
            "train/update_ratio": ((5 + 6.25) ** 0.5 / 27**0.5 + (9 + 6.25) ** 0.5 / 27**0.5) / 2,
            "train/zero_gradients": (2 / 6 + 5 / 6) / 2,
        }
    )
    assert watch.read_and_reset() == {}, "reading starts a new epoch"


def test_a_ratio_to_weights_of_zero_has_no_value() -> None:
    """A layer that starts at zero, as heads and positions do: its first step has no ratio, the others have."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)), model[1].weight.zero_(), model[2].weight.zero_()
    watch = make_probe_runner(model, ["weight_updates"])
    for _ in range(3):
        watch.before_update()
        with torch.no_grad():
            model[0].weight.mul_(1.5), model[1].weight.add_(0.5)  # norms 0, 0.5 sqrt(2), sqrt(2)
        watch.after_update()
    row = watch.read_and_reset()
    # all layers: the updates' squared norms are 0.5 and 0.5 in each step, then the first grows by 1.5 in each
    squares = [(0.5 * 2.25**n + 0.5, 2 * 2.25**n + 0.5 * n**2) for n in range(3)]
    together = sum((change / norm) ** 0.5 for change, norm in squares) / 3
    layers = {"update_ratio/0": 0.5, "update_ratio/1": (1 + 0.5) / 2}
    assert row == pytest.approx({**layers, "train/update_ratio": together})
    assert "update_ratio/2" not in row, "weights that stay zero have no ratio at all"
    watch.before_update(), watch.after_update()
    assert watch.read_and_reset() == {"update_ratio/0": 0.0, "update_ratio/1": 0.0, "train/update_ratio": 0.0}


def test_nan_of_any_probe_is_no_value() -> None:
    class Some:
        labels: ClassVar = {"mean": ("", ""), "largest": ("", ""), "one": ("", "")}
        reduce: ClassVar = {"largest": "max"}
        values: ClassVar = [float("nan"), 2.0, float("inf")]

        def start(self, parameters: Mapping[str, Tensor]) -> None:
            self.layers = ["a", "b", "c"]

        def after_update(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
            value = torch.tensor(self.values)
            return {"mean": value, "largest": -value, "one": value[0]}

    watch = ProbeRunner([Some()], dict(network().named_parameters()), every=1)
    watch.after_update()
    assert watch.read_and_reset() == {
        "mean/b": 2.0,
        "mean/c": float("inf"),
        "largest/b": -2.0,
        "largest/c": float("-inf"),
    }
    watch.after_update()
    Some.values = [1.0, 4.0, 0.0]
    watch.after_update()
    row = watch.read_and_reset()
    assert [row[key] for key in ("mean/a", "mean/b", "largest/a", "largest/b", "one")] == [1.0, 3.0, -1.0, -2.0, 1.0]


def test_sums_of_an_older_checkpoint_have_one_count_for_all_layers() -> None:
    model = network()
    old, new = make_probe_runner(model, ["weight_updates"]), make_probe_runner(model, ["weight_updates"])
    train(model, old, steps=2)
    saved = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    expected = old.read_and_reset()
    saved["count/update_ratio"] = saved["count/update_ratio"][0]
    new.load_state_dict(saved)
    assert new.read_and_reset() == expected
    new.load_state_dict(saved)
    train(model, new, steps=1)
    assert new.read_and_reset().keys() == expected.keys()


def test_large_layers_lose_no_digits() -> None:
    layer = nn.Linear(1024, 1024, bias=False)
    watch = make_probe_runner(layer, ["gradient_flow"])
    torch.manual_seed(0)
    layer.weight.grad = torch.randn(1024, 1024)
    watch.after_backward()
    exact = layer.weight.grad.double()
    row = watch.read_and_reset()
    expected = [exact.abs().mean().item(), exact.abs().max().item(), exact.norm().item()]
    assert [row[f"gradient_{m}/weight"] for m in ("mean", "max", "norm")] == pytest.approx(expected, rel=1e-5)


def test_layers_are_the_weights_that_train_in_network_order() -> None:
    model = network()
    assert list(weight_layers(dict(model.named_parameters()))) == ["0", "4", "6"]
    model[0].weight.requires_grad_(False)
    watch = make_probe_runner(model)
    train(model, watch, steps=1)
    keys = [key for key in watch.read_and_reset() if key.startswith("gradient_mean")]
    assert keys == ["gradient_mean/4", "gradient_mean/6"]


def test_cadence_starts_with_the_first_step() -> None:
    model = network()
    assert [step for step in range(12) if make_probe_runner(model, every=5).is_due(step)] == [0, 5, 10]
    assert not any(make_probe_runner(model, [], every=1).is_due(step) for step in range(5))
    assert make_probe_runner(model, []).read_and_reset() == {} and make_probe_runner(model, []).state_dict() == {}


def test_state_carries_an_epoch_across_a_checkpoint() -> None:
    def looks(watch: ProbeRunner, model: nn.Module, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            watch.after_backward()

    model = network()
    whole, half, fresh, used = (make_probe_runner(model, every=1) for _ in range(4))
    looks(whole, model, range(6))
    looks(half, model, range(3))
    looks(used, model, range(9))  # what it has seen gives way to what is loaded
    saved = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    expected = whole.read_and_reset()
    for resumed in (fresh, used):
        resumed.load_state_dict(saved)
        looks(resumed, model, range(3, 6))
        row = resumed.read_and_reset()
        assert row == expected and list(row) == list(expected)
    used.load_state_dict({})
    assert used.read_and_reset() == {}


def test_every_metric_has_a_label_and_no_two_probes_share_one() -> None:
    model = network()
    watch = make_probe_runner(model)
    train(model, watch, steps=2)
    labels = watch.metric_labels()
    assert {key if key in labels else key.partition("/")[0] for key in watch.read_and_reset()} == set(labels)
    assert all(set(entry) == {"label", "unit"} and entry["label"] for entry in labels.values())
    with pytest.raises(UserError, match="two probes measure"):
        make_probe_runner(model, ["gradient_flow", "gradient_flow"])


def test_a_probe_of_one_number() -> None:
    class Size:
        labels: ClassVar = {"size": ("norm of all weights", "")}

        def start(self, parameters: Mapping[str, Tensor]) -> None:
            self.layers: list[str] = []

        def after_update(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"size": torch.stack([p.norm() for p in parameters.values()]).norm()}

    model = network()
    watch = ProbeRunner([Size()], dict(model.named_parameters()), every=1)
    watch.after_update()
    assert watch.read_and_reset() == pytest.approx(
        {"size": float(torch.cat([p.detach().flatten() for p in model.parameters()]).norm())}
    )


def test_a_probe_written_with_the_old_names_still_works() -> None:
    class Largest:
        labels: ClassVar = {"largest": ("largest |gradient|", "")}

        def start(self, parameters: Mapping[str, Tensor]) -> None:
            layers = weight_layers(parameters)
            self.layers, self.names, self.by = list(layers), list(layers.values()), flow

        def after_backward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"largest": self.by(gradients(parameters, self.names))[1]}

        def compute(self) -> None:
            pytest.fail("a method of the plug-in's own is neither called nor compiled")

    model, compiled = network(), []
    probe = Largest()
    runner = Watcher([probe], dict(model.named_parameters()), every=1)
    runner.compile(lambda function: compiled.append(function) or function)
    assert compiled == [flow]
    train(model, runner, steps=1)
    assert runner.read_and_reset().keys() == {f"largest/{layer}" for layer in probe.layers}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["gradient_flow", "weight_updates", "zero_gradients"], [call_functions, measure_updates]),
        (["zero_gradients", "gradient_flow"], [call_functions]),
        (["gradient_flow"], [measure_gradients]),
    ],
)
def test_probes_of_the_same_gradients_are_compiled_as_one(names: list[str], expected: list[object]) -> None:
    plain, compiled = network(), network()
    watches = make_probe_runner(plain, names, every=3), make_probe_runner(compiled, names, every=3)
    functions: list[object] = []
    watches[1].compile(lambda function: functions.append(function) or function)
    assert functions == expected
    for model, watch in zip((plain, compiled), watches, strict=True):
        train(model, watch)
    row = watches[0].read_and_reset()
    assert row
    assert watches[1].read_and_reset() == row
    for model, watch in zip((plain, compiled), watches, strict=True):
        train(model, watch, steps=4)  # nothing of the steps before is left
    assert watches[1].read_and_reset() == watches[0].read_and_reset() != row


def test_a_plug_in_that_looks_at_other_gradients_is_compiled_alone() -> None:
    class FirstOnly(ZeroGradients):
        labels: ClassVar = {"first": ("zero gradients", ""), "train_first": ("zero gradients", "")}

        def start(self, parameters: Mapping[str, Tensor]) -> None:
            super().start(parameters)
            self.layers, self.names = self.layers[:1], self.names[:1]

        def after_backward(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
            measured = super().after_backward(parameters)
            return {"first": measured["gradient_zeros"], "train_first": measured["train/zero_gradients"]}

    model = network()
    runner = ProbeRunner([GradientFlow(), FirstOnly()], dict(model.named_parameters()), every=1)
    functions: list[object] = []
    runner.compile(lambda function: functions.append(function) or function)
    assert functions == [measure_gradients, measure_zeros]
    F.cross_entropy(model(torch.randn(4, 3, 6, 6)), torch.zeros(4, dtype=torch.long)).backward()
    model[0].weight.grad.zero_()  # type: ignore[union-attr, operator]
    runner.after_backward()
    assert runner.read_and_reset()["train_first"] == 1.0
