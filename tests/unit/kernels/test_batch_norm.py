"""BatchNorm's kernels against torch's: on a GPU as they are used, elsewhere by Triton's interpreter."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from cifar.kernels import fuse
from cifar.kernels.triton import batch_norm, conv3x3
from cifar.kernels.triton.verify import KernelCase
from helpers.kernels import (
    DEVICE,
    DTYPES,
    GPU,
    TOLERANCE,
    draw_images,
    forget_verifications,
    measure_error,
    record_verifications,
    slow_here,
)

pytestmark = pytest.mark.usefixtures("interpreted")

SHAPES = [(3, 16, 8, 8), (2, 64, 5, 7), (1, 5, 3, 3), (2, 24, 12, 4)]
CONVOLUTIONS = [(3, 16, 8, 8), (16, 5, 4, 6), (32, 32, 4, 4), (64, 64, 8, 8), (40, 48, 3, 5)]


@pytest.fixture(autouse=True)
def _unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch_norm, conv3x3):
        forget_verifications(monkeypatch, module)


def sums(x: Tensor, pivot: Tensor) -> Tensor:
    off = x.double() - pivot.double()[:, None, None]
    return torch.stack([off.sum((0, 2, 3)), off.square().sum((0, 2, 3))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_pixel_is_summed_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, pivot = draw_images(*shape, dtype=dtype), torch.randn(shape[1], device=DEVICE)
    programs = batch_norm.choose_sum_programs(x.shape, conv3x3.count_multiprocessors(x.device))
    parts = batch_norm.pixel_sums_triton(x, pivot, programs)
    assert measure_error(parts.sum(0), sums(x, pivot)) < 1e-5
    assert measure_error(batch_norm.pixel_sums_reference(x, pivot, programs).sum(0), sums(x, pivot)) < 1e-5
    torch.library.opcheck(batch_norm.pixel_sums, (x, pivot, programs), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_a_convolution_sums_up_what_it_stores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inner, outer, height, width = shape
    x, pivot = draw_images(3, inner, height, width, dtype=dtype), torch.randn(outer, device=DEVICE)
    weight = draw_images(outer, inner, 3, 3, dtype=dtype).float() / (9 * inner) ** 0.5
    programs = conv3x3.choose_conv_programs(x.shape, outer, conv3x3.count_multiprocessors(x.device))
    y, parts = conv3x3.convolve_3x3_sums_triton(x, weight, pivot, programs)
    assert torch.equal(y, conv3x3.convolve_3x3_triton(x, weight, False))
    assert measure_error(parts.sum(0), sums(y, pivot)) < 1e-5, "rounded as it is, not as it was in the kernel"
    for by in (batch_norm.convolve_3x3_sums, torch.no_grad()(batch_norm.convolve_3x3_sums)):
        result, found = by(x, weight, pivot, programs)
        assert measure_error(result.detach(), y.double()) < TOLERANCE[dtype] and found.shape == parts.shape
    torch.library.opcheck(
        batch_norm.convolve_3x3_sums, (x, weight, pivot, programs), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("by", ["ours", "torch"])
def test_the_statistics_of_many_batches_are_batch_norms(by: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(20, momentum=0.3, dtype=torch.float64).to(DEVICE).train()
    running = torch.zeros(20, device=DEVICE), torch.ones(20, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    take = batch_norm.update_statistics_triton if by == "ours" else batch_norm.update_statistics_reference
    for batch in range(4):
        x = torch.randn(3, 20, 4, 5, device=DEVICE) * 2 + torch.arange(20.0, device=DEVICE)[:, None, None]
        norm(x.double())
        found = take(batch_norm.pixel_sums_reference(x, running[0], 7), *running, x.numel() // 20, 0.3)
        variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        assert measure_error(found[0], mean) < 1e-6 and measure_error(found[1], variance) < 1e-5, batch
    assert norm.running_mean is not None and norm.running_var is not None
    assert measure_error(running[0], norm.running_mean) < 1e-6 and measure_error(running[1], norm.running_var) < 1e-5
    assert running[2] == norm.num_batches_tracked == 4


def test_a_mean_far_from_zero_cancels_nothing_once_it_is_known() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 8, 8, device=DEVICE) + 4096
    running = (
        torch.full((16,), 4096.5, device=DEVICE),
        torch.ones(16, device=DEVICE),
        torch.zeros((), dtype=torch.int64, device=DEVICE),
    )
    found = batch_norm.update_statistics_triton(batch_norm.pixel_sums_triton(x, running[0], 3), *running, 512, 0.1)
    assert measure_error(found[1], x.double().var((0, 2, 3), correction=0)) < 1e-5
    zero = batch_norm.pixel_sums_reference(x, torch.zeros(16, device=DEVICE), 1)
    cancelled = batch_norm.update_statistics_triton(
        zero, torch.zeros(16, device=DEVICE), running[1].clone(), running[2].clone(), 512, 0.1
    )
    assert measure_error(cancelled[1], x.double().var((0, 2, 3), correction=0)) > 1e-3, "what the pivot is for"


def test_one_value_everywhere_has_no_variance_and_what_is_no_number_stays_none() -> None:
    x = torch.full((2, 16, 4, 4), 3.1, device=DEVICE)
    x[0, 3, 0, 0] = float("nan")
    running = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    mean, variance = batch_norm.update_statistics_triton(batch_norm.pixel_sums_triton(x, running[0], 3), *running, 32, 0.1)
    others = torch.arange(16, device=DEVICE) != 3
    assert mean[3].isnan() and variance[3].isnan() and running[0][3].isnan()
    assert (mean[others] - 3.1).abs().max() < 1e-5 and (variance[others] >= 0).all() and variance[others].max() < 1e-5


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradients_are_those_in_double_precision(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved = record_verifications(monkeypatch, batch_norm)
    torch.manual_seed(0)
    x, g = draw_images(*shape, dtype=dtype), draw_images(*shape, dtype=dtype)
    weight, bias = torch.randn(shape[1], device=DEVICE), torch.randn(shape[1], device=DEVICE)
    exact = [value.double().requires_grad_() for value in (x, weight, bias)]
    wanted = nn.functional.batch_norm(exact[0], None, None, exact[1], exact[2], training=True, eps=1e-3)
    (wanted.relu() if relu else wanted).backward(g.double())

    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    moments = torch.stack([mean, variance])
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    y = batch_norm.apply_batch_norm(leaves[0], moments, leaves[1], leaves[2], 1e-3, relu)
    assert y.dtype == dtype and measure_error(y.detach(), (wanted.relu() if relu else wanted).detach()) < TOLERANCE[dtype]
    y.backward(g)
    assert proved == [True]
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad is not None and measure_error(ours.grad, theirs.grad) < max(TOLERANCE[dtype], 1e-5)
    both = [
        by(g, x, moments, weight, bias, 1e-3, relu)
        for by in (batch_norm.gradient_sums_triton, batch_norm.gradient_sums_reference)
    ]
    for found in both:
        assert measure_error(found, torch.stack([exact[2].grad, exact[1].grad])) < 1e-5
    torch.library.opcheck(
        batch_norm.gradient_sums, (g, x, moments, weight, bias, 1e-3, relu), test_utils=("test_schema", "test_faketensor")
    )


def shuffled(x: Tensor, pivot: Tensor, programs: int) -> Tensor:
    return batch_norm.pixel_sums_reference(x.roll(1, 1), pivot, programs)


def half_twice(x: Tensor, pivot: Tensor, programs: int) -> Tensor:
    return batch_norm.pixel_sums_reference(torch.cat([x[: len(x) // 2]] * 2), pivot, programs)


def first_without_x(x: Tensor, pivot: Tensor, programs: int) -> Tensor:
    sums = batch_norm.pixel_sums_reference(x, pivot, programs)
    sums[:, 0] = 0
    return sums


@pytest.mark.parametrize("wrong", [None, shuffled, half_twice, first_without_x])
def test_sums_of_other_pixels_are_found_out(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = KernelCase("pixels", (64, 16, 16, 16), 16, (), DTYPES[0], torch.device(DEVICE))
    monkeypatch.setattr(batch_norm, "pixel_sums_triton", wrong or batch_norm.pixel_sums_reference)
    assert batch_norm.verifier.is_verified(case) == (wrong is None)
    forget_verifications(monkeypatch, batch_norm)

    def convolved(x: Tensor, weight: Tensor, pivot: Tensor, programs: int) -> tuple[Tensor, Tensor]:
        y = conv3x3.convolve_3x3_reference(x, weight, False)
        return y, (wrong or batch_norm.pixel_sums_reference)(y, pivot, programs)

    monkeypatch.setattr(batch_norm, "convolve_3x3_sums_triton", convolved)
    weight = draw_images(16, 16, 3, 3)
    assert batch_norm.verifier.is_verified(case._replace(kernel="convolve", options=weight.stride())) == (wrong is None)


@pytest.mark.parametrize("kept", [None, 1, 2, 3], ids=["right", "mean", "variance", "batches"])
def test_statistics_that_do_not_move_are_found_out(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def statistics(*given: Any) -> Tensor:
        before = given[kept].clone() if kept else None
        found = batch_norm.update_statistics_reference(*given)
        if kept:
            given[kept].copy_(before)
        return found

    monkeypatch.setattr(batch_norm, "update_statistics_triton", statistics)
    case = batch_norm.make_statistics_case(torch.empty(528, 2, 16, device=DEVICE))
    assert batch_norm.verifier.is_verified(case) == (kept is None)


@pytest.mark.parametrize(
    "what", ["pixel_sums_triton", "convolve_3x3_sums_triton", "gradient_sums_triton", "update_statistics_triton"]
)
def test_a_wrong_kernel_is_found_out_and_not_used(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[0]
    x, weight, pivot = (
        draw_images(2, 16, 4, 4, dtype=dtype),
        draw_images(16, 16, 3, 3).to(dtype).float(),
        torch.randn(16, device=DEVICE),
    )
    moments, ones = torch.stack([pivot, pivot.square() + 0.1]), torch.ones(16, device=DEVICE)

    def results() -> list[Tensor]:
        running = pivot.clone(), ones.clone(), torch.zeros((), dtype=torch.int64, device=DEVICE)
        y, parts = batch_norm.convolve_3x3_sums(x, weight, pivot, 3)
        found = batch_norm.update_statistics(parts, *running, 32, 0.1)
        return [
            y,
            parts.sum(0),
            found,
            *running,
            batch_norm.pixel_sums(x, pivot, 2).sum(0),
            batch_norm.gradient_sums(x, x, moments, pivot, ones, 0.1, True),
        ]

    def proved() -> list[bool]:
        return [
            batch_norm.verifier.can_use("pixels", x, 16),
            batch_norm.verifier.can_use("convolve", x, 16, weight.stride()),
            batch_norm.verifier.can_use("gradients", x, 16, (0.1, True)),
            batch_norm.verifier.is_verified(batch_norm.make_statistics_case(torch.empty(3, 2, 16, device=DEVICE))),
        ]

    before = results()
    assert proved() == [True] * 4
    right = getattr(batch_norm, what)
    monkeypatch.setattr(
        batch_norm, what, lambda *given: torch.utils._pytree.tree_map(lambda value: value * 1.05, right(*given))
    )
    forget_verifications(monkeypatch, batch_norm)
    assert proved().count(False) == 1
    for wrong, wanted in zip(results(), before, strict=True):
        assert measure_error(wrong, wanted.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("by", ["triton", "reference"])
def test_after_a_batch_without_numbers_the_next_is_normalised_all_the_same(by: str) -> None:
    x = torch.randn(2, 16, 4, 4, device=DEVICE) + 3
    unknown = torch.full((16,), float("nan"), device=DEVICE)
    unknown[1] = -float("inf")
    running = unknown, torch.ones(16, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    first, then = (getattr(batch_norm, f"{name}_{by}") for name in ("pixel_sums", "update_statistics"))
    found = then(first(x, unknown, 2), *running, 32, 0.1)
    assert measure_error(found[0], x.double().mean((0, 2, 3))) < 1e-5, "as torch would, which needs no pivot"
    assert measure_error(found[1], x.double().var((0, 2, 3), correction=0)) < 1e-4
    assert not running[0].isfinite().any(), "which torch's would stay, too"


# -- in a network ------------------------------------------------------------------------------------------------------


def row(
    inner: int = 8, outer: int = 16, *, bias: bool = False, third: nn.Module | None = None, **given: object
) -> nn.Sequential:
    parts = [nn.Conv2d(inner, outer, 3, padding=1, bias=bias), nn.BatchNorm2d(outer, **given)]
    return nn.Sequential(*parts, *([third] if third else []))


def test_rows_of_that_kind_are_taken_and_no_others() -> None:
    taken = [
        row(),
        row(third=nn.ReLU()),
        row(64, 64),
        nn.Sequential(nn.Conv2d(8, 24, 1, stride=2, bias=False), nn.BatchNorm2d(24)),
    ]
    left = [
        row(bias=True),
        row(outer=65),
        row(third=nn.GELU()),
        row(affine=False),
        row(momentum=None),
        row(track_running_stats=False),
        nn.Sequential(*row(), nn.ReLU(), nn.ReLU()),
        row(third=nn.ReLU()),
        row(third=nn.ReLU()),
    ]
    for module in left[-1][1:]:
        module.register_forward_hook(lambda *_: None)  # somebody looks at it
    left[-2].register_forward_hook(lambda *_: None)
    for number, model in enumerate(taken + left):
        model.to(DEVICE)
        names = list(model.state_dict())
        fuse.fuse_model(model, torch.zeros(1, model[0].in_channels, 8, 8, device=DEVICE))
        assert (type(model) is fuse.FusedConvNorm) == (number < len(taken)), number
        assert list(model.state_dict()) == names


@pytest.mark.parametrize("inner", [slow_here(3), slow_here(64)], ids=["lines", "taps"])
@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
def test_compiled_rows_learn_what_torchs_learn(inner: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.TritonConv2d, "precision", dtype)
    proved = record_verifications(monkeypatch, batch_norm)
    torch.manual_seed(0)
    width = 16 if inner == 3 else inner
    first, second = row(inner, width, third=nn.ReLU(), momentum=0.2), row(width, width)
    down = nn.Sequential(nn.Conv2d(width, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    theirs = nn.Sequential(first, second, down, head).to(DEVICE, memory_format=torch.channels_last)
    ours = copy.deepcopy(theirs)
    x, labels = draw_images(4, inner, *([8, 8] if inner == 3 else [4, 4])), torch.arange(4, device=DEVICE)
    fuse.fuse_model(ours, x[:1])
    assert [type(part) is fuse.FusedConvNorm for part in ours] == [True, True, True, False]

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            logits = model(x)
        return nn.functional.cross_entropy(logits.float(), labels)

    compiled = torch.compile(loss, dynamic=False, fullgraph=True)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (theirs, ours)]
    exact = dtype == torch.float32
    for step in range(2):
        for model, by, optimizer in zip((theirs, ours), (loss, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            by(model).backward()
        for (name, wanted), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert wanted.grad is not None and found.grad is not None
            assert measure_error(found.grad, wanted.grad.double()) < (1e-4 if exact else 0.2), (step, name)
        for optimizer in optimizers:
            optimizer.step()
    assert len(proved) >= 7 and all(proved), "the kernels ran"
    for (name, wanted), found in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        assert measure_error(found, wanted.double()) < (1e-5 if exact else 2e-2), name
        assert found.dtype == wanted.dtype
    before = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        found, wanted = ours.eval()(x), theirs.eval()(x)
    assert measure_error(found, wanted.double()) < (1e-4 if exact else 5e-2)
    ours.train()[0][1].eval()  # somebody keeps this one's statistics
    loss(ours)
    for name, value in ours.state_dict().items():
        if "running" in name or "num" in name:
            assert torch.equal(value, before[name]) == name.startswith("0."), name


def test_without_autocast_a_row_computes_what_it_did() -> None:
    torch.manual_seed(0)
    theirs = row(third=nn.ReLU()).to(DEVICE)
    ours, x = copy.deepcopy(theirs), draw_images(2, 8, 8, 8)
    fuse.fuse_model(ours, x[:1])
    assert type(ours) is fuse.FusedConvNorm
    assert torch.equal(ours(x), theirs(x))
    for found, wanted in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["momentum", "statistics", "hook", "backward hook"])
def test_what_somebody_changes_later_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.TritonConv2d, "precision", DTYPES[0])
    torch.manual_seed(0)
    theirs = row(third=nn.ReLU()).to(DEVICE)
    ours, x, seen = copy.deepcopy(theirs), draw_images(2, 8, 8, 8, dtype=DTYPES[0]), []
    fuse.fuse_model(ours, x[:1].float())
    for model in (ours, theirs):
        if change == "momentum":
            model[1].momentum = None  # a plain mean, as torch.optim.swa_utils.update_bn has it
        elif change == "statistics":
            model[1].track_running_stats = False
        elif change == "hook":
            model[0].register_forward_hook(lambda *_: seen.append(1))
        else:
            model[2].register_full_backward_hook(lambda *_: seen.append(1))
        with torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
            model(x).float().sum().backward()
    assert len(seen) == (2 if "hook" in change else 0)
    for found, wanted in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(found.double(), wanted.double(), atol=1e-2 if GPU else 1e-6)


@pytest.mark.slow
def test_a_digest_of_the_kernels_is_part_of_what_compiled_code_is_found_by(tmp_path: Path) -> None:
    """Torch finds compiled code on disk by the names of operators, not by what is in them."""
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from cifar import kernels
from cifar.kernels import fuse
fuse.TritonConv2d.precision = torch.float32
torch.compiler.config.cache_key_tag = kernels.digest_sources()
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
x = torch.randn(2, 8, 8, 8)
fuse.fuse_model(model, x[:1])
torch.compile(lambda: model(x).square().mean(), dynamic=False)().backward()
print("gradient", model[0].weight.grad.norm().item())
"""
    shutil.copytree(Path(batch_norm.__file__).parents[2], tmp_path / "cifar")
    changed = tmp_path / "cifar" / "kernels" / "triton" / "batch_norm.py"

    def gradient() -> float:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        return float(done.stdout.split()[-1])

    before = gradient()
    text = changed.read_text()
    assert text.count("return images.to(x.dtype), None") == 1
    changed.write_text(text.replace("return images.to(x.dtype), None", "return 2 * images.to(x.dtype), None"))
    assert gradient() == pytest.approx(2 * before)
