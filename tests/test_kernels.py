"""The Triton convolutions against torch's: on a GPU as they are used, elsewhere by Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE, DTYPES = ("cuda", [torch.bfloat16]) if GPU else ("cpu", [torch.float32, torch.float16])  # interpreted bf16 is wrong
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def slow_here(*values: Any) -> Any:
    """Parameters of a test that takes seconds in the interpreter."""
    return pytest.param(*values, marks=() if GPU else pytest.mark.slow)


BY_DTYPE = pytest.mark.parametrize("dtype", [DTYPES[0], *map(slow_here, DTYPES[1:])], ids=str)
with pytest.MonkeyPatch.context() as patch:
    if not GPU:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined
    import triton.language as tl

    from cifar import registry
    from cifar.kernels import fuse as network
    from cifar.kernels.triton import batch_norm as norms
    from cifar.kernels.triton import batch_norm_kernels as sums
    from cifar.kernels.triton import conv3x3 as kernels
    from cifar.kernels.triton import conv3x3_kernels as lines


ADDED = kernels.SUMMED, kernels.SUMMED_MANY, kernels.MANY


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # and where it runs
        for module in (lines, sums):  # the same, which the interpreter does not call for each number
            monkeypatch.setattr(module, "plus", tl.standard._sum_combine)
        few = norms.How(256, 4, 1, 1)
        monkeypatch.setattr(norms, "PIXELS", few)
        monkeypatch.setattr(norms, "GRADIENTS", {True: few, False: few})


BUILT = [
    "conv",
    "densenet_bc",
    "mobilenet_v2",
    "preact_resnet",
    "resnet",
    slow_here("shufflenet_v2"),
    "vgg",
    "worksheet1",
    "worksheet2",
    "wrn",
]
SHAPES = [(3, 16, 8, 8), (16, 16, 8, 8), (3, 5, 12, 9), (8, 16, 8, 6), (16, 32, 4, 5), (32, 16, 4, 4), (32, 64, 4, 8)]
SHAPES += [(64, 64, 4, 8), (40, 48, 5, 7), (64, 16, 3, 4)]  # by single taps


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def proofs(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[bool]:
    """What a module's kernels are found to be from here on: right or not."""
    found: list[bool] = []
    right = module.works
    module._right.cache_clear()

    def works(agree: Callable[[], bool]) -> bool:
        found.append(right(agree))
        return found[-1]

    monkeypatch.setattr(module, "works", works)
    return found


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@BY_DTYPE
@pytest.mark.parametrize(("inner", "outer", "height", "width"), SHAPES)
def test_each_kernel_gives_the_convolution_in_double_precision(
    inner: int, outer: int, height: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, g = images(3, inner, height, width, dtype=dtype), images(3, outer, height, width, dtype=dtype)
    weight = images(outer, inner, 3, 3, dtype=dtype).float()
    exact = x.double().requires_grad_(), weight.double().requires_grad_()
    y = nn.functional.conv2d(*exact, padding=1)
    y.backward(g.double())

    assert error(kernels.our_convolve(x, weight, False), y.detach()) < TOLERANCE[dtype]
    filters = kernels.our_correlate(x, g)
    assert filters.dtype == torch.float32
    assert error(filters, exact[1].grad) < 1e-5
    if kernels.meant(outer, inner, height, width):
        assert error(kernels.our_convolve(g, weight, True), exact[0].grad) < TOLERANCE[dtype]


@pytest.mark.parametrize(("inner", "outer"), [(3, 16), (16, 16), (32, 64), slow_here(64, 64), (16, 48)])
@pytest.mark.parametrize("height", [8, 7], ids=["fits", "odd"])
def test_the_operators_have_torchs_gradients_whoever_computes_them(inner: int, outer: int, height: int) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[0]
    x, weight = images(2, inner, height, 8, dtype=dtype), images(outer, inner, 3, 3)
    torch.library.opcheck(kernels.convolve, (x.clone(), weight.clone(), False), test_utils="test_faketensor")
    ours = x.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = x.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    y, wanted = kernels.convolve(*ours, False), nn.functional.conv2d(*exact, padding=1)
    g = images(*y.shape, dtype=dtype)
    y.backward(g)
    wanted.backward(g.double())
    for a, b in zip((y, ours[0].grad, ours[1].grad), (wanted, exact[0].grad, exact[1].grad), strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert error(a.detach(), b.detach()) < TOLERANCE[dtype]


def test_a_wrong_kernel_is_found_out_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = images(2, 3, 16, 16, dtype=DTYPES[0]), images(16, 3, 3, 3)
    kernels._right.cache_clear()
    assert kernels._ours("convolve", x, 16, weight.stride())
    kernels._right.cache_clear()
    right = kernels.our_convolve
    monkeypatch.setattr(kernels, "our_convolve", lambda *given: right(*given) * 1.05)
    try:
        assert not kernels._ours("convolve", x, 16, weight.stride())
        y = kernels.convolve(x, weight, False)
    finally:
        kernels._right.cache_clear()
    exact = nn.functional.conv2d(x.double(), weight.to(DTYPES[0]).double(), padding=1)
    assert error(y, exact) < TOLERANCE[DTYPES[0]]


def test_a_program_that_goes_through_many_blocks_adds_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: 1)
    torch.manual_seed(0)
    x, g, weight = images(37, 16, 16, 16, dtype=DTYPES[0]), images(37, 16, 16, 16, dtype=DTYPES[0]), images(16, 16, 3, 3)
    places = x.shape[0] * 16 * 16 // kernels.LINES
    for how in (kernels._convolution(16, 16)[1], kernels._correlation(16, 16)[1]):
        assert places > 3 * how.block * kernels.programs_of(how, places, 1), "at least three blocks a program"
    weight = weight.to(DTYPES[0]).float()
    wanted = kernels.torch_convolve(x.double(), weight.double(), False)
    assert error(kernels.our_convolve(x, weight, False), wanted) < TOLERANCE[DTYPES[0]]
    wanted = kernels.torch_correlate(x.double(), g.double()).double()
    assert error(kernels.our_correlate(x, g), wanted) < (1e-4 if GPU else 1e-5)  # 600 products are added in float32 in turn


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("programs", "size"), [(1, 5), (64, 32), (65, 33), (200, 70)])
def test_what_programs_found_is_added_up(programs: int, size: int, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("SUMMED", "SUMMED_MANY", "MANY"), ADDED, strict=True):
        monkeypatch.setattr(kernels, name, 0 if many and name == "MANY" else value)
    parts = torch.randn(programs, size, device=DEVICE)
    assert torch.allclose(kernels.added(parts).double(), parts.double().sum(0), atol=1e-5)


