"""Batches: every image once, resumable, and the same distribution by both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cifar.data import Augment, BatchFormat, CIFAR10Custom, EpochOptions, Loader, make_dataloader
from cifar.data.loader import derive_seed


def dataset(count: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=source), torch.arange(count)


def training(count: int = 300, seed: int = 0, **changes: object) -> Loader:
    return Loader(*dataset(count), batch_size=64, augment=Augment(**changes), seed=seed)


def test_training_visits_every_image_at_most_once_and_drops_the_rest() -> None:
    loader = training()
    assert loader.num_steps == 4
    seen = torch.cat([labels for _, labels in loader.iter_batches(0)])
    assert len(seen) == 256 == len(seen.unique()) and sorted(loader.draw_order(0).tolist()) == list(range(300))
    left = set(range(300)).difference(
        *(torch.cat([labels for _, labels in loader.iter_batches(e)]).tolist() for e in range(12))
    )
    assert not left, "another few are dropped in each epoch"


def test_images_and_labels_stay_together() -> None:
    images, labels = dataset(256)
    loader = Loader(images, labels, batch_size=64, augment=Augment(flip="none", crop=0))
    for batch, places in loader.iter_batches(3):
        assert torch.allclose(batch, images[places].float() / 127.5 - 1, atol=1e-6)


def test_evaluation_counts_every_image_once_in_order() -> None:
    images, labels = dataset()
    loader = Loader(images, labels, batch_size=64, batch_format=BatchFormat(normalize="dataset", channels_last=True))
    batches = list(loader.iter_batches(0))
    assert loader.num_steps == len(batches) == 5 and torch.equal(torch.cat([places for _, places in batches]), labels)
    again = torch.cat([batch for batch, _ in loader.iter_batches(1)])
    assert torch.equal(torch.cat([batch for batch, _ in batches]), again), "nothing random"


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    one, other = training(seed=1), training(seed=1)
    list(one.iter_batches(0))  # has drawn more than the other
    assert torch.equal(one.draw_order(1), other.draw_order(1))
    orders = [training(seed=seed).draw_order(epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order.tolist()) for order in orders}) == 16
    torch.manual_seed(7)
    assert torch.equal(one.draw_order(1), orders[5])


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(training(cutout=8).iter_batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_decide() -> None:
    one, same, other = (torch.cat([batch for batch, _ in training(seed=seed).iter_batches(0)]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len({derive_seed("order", seed, epoch) for seed in range(50) for epoch in range(50)}) == 2500
    assert all(0 <= derive_seed("augment", seed) < 2**63 for seed in range(50))


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_resumed_within_an_epoch_gives_the_same_batches(stop: int) -> None:
    uninterrupted = training(flip="alternating", cutout=4)
    whole = [batch for epoch in range(2) for batch in uninterrupted.iter_batches(epoch)]
    first, second = training(flip="alternating", cutout=4), training(flip="alternating", cutout=4)
    batches = first.iter_batches(0)
    got = [next(batches) for _ in range(stop)]
    list(second.iter_batches(5))  # what was drawn before does not matter
    got += [*second.iter_batches(0, start_step=stop), *second.iter_batches(1)]
    assert len(got) == len(whole) == 8
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(got, whole, strict=True))


def taken(loader: Loader, epoch: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The epoch's batches as a step takes them."""
    loader.begin_epoch(epoch, start)
    found = []
    for _ in range(start, loader.num_steps):
        found.append(tuple(tensor.clone() for tensor in loader.next_batch()))
        loader.step_index.add_(1)
    return found


def test_a_step_takes_the_batches_of_the_epoch() -> None:
    loader = training(flip="alternating", cutout=4)
    for epoch, start in ((1, 0), (2, 3)):
        expected = list(training(flip="alternating", cutout=4).iter_batches(epoch, start))
        for ours, its in zip(taken(loader, epoch, start), expected, strict=True):
            assert torch.equal(ours[0], its[0]) and torch.equal(ours[1], its[1])


def test_planning_ahead_changes_nothing() -> None:
    eager, ahead = training(cutout=4), training(cutout=4)
    for epoch in (1, 2, 3):
        ahead.plan_epoch(epoch + 1)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(eager.iter_batches(epoch), ahead.iter_batches(epoch), strict=True))


