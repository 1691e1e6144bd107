"""Augmentation against oracles written image by image, and the distributions it draws from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from torch import Tensor

from cifar.data import MEAN, STD, Augment, cifar10, crop, cutout, draw_mixing, flip, mix, normalize
from cifar.data.augment import augment_fused, initial_flips, pad
from cifar.errors import UserError


def pictures(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flip_mirrors_the_chosen() -> None:
    images, mask = pictures(4), torch.tensor([True, False, False, True])
    flipped = flip(images, mask)
    for image, result, mirrored in zip(images.numpy(), flipped.numpy(), mask.tolist(), strict=True):
        assert np.array_equal(result, image[:, :, ::-1] if mirrored else image)


@pytest.mark.parametrize(("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("padding", [1, 4, 7])
def test_crop_equals_numpy(mode: str, numpy_mode: str, padding: int) -> None:
    images = pictures(20)
    offsets = torch.randint(0, 2 * padding + 1, (20, 2), generator=generator())
    offsets[:4] = torch.tensor([[0, 0], [2 * padding, 2 * padding], [0, 2 * padding], [padding, padding]])  # the corners
    cropped = crop(images, offsets, padding, mode)
    assert cropped.dtype == torch.uint8 and cropped.is_contiguous()
    for image, result, (row, column) in zip(images.numpy(), cropped.numpy(), offsets.tolist(), strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=numpy_mode)
        assert np.array_equal(result, padded[:, row : row + 32, column : column + 32])
    assert torch.equal(cropped[3], images[3])


def test_pads_are_black_not_grey() -> None:
    white = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    batch = Augment(flip="none", crop=4)(white, torch.arange(64), 0, generator())
    assert set(batch.unique().tolist()) == {-1.0, 1.0}
    batch = Augment(flip="none", crop=4, normalize="dataset")(white, torch.arange(64), 0, generator())
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    assert torch.allclose(batch.amin((0, 2, 3)), black, atol=1e-5)


def test_cutout_blanks_a_clipped_square() -> None:
    images = torch.full((5, 3, 32, 32), 200, dtype=torch.uint8)
    centres = torch.tensor([[16, 16], [0, 0], [31, 5], [4, 31], [10, 20]])
    for size in (1, 7, 8):
        for result, (row, column) in zip(cutout(images, centres, size), centres.tolist(), strict=True):
            expected = np.zeros((32, 32), bool)
            expected[
                max(row - size // 2, 0) : row - size // 2 + size, max(column - size // 2, 0) : column - size // 2 + size
            ] = True
            assert np.array_equal((result != 200).all(0).numpy(), expected)
    blank = normalize(cutout(images, centres, 8), "dataset")[0, :, 16, 16]
    assert blank.abs().max() < 0.01, "blank is the mean"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize(channels_last: bool, dtype: torch.dtype) -> None:
    images = pictures()
    tolerance = 1e-6 if dtype is torch.float32 else 0.02
    half = normalize(images, "half", dtype=dtype, channels_last=channels_last)
    exact = images.numpy() / 255.0
    assert half.dtype == dtype and half.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert np.allclose(half.float().numpy(), (exact - 0.5) / 0.5, atol=tolerance) and half.min() >= -1 and half.max() <= 1
    scaled = normalize(images, "dataset", dtype=dtype, channels_last=channels_last)
    oracle = (exact - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert np.allclose(scaled.float().numpy(), oracle, atol=4 * tolerance)


def test_offsets_and_flips_are_uniform() -> None:
    """Each image is a map of its own coordinates, so a result tells what was done to it."""
    count, p = 40000, 2
    tag = (torch.arange(8)[:, None] * 8 + torch.arange(8) + 1).to(torch.uint8).expand(count, 3, 8, 8).contiguous()
    done = Augment(crop=p).augment_uint8(tag, torch.arange(count), 0, generator(3))
    middle = done[:, 0, 3:5, 3:5].long() - 1  # padding never reaches the centre
    mirrored = middle[:, 0, 1] < middle[:, 0, 0]
    row, column = middle[:, 0, 0] // 8, middle[:, 0, 0] % 8
    across = torch.where(mirrored, 7 - column, column) - 3 + p
    cell = (row - 3 + p) * (2 * p + 1) + across
    table = torch.bincount(mirrored.long() * (2 * p + 1) ** 2 + cell, minlength=2 * (2 * p + 1) ** 2)
    assert len(table) == 50 and scipy.stats.chisquare(table.numpy()).pvalue > 1e-3


def test_alternating_flip_shows_both_sides_in_two_epochs() -> None:
    images, places = pictures(2000), torch.arange(2000)
    augment = Augment(flip="alternating", crop=0, seed=5)
    epochs = [augment.augment_uint8(images, places, epoch, generator(epoch)) for epoch in range(3)]
    mirrored = [(epoch != images).flatten(1).any(1) for epoch in epochs]
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2])
    assert scipy.stats.binomtest(int(mirrored[0].sum()), 2000).pvalue > 1e-3
    assert torch.equal(augment.augment_uint8(images[7:9], places[7:9], 0, generator()), epochs[0][7:9]), "whatever the batch"


def test_first_sides_of_seeds_and_neighbours_are_unrelated() -> None:
    sides = torch.stack([initial_flips(torch.arange(20000), seed) for seed in range(20)]).double()
    assert set(sides.unique().tolist()) == {0.0, 1.0}
    correlation = torch.corrcoef(sides) - torch.eye(20, dtype=torch.float64)
    neighbours = torch.corrcoef(torch.stack([sides[:, :-1].flatten(), sides[:, 1:].flatten()]))[0, 1]
    assert correlation.abs().max() < 5 / 20000**0.5 and abs(neighbours) < 5 / 400000**0.5


def test_deterministic_given_the_generator() -> None:
    augment = Augment(cutout=8)
    once, again, other = (augment(pictures(), torch.arange(16), 0, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_input_is_left_alone() -> None:
    images = pictures()
    before = images.clone()
    Augment(crop_padding="reflect", cutout=8)(images, torch.arange(16), 0, generator())
    normalize(images, "dataset", channels_last=True)
    assert torch.equal(images, before)


@pytest.mark.parametrize("field", ["flip", "crop_padding", "normalize"])
def test_unknown_choices_are_answered_with_the_known(field: str) -> None:
    with pytest.raises(UserError, match="known: "):
        Augment(**{field: "sideways"})


# -- mixup and CutMix --------------------------------------------------------------------------------------------------


def onehot(count: int) -> Tensor:
    return torch.eye(10)[torch.arange(count) % 10]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_mixup_weights_follow_beta(alpha: float) -> None:
    images, targets, source = torch.rand(4, 3, 2, 2), onehot(4), generator(1)
    weights = []
    for _ in range(1500):
        mixed, soft = mix(images, targets, "mixup", draw_mixing(1, alpha, source)[0])
        weight = float(soft[0, 0])
        assert torch.allclose(mixed, weight * images + (1 - weight) * images.roll(1, 0), atol=1e-6)
        assert torch.allclose(soft, weight * targets + (1 - weight) * targets.roll(1, 0), atol=1e-6)
        weights.append(weight)
    spread = np.array(weights) + np.random.default_rng(0).uniform(-1e-7, 1e-7, 1500)  # float32 has ties at the ends
    oracle = scipy.stats.beta(alpha, alpha).rvs(20000, random_state=1)
    assert scipy.stats.ks_2samp(np.clip(spread, 1e-6, 1 - 1e-6), np.clip(oracle, 1e-6, 1 - 1e-6)).pvalue > 1e-3


def test_cutmix_pastes_a_box_and_weighs_by_area() -> None:
    images, targets, source = torch.zeros(3, 1, 32, 32), onehot(3), generator(2)
    images += torch.arange(3).view(3, 1, 1, 1)
    areas = []
    for _ in range(600):
        mixed, soft = mix(images, targets, "cutmix", draw_mixing(1, 1.0, source)[0])
        pasted = (mixed[1, 0] == 0).numpy()
        area = pasted.mean()
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(rows) * len(columns), "a box"
        assert len(rows) == 0 or (np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns))
        assert torch.allclose(soft[1], (1 - area) * targets[1] + area * targets[0], atol=1e-6)
        assert torch.equal(mixed[2, 0] == 1, torch.from_numpy(pasted)), "one box for the batch"
        areas.append(area)
    random = np.random.default_rng(0)  # the paper's box, drawn with NumPy
    half = np.sqrt(1 - random.beta(1, 1, 20000))[:, None] / 2
    centre = random.uniform(0, 1, (20000, 2))
    oracle = np.floor(np.clip(centre + half, 0, 1) * 32) - np.floor(np.clip(centre - half, 0, 1) * 32)
    assert scipy.stats.ks_2samp(areas, oracle.prod(1) / 1024).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mix_keeps_format_and_repeats(kind: str) -> None:
    images = normalize(pictures(), dtype=torch.bfloat16, channels_last=True)
    mixed, soft = mix(images, onehot(16), kind, draw_mixing(1, 0.5, generator(4))[0])
    again, _ = mix(images, onehot(16), kind, draw_mixing(1, 0.5, generator(4))[0])
    assert mixed.dtype == torch.bfloat16 and mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed, again) and torch.allclose(soft.sum(1), torch.ones(16))


# -- the constants -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("CIFAR_DATA" not in os.environ, reason="CIFAR_DATA is not set: MEAN and STD are NOT checked")
def test_mean_and_std_are_the_training_sets() -> None:
    images = cifar10.load_dataset("cifar10", Path(os.environ["CIFAR_DATA"])).train_images
    for channel in range(3):
        parts = np.split(images[:, channel], 50)
        counts = np.sum([np.bincount(part.ravel(), minlength=256) for part in parts], 0)  # exact, in integers
        values = np.arange(256) / 255
        mean = (counts * values).sum() / counts.sum()
        std = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
        assert abs(mean - MEAN[channel]) < 1e-6 and abs(std - STD[channel]) < 1e-6


@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(flip="alternating", crop=2, crop_padding="reflect", normalize="dataset", seed=3),
        Augment(flip="none", crop=0, cutout=9),
        Augment(cutout=8, crop_padding="reflect"),
        Augment(cutout=8, contrast=0.3, brightness=0.2),
        Augment(flip="none", crop=0, brightness=0.5, normalize="dataset"),
    ],
    ids=["worksheet", "reflect", "cutout", "all", "jitter", "brightness"],
)
def test_augmenting_at_once_is_the_same_as_step_by_step(augment: Augment) -> None:
    images, chosen = pictures(64), torch.randperm(64, generator=generator(1))[:40]
    draws = augment.draw(40, generator(2))
    slow = augment.finish(augment.apply(images[chosen], chosen, 5, draws), draws, torch.float32, False)
    quick = augment.apply_fused(images, chosen, 5, draws, torch.float32, augment_fused)
    assert torch.equal(quick.permute(0, 3, 1, 2), slow)


@pytest.mark.parametrize("kind", ["half", "dataset"])
def test_jitter_changes_each_image_by_its_own_numbers(kind: str) -> None:
    images, augment = pictures(50), Augment(flip="none", crop=0, contrast=0.25, brightness=0.1, normalize=kind)
    draws = augment.draw(50, generator(3))
    assert draws.contrast is not None and draws.brightness is not None
    result = augment.finish(images, draws, torch.float32, True)
    assert result.is_contiguous(memory_format=torch.channels_last)
    mean = np.round(np.array(MEAN) * 255)[:, None, None] / 255
    for image, found, factor, added in zip(images, result, draws.contrast.tolist(), draws.brightness.tolist(), strict=True):
        expected = mean + factor * (image.numpy() / 255 - mean) + added
        low, high = (0.5, 0.5) if kind == "half" else (np.array(MEAN)[:, None, None], np.array(STD)[:, None, None])
        assert np.abs(found.numpy() - (expected - low) / high).max() < 1e-5


def test_jitter_is_uniform_within_its_limits_and_leaves_the_other_draws() -> None:
    plain, jittered = Augment(cutout=4), Augment(cutout=4, contrast=0.4, brightness=0.3)
    before, after = plain.draw(20_000, generator()), jittered.draw(20_000, generator())
    assert before.contrast is None and before.brightness is None
    for name in ("mirrored", "offsets", "centres"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert after.contrast is not None and after.brightness is not None
    for drawn, low, high in ((after.contrast, 0.6, 1.4), (after.brightness, -0.3, 0.3)):
        assert scipy.stats.kstest(drawn.numpy(), "uniform", (low, high - low)).pvalue > 1e-3
    assert abs(np.corrcoef(after.contrast, after.brightness)[0, 1]) < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: capture and the absence of waiting are NOT checked")
def test_on_a_gpu_it_never_waits_and_can_be_captured() -> None:
    images, places = pictures(64).cuda(), torch.arange(64, device="cuda")
    source = torch.Generator("cuda").manual_seed(0)
    augment = Augment(crop_padding="reflect", cutout=8, flip="alternating")

    def step() -> Tensor:
        mixed = augment(images, places, 1, source, dtype=torch.bfloat16, channels_last=True)
        for kind in ("mixup", "cutmix"):
            mixed, _ = mix(mixed, onehot_gpu, kind, drawn.index_select(0, at)[0])
        return mixed

    onehot_gpu, at = onehot(64).cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")
    drawn = draw_mixing(3, 0.5, torch.Generator().manual_seed(1)).cuda()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(source)
    with torch.cuda.graph(graph):
        result = step()
    graph.replay()
    first = result.clone()
    graph.replay()
    assert not torch.equal(first, result), "new draws at each replay"
    expected = augment.augment_uint8(images, places, 1, torch.Generator("cuda").manual_seed(9)).cpu()
    assert expected.shape == images.shape and torch.equal(pad(images, 4, "reflect").cpu(), pad(images.cpu(), 4, "reflect"))
