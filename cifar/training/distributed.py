"""Data-parallel training with `torchrun`: each process takes a shard of every batch, and rank 0 keeps the run's folder.

    torchrun --nproc-per-node 4 -m cifar train --experiment resnet20

`batch_size` is the batch of all processes together, so a run means the same on one process and on four. `lr` is that of this
batch and is never scaled. Every rank draws order, augmentation and mixing for the whole batch, and makes its shard. (With
mixup and CutMix it makes the whole batch, then takes its shard.) Weights start equal and stay equal to the bit, because all
ranks apply the same mean gradient: one sum over all parameters, which a captured step has in it. Without BatchNorm, N
ranks compute what one computes, up to the order of additions. BatchNorm normalises each shard by itself, and rank 0's running
statistics are evaluated and saved. Random states are equal too, so dropout's masks repeat from shard to shard. Rank 0's
checkpoint therefore serves every rank, and a run can go on with another number of ranks.

Every rank runs the same program. Ranks other than 0 write to a temporary copy of the folder and print nothing. A stop that
only one rank knows of (a signal, a loss that is not finite) is agreed on after each step. That happens on the CPU, so that
no GPU has to be waited for.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.system.variables import read_variable, read_whole_number
from cifar.tracking.run_dir import RunDir
from cifar.training.step import EpochMeter

T = TypeVar("T")
MAX_RANKS = 65536
CAPTURE_VARIABLE = "CIFAR_CAPTURE_RANKS"  # on: capture the steps of several processes. Not the default before it is measured
RESUME_FILES = ("run.json", "config.json", "status.json", "metrics.jsonl", "checkpoint.pt")  # what resuming a run reads


class PeerLostError(UserError):
    """Another rank is gone. Its own output says why. The run can go on from its checkpoint."""


class DistributedContext:
    """This process as one rank among `world_size`. In a single process every method does nothing or returns its argument.

    `local_rank` counts the processes of this machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank

    @property
    def captures_steps(self) -> bool:
        """Whether the steps may be captured as CUDA graphs: of several processes only where the user asks for it."""
        return self.world_size == 1 or read_variable(CAPTURE_VARIABLE) == "on"

    # -- in every step --

    @property
    def shard(self) -> tuple[int, int]:
        """(index, count): which part of every batch this rank trains."""
        return self.rank, self.world_size

    def shard_batch(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This rank's rows of tensors (B, ...) -> (B / world_size, ...)."""
        return tuple(tensor.chunk(self.world_size)[self.rank] for tensor in batch) if self.world_size > 1 else batch

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the ranks, in place. Probes and the update see that one."""
        if self.world_size > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            _flat_collective(gradients, lambda flat: (dist.all_reduce(flat), flat.div_(self.world_size)))

    def make_meter(self, device: torch.device) -> EpochMeter:
        """A meter of loss and accuracy over all shards. It reads the same on every rank."""
        return _DistributedMeter(device) if self.world_size > 1 else EpochMeter(device)

    def sync_stop(self, end: Sequence[str]) -> Sequence[str]:
        """(state, reason) of this rank if it has to end, else () -> the same for all ranks. A divergence comes first."""
        if self.world_size == 1:
            return end
        flag = torch.tensor(int(bool(end)), dtype=torch.int32)
        with _peer_errors():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not flag.item():
            return ()
        ends = [rank_end for rank_end in self.all_gather(tuple(end)) if rank_end]
        return min(ends, key=lambda rank_end: rank_end[0] != "diverged")

    # -- at times --

    def agree_on_error(self, error: str) -> str:
        """The error of this rank, or "" -> that of the first rank that has one, on all ranks."""
        return next(filter(None, self.all_gather(error)), "")

    def broadcast_weights(self, *models: nn.Module) -> None:
        """Copy rank 0's weights and buffers to every rank."""
        if self.world_size > 1:
            for model in models:
                _flat_collective(list(model.state_dict().values()), lambda flat: dist.broadcast(flat, 0))

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _peer_errors():
            dist.all_gather_object(values, value)
        return values

    def rank_zero_call(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 only, and return its result, or raise its UserError, on every rank."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None, None]  # result, error
        if self.rank == 0:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = error
        with _peer_errors():
            dist.broadcast_object_list(outcome, 0)
        if outcome[1]:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    # -- before training --

    def validate_config(self, values: Mapping[str, Any]) -> None:
        """Raise UserError on every rank if configurations differ, or if the batch does not divide by the number of ranks.

        Makes this rank's GPU the current one, where there are any: the Nth process of a machine has its Nth GPU.
        """
        if self.world_size == 1:
            return
        on_cuda = values["device"] != "cpu" and torch.cuda.is_available()
        device_error = self._device_error(str(values["device"]), on_cuda)
        gathered = self.all_gather((device_error, {**values, "a GPU": "found" if on_cuda else "none"}))
        if errors := [error for error, _ in gathered if error]:
            raise UserError(errors[0])
        configs = [config for _, config in gathered]
        differing = sorted({key for config in configs for key in configs[0] | config if config.get(key) != configs[0].get(key)})
        if differing:
            listed = "; ".join(f"{key}: {', '.join(str(config.get(key)) for config in configs)}" for key in differing[:6])
            raise UserError(
                f"the {self.world_size} processes of this run differ in {listed} (by rank); give all the same values"
            )
        if values["keep"] < 1:
            raise UserError(f"keep={values['keep']} needs a process that sees every loss; start it without torchrun")
        batch, world_size = values["batch_size"], self.world_size
        if batch % world_size:
            lower = batch // world_size * world_size
            candidates = [str(size) for size in (lower, lower + world_size) if size]
            raise UserError(
                f"batch_size {batch} is that of all {world_size} processes together and cannot be shared out evenly; "
                f"take batch_size={' or '.join(candidates)}, or another --nproc-per-node"
            )
        if on_cuda:
            torch.cuda.set_device(self.local_rank)  # `device: cuda` and `auto` mean this one from now on

    def _device_error(self, device: str, on_cuda: bool) -> str:
        """Why this rank cannot use `device`, or empty."""
        if re.fullmatch(r"cuda:\d+", device):
            return f"device={device} is one GPU for all {self.world_size} processes; take device=cuda, each has its own then"
        if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
            return "several processes share no Apple GPU; take device=cpu, or start one process"
        if on_cuda and self.local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            return f"process {self.local_rank + 1} of this machine has no GPU ({count} are here); take --nproc-per-node {count}"
        return ""

    @contextlib.contextmanager
    def rank_run_dir(self, run_dir: RunDir) -> Iterator[RunDir]:
        """The run's folder on rank 0; on other ranks a temporary copy of it. The ranks need no common file system."""
        if self.world_size == 1:
            yield run_dir
            return
        files = self.rank_zero_call(
            lambda: {n: (run_dir.path / n).read_bytes() for n in RESUME_FILES if (run_dir.path / n).exists()}
        )
        if self.rank == 0:
            yield run_dir
            return
        with tempfile.TemporaryDirectory(prefix="cifar-rank-", ignore_cleanup_errors=True) as folder:
            scratch = Path(folder) / run_dir.id
            scratch.mkdir()
            for name, content in files.items():
                (scratch / name).write_bytes(content)
            yield RunDir(scratch)

    def describe(self) -> dict[str, int]:
        """What environment.json says about the ranks."""
        return {"ranks": self.world_size} if self.world_size > 1 else {}


SINGLE_PROCESS = DistributedContext()


@contextlib.contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Join the processes that torchrun started; without torchrun, SINGLE_PROCESS. Raises UserError if they do not meet."""
    world_size = read_whole_number("WORLD_SIZE", 1, low=1, high=MAX_RANKS)
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    for name in ("RANK", "LOCAL_RANK"):
        read_whole_number(name, 0, low=0, high=world_size - 1)
    read_whole_number("MASTER_PORT", 29500, low=1, high=65535)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"WORLD_SIZE is {world_size}, but its processes do not meet ({first}); "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from error
    failed = True
    try:
        yield DistributedContext(dist.get_rank(), world_size, read_whole_number("LOCAL_RANK", 0, low=0, high=world_size - 1))
        failed = False
    finally:
        # Also after an error: the group's threads could abort the process at the interpreter's end and lose the exit code.
        if not (failed and nccl):  # with NCCL it would wait for the other ranks, which know of no error or are gone
            dist.destroy_process_group()


@contextlib.contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn an error of a collective operation into PeerLostError. In a capture it is an error of the capture."""
    try:
        yield
    except RuntimeError as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise
        raise PeerLostError(
            f"another process of this run is gone, its own words say why ({str(error).splitlines()[0]}); "
            "then go on with --resume RUN under torchrun"
        ) from error


@torch.no_grad()
def _flat_collective(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Apply one collective operation to all tensors of a dtype together, in place: many small ones would take longer."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        with _peer_errors():
            collective(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)])


class _DistributedMeter(EpochMeter):
    """Sums over the ranks after each step, not after the epoch, as rank 0's checkpoint within an epoch needs the whole sum."""

    def update(self, loss: Tensor, correct: Tensor, count: int, step_index: Tensor) -> None:
        total, self.sums = self.sums, torch.zeros_like(self.sums)
        super().update(loss, correct, count, step_index)
        with _peer_errors():
            dist.all_reduce(self.sums)
        self.sums = total.add_(self.sums)