def test_a_plan_made_in_a_thread_is_the_one_of_its_epoch_and_seed() -> None:
    ahead, plain = training(seed=1), training(seed=1)
    for epoch in (1, 2, 3):
        ahead.begin_epoch(epoch)
        ahead.prefetch_plan(epoch + 1)
        ahead.prefetch_plan(epoch + 1)
        assert torch.equal(ahead.plan_epoch(epoch).order, plain.draw_order(epoch)[: len(ahead.plan_epoch(epoch).order)])
    assert torch.equal(ahead.plan_epoch(7).order, training(seed=1).plan_epoch(7).order), "another than the one in the making"
    ahead.prefetch_plan(2)
    ahead.reseed(5)
    assert torch.equal(ahead.plan_epoch(2).order, training(seed=5).plan_epoch(2).order)


def test_reseeded_is_another_loader() -> None:
    loader = training(seed=3)
    list(loader.iter_batches(1))
    loader.reseed(7)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loader.iter_batches(1), training(seed=7).iter_batches(1), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_form_of_a_batch(dtype: torch.dtype) -> None:
    images, labels = dataset(64)
    plain, last = (
        next(
            Loader(
                images, labels, batch_size=32, augment=Augment(), batch_format=BatchFormat(dtype=dtype, channels_last=flag)
            ).iter_batches(0)
        )[0]
        for flag in (False, True)
    )
    assert plain.dtype == last.dtype == dtype and plain.shape == (32, 3, 32, 32)
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(plain, last)


# -- the worksheets' way -----------------------------------------------------------------------------------------------


def test_per_sample_without_training_only_normalises() -> None:
    images, labels = dataset(4)
    sample = CIFAR10Custom(images.numpy(), labels.numpy(), train=False)
    image, label = sample[2]
    assert len(sample) == 4 and label == 2 and torch.allclose(image, (images[2] / 255 - 0.5) / 0.5)
    batches = list(make_dataloader(images, labels, train=False, batch_size=3))
    assert [len(places) for _, places in batches] == [3, 1]


def test_per_sample_training_repeats_with_the_global_seed() -> None:
    images, labels = dataset(64)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([batch for batch, _ in make_dataloader(images, labels, train=True, batch_size=32, seed=1)])
    assert len(runs[0]) == 2 and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_per_sample_with_worker_processes() -> None:
    images, labels = dataset(64)
    batches = list(make_dataloader(images, labels, train=True, batch_size=16, workers=2))
    assert sorted(torch.cat([places for _, places in batches]).tolist()) == list(range(64))


def tagged(count: int, side: int) -> Tensor:
    """Each pixel holds its own place, so that what was done to an image can be read off it."""
    places = torch.arange(side)[:, None] * side + torch.arange(side) + 1
    return places.to(torch.uint8).expand(count, 3, side, side).contiguous()


def placement(batch: Tensor, p: int) -> Tensor:
    """Normalised images of 8x8 tags -> (mirrored, row, column) as one number below 2 * (2p + 1)^2."""
    middle = ((batch[:, 0, 3:5, 3:5] + 1) * 127.5).round().long() - 1
    mirrored = middle[:, 0, 1] < middle[:, 0, 0]
    row, column = middle[:, 0, 0] // 8, middle[:, 0, 0] % 8
    across = torch.where(mirrored, 7 - column, column)
    return mirrored.long() * (2 * p + 1) ** 2 + (row - 3 + p) * (2 * p + 1) + across - 3 + p


def test_both_ways_place_and_flip_alike() -> None:
    count, p = 6000, 1
    images, labels = tagged(count, 8), torch.arange(count)
    torch.manual_seed(0)
    slow = torch.cat(
        [placement(b, p) for b, _ in make_dataloader(images, labels, train=True, batch_size=500, augment=Augment(crop=p))]
    )
    loader = Loader(images, labels, batch_size=500, augment=Augment(crop=p))
    fast = torch.cat([placement(b, p) for epoch in range(3) for b, _ in loader.iter_batches(epoch)])
    counts = [torch.bincount(cells, minlength=18).numpy() for cells in (slow, fast)]
    assert all(len(c) == 18 and stats.chisquare(c).pvalue > 1e-3 for c in counts), "both are uniform"
    assert stats.chi2_contingency(np.stack(counts)).pvalue > 1e-3, "and agree"


