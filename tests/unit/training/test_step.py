"""The maths of training against plain, slow computations of the same thing."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.training.ema import ExponentialMovingAverage
from cifar.training.evaluation import (
    VIEWS,
    compute_loss_and_accuracy,
    count_views,
    evaluate,
    evaluate_unsure_views,
    find_unsure,
)
from cifar.training.step import EpochMeter, ForwardOptions, forward, run_backward


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 3, 32, 32), torch.randint(10, (n,))) for n in sizes]


def test_the_backward_pass_is_that_of_pytorch() -> None:
    (images, labels), nets = batches([5])[0], [small_net(), small_net()]
    losses = [F.cross_entropy(net(images), labels) for net in nets]
    run_backward(losses[0], torch.tensor(0.5))
    losses[1].backward(torch.tensor(0.5))
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_a_process_that_compiles_nothing_imports_no_compiler() -> None:
    """Each of these takes a start a fifth of a second or more, and PyTorch imports them for little things."""
    program = (
        "import sys, torch; before = set(sys.modules);"
        "from cifar.training import run, step; from cifar import registry;"
        "run.measure_network(registry.models['worksheet1'], {});"
        "net = torch.nn.Linear(2, 1); step.run_backward(net(torch.ones(1, 2)).mean(), torch.ones(()));"
        "run.data.split_indices(run.np.arange(50) % 10, 20);"
        "new = {'triton', 'sympy', 'torch._dynamo', 'torch._inductor', 'numpy.ma', 'torchvision', 'matplotlib', 'wandb'};"
        "new &= set(sys.modules) - before; assert not new, new"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_meter_weighs_batches_by_their_size() -> None:
    meter, seen, at = EpochMeter(torch.device("cpu")), batches([7, 3]), torch.zeros(1, dtype=torch.int64)
    logits = [torch.randn(len(labels), 10) for _, labels in seen]
    for (_, labels), out in zip(seen, logits, strict=True):
        meter.update(F.cross_entropy(out, labels), (out.argmax(1) == labels).sum(), len(labels), at)
    loss, accuracy = meter.read_and_reset()
    everything, labels = torch.cat(logits), torch.cat([labels for _, labels in seen])
    assert abs(loss - F.cross_entropy(everything, labels).item()) < 1e-6
    assert abs(accuracy - (everything.argmax(1) == labels).double().mean().item()) < 1e-9
    assert meter.read_and_reset() == (0.0, 0.0)  # reading starts again


def test_evaluation_counts_every_image_once_and_leaves_the_statistics_alone() -> None:
    net, data = small_net(), batches([5, 5, 2])
    before = copy.deepcopy(net.state_dict())
    logits, labels = evaluate(net, data, autocast=contextlib.nullcontext())
    assert logits.shape == (12, 10) and torch.equal(labels, torch.cat([y for _, y in data]))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    expected = net(torch.cat([x for x, _ in data]))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert compute_loss_and_accuracy(logits, labels)[1] == (logits.argmax(1) == labels).double().mean().item()


def test_views_are_weighted_means_that_sum_to_one() -> None:
    class Mean(nn.Module):  # the logits of a constant image do not depend on the view
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None].expand(-1, 10)

    image = torch.full((2, 3, 32, 32), 0.7)
    for passes, view in VIEWS.values():
        assert torch.allclose(view(Mean(), image), torch.full((2, 10), 0.7)), passes

    calls = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return torch.zeros(len(x), 10)

    for passes, view in VIEWS.values():
        calls.clear()
        view(Counting(), torch.randn(2, 3, 32, 32))
        assert len(calls) == passes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("share", "count"), [(0.25, 8), (0.1, 4), (0.9, 28), (1e-6, 1)])
def test_only_the_images_that_one_view_leaves_unsure_get_all_views(share: float, count: int, channels_last: bool) -> None:
    torch.manual_seed(1)
    net, given = small_net().eval(), batches([12, 12, 7])
    if channels_last:
        given = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in given]
    one_view, labels = evaluate(net, given, autocast=contextlib.nullcontext())
    all_views, _ = evaluate(net, given, autocast=contextlib.nullcontext(), views="flip+shift")
    logits, found = evaluate_unsure_views(net, iter(given), autocast=contextlib.nullcontext(), views="flip+shift", share=share)
    assert torch.equal(found, labels)
    largest = [sorted(row, reverse=True)[:2] for row in torch.softmax(one_view.double(), 1).tolist()]
    unsure = sorted(range(31), key=lambda image: largest[image][0] - largest[image][1])[:count]
    assert sorted(find_unsure(one_view, share).tolist()) == sorted(unsure)
    expected = one_view.clone()
    expected[unsure] = all_views[unsure]
    assert torch.allclose(logits, expected, atol=1e-5) and not torch.allclose(all_views, one_view, atol=1e-3)


def test_all_views_of_all_images_are_the_plain_figure_and_batches_stay_whole() -> None:
    net, given, sizes = small_net().eval(), batches([10, 10, 10]), list[int]()

    def record(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return net(images)

    def score(share: float) -> Tensor:
        options = {"autocast": contextlib.nullcontext(), "views": "flip", "compiled_model": record}
        return evaluate_unsure_views(net, given, share=share, **options)[0]

    score(0.4)
    assert sizes == [10] * (3 + 2 * 2)  # one view of 30 images, two of 12
    assert torch.allclose(score(1.0), evaluate(net, given, autocast=contextlib.nullcontext(), views="flip")[0], atol=1e-5)
    assert [count_views("flip+shift", share) for share in (1.0, 0.25, 0.999, 0.01)] == [6, 3, 6, 2]
    assert count_views("none", 0.25) == 1 and count_views("flip", 0.25) == 2


def test_flipping_the_image_does_not_change_the_flip_view() -> None:
    net = small_net().eval()
    image = torch.randn(3, 3, 32, 32)
    _, view = VIEWS["flip"]
    assert torch.allclose(view(net, image), view(net, image.flip(-1)), atol=1e-5)


def test_the_average_follows_its_recurrence() -> None:
    net = small_net()
    averaged = copy.deepcopy(net)
    average = ExponentialMovingAverage(net, averaged, decay=0.9)
    expected = {k: v.clone().double() for k, v in net.state_dict().items()}
    for t in range(30):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        average.update()
        decay = min(0.9, (1 + t) / (10 + t))
        for k, v in net.state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v.double() if v.is_floating_point() else v.double()
    for k, v in averaged.state_dict().items():
        assert torch.allclose(v.double(), expected[k], atol=1e-5), k


@pytest.mark.parametrize("shares", [False, True], ids=["labels", "shares"])
def test_the_loss_is_torchs_with_smoothed_labels(shares: bool) -> None:
    net, ((images, labels),) = small_net().eval(), batches([6])
    targets = torch.randn(6, 10).softmax(1) if shares else labels
    for smoothing in (None, 0.1):
        options = ForwardOptions(None if smoothing is None else torch.tensor(smoothing))
        loss, correct, _ = forward(net, images, targets, labels, options)
        expected = F.cross_entropy(net(images), targets, label_smoothing=smoothing or 0.0)
        assert torch.allclose(loss, expected, rtol=1e-6)
        assert correct == (net(images).argmax(1) == labels).sum()
