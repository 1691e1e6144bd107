"""The parts of one run, built from its configuration, and the state they are in: what a checkpoint holds."""

from __future__ import annotations

import copy
import functools
import os
import random
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import data, optim, registry
from cifar.config import resolve as configuration
from cifar.config.resolve import Settings
from cifar.data.augment import augmented, mix
from cifar.data.loader import picked, quiet
from cifar.errors import UserError
from cifar.kernels.cpu_conv_pool import in_pieces
from cifar.probes import Watcher
from cifar.training.cudagraph import Captured
from cifar.training.distributed import ALONE, Team
from cifar.training.step import VIEWS, Average, Forward, Step, add_up, evaluate, forward, logits_of


def device_of(name: str) -> torch.device:
    """`auto` -> CUDA, else Apple's MPS, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise RuntimeError("no such device")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used ({first}); take device=auto, cpu, cuda, cuda:1 or mps") from None


EVALUATED = {"cpu": 125}  # images at once, else 1,000; by those a CPU took up to twice as long (LOG.md)
THREADS = torch.get_num_threads()  # torch's own choice, before any trial asks for another


def settle(config: Settings) -> None:
    """The switches that a process has once: each trial sets all of them, whatever the one before wanted."""
    if (device := device_of(config.device)).type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and Triton's kernels are the current device's
    torch.set_num_threads(config.threads or THREADS)
    torch.backends.cudnn.benchmark = not config.deterministic
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:  # setting it imports torch.compile, seconds
        torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high" if config.precision != "fp32" else "highest")


class Training:
    """All that one run computes with, and all that a checkpoint holds.

    Everything that a step changes, and every scalar in which trials of one architecture differ, is a tensor that is written
    in place. So a captured step goes on being valid when `load` or `restart` puts another state there.
    """

    def __init__(self, config: Settings, data_dir: Path | None, *, team: Team = ALONE, shares: bool = False) -> None:
        """`shares`: whether other trials draw from torch's generator in between."""
        self.config, self.data_dir, self.team = config, data_dir, team
        self.device = device_of(config.device)
        settle(config)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")

        self.splits, self.fingerprint = splits(config.dataset, data_dir, config.val_size, config.train_size, self.device)
        self.train_batches = self._loader("train", training=True)
        self.model = self._initial_model()
        if self.device.type == "cpu":
            in_pieces(self.model)
        self.average = Average(self.model, copy.deepcopy(self.model), config.ema) if config.ema else None
        self.optimizer = self._optimizer()
        self.watcher = self._watcher()
        self.meter = team.meter(self.device)
        self.step = Step(
            self.model,
            self.train_batches,
            self.optimizer,
            self.meter,
            self.watcher,
            team,
            self.average,
            self._mix if config.mixup or config.cutmix else None,
            torch.tensor(config.label_smoothing, device=self.device) if config.label_smoothing else None,
            self.bf16,
        )
        self.at = self.train_batches.at
        self.compiled, self.shares = False, shares
        self._evaluations: dict[str, Captured] = {}
        self._afresh()

    def _afresh(self) -> None:
        self.steps = min(self.train_batches.steps, self.config.max_steps or self.train_batches.steps)  # an epoch
        self.epoch, self.batch, self.seconds = 1, 0, 0.0  # the next step to take; seconds of this epoch so far
        self.idle = False
        self.random: Tensor | None = torch.get_rng_state() if self.shares else None

    def _initial_model(self) -> nn.Module:
        """As the seed has it, on the device. Leaves torch's and Python's generators where training begins."""
        config = self.config
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        model: Any = registry.models[config.model].build(**config.part("model"))
        model.to(self.device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
        if hasattr(model, "init_from_data"):
            model.init_from_data(data.normalize(self.splits["train"][0][:5000], config.normalize))
        return cast(nn.Module, model)

    def _optimizer(self) -> optim.Optimizer:
        config = self.config
        optimizer: optim.Optimizer = registry.optimizers[config.optimizer].build(
            optim.Parameters.of(self.model), **config.part("optimizer")
        )
        optimizer.schedule = registry.schedules[config.schedule].build(**config.part("schedule"))
        return optimizer

    def _watcher(self) -> Watcher:
        names = configuration.probe_names(self.config.probes)
        probes = [registry.probes[name].build(**self.config.part(name)) for name in names]
        return Watcher(probes, dict(self.model.named_parameters()), every=self.config.probe_every)

    def _loader(self, split: str, *, training: bool = False) -> data.Loader:
        config, (images, labels) = self.config, self.splits[split]
        augment = data.Augment(
            config.flip, config.crop, config.crop_padding, config.cutout, normalize=config.normalize, seed=config.seed
        )
        return data.Loader(
            images,
            labels,
            batch_size=config.batch_size if training else EVALUATED.get(self.device.type, 1000),
            augment=augment if training else None,
            normalize=config.normalize,
            seed=config.seed,
            shuffle=training,
            drop_last=training,
            channels_last=config.channels_last,
            dtype=torch.bfloat16 if self.bf16 else torch.float32,
            mixing=(config.mixup or config.cutmix) if training else 0.0,
            keep=config.keep if training else 1.0,
        )

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self.train_batches.drawn
        assert drawn is not None
        kind = "mixup" if self.config.mixup else "cutmix"
        return mix(images, F.one_hot(labels, 10).float(), kind, drawn.index_select(0, self.at)[0])

    # -- the next trial --

    def restart(self, config: Settings) -> bool:
        """Become the beginning of another run, in place. False, and nothing has changed, where that takes new parts."""
        if configuration.form(config) != configuration.form(self.config):
            return False
        settle(config)
        before, self.config = self.config, config
        model = self._initial_model()
        if not self.optimizer.adopt(self._optimizer()):
            self.config = before
            return False
        self.model.load_state_dict(model.state_dict())
        with torch.no_grad():
            for ours, fresh in zip(self.model.buffers(), model.buffers(), strict=True):
                ours.copy_(fresh)  # those, too, that a checkpoint leaves out
        if self.average:
            self.average.averaged.load_state_dict(model.state_dict())
            self.average.updates.zero_()
        self.train_batches.reseed(config.seed)
        if self.device.type == "cuda":
            self.watcher.load({})  # its probes are part of a captured step
        else:
            self.step.watcher = self.watcher = self._watcher()
            if self.compiled:
                self.watcher.compile(compiled)
        self.meter.sums.zero_()
        if self.step.smoothing is not None:
            self.step.smoothing.fill_(config.label_smoothing)
        self._afresh()
        return True

    def clear(self) -> None:
        """Forget the gradients of a step that was not taken to its end."""
        self.model.zero_grad(set_to_none=True)

    def compile(self) -> None:
        """Fuse the forward and backward passes, the update and what is around them (torch.compile)."""
        self.compiled = True
        self.step.forward = compiled(forward, self.config.compile == "max")
        self.meter.add_up = compiled(add_up)
        self.watcher.compile(compiled)
        self.optimizer.compile()
        if self.device.type == "cuda":
            self.train_batches.at_once = compiled(augmented)
            if self.bf16 and self.config.channels_last:
                from cifar.kernels.fuse import quicken  # Triton is there where there is a GPU

                with self.autocast():
                    quicken(self.model, torch.zeros_like(self.splits["test"][0][:1], dtype=torch.float32))
            if self.step.mix is None:
                self.step.forward_at = self._forward_at

    def _forward_at(self, rest: bool) -> Forward:
        batches, step = self.train_batches, self.step
        assert batches.store is not None
        function = compiled(_forward_at, self.config.compile == "max")
        given = self.model, *batches.store, self.at, batches.channels_last, step.smoothing, step.bf16
        return cast(Forward, function(*given, batches.picks, rest))

    # -- an epoch --

    def begin_epoch(self) -> None:
        """Everything that the coming steps need from the host. Never waits for the device."""
        self.model.train()
        self.train_batches.begin(self.epoch, self.batch)
        self.optimizer.plan([self.progress(step) for step in range(self.steps)])

    def look_ahead(self) -> None:
        """Have the next epoch's order and draws worked out while the device is busy with this one."""
        if self.device.type == "cuda" and self.epoch < self.config.epochs:
            self.train_batches.look_ahead(self.epoch + 1)

    @property
    def may_rest(self) -> bool:
        return bool(self.optimizer.stopping)

    @property
    def rests(self) -> bool:
        return self.optimizer.rests(self.progress(self.batch))

    def progress(self, step: int) -> float:
        """The share of all steps that are done before this one of the epoch."""
        return ((self.epoch - 1) * self.steps + step) / (self.config.epochs * self.steps)

    def evaluate(self, split: str, views: str = "none") -> tuple[Tensor, Tensor]:
        """Logits and labels of every image. The next call may write into the same tensors."""
        self.team.same(self.evaluated)  # BatchNorm's statistics are each rank's own
        name = f"{split} {views}"
        if name not in self._evaluations:
            batches = self._loader(split)

            def once(by: Any = None) -> tuple[Tensor, Tensor]:
                model = functools.partial(by, self.evaluated) if by else None
                return evaluate(self.evaluated, batches.epoch(1), autocast=self.autocast(), views=views, by=model)

            # several views of every image are worth compiling, but not for one evaluation
            better = functools.partial(once, compiled(logits_of)) if self.compiled and VIEWS[views][0] > 1 else None
            self._evaluations[name] = Captured(once, self.device, better)
        evaluation = self._evaluations[name]
        if self.device.type == "cuda" and evaluation.graph is None:
            quiet()
        return cast(tuple[Tensor, Tensor], evaluation())

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy is reported: the average where there is one."""
        return self.average.averaged if self.average else self.model

    # -- checkpoints --

    def state(self) -> dict[str, Any]:
        """Everything that decides how training goes on: tensors and plain values, as `weights_only` loads them.

        Batches are no part of it: those of an epoch depend on seed and epoch alone, or on what `keep` has left in `batches`.
        """
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "average": self.average.averaged.state_dict() if self.average else {},
            "average_updates": self.average.updates if self.average else 0,
            "watcher": self.watcher.state(),
            "meter": self.meter.sums,
            "batches": self.train_batches.state(),
            "torch": torch.get_rng_state() if self.random is None else self.random,
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "mps": torch.mps.get_rng_state() if self.device.type == "mps" else None,
            "python": random.getstate(),
            "threads": torch.get_num_threads(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to `state`, in place."""
        self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
        self.at.fill_(self.batch)
        self.model.load_state_dict(state["model"])
        self.optimizer.load(state["optimizer"])
        if self.average:
            self.average.averaged.load_state_dict(state["average"])
            self.average.updates.copy_(state["average_updates"])
        self.watcher.load(state["watcher"])
        self.meter.sums.copy_(state["meter"])
        self.train_batches.load(state.get("batches", {}))  # older checkpoints have none
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        if state["mps"] is not None and self.device.type == "mps":
            torch.mps.set_rng_state(state["mps"])
        random.setstate(state["python"])
        if self.device.type == "cpu":
            torch.set_num_threads(state["threads"])  # sums over 1 and over 2 threads differ in the last bit


def _forward_at(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    at: Tensor,
    last: bool,
    smoothing: Tensor | None,
    bf16: bool,
    apart: bool,
    rest: bool,
) -> Forward:
    """`forward` of batch `at` of a stored epoch, for a compiler that makes one kernel of taking it and what comes next."""
    chosen, classes = picked(images, labels, at, last)
    return forward(model, chosen, classes, classes, smoothing, bf16, apart, rest)


@functools.cache
def compiled(function: Any, most: bool = False) -> Any:
    """One compiled function for all trainings of a process: the same architecture compiles once.

    `most`: try out more kernels, for some minutes.
    """
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, 64)  # a sweep has more architectures than 8
    return torch.compile(function, mode="max-autotune-no-cudagraphs" if most else None, dynamic=False)


@functools.lru_cache(maxsize=2)
def splits(
    dataset: str, data_dir: Path | None, val_size: int, train_size: int, device: torch.device
) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """train, val (where there is a cut) and test, and the dataset's fingerprint; read once for all trials of a process.

    Images are (N, 3, 32, 32) uint8 and labels (N,) int64, on the device.
    """
    arrays = data.load(dataset, data_dir)
    train, val = data.split(arrays.train_labels, val_size)
    train = train[:train_size] if train_size else train

    def put(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(images.copy()).to(device), torch.from_numpy(labels.copy()).to(device)  # writable

    found = {
        "train": put(arrays.train_images[train], arrays.train_labels[train]),
        "test": put(arrays.test_images, arrays.test_labels),
    }
    if val_size:
        found["val"] = put(arrays.train_images[val], arrays.train_labels[val])
    return found, arrays.fingerprint