@pytest.mark.parametrize(
    "augment",
    [Augment(), Augment(crop_padding="reflect", normalize="dataset"), Augment(flip="none", crop=2, cutout=9)],
    ids=["worksheet", "reflect", "cutout"],
)
def test_both_ways_agree_in_mean_and_variance_of_every_pixel(augment: Augment) -> None:
    count = 2000
    picture = dataset(1, seed=5)[0]
    images, labels = picture.expand(count, 3, 32, 32).contiguous(), torch.arange(count)
    torch.manual_seed(1)
    slow = torch.cat([b for b, _ in make_dataloader(images, labels, train=True, batch_size=500, augment=augment)])
    fast = torch.cat([b for b, _ in Loader(images, labels, batch_size=500, augment=augment).iter_batches(0)])
    assert slow.min() == pytest.approx(float(fast.min()), abs=1e-5) and slow.max() == pytest.approx(float(fast.max()), abs=1e-5)
    error = ((slow.var(0) + fast.var(0)) / count).sqrt()  # of a difference of means
    assert ((slow.mean(0) - fast.mean(0)).abs() / error).max() < 5.5  # of 3072 pixels
    centred = [(b - b.mean(0)) ** 2 for b in (slow, fast)]
    error = ((centred[0].var(0) + centred[1].var(0)) / count).sqrt()
    assert ((centred[0].mean(0) - centred[1].mean(0)).abs() / error).max() < 6


