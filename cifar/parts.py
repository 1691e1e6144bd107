"""The parts of one run, built from its configuration, and the state they are in: what a checkpoint holds."""

from __future__ import annotations

import functools
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import config as configuration
from cifar import data, optim, registry
from cifar.config import Settings
from cifar.data.augment import mix
from cifar.errors import UserError
from cifar.probes import Watcher
from cifar.ranks import ALONE, Team
from cifar.train import Average, evaluate


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


class Training:
    """All that one run computes with, and all that a checkpoint holds."""

    def __init__(self, config: Settings, data_dir: Path | None, team: Team = ALONE) -> None:
        self.config, self.team = config, team
        self.device = device_of(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.backends.cudnn.benchmark = not config.deterministic
        torch.use_deterministic_algorithms(config.deterministic)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_float32_matmul_precision("high" if config.precision != "fp32" else "highest")
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")

        self.splits, self.fingerprint = splits(config.dataset, data_dir, config.val_size, config.train_size, self.device)
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        self.model: nn.Module = registry.models[config.model].build(**config.part("model"))
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=memory_format)
        self.train_batches = self._loader("train", training=True)
        if hasattr(self.model, "init_from_data"):
            self.model.init_from_data(data.normalize(self.splits["train"][0][:5000], config.normalize))
        self.average: Average | None = None
        if config.ema:
            averaged = registry.models[config.model].build(**config.part("model"))
            averaged.to(self.device, memory_format=memory_format).load_state_dict(self.model.state_dict())
            self.average = Average(self.model, averaged, config.ema)
        self.forward = cast(nn.Module, torch.compile(self.model)) if config.compile else self.model

        schedule = registry.schedules[config.schedule].build(**config.part("schedule"))
        parameters = optim.Parameters.of(self.model)
        self.optimizer = registry.optimizers[config.optimizer].build(parameters, **config.part("optimizer"))
        self.optimizer.schedule = schedule
        probes = [registry.probes[name].build(**config.part(name)) for name in configuration.probe_names(config.probes)]
        self.watcher = Watcher(probes, dict(self.model.named_parameters()), every=config.probe_every)
        self.meter = team.meter(self.device)
        self.steps = min(self.train_batches.steps, config.max_steps or self.train_batches.steps)  # an epoch
        self.epoch, self.batch, self.seconds = 1, 0, 0.0  # the next step to take; seconds of this epoch so far

    def _loader(self, split: str, *, training: bool = False) -> data.Loader:
        config, (images, labels) = self.config, self.splits[split]
        augment = data.Augment(
            config.flip, config.crop, config.crop_padding, config.cutout, normalize=config.normalize, seed=config.seed
        )
        return data.Loader(
            images,
            labels,
            batch_size=config.batch_size if training else 1000,
            augment=augment if training else None,
            normalize=config.normalize,
            seed=config.seed,
            shuffle=training,
            drop_last=training,
            channels_last=config.channels_last,
        )

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def mix(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        kind = "mixup" if self.config.mixup else "cutmix" if self.config.cutmix else ""
        alpha = self.config.mixup or self.config.cutmix
        if not kind:
            return None
        return lambda images, labels: mix(images, F.one_hot(labels, 10).float(), kind, alpha, self.train_batches.generator)

    def evaluate(self, split: str, views: str = "none") -> tuple[Tensor, Tensor]:
        self.team.same(self.evaluated)  # BatchNorm's statistics are each rank's own
        model = self.average.averaged if self.average else self.forward
        return evaluate(model, self._loader(split).epoch(1), autocast=self.autocast(), views=views)

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy is reported: the average where there is one."""
        return self.average.averaged if self.average else self.model

    def state(self) -> dict[str, Any]:
        """Everything that decides how training goes on: tensors and plain values, as `weights_only` loads them."""
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
            "augmentation": self.train_batches.state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "mps": torch.mps.get_rng_state() if self.device.type == "mps" else None,
            "python": random.getstate(),
            "threads": torch.get_num_threads(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to `state`, in place."""
        self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load(state["optimizer"])
        if self.average:
            self.average.averaged.load_state_dict(state["average"])
            self.average.updates = state["average_updates"]
        self.watcher.load(state["watcher"])
        self.meter.sums.copy_(state["meter"])
        self.train_batches.load(state["augmentation"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        if state["mps"] is not None and self.device.type == "mps":
            torch.mps.set_rng_state(state["mps"])
        random.setstate(state["python"])
        if self.device.type == "cpu":
            torch.set_num_threads(state["threads"])  # sums over 1 and over 2 threads differ in the last bit


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
