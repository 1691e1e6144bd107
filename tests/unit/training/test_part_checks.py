"""Plug-ins that `profile` and `--dry-run` accept train, or are refused in one sentence before a folder is made."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifar import registry
from cifar.config.resolve import resolve_config
from cifar.errors import PartError
from cifar.optim import Group, Optimizer, Parameters
from cifar.probes import weight_layers
from cifar.training import run
from cifar.training.part_checks import check_parts
from helpers.plugins import keep_registries
from helpers.run_configs import FULL, TINY
from helpers.weights import hash_run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    with keep_registries():
        yield


class Net(nn.Module):
    """A convolution and a linear layer; `change` is applied to the logits."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.conv, self.head, self.change = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(512, 10), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(self.features(x)))

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().flatten(1)


class View(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().view(len(x), -1)


class Spectrum(nn.Module):
    """A parameter of four dimensions that has to be contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(3, 32, 17, 2)), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(x.float()) * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft2(y, s=(32, 32)).relu().mean((2, 3)))


class ComplexFilter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(3, 32, 17, dtype=torch.cfloat)), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft2(torch.fft.rfft2(x.float()) * self.filter, s=(32, 32)).relu().mean((2, 3)))


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(96, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


class TrainsOnly(Net):
    def features(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("not for evaluation")
        return super().features(x)


class EvaluatesOnly(Net):
    def features(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("not for training")
        return super().features(x)


class OneBatchSize(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().reshape(64, -1)


class Groups32(Net):
    """Statistics of 32 images each, as ghost BatchNorm has: it trains with batches of 64 and evaluates any number."""

    def features(self, x: Tensor) -> Tensor:
        x = super().features(x)
        return torch.cat([part - part.mean(0) for part in x.chunk(len(x) // 32)]) if self.training else x


class InPlace(Net):
    def features(self, x: Tensor) -> Tensor:
        y = self.conv(x).sigmoid()
        z = y * y
        y.add_(1)
        return z.flatten(1)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise NotImplementedError("no backward yet")


class KeepsFromEvaluation(Net):
    """In training it uses what an evaluation has left."""

    def features(self, x: Tensor) -> Tensor:
        if not self.training or not hasattr(self, "kept"):
            self.kept = torch.ones(512) * 2
        return super().features(x) * self.kept


class WithRoles(Net):
    roles: ClassVar = {"conv.wait": "hidden"}


class MakesLayer(Net):
    """A layer that is made by the first forward pass is no parameter that the optimizer knows."""

    def features(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Linear(512, 512)
        return self.late(super().features(x))


class Remembers(Net):
    """A buffer that grows."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0), persistent=persistent)

    def features(self, x: Tensor) -> Tensor:
        self.means = torch.cat([self.means, x.detach().mean()[None]])
        return super().features(x)


class Halved(Net):
    """A part in half precision, which is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.bfloat16()

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x.bfloat16()).float().relu().flatten(1)


class NoParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


class Ends(Net):
    def features(self, x: Tensor) -> Tensor:
        raise SystemExit(3)


def frozen() -> nn.Module:
    return Net().requires_grad_(False)


def normed_vector() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))


def volume() -> nn.Module:
    conv = nn.Conv3d(1, 4, 3, padding=1)
    return nn.Sequential(nn.Unflatten(1, (1, 3)), conv, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 10))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10))


def old_weight_norm() -> nn.Module:
    model = View()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.conv)
    return model


def uses_numpy_and_random() -> nn.Module:
    random.random(), np.random.rand(), torch.rand(3)
    return Net()


def needs_an_argument(width: int) -> nn.Module:
    return Net()


def table() -> nn.Module:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 10, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(((x + 1) * 127).long().clamp(0, 255)).mean((1, 2, 3))

    return Table()


REFUSED: dict[str, tuple[Any, str]] = {
    "tuple": (lambda: Net(lambda y: (y, y)), "its output is a tuple; it has to be a floating-point tensor (B, 10)"),
    "dict": (lambda: Net(lambda y: {"logits": y}), "its output is a dict"),
    "list": (lambda: Net(lambda y: [y]), "its output is a list"),
    "none": (lambda: Net(lambda y: None), "its output is None"),
    "a number": (lambda: Net(lambda y: y[:, 0]), "its output has the shape (64,)"),
    "five classes": (lambda: Net(lambda y: y[:, :5]), "its output has the shape (64, 5)"),
    "four dimensions": (lambda: Net(lambda y: y[:, :, None, None]), "its output has the shape (64, 10, 1, 1)"),
    "transposed": (lambda: Net(lambda y: y.T), "its output has the shape (10, 64)"),
    "integers": (lambda: Net(lambda y: y.long()), "its output is of torch.int64"),
    "complex": (lambda: Net(lambda y: y.to(torch.cfloat)), "its output is of torch.complex64"),
    "detached": (lambda: Net(lambda y: y.detach()), "no gradient reaches any of its parameters"),
    "no parameters": (NoParameters, "has no parameters that train"),
    "frozen": (frozen, "has no parameters that train"),
    "a function": (lambda: lambda x: x, "is built as a function; return a torch.nn.Module"),
    "nothing": (lambda: None, "is built as None; return a torch.nn.Module"),
    "argument": (needs_an_argument, "fails when it is built: TypeError"),
    "training mode": (EvaluatesOnly, "fails in a training step of 64 images: RuntimeError: not for training"),
    "evaluation mode": (TrainsOnly, "fails in an evaluation of 75 images (it has to take any number)"),
    "one batch size": (OneBatchSize, "fails in an evaluation of 75 images (it has to take any number)"),
    "in place": (InPlace, "fails in the backward pass of 64 images: RuntimeError: one of the variables needed for gradient"),
    "backward": (lambda: Net(NoBackward.apply), "fails in the backward pass of 64 images: NotImplementedError: no backward"),
    "double": (lambda: Net().double(), "fails in a training step of 64 images: RuntimeError"),
    "half": (lambda: Net().half(), "fails in a training step of 64 images: RuntimeError"),
    "kept from evaluation": (KeepsFromEvaluation, "Inference tensors cannot be saved for backward"),
    "wrong roles": (WithRoles, "its `roles` name 'conv.wait', which is no parameter of it"),
    "sparse": (table, "has sparse gradients"),
    "exit": (Ends, "SystemExit: 3"),
    "layer in a forward pass": (MakesLayer, "makes 'late.weight' in its forward pass, too late to be trained"),
    "growing buffer": (lambda: Remembers(True), "changes 'means' in its forward pass: it has the shape (0,) before"),
}  # name -> builder, and what has to be said
TRAINED: dict[str, tuple[Any, bool]] = {
    "view": (View, False),
    "spectrum": (Spectrum, False),
    "volume": (volume, False),
    "old weight norm": (old_weight_norm, False),
    "complex filter": (ComplexFilter, True),
    "rows": (Rows, True),
    "lazy": (lazy, True),
    "groups of 32": (Groups32, True),
    "normed vector": (normed_vector, True),
    "probabilities": (lambda: Net(lambda y: y.softmax(1)), True),
    "half output": (lambda: Net(lambda y: y.half()), True),
    "other generators": (uses_numpy_and_random, True),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 10))), True),
    "growing buffer that is not stored": (lambda: Remembers(False), True),
    "a part in half precision": (Halved, True),
}  # name -> builder, and whether it is trained in channels-last format


def register(builder: Any, name: str = "mine", kind: registry.Registry = registry.models) -> None:
    kind.register(name)(builder)


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_be_trained_is_refused_before_a_folder_is_made(name: str, runs: Path) -> None:
    builder, said = REFUSED[name]
    register(builder)
    with pytest.raises(PartError) as caught:
        run.create_run(resolve_config(_values(model="mine")), runs)
    assert said in str(caught.value) and "model 'mine' (" in str(caught.value) and __file__ in str(caught.value)
    assert "\n" not in str(caught.value) and not runs.exists()


def _values(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in TINY.items() if key != "width" or changes.get("model") == "conv"} | {
        "epochs": 1,
        "max_steps": 2,
        "probe_every": 1,
        **changes,
    }


@pytest.mark.parametrize("name", TRAINED)
def test_a_network_that_trains_does_so_in_a_format_that_it_takes(name: str, runs: Path) -> None:
    builder, channels_last = TRAINED[name]
    register(builder)
    config = resolve_config(_values(model="mine", optimizer="sgd"))
    record = run.create_run(config, runs)
    assert run.train_run(config, record) == "finished"
    assert record.read_json("environment")["step"]["channels_last"] is channels_last
    notes = " ".join(record.read_json("run").get("notes", []))
    assert ("trained on contiguous images, because with channels_last=true it fails" in notes) is not channels_last
    assert config.channels_last and record.read_json("config")["channels_last"], "what was asked for stays on record"
    assert len(list(record.read_rows())) == 1


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_complex_parameters_are_updated_as_pairs_of_real_ones(optimizer: str) -> None:
    torch.manual_seed(0)
    ours = ComplexFilter()
    theirs = ComplexFilter()
    theirs.load_state_dict(ours.state_dict())
    built = registry.optimizers[optimizer].build(Parameters.from_model(ours), **({} if optimizer == "muon" else {"lr": 1e-2}))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    reference = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(optimizer)
    other = reference(theirs.parameters(), lr=1e-2, weight_decay=0.0) if reference else None
    if optimizer == "adamw":
        built = registry.optimizers[optimizer].build(Parameters.from_model(ours), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        nn.functional.cross_entropy(ours(images), labels).backward()
        built.step()
        built.zero_grad()
        if other:
            nn.functional.cross_entropy(theirs(images), labels).backward()
            other.step()
            other.zero_grad()
    assert torch.isfinite(torch.view_as_real(ours.filter)).all()
    if other:
        torch.testing.assert_close(ours.filter, theirs.filter, rtol=1e-4, atol=1e-6)


def test_batch_norm_of_a_vector_needs_two_images() -> None:
    register(normed_vector)
    check_parts(resolve_config(_values(model="mine")), CPU)
    with pytest.raises(PartError, match=r"in a training step of 1 image: ValueError: Expected more than 1 value"):
        check_parts(resolve_config(_values(model="mine", batch_size=1)), CPU)


def test_the_line_of_the_error_is_the_users_own() -> None:
    register(InPlace)
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "z = y * y" in text)
    with pytest.raises(PartError, match=rf"\({__file__}:{line}\)"):
        check_parts(resolve_config(_values(model="mine")), CPU)


def test_no_generator_notices_and_training_is_bit_equal_with_and_without_the_check(runs: Path) -> None:
    register(uses_numpy_and_random)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    check_parts(resolve_config(_values(model="mine")), CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    register(registry.models["conv8"].builder, "twin")
    assert registry.models["twin"].is_plugin and not registry.models["conv8"].is_plugin
    values = {**FULL, "epochs": 1, "max_steps": 4}
    hashes = []
    for model in ("conv", "twin"):
        config = resolve_config({**values, "model": model, "width": 8})
        record = run.create_run(config, runs)
        run.train_run(config, record)
        hashes.append(hash_run(record))
    assert hashes[0] == hashes[1]


# -- other parts -------------------------------------------------------------------------------------------------------


def rule(params: list[Tensor], grads: list[Tensor], state: Any, hyper: Any) -> None:
    torch._foreach_sub_(params, torch._foreach_mul(grads, hyper["lr"]))


def bad_rule(params: list[Tensor], grads: list[Tensor], state: Any, hyper: Any) -> None:
    state["velocity"]


def rebinding_rule(params: list[Tensor], grads: list[Tensor], state: Any, hyper: Any) -> None:
    """Changes the list, and not the tensors in it."""
    params[:] = [param - hyper["lr"] * grad for param, grad in zip(params, grads, strict=True)]


def group(parameters: Parameters, update: Any, hyper: dict[str, float]) -> Optimizer:
    return Optimizer([Group(list(parameters.tensors), list(parameters.tensors.values()), update, hyper)])


OPTIMIZERS: dict[str, tuple[Any, str]] = {
    "torch's": (lambda p: torch.optim.SGD(list(p.tensors.values()), lr=0.1), "is built as a torch.optim.sgd.SGD"),
    "none": (lambda p: None, "is built as None, which has no lrs_at"),
    "list": (lambda p: [group(p, rule, {"lr": 0.1})], "is built as a list"),
    "empty": (lambda p: Optimizer([]), "an optimizer needs a group with parameters"),
    "no argument": (lambda: None, "fails when it is built: TypeError"),
    "no lr": (lambda p: group(p, rule, {"rate": 0.1}), "fails when it is built: KeyError: 'lr'"),
    "rule": (lambda p: group(p, bad_rule, {"lr": 0.1}), "fails in its step: KeyError: 'velocity'"),
    "arguments": (lambda p: group(p, lambda params, grads: None, {"lr": 0.1}), "fails in its step: TypeError"),
    "nothing changes": (
        lambda p: group(p, lambda params, grads, state, hyper: None, {"lr": 0.1}),
        "changes no parameter in its step",
    ),
    "rebinds": (lambda p: group(p, rebinding_rule, {"lr": 0.1}), "changes no parameter in its step"),
    "copies": (lambda p: group(copy.deepcopy(p), rule, {"lr": 0.1}), "'stem.conv.weight' in a group that is no parameter"),
    "twice": (lambda p: Optimizer(group(p, rule, {"lr": 0.1}).groups * 2), "has 'stem.conv.weight' in two groups"),
    "names": (lambda p: Optimizer([Group(["a"], list(p.tensors.values()), rule, {"lr": 0.1})]), "parameters and 1 names"),
    "nan lr": (lambda p: group(p, rule, {"lr": float("nan")}), "a group with lr=nan; give a finite number"),
    "negative lr": (lambda p: group(p, rule, {"lr": -0.1}), "a group with lr=-0.1"),
}
SCHEDULES: dict[str, tuple[Any, str]] = {
    "text": (lambda: lambda progress: "0.1", "gives '0.1' at 0 % of the training"),
    "nan": (lambda: lambda progress: 1.0 if progress < 0.5 else float("nan"), "gives 'nan' at 50 %"),
    "negative": (lambda: lambda progress: 0.5 - progress, "of the training; it has to give what lr is multiplied by"),
    "infinite": (lambda: lambda progress: 1e400, "gives 'inf' at 0 %"),
    "none": (lambda: lambda progress: None, "gives 'None' at 0 %"),
    "bool": (lambda: lambda progress: True, "gives 'True' at 0 %"),
    "number": (lambda: 0.5, "is built as a float; return a function"),
    "nothing": (lambda: None, "is built as None; return a function"),
    "raises": (lambda: lambda progress: [1.0][round(progress)], "fails when it is asked for a factor of lr: IndexError"),
    "arguments": (lambda: lambda step, total: 1.0, "fails when it is asked for a factor of lr: TypeError"),
}


@pytest.mark.parametrize(
    ("kind", "name"), [("optimizer", name) for name in OPTIMIZERS] + [("schedule", name) for name in SCHEDULES]
)
def test_an_optimizer_or_a_schedule_that_does_not_work_is_refused(kind: str, name: str, runs: Path) -> None:
    builder, said = (OPTIMIZERS if kind == "optimizer" else SCHEDULES)[name]
    register(builder, "mine", registry.optimizers if kind == "optimizer" else registry.schedules)
    config = resolve_config(_values(model="conv8", epochs=20, **{kind: "mine"}))
    with pytest.raises(PartError) as caught:
        run.create_run(config, runs)
    assert said in str(caught.value) and f"{kind} 'mine' ({__file__})" in str(caught.value)
    assert not runs.exists()
    registry.schedules.register("other")(lambda: lambda progress: 1)
    if kind == "schedule":
        check_parts(resolve_config(_values(model="conv8", epochs=20, schedule="other")), CPU)


def test_an_optimizer_may_have_lr_0_and_leave_parameters_out() -> None:
    registry.optimizers.register("still")(lambda p: group(p, rule, {"lr": 0.0}))
    registry.optimizers.register("head")(lambda p: group(Parameters(p.with_roles(["head"]), p.roles), rule, {"lr": 0.1}))
    for name in ("still", "head"):
        assert check_parts(resolve_config(_values(model="conv8", optimizer=name)), CPU).notes == ()


def test_outputs_that_are_no_numbers_are_said_and_what_is_printed_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    register(lambda: Net(lambda y: print("in forward") or y * torch.inf * 0))
    (note,) = check_parts(resolve_config(_values(model="mine")), CPU).notes
    assert "NaN or infinite values for random images" in note
    out, err = capsys.readouterr()
    assert not out and "in forward" in err


@pytest.mark.parametrize("value", [1, np.float32(0.5), torch.tensor(0.5)])
def test_a_schedule_may_give_any_number(value: Any, runs: Path) -> None:
    register(lambda: lambda progress: value, "mine", registry.schedules)
    config = resolve_config(_values(model="conv8", schedule="mine", optimizer="sgd", lr=0.1))
    record = run.create_run(config, runs)
    assert run.train_run(config, record) == "finished"
    assert next(record.read_rows())["train/lr"] == pytest.approx(0.1 * float(value))


class Probe:
    labels: ClassVar[Any] = {"mine": ("mine", "")}

    def start(self, parameters: Any) -> None:
        self.layers = list(weight_layers(parameters))


def probe(value: Any = None, **attributes: Any) -> type:
    methods = {} if value is None else {"after_update": lambda self, parameters: value}
    return type("Mine", (Probe,), {"__module__": __name__, **methods, **attributes})


NUMBER = torch.tensor(1.0)


def shrink(self: Probe, parameters: Any) -> None:
    next(iter(parameters.values())).mul_(0.9)


def clip(self: Probe, parameters: Any) -> None:
    next(iter(parameters.values())).grad.clamp_(-1, 1)


def draw(self: Probe, parameters: Any) -> None:
    torch.rand(1)


PROBES: dict[str, tuple[Any, str]] = {
    "too many": (lambda: probe({"mine": torch.ones(9)}), "'mine' has the shape (9,); it is () for one number, or (4,)"),
    "matrix": (lambda: probe({"mine": torch.ones(4, 2)}), "'mine' has the shape (4, 2)"),
    "no label": (lambda: probe({"other": NUMBER}), "'other' is measured, but not among its labels: mine"),
    "float": (lambda: probe({"mine": 1.0}), "'mine' is measured as float; return a tensor"),
    "list": (lambda: probe([1.0]), "after_update returns list; return {metric: tensor}"),
    "raises": (lambda: probe(after_update=lambda self, p: p["nothing"]), "fails in a training step: KeyError: 'nothing'"),
    "weights": (lambda: probe(before_update=shrink), "changes 'stem.conv.weight' or its gradient; a probe may only look"),
    "gradients": (lambda: probe(before_update=clip), "changes 'stem.conv.weight' or its gradient"),
    "draws": (lambda: probe(before_update=draw), "draws random numbers"),
    "no method": (probe, "it measures nothing; give it a method after_backward, before_update or after_update"),
    "labels": (lambda: probe({}, labels=["mine"]), 'it needs labels = {"metric": ("label", "unit")}'),
    "label": (lambda: probe({}, labels={"mine": "mine"}), "it needs labels"),
    "our own": (lambda: probe({}, labels={"val/acc": ("", "")}), "'val/acc' is no name for a metric of a probe"),
    "reduce": (lambda: probe({}, reduce=["max"]), "reduce is ['max']"),
    "reduce of nothing": (lambda: probe({}, reduce={"other": "max"}), "reduce is {'other': 'max'}"),
    "no start": (lambda: probe({}, start=None), "it needs a method start(parameters)"),
    "no layers": (lambda: probe({}, start=lambda self, p: None), "start(parameters) has to set `layers`"),
    "layers": (lambda: probe({}, start=lambda self, p: setattr(self, "layers", "conv")), "has to set `layers`"),
}


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_that_does_not_work_is_refused(name: str, runs: Path) -> None:
    make, said = PROBES[name]
    register(make(), "mine", registry.probes)
    with pytest.raises(PartError) as caught:
        run.create_run(resolve_config(_values(model="conv8", probes="mine,gradient_flow")), runs)
    assert said in str(caught.value) and __file__ in str(caught.value) and not runs.exists()


def test_a_probe_that_works_is_measured(runs: Path) -> None:
    register(probe({"mine": torch.arange(4.0)}), "mine", registry.probes)
    config = resolve_config(_values(model="conv8", probes="mine"))
    record = run.create_run(config, runs)
    assert run.train_run(config, record) == "finished"
    values = [value for key, value in next(record.read_rows()).items() if key.startswith("mine/")]
    assert values == [0.0, 1.0, 2.0, 3.0]


def test_built_in_parts_are_not_tried_and_one_image_a_step_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tests show that they train; trying them would cost each start its time."""
    built: list[str] = []
    known = registry.models["conv8"]
    watched = registry.Entry("model", "conv8", lambda: built.append("") or known.build(), {}, {}, known.file)
    monkeypatch.setitem(registry.models._entries, "conv8", watched)
    assert check_parts(resolve_config(_values(model="conv8")), CPU).channels_last and not built
    check_parts(resolve_config(_values(model="conv8", batch_size=1)), CPU)
    assert built
