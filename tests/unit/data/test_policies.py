"""TrivialAugment, RandAugment and random erasing against torchvision, and the same images however they are batched."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from torch import Tensor

from cifar.data import Augment, EpochOptions, Loader, normalize
from cifar.data.augment import augment_fused, draw_boxes, erase
from cifar.data.policies import NUM_LEVELS, OPERATIONS, Policy, group_by_operation

LEVELS = range(NUM_LEVELS) if "CIFAR_ALL_LEVELS" in os.environ else (0, 1, 9, 16, 23, 30)
NAMES = [  # torchvision's, in its order
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
    "Posterize", "Solarize", "AutoContrast", "Equalize",
]  # fmt: skip


def pictures(count: int = 4, seed: int = 0) -> Tensor:
    """Noise, smooth pictures, one grey and one with two levels."""
    source = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=source)
    coarse = 255 * torch.rand(count, 3, 5, 5, generator=source)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").to(torch.uint8)
    grey = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    return torch.cat([noise, smooth, grey, (noise[:1] > 200).to(torch.uint8) * 190 + 7])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["trivialaugment", "randaugment"])
def test_every_operation_is_torchvisions(kind: str) -> None:
    """Equal to the grey level, but for pixels whose source lies midway between two: float32 decides there which is nearest."""
    theirs: Any = pytest.importorskip("torchvision.transforms.autoaugment")
    nearest = theirs.InterpolationMode.NEAREST
    wide, space = theirs.TrivialAugmentWide(), theirs.RandAugment()
    ranges = wide._augmentation_space(31) if kind == "trivialaugment" else space._augmentation_space(31, (32, 32))
    assert list(ranges) == NAMES and len(NAMES) == len(OPERATIONS)
    images = pictures(2)
    for operation, (name, (magnitudes, signed)) in enumerate(ranges.items()):
        for level in LEVELS:
            for negative in (0, 1):
                magnitude = (float(magnitudes[level]) if magnitudes.ndim else 0.0) * (-1 if signed and negative else 1)
                expected = torch.stack([theirs._apply_op(image, name, magnitude, nearest, None) for image in images])
                code = torch.full((len(images), 1), (operation * NUM_LEVELS + level) * 2 + negative, dtype=torch.int16)
                differing = (Policy(kind).apply(images, code) != expected).float().mean()
                assert differing <= (0.01 if name in ("ShearX", "ShearY", "Rotate") else 0), (name, level, negative)


def test_operations_levels_and_signs_are_uniform() -> None:
    codes = Policy("trivialaugment").draw(200_000, generator(1))
    assert codes.shape == (200_000, 1)
    table = torch.bincount(codes[:, 0].long(), minlength=14 * 31 * 2).numpy()
    assert len(table) == 868 and scipy.stats.chisquare(table).pvalue > 1e-3
    for num_ops, magnitude in ((1, 0), (3, 14), (2, 30)):
        codes = Policy("randaugment", num_ops, magnitude).draw(30_000, generator(2)).long()
        assert codes.shape == (30_000, num_ops) and ((codes // 2) % 31 == magnitude).all()
        chosen = (codes // 62 * 2 + codes % 2).T
        assert scipy.stats.chisquare(torch.bincount(chosen.flatten(), minlength=28).numpy()).pvalue > 1e-3
        if num_ops > 1:  # one after the other, independent of each other
            pairs = torch.bincount(chosen[0] // 2 * 14 + chosen[1] // 2, minlength=196).view(14, 14).numpy()
            assert scipy.stats.chi2_contingency(pairs).pvalue > 1e-3


def test_an_image_is_changed_alike_in_any_company() -> None:
    images, before = pictures(40), pictures(40)
    for policy in (Policy("trivialaugment"), Policy("randaugment", 3, 20)):
        codes = policy.draw(len(images), generator(3))
        together = policy.apply(images, codes)
        alone = torch.cat([policy.apply(images[i : i + 1], codes[i : i + 1]) for i in range(len(images))])
        assert torch.equal(together, alone) and together.dtype == torch.uint8 and torch.equal(images, before)
        one_by_one = images
        for column in codes.unbind(1):
            one_by_one = policy.apply(one_by_one, column[:, None])
        assert torch.equal(one_by_one, together), "one operation after the other"


def test_groups_hold_every_image_once() -> None:
    codes = Policy("randaugment").draw(500, generator(4))
    for column, group in zip(codes.long().unbind(1), group_by_operation(codes), strict=True):
        assert sorted(group.positions.tolist()) == list(range(500)) and sum(group.counts) == 500
        operations = column[group.positions] // 62
        assert (operations.diff() >= 0).all() and operations.bincount(minlength=14).tolist() == list(group.counts)


# -- random erasing ------------------------------------------------------------------------------------------------------


def test_erased_boxes_are_distributed_as_torchvisions() -> None:
    theirs: Any = pytest.importorskip("torchvision.transforms")
    image = torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    expected = np.array(
        [theirs.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(5000)], dtype=float
    )
    boxes = draw_boxes(20_000, 1.0, 32, generator(5)).numpy().astype(float)
    assert (boxes[:, 2:].min() > 0) and (boxes[:, :2] + boxes[:, 2:] <= 32).all() and (boxes[:, 2:] < 32).all()
    for read in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert scipy.stats.ks_2samp(read(boxes), read(expected)).pvalue > 1e-3
    some = draw_boxes(20_000, 0.25, 32, generator(6))
    assert scipy.stats.binomtest(int((some[:, 2] > 0).sum()), 20_000, 0.25).pvalue > 1e-3
    assert torch.equal(some[:, 2] > 0, some[:, 3] > 0)


def test_erasing_blanks_its_box_and_nothing_else() -> None:
    images = torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 0, 0], [0, 3, 5, 7], [20, 1, 12, 31], [31, 31, 1, 1]])
    for result, (top, left, height, width) in zip(erase(images, boxes), boxes.tolist(), strict=True):
        expected = np.zeros((32, 32), bool)
        expected[top : top + height, left : left + width] = True
        assert np.array_equal((result != 200).all(0).numpy(), expected) and ((result == 200).all(0).numpy() == ~expected).all()
    assert normalize(erase(images, boxes), "dataset")[1, :, 2, 5].abs().max() < 0.01, "the mean colour"


def test_erasing_at_once_is_the_same_as_step_by_step() -> None:
    augment = Augment(cutout=5, random_erasing=0.6, flip="alternating")
    images, chosen = pictures(30), torch.randperm(62, generator=generator(1))[:40]
    draws = augment.draw(40, generator(2))
    slow = normalize(augment.apply(images[chosen], chosen, 5, draws), augment.normalize)
    quick = augment.apply_fused(images, chosen, 5, draws, torch.float32, augment_fused)
    assert torch.equal(quick.permute(0, 3, 1, 2), slow)


# -- in the loader -------------------------------------------------------------------------------------------------------

RECIPES = [
    {"augment_policy": "trivialaugment", "random_erasing": 0.5},
    {"augment_policy": "randaugment", "randaugment_num_ops": 3, "randaugment_magnitude": 15, "flip": "alternating"},
]


def make_loader(recipe: dict[str, Any], keep: float = 1.0, seed: int = 0) -> Loader:
    images, options = pictures(49), EpochOptions(keep=keep)
    return Loader(images, torch.arange(100), batch_size=16, augment=Augment(**recipe), seed=seed, epoch_options=options)


@pytest.mark.parametrize("recipe", RECIPES, ids=["trivialaugment", "randaugment"])
def test_batches_depend_on_seed_and_epoch_alone(recipe: dict[str, Any]) -> None:
    whole = [batch for epoch in (1, 2) for batch, _ in make_loader(recipe).iter_batches(epoch)]
    resumed = make_loader(recipe)
    list(resumed.iter_batches(7))
    got = [batch for epoch, start in ((1, 0), (2, 3)) for batch, _ in resumed.iter_batches(epoch, start)]
    assert len(whole) == 12 and all(torch.equal(a, b) for a, b in zip(whole[:6] + whole[9:], got, strict=True))
    other = [batch for batch, _ in make_loader(recipe, seed=1).iter_batches(1)]
    assert not torch.equal(whole[0], other[0]) and not torch.equal(whole[0], whole[6])


@pytest.mark.parametrize("recipe", RECIPES, ids=["trivialaugment", "randaugment"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("fused", [False, True])
def test_a_whole_epoch_at_once_has_the_images_of_its_batches(recipe: dict[str, Any], keep: float, fused: bool) -> None:
    """A GPU applies the policy to the epoch, in groups that were sorted ahead; here by hand, on the CPU."""
    loader = make_loader(recipe, keep)
    loader.begin_epoch(3)
    plan = loader.plan_epoch(3)
    assert plan.draws.codes is not None
    loader._plans[3] = plan._replace(policy_groups=group_by_operation(plan.draws.codes))
    changed = loader._apply_epoch_policy()
    assert changed is not None and len(changed) == len(plan.order)
    by_batch = [loader.make_batch(step) for step in range(loader.num_steps)]
    loader.fused_augment = augment_fused if fused else None
    images, labels = loader._make_batches(slice(0, loader.num_steps * 16), changed)
    assert torch.equal(images, torch.cat([batch for batch, _ in by_batch]))
    assert torch.equal(labels, torch.cat([places for _, places in by_batch]))


@pytest.mark.slow
def test_one_image_at_a_time_has_the_same_distribution() -> None:
    from cifar.data import make_dataloader

    recipe = Augment(augment_policy="trivialaugment", random_erasing=0.5, flip="none", crop=0)
    images, count = pictures(1)[1:2].expand(1500, 3, 32, 32).contiguous(), 1500
    torch.manual_seed(1)
    slow = torch.cat([b for b, _ in make_dataloader(images, torch.arange(count), train=True, batch_size=500, augment=recipe)])
    fast = torch.cat([b for b, _ in Loader(images, torch.arange(count), batch_size=500, augment=recipe).iter_batches(0)])
    error = ((slow.var(0) + fast.var(0)) / count).sqrt()
    assert ((slow.mean(0) - fast.mean(0)).abs() / error).max() < 5.5


def test_without_a_policy_nothing_is_drawn_for_it() -> None:
    plain = Augment(cutout=8).draw(50, generator(9))
    assert plain.codes is None and plain.boxes is None and Augment().policy is None
    more = Augment(cutout=8, random_erasing=0.5, augment_policy="randaugment").draw(50, generator(9))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], more[:3], strict=True)), "flips and crops stay what they were"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: that the policy never waits is NOT checked")
@pytest.mark.parametrize("recipe", RECIPES, ids=["trivialaugment", "randaugment"])
def test_on_a_gpu_an_epoch_never_waits_and_has_the_images_of_a_cpu(recipe: dict[str, Any]) -> None:
    images = pictures(49)
    augment = Augment(**recipe)
    ours = Loader(images.cuda(), torch.arange(100).cuda(), batch_size=16, augment=augment)
    ours.begin_epoch(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.begin_epoch(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ours.epoch_buffer is not None
    expected = torch.stack([batch for batch, _ in make_loader(recipe).iter_batches(2)])
    differing = (ours.epoch_buffer[0].cpu() != expected).float().mean()
    assert differing < 1e-3
