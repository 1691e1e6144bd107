"""The processes of one run that `torchrun` starts: each takes a share of every batch, and rank 0 keeps the record.

    torchrun --nproc-per-node 4 -m cifar train --experiment resnet20

`batch_size` is the batch of all of them together, so a run means the same on one process and on four: every rank draws
order, augmentation and mixing for the whole batch, then takes its share. Weights start equal and stay equal, bit for bit,
as all apply the same mean gradient. Without BatchNorm, N ranks give what one gives, up to the order of additions; BatchNorm
normalises by each rank's own share, and rank 0's running statistics are what is evaluated and saved. Random states are equal
too (so dropout's masks repeat from share to share): with that, rank 0's checkpoint is every rank's, for any number of ranks.

Every rank runs the same program. The others' records are scratch copies, and they print nothing. What one rank decides from
what it alone sees (a signal, a loss that is not finite) is agreed on after each step, on the CPU, so no GPU is waited for.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.tracking.run_dir import Record
from cifar.training.step import Meter

T = TypeVar("T")
FILES = ("run.json", "config.json", "status.json", "metrics.jsonl", "checkpoint.pt")  # what going on with a run reads


class Lost(UserError):
    """Another rank is gone. Its own words say why; the run can go on from its checkpoint."""


class Team:
    """One rank among `size`. Alone, every method gives back what it was given."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0) -> None:
        self.rank, self.size, self.local = rank, size, local  # `local`: which of the processes on this machine

    # -- in every step --

    def share(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This rank's rows of tensors (B, ...) -> (B / size, ...)."""
        return tuple(tensor.chunk(self.size)[self.rank] for tensor in batch) if self.size > 1 else batch

    def average_gradients(self, model: nn.Module) -> None:
        """The mean over ranks, in place: what probes and the update see."""
        if self.size > 1:
            found = [p.grad for p in model.parameters() if p.grad is not None]
            _together(found, lambda flat: (dist.all_reduce(flat), flat.div_(self.size)))

    def meter(self, device: torch.device) -> Meter:
        """Loss and accuracy over all shares, equal on every rank."""
        return _TeamMeter(device) if self.size > 1 else Meter(device)

    def agree(self, ended: Sequence[str]) -> Sequence[str]:
        """(state, reason) of a rank that has to end, or nothing -> what all do after this step. Divergence comes first."""
        if self.size == 1:
            return ended
        flag = torch.tensor(int(bool(ended)), dtype=torch.int32)
        with _peers():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not flag.item():
            return ()
        wishes = [wish for wish in self.gather(tuple(ended)) if wish]
        return min(wishes, key=lambda wish: wish[0] != "diverged")

    # -- once in a while --

    def same(self, *models: nn.Module) -> None:
        """Weights and buffers of every rank become rank 0's."""
        if self.size > 1:
            for model in models:
                _together(list(model.state_dict().values()), lambda flat: dist.broadcast(flat, 0))

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; its UserError too."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except UserError as error:
                made[1] = error
        with _peers():
            dist.broadcast_object_list(made, 0)
        if made[1]:
            raise made[1]
        return made[0]  # type: ignore[no-any-return]

    # -- before training --

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises UserError on every rank where configurations differ, or a batch cannot be shared out.

        Takes this rank's GPU, where there are any: rank N of a machine has its Nth.
        """
        if self.size == 1:
            return
        on_cuda = values["device"] != "cpu" and torch.cuda.is_available()
        wrong = self._wrong_device(str(values["device"]), on_cuda)
        everybody = self.gather((wrong, {**values, "a GPU": "found" if on_cuda else "none"}))
        if reasons := [reason for reason, _ in everybody if reason]:
            raise UserError(reasons[0])
        configs = [config for _, config in everybody]
        differing = sorted({key for config in configs for key in configs[0] | config if config.get(key) != configs[0].get(key)})
        if differing:
            told = "; ".join(f"{key}: {', '.join(str(config.get(key)) for config in configs)}" for key in differing[:6])
            raise UserError(f"the {self.size} processes of this run differ in {told} (by rank); give all the same values")
        if values["keep"] < 1:
            raise UserError(f"keep={values['keep']} needs a process that sees every loss; start it without torchrun")
        batch, size = values["batch_size"], self.size
        if batch % size:
            near = [str(n) for n in (batch // size * size, (batch // size + 1) * size) if n]
            raise UserError(
                f"batch_size {batch} is that of all {size} processes together and cannot be shared out evenly; "
                f"take batch_size={' or '.join(near)}, or another --nproc-per-node"
            )
        if on_cuda:
            torch.cuda.set_device(self.local)  # what `cuda` and `auto` mean from now on

    def _wrong_device(self, device: str, on_cuda: bool) -> str:
        if re.fullmatch(r"cuda:\d+", device):
            return f"device={device} is one GPU for all {self.size} processes; take device=cuda, each has its own then"
        if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
            return "several processes share no Apple GPU; take device=cpu, or start one process"
        if on_cuda and self.local >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            return f"process {self.local + 1} of this machine has no GPU ({count} are here); take --nproc-per-node {count}"
        return ""

    @contextlib.contextmanager
    def own(self, record: Record) -> Iterator[Record]:
        """Rank 0's record; elsewhere a scratch copy of it. Needs no shared folder."""
        if self.size == 1:
            yield record
            return
        files = self.first(lambda: {n: (record.path / n).read_bytes() for n in FILES if (record.path / n).exists()})
        if self.rank == 0:
            yield record
            return
        with tempfile.TemporaryDirectory(prefix="cifar-rank-", ignore_cleanup_errors=True) as folder:
            scratch = Path(folder) / record.id
            scratch.mkdir()
            for name, content in files.items():
                (scratch / name).write_bytes(content)
            yield Record(scratch)

    def described(self) -> dict[str, int]:
        """For the record."""
        return {"ranks": self.size} if self.size > 1 else {}


ALONE = Team()


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """This process's place among those that torchrun started; alone without one. Raises UserError where they do not meet."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1:
        yield ALONE
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"WORLD_SIZE is {size}, but its processes do not meet ({first}); start them with torchrun, or unset WORLD_SIZE"
        ) from error
    failed = True
    try:
        yield Team(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK") or 0))
        failed = False
    finally:
        # After an error too: a group's threads that live on when the interpreter ends may abort the process, exit code lost.
        if not (failed and nccl):  # NCCL would wait for the others, who know of nothing, or are gone
            dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """What fails in here is a conversation with the other ranks."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"another process of this run is gone, its own words say why ({str(error).splitlines()[0]}); "
            "then go on with --resume RUN under torchrun"
        ) from error


@torch.no_grad()
def _together(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """One collective for all tensors of a type, in place: many small ones would take longer."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        these = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in these])
        with _peers():
            collective(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in these])
        torch._foreach_copy_(these, [part.view(tensor.shape) for part, tensor in zip(parts, these, strict=True)])


class _TeamMeter(Meter):
    """Sums over ranks after each step, not after the epoch: a checkpoint may fall in between, and it is rank 0's."""

    def add(self, loss: Tensor, correct: Tensor, count: int, at: Tensor) -> None:
        total, self.sums = self.sums, torch.zeros_like(self.sums)
        super().add(loss, correct, count, at)
        with _peers():
            dist.all_reduce(self.sums)
        self.sums = total.add_(self.sums)