def test_agrees_with_torchvision() -> None:
    """The usual recipe, by the library that everyone uses: RandomCrop and RandomHorizontalFlip."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    count = 2000
    picture = dataset(1, seed=6)[0]
    recipe = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
    torch.manual_seed(2)
    theirs = torch.stack([recipe(picture[0]) for _ in range(count)]).float() / 127.5 - 1
    images = picture.expand(count, 3, 32, 32).contiguous()
    ours = torch.cat([b for b, _ in Loader(images, torch.arange(count), batch_size=500, augment=Augment()).iter_batches(0)])
    error = ((theirs.var(0) + ours.var(0)) / count).sqrt()
    assert ((theirs.mean(0) - ours.mean(0)).abs() / error).max() < 5.5


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_an_epoch_keeps_the_images_that_were_hardest_when_last_seen(device: str, mode: str) -> None:
    images, labels = dataset(300)
    augment = Augment(cutout=4, flip="alternating", crop_padding=mode)
    everything = Loader(images, labels, batch_size=30, augment=augment, seed=2)  # ten steps of all 300
    loader = Loader(
        images.to(device), labels.to(device), batch_size=30, augment=augment, seed=2, epoch_options=EpochOptions(keep=0.55)
    )
    assert loader.num_steps == 5 and loader.selects_hard and not everything.selects_hard
    losses, chance = torch.full((300,), torch.inf), torch.Generator().manual_seed(1)
    for epoch in range(1, 6):
        everything.begin_epoch(epoch)
        whole = [everything.make_batch(step) for step in range(everything.num_steps)]
        shown = {int(place): image for batch, places in whole for image, place in zip(batch, places, strict=True)}
        loader.begin_epoch(epoch)
        seen = []
        for step in range(loader.num_steps):
            loader.step_index.fill_(step)
            batch, places = (tensor.cpu() for tensor in loader.next_batch())
            assert all(torch.allclose(image, shown[int(p)], atol=1e-6) for image, p in zip(batch, places, strict=True))
            seen += places.tolist()
            loader.record_losses(torch.arange(30, device=device) + 100.0 * step)  # of this batch; all others stay as they are
        assert len(set(seen)) == 150
        assert seen == [place for place in everything.draw_order(epoch).tolist() if place in set(seen)], "in the epoch's order"
        left = sorted(set(range(300)) - set(seen))
        assert losses[seen].min() >= losses[left].max(), "none that was left was harder"
        losses[seen] = torch.cat([torch.arange(30) + 100.0 * step for step in range(5)])
        if epoch == 3:  # another set of losses, as if from a checkpoint
            losses = torch.rand(300, generator=chance)
            loader.load_state_dict({"losses": losses, "slots": loader.state_dict()["slots"]})
    assert torch.equal(loader.state_dict()["losses"].cpu(), losses)
    loader.reseed(3)
    assert loader.state_dict()["losses"].isinf().all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_kept_is_kept_when_an_epoch_is_taken_up_in_its_middle(device: str) -> None:
    def fresh() -> Loader:
        images, labels = (tensor.to(device) for tensor in dataset(300))
        return Loader(images, labels, batch_size=30, augment=Augment(cutout=4), seed=2, epoch_options=EpochOptions(keep=0.5))

    def taken_and_noted(loader: Loader, first: int, last: int) -> list[Tensor]:
        found = []
        for step in range(first, last):
            loader.step_index.fill_(step)
            found.append(loader.next_batch()[0].cpu())
            loader.record_losses(found[-1].mean((1, 2, 3)).to(device))
        return found

    one, two, three = fresh(), fresh(), fresh()
    for loader in (one, two):
        loader.begin_epoch(1)
        taken_and_noted(loader, 0, 5)
    one.begin_epoch(2)
    whole = taken_and_noted(one, 0, 5)
    two.begin_epoch(2)
    parts = taken_and_noted(two, 0, 3)
    three.load_state_dict({name: tensor.clone() for name, tensor in two.state_dict().items()})
    three.begin_epoch(2, 3)
    parts += taken_and_noted(three, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert all(torch.equal(one.state_dict()[name], three.state_dict()[name]) for name in ("losses", "slots"))


@pytest.mark.parametrize("device", DEVICES)
def test_shards_of_a_batch_are_the_batch_bit_for_bit(device: str) -> None:
    images, labels = (tensor.to(device) for tensor in dataset(300))
    augment = Augment(cutout=4, flip="alternating", crop_padding="reflect")

    def batches(index: int, count: int) -> list[tuple[Tensor, Tensor]]:
        shard = EpochOptions(shard=(index, count))
        loader = Loader(images, labels, batch_size=48, augment=augment, seed=3, epoch_options=shard)
        assert loader.num_steps == 6 and loader.batch_size == 48
        found = []
        for epoch in (1, 2):
            loader.begin_epoch(epoch, 2 * (epoch - 1))  # the second one in its middle
            for step in range(2 * (epoch - 1), loader.num_steps):
                loader.step_index.fill_(step)
                found.append(loader.next_batch())
        return found

    whole = batches(0, 1)
    for count in (2, 3, 4):
        parts = [batches(index, count) for index in range(count)]
        assert all(len(labels) == 48 // count for part in parts for _, labels in part)
        for step, (batch, places) in enumerate(whole):
            assert torch.equal(torch.cat([part[step][0] for part in parts]), batch)
            assert torch.equal(torch.cat([part[step][1] for part in parts]), places)
    with pytest.raises(AssertionError):
        batches(0, 5)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the epoch that is made there at once is NOT checked")


@GPU
def test_an_epoch_never_waits_for_the_gpu() -> None:
    images, labels = (tensor.cuda() for tensor in dataset(256))
    loader = Loader(
        images,
        labels,
        batch_size=64,
        augment=Augment(cutout=4),
        batch_format=BatchFormat(dtype=torch.bfloat16, channels_last=True),
        epoch_options=EpochOptions(mixing=0.5),
    )
    taken(loader, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(taken(loader, 1)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
@pytest.mark.parametrize("last", [False, True])
def test_every_device_shows_the_same_epoch(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar.data.loader.AUGMENT_CHUNK", 100)  # smaller than an epoch
    images, labels = dataset(300)
    augment = Augment(cutout=4, flip="alternating", crop_padding="reflect")
    here, there = (
        Loader(i, y, batch_size=64, augment=augment, seed=4, batch_format=BatchFormat(channels_last=last))
        for i, y in ((images, labels), (images.cuda(), labels.cuda()))
    )
    for epoch, start in ((1, 0), (2, 2)):
        for ours, its in zip(taken(there, epoch, start), taken(here, epoch, start), strict=True):
            assert torch.equal(ours[1].cpu(), its[1]) and torch.allclose(ours[0].cpu(), its[0], atol=1e-6)
            assert ours[0].is_contiguous(memory_format=torch.channels_last) == its[0].is_contiguous(
                memory_format=torch.channels_last
            )


def test_batches_made_ahead_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar.data.loader.num_cores", lambda: torch.get_num_threads() + 1)  # a core that has nothing to do
    loader, other = training(cutout=8), training(cutout=8)

    def same(step: int) -> bool:
        loader.step_index.fill_(step)
        return all(torch.equal(one, two) for one, two in zip(loader.next_batch(), other.make_batch(step), strict=True))

    for epoch, steps in ((1, [0, 1, 2, 3]), (2, [2, 3, 0, 1, 3]), (3, [0])):  # to the end, out of order, broken off
        loader.begin_epoch(epoch, steps[0])
        other.begin_epoch(epoch, steps[0])
        assert all(same(step) for step in steps)
    assert loader._prefetched_batch, "nothing was made ahead"
    loader.reseed(5)
    other.reseed(5)
    loader.begin_epoch(3)
    other.begin_epoch(3)
    assert same(0) and same(1)
