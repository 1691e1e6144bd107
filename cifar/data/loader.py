"""`Loader`: shuffled, augmented batches of images that lie as one uint8 tensor on the device.

There are no worker processes, and making a batch never waits for the device. torch_dataset.py is the ordinary way to batches;
both draw from the same distribution.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cifar.data.augment import Augment, Draws, FusedAugment, draw_mixing, normalize
from cifar.data.policies import OperationGroups, group_by_operation, move_groups
from cifar.system.devices import num_cores

AUGMENT_CHUNK = 10_000  # images that a GPU augments at once: a compromise between launches and memory. Compiled, it takes all


@dataclass(frozen=True)
class BatchFormat:
    """What images look like when a network gets them."""

    normalize: str = "half"  # where there is no `Augment`, which has a key of that name
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


@dataclass(frozen=True)
class EpochOptions:
    """Which images an epoch shows, and in which order."""

    shuffle: bool | None = None  # None: if images are augmented
    drop_last: bool | None = None  # a last short batch; None: if images are augmented
    mixing: float = 0.0  # alpha of mixup or cutmix; 0: neither
    keep: float = 1.0  # the fraction of the images that an epoch shows
    shard: tuple[int, int] = (
        0,
        1,
    )  # (index, count): the part of each batch that is made, where processes share batches


class EpochPlan(NamedTuple):
    """What an epoch will show, on the CPU: a function of (seed, epoch) alone, the same for every device."""

    # (steps * B,) int64: indices into the data set; (N,) where the images of the epoch are selected from it. Of a shard of each
    # batch: (steps * B / count,)
    order: Tensor
    draws: Draws  # for each of them
    mixing: Tensor | None  # (steps, 3): see draw_mixing
    policy_groups: Sequence[OperationGroups] = ()  # for a GPU, which applies the policy to the whole epoch at once
    kept_paths: Tensor | None = None  # (steps, blocks, B) bool: see `drop_path_rates`


class Loader:
    """Shuffled, augmented batches of `images` (N, 3, H, W) uint8 and `labels` (N,) int64, both on one device.

    After `begin_epoch(epoch)`, `next_batch()` gives the batch of `step_index`. That is a tensor on the device, so that a
    captured step finds its own batch. On a GPU `begin_epoch` makes the whole epoch at once, in the memory of the last one.
    Elsewhere `next_batch` makes the batch; if a CPU has more cores than torch uses threads, another thread makes it while the
    network runs on the one before.
    With `keep` < 1 an epoch takes, in its order, that fraction of the images: those whose loss was largest when last seen, as
    `record_losses` was told. Images that were never seen count as largest. (Selective backpropagation with stale losses, Jiang
    et al. 2019, arXiv:1910.00762, draws by the percentile of the loss; here the largest are taken.)
    With a `shard`, order and random numbers are drawn for whole batches, and the images of the shard alone are made.
    To resume within an epoch, begin it at a later step. Training drops a last short batch. For evaluation (no augmentation, no
    shuffling) every image comes once, and the last batch may be short.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        augment: Augment | None = None,
        seed: int = 0,
        batch_format: BatchFormat = BatchFormat(),
        epoch_options: EpochOptions = EpochOptions(),
    ) -> None:
        assert images.dtype == torch.uint8 and len(images) == len(labels) and images.device == labels.device
        self.images, self.labels, self.device = images.contiguous(), labels, images.device
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.normalize, self.dtype, self.channels_last = batch_format.normalize, batch_format.dtype, batch_format.channels_last
        shuffle, drop_last = epoch_options.shuffle, epoch_options.drop_last
        self.shuffle = shuffle if shuffle is not None else augment is not None
        self.drop_last = drop_last if drop_last is not None else augment is not None
        self.mixing_alpha = epoch_options.mixing
        self.keep, self.selects_hard = epoch_options.keep, epoch_options.keep < 1
        self.shard_index, self.num_shards = epoch_options.shard
        assert batch_size % self.num_shards == 0 and (self.num_shards == 1 or not (self.mixing_alpha or self.selects_hard))
        self.shard_size = batch_size // self.num_shards  # images that a batch of this loader holds
        self.step_index = torch.zeros(1, dtype=torch.int64, device=self.device)  # the step of the epoch that comes next
        self.current_epoch = 0
        self.mixing_draws: Tensor | None = None  # (steps, 3) of the epoch: what `mix` takes
        self.drop_path_rates: Sequence[
            float
        ] = ()  # of the network's blocks: how often stochastic depth drops an image's branch
        self._kept_scales = torch.empty(0)  # (blocks, 1): 1 / (1 - rate)
        self.path_scales: Tensor | None = None  # (steps, blocks, B) of the epoch: 0 where dropped, else 1 / (1 - rate)
        self.fused_augment: FusedAugment | None = None  # how a GPU makes many batches, if that has been compiled
        self.epoch_buffer: tuple[Tensor, Tensor] | None = None  # the whole epoch: (steps, B, ...) and (steps, B)
        self._plans: dict[int, EpochPlan] = {}
        self._prefetched_batch: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None  # a step, and its batch being made
        self._prefetched_plan: tuple[int, Future[EpochPlan]] | None = None  # an epoch, and its plan being made
        if self.selects_hard:
            assert self.augment is not None and self.drop_last
            num_selected = self.num_steps * batch_size
            self._losses = torch.full((len(images),), torch.inf, device=self.device)  # of each image, when it was last seen
            # the selected images: positions in the order of the epoch, and indices into the data set
            self._selected_slots = torch.zeros(num_selected, dtype=torch.int64, device=self.device)
            self._selected_indices = torch.zeros_like(self._selected_slots)

    @property
    def num_steps(self) -> int:
        """Batches of an epoch."""
        count = round(self.keep * len(self.images))
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def draw_order(self, epoch: int) -> Tensor:
        """(N,) int64 on the CPU: indices into the training set, in the order in which `epoch` visits them."""
        if not self.shuffle:
            return torch.arange(len(self.images))
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
        return torch.randperm(len(self.images), generator=generator)

    def reseed(self, seed: int) -> None:
        """Start over as a loader with that seed."""
        self._discard_prefetched()
        if self._prefetched_plan:
            self._prefetched_plan[1].exception()  # waits
            self._prefetched_plan = None
        self.seed, self.current_epoch, self._plans = seed, 0, {}
        if self.selects_hard:
            self._losses.fill_(torch.inf)
            self._selected_slots.zero_()
        self.augment = replace(self.augment, seed=seed) if self.augment else None

    def plan_epoch(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, drawn once; an epoch may be planned before it begins."""
        if epoch not in self._plans:
            prefetched, self._prefetched_plan = self._prefetched_plan, None
            plan = prefetched[1].result() if prefetched and prefetched[0] == epoch else self._draw_plan(epoch)
            self._plans = {number: known for number, known in self._plans.items() if number == self.current_epoch}
            self._plans[epoch] = plan
        return self._plans[epoch]

    def prefetch_plan(self, epoch: int) -> None:
        """Draw the plan of an epoch in another thread."""
        if epoch not in self._plans and not self._prefetched_plan:
            self._prefetched_plan = epoch, _prefetch_pool().submit(self._draw_plan, epoch)

    def _draw_plan(self, epoch: int) -> EpochPlan:
        order = self.draw_order(epoch)[: None if self.selects_hard else self.num_steps * self.batch_size]
        generator = torch.Generator().manual_seed(derive_seed("augment", self.seed, epoch))
        augment = self.augment or Augment(flip="none", crop=0)
        draws = augment.draw(len(order), generator, self.images.shape[2])
        mixing = draw_mixing(self.num_steps, self.mixing_alpha, generator) if self.mixing_alpha else None
        if self.num_shards > 1:
            slots = torch.arange(len(order)).view(self.num_steps, self.num_shards, -1)[:, self.shard_index].flatten()
            order, draws = order[slots], draws.select(slots)
        kept_paths = self._draw_kept_paths(epoch) if self.drop_path_rates else None
        groups: list[OperationGroups] = []
        if self.device.type == "cuda":  # a copy from pinned memory does not wait
            order, draws = order.pin_memory(), Draws(*(None if drawn is None else drawn.pin_memory() for drawn in draws))
            kept_paths = None if kept_paths is None else kept_paths.pin_memory()
            if draws.codes is not None:
                groups = [
                    g._replace(positions=g.positions.pin_memory(), codes=g.codes.pin_memory())
                    for g in group_by_operation(draws.codes)
                ]
        return EpochPlan(order, draws, mixing, groups, kept_paths)

    def _draw_kept_paths(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed("drop_path", self.seed, epoch))
        drawn = torch.rand((self.num_steps, len(self.drop_path_rates), self.batch_size), generator=generator)
        return drawn >= torch.tensor(self.drop_path_rates)[:, None]

    def begin_epoch(self, epoch: int, start_step: int = 0) -> None:
        """From here on batches are those of `epoch`, from `start_step` on. Never waits for the device."""
        self._discard_prefetched()
        self.current_epoch = epoch
        plan = self.plan_epoch(epoch)
        self.step_index.fill_(start_step)
        if self.selects_hard:
            self._select_hard_examples(plan, start_step)
        if plan.mixing is not None:
            if self.mixing_draws is None:
                self.mixing_draws = torch.empty_like(plan.mixing, device=self.device)
            copy_to_device(self.mixing_draws, plan.mixing)
        if plan.kept_paths is not None:
            if self.path_scales is None:
                self.path_scales = torch.empty(plan.kept_paths.shape, device=self.device)
                self._kept_scales = 1 / (1 - torch.tensor(self.drop_path_rates)[:, None].to(self.device))
            torch.mul(move_to_device(plan.kept_paths, self.device), self._kept_scales, out=self.path_scales)
        if self.device.type == "cuda" and self.augment is not None:
            self._fill_epoch_buffer(start_step)

    def _select_hard_examples(self, plan: EpochPlan, start_step: int) -> None:
        order = move_to_device(plan.order, self.device)
        if not start_step:  # within an epoch the slots are those that `load_state_dict` has restored
            hardest = self._losses.index_select(0, order).argsort(descending=True, stable=True)
            self._selected_slots.copy_(hardest[: len(self._selected_slots)].sort().values)
        self._selected_indices.copy_(order.index_select(0, self._selected_slots))

    def record_losses(self, losses: Tensor) -> None:
        """Remember the losses (B,) of the images of the current step."""
        indices = self._selected_indices.view(self.num_steps, self.batch_size).index_select(0, self.step_index)[0]
        self._losses.index_copy_(0, indices, losses.float())

    def state_dict(self) -> dict[str, Tensor]:
        """What batches depend on besides seed and epoch, as live tensors: nothing unless `keep` < 1."""
        return {"losses": self._losses, "slots": self._selected_slots} if self.selects_hard else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict()` in place. To be called before `begin_epoch`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(images (B, 3, H, W) float, labels (B,)) of the current step. The caller advances `step_index`."""
        if self.epoch_buffer is not None:
            return select_batch(*self.epoch_buffer, self.step_index, self.channels_last)
        step, prefetched = int(self.step_index), self._prefetched_batch
        batch = prefetched[1].result() if prefetched and prefetched[0] == step else self.make_batch(step)
        self._prefetched_batch = None
        if self.device.type == "cpu" and step + 1 < self.num_steps and torch.get_num_threads() < num_cores():
            # a batch depends only on what `begin_epoch` has set, so it is the same in any thread
            self._prefetched_batch = step + 1, _prefetch_pool().submit(self.make_batch, step + 1)
        return batch

    def _discard_prefetched(self) -> None:
        """Wait for the batch that is being made, and forget it: it belongs to an epoch that is over."""
        if self._prefetched_batch:
            self._prefetched_batch[1].exception()
            self._prefetched_batch = None

    def iter_batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (B, 3, H, W) float, labels (B,)) from batch `start_step` on."""
        assert not self.selects_hard, "images are selected by `begin_epoch`"
        self.current_epoch = epoch
        for step in range(start_step, self.num_steps):
            yield self.make_batch(step)

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step of the current epoch, on the device; augmented if this loader augments."""
        return self._make_batches(slice(step * self.shard_size, (step + 1) * self.shard_size))

    def _make_batches(self, slots: slice, changed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The images in these positions of the epoch's order, and their labels.

        changed: (N, 3, H, W) uint8, the images in the epoch's order after its policy, where that has been applied already.
        """
        if self.augment is None and not self.shuffle:
            images, labels = self.images[slots], self.labels[slots]
        else:
            plan = self.plan_epoch(self.current_epoch)
            indices = self._selected_indices[slots] if self.selects_hard else move_to_device(plan.order[slots], self.device)
            labels = self.labels.index_select(0, indices)
            if self.augment is not None:
                draws = self._select_draws(plan, slots, has_policy=changed is None)
                source, places = self.images, indices
                if changed is not None and self.selects_hard:
                    source, places = changed, self._selected_slots[slots]
                elif changed is not None:
                    source, places = changed, torch.arange(slots.start, slots.start + len(indices), device=self.device)
                if self.fused_augment is not None:
                    epoch, fused = self.current_epoch, self.fused_augment
                    draws = self.augment.resolve_flips(indices, epoch, draws)
                    images = self.augment.apply_fused(source, places, epoch, draws, self.dtype, fused)
                    return images.permute(0, 3, 1, 2), labels
                images = self.augment.apply(source.index_select(0, places), indices, self.current_epoch, draws)
                return self.augment.finish(images, draws, self.dtype, self.channels_last), labels
            images = self.images.index_select(0, indices)
        return normalize(images, self.normalize, dtype=self.dtype, channels_last=self.channels_last), labels

    def _select_draws(self, plan: EpochPlan, slots: slice, *, has_policy: bool) -> Draws:
        """The draws of the images in these positions, on the device; the policy's codes on the CPU, or not at all."""
        on_cpu = plan.draws._replace(codes=None)
        on_cpu = on_cpu if self.selects_hard else on_cpu.select(slots)
        draws = Draws(*(None if drawn is None else move_to_device(drawn, self.device) for drawn in on_cpu))
        draws = draws.select(self._selected_slots[slots]) if self.selects_hard else draws
        if plan.draws.codes is None or not has_policy:
            return draws
        return draws._replace(codes=plan.draws.codes[self._selected_slots[slots].cpu() if self.selects_hard else slots])

    def _apply_epoch_policy(self) -> Tensor | None:
        """The images in the epoch's order, (N, 3, H, W) uint8, after the policy; None where there is no policy."""
        assert self.augment is not None
        plan, policy = self.plan_epoch(self.current_epoch), self.augment.policy
        if policy is None:
            return None
        images = self.images.index_select(0, move_to_device(plan.order, self.device))
        return policy.apply_groups(images, [move_groups(group, self.device) for group in plan.policy_groups])

    def _fill_epoch_buffer(self, start_step: int) -> None:
        """Make every batch of the epoch, in large chunks, in the memory of the last epoch."""
        if self.epoch_buffer is None:
            _, channels, height, width = self.images.shape
            shape = (height, width, channels) if self.channels_last else (channels, height, width)
            images = torch.zeros((self.num_steps, self.shard_size, *shape), dtype=self.dtype, device=self.device)
            labels = torch.zeros((self.num_steps, self.shard_size), dtype=self.labels.dtype, device=self.device)
            self.epoch_buffer = images, labels
        images, labels = self.epoch_buffer
        chunk_steps = max(1, AUGMENT_CHUNK // self.shard_size)
        if self.fused_augment is not None:  # compiled for one size
            start_step, chunk_steps = 0, self.num_steps
        changed = self._apply_epoch_policy()
        for step in range(start_step, self.num_steps, chunk_steps):
            end = min(step + chunk_steps, self.num_steps)
            new_images, new_labels = self._make_batches(slice(step * self.shard_size, end * self.shard_size), changed)
            new_images = new_images.permute(0, 2, 3, 1) if self.channels_last else new_images
            images[step:end].copy_(new_images.reshape(images[step:end].shape))
            labels[step:end].copy_(new_labels.view(labels[step:end].shape))


@functools.cache
def _prefetch_pool() -> ThreadPoolExecutor:
    """A thread that makes batches while others compute. One is enough for any network."""
    return ThreadPoolExecutor(1, "batches", initializer=lambda: torch.set_num_threads(1))


def wait_for_prefetch() -> None:
    """Wait until the thread has nothing to do: a CUDA graph cannot be captured while another thread calls the GPU."""
    _prefetch_pool().submit(lambda: None).result()


def select_batch(images: Tensor, labels: Tensor, step_index: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Batch `step_index` (1,) of a stored epoch, as a network takes it."""
    batch = images.index_select(0, step_index)[0]
    return batch.permute(0, 3, 1, 2) if channels_last else batch, labels.index_select(0, step_index)[0]


def copy_to_device(target: Tensor, source: Tensor) -> None:
    """Copy a CPU tensor in place. A copy from pinned memory to a GPU does not wait."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=target.is_cuda)


def move_to_device(source: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device, without waiting for that."""
    return source.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else source.to(device)


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from names and numbers. Neighbouring seeds give unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