def test_there_is_no_second_derivative() -> None:
    x, weight = images(1, 3, 4, 4, dtype=DTYPES[0]).requires_grad_(), images(4, 3, 3, 3).requires_grad_()
    (first,) = torch.autograd.grad(kernels.convolve(x, weight, False).float().square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError):
        first.float().sum().backward()


def test_without_autocast_a_network_computes_what_it_did() -> None:
    model = nn.Conv2d(3, 16, 3, padding=1).to(DEVICE)
    x = images(2, 3, 8, 8)
    before = model(x)
    assert network.quicken(model, x[:1]) == 1
    assert torch.equal(model.train()(x), before)


def test_only_convolutions_of_that_kind_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.Quick, "precision", DTYPES[0])
    convolutions = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding="same", bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False),
        nn.Conv2d(16, 64, 3, padding=1),
        nn.Conv2d(64, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3),  # from here on sides are no multiples of four
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
    ]
    model = nn.Sequential(*convolutions).to(DEVICE).train()
    names, x = list(model.state_dict()), images(2, 3, 16, 16)

    assert network.quicken(model, torch.zeros(1, 3, 16, 16, device=DEVICE)) == 3
    assert [n for n, module in enumerate(model) if type(module) is network.Quick] == [0, 1, 6]
    assert list(model.state_dict()) == names and model.training
    first = convolutions[0].eval()
    with torch.inference_mode(), torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
        found = first(x)
    assert error(found, nn.functional.conv2d(x, first.weight, first.bias, padding=1).detach().double()) < TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
def test_compiled_and_with_batch_norm_it_learns_what_torchs_convolutions_learn(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved = proofs(monkeypatch, kernels)
    monkeypatch.setattr(network.Quick, "precision", dtype)

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
        model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        return model.to(DEVICE, memory_format=torch.channels_last)

    plain, quick = made(), made()
    x, labels = images(8, 3, 8, 8), torch.arange(8, device=DEVICE)
    assert network.quicken(quick, x[:1].float()) == 2

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            logits = model(x)
        return nn.functional.cross_entropy(logits.float(), labels)

    loss(plain).backward()
    torch.compile(loss, dynamic=False)(quick).backward()
    assert proved == [True] * 5, "two forward, one for the images' gradient, two for the filters'"
    for (name, wanted), ours in zip(plain.named_parameters(), quick.parameters(), strict=True):
        assert ours.grad is not None and wanted.grad is not None
        assert ours.grad.stride() == wanted.grad.stride()
        assert error(ours.grad, wanted.grad.double()) < (1e-4 if dtype == torch.float32 else 0.2), name


@pytest.mark.parametrize("name", BUILT)
def test_every_small_network_computes_the_same_with_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.Quick, "precision", DTYPES[0])
    torch.manual_seed(0)
    plain = registry.models[name].build().to(DEVICE, memory_format=torch.channels_last)
    quick, x = copy.deepcopy(plain), images(2, 3, 32, 32)
    assert network.quicken(quick, x[:1])
    found = []
    for model in (quick, plain):
        torch.manual_seed(1)  # dropout
        with torch.no_grad(), torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
            found.append(model.train()(x))
    assert error(found[0], found[1].double()) < (0.1 if GPU else 1e-4)
