"""The objects of one run, built from its configuration, and their state, which a checkpoint holds."""

from __future__ import annotations

import functools
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import data
from cifar.config import resolve as configuration
from cifar.config.schema import Settings
from cifar.data.augment import augment_fused, mix
from cifar.data.loader import select_batch, wait_for_prefetch
from cifar.errors import DeviceError
from cifar.kernels.cpu_conv_pool import chunk_conv_pools
from cifar.models.blocks import DropPath
from cifar.optim import Optimizer
from cifar.system.energy import announce_use
from cifar.system.environment import gpu_uuid
from cifar.tracking.histograms import is_looked_at
from cifar.tracking.pretrained import find_run_or_pretrained
from cifar.tracking.run_dir import resolve_runs_dir
from cifar.training import parts
from cifar.training.compile import compile_once
from cifar.training.cudagraph import GraphedCallable
from cifar.training.distributed import SINGLE_PROCESS, DistributedContext
from cifar.training.ema import ExponentialMovingAverage
from cifar.training.evaluation import (
    DEFAULT_EVAL_BATCH_SIZE,
    EVAL_BATCH_SIZES,
    VIEWS,
    compute_logits,
    evaluate,
    evaluate_unsure_views,
)
from cifar.training.gpu_libraries import wait_for_libraries
from cifar.training.part_checks import choose_channels_last
from cifar.training.step import Distillation, ForwardOptions, ForwardResult, Step, accumulate_sums, forward
from cifar.training.teachers import Teacher, check_same_data, find_teachers, load_network


def resolve_device(name: str) -> torch.device:
    """`auto` means CUDA, else Apple's MPS, else the CPU. Raises DeviceError for a device that cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise RuntimeError("no such device")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise DeviceError(f"device '{name}' cannot be used ({first}); take device=auto, cpu, cuda, cuda:1 or mps") from None


DEFAULT_NUM_THREADS = torch.get_num_threads()  # torch's own choice, read before any trial changes it


def apply_process_settings(config: Settings) -> None:
    """Set everything that is global to a process. Each trial sets all of it, as the trial before may have changed it."""
    if (device := resolve_device(config.device)).type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and Triton kernels use the current device
        torch.backends.cudnn.benchmark_limit = config.cudnn_trials
        announce_use(gpu_uuid(device))
    torch.set_num_threads(config.threads or DEFAULT_NUM_THREADS)
    torch.backends.cudnn.benchmark = not config.deterministic
    if (
        torch.are_deterministic_algorithms_enabled() != config.deterministic
    ):  # setting it imports torch.compile, which takes seconds
        torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high" if config.precision != "fp32" else "highest")


class Trainer:
    """Model, data, optimizer, probes and step of one run. A checkpoint holds their state.

    Everything that a step changes is a tensor that is written in place. So is every scalar in which trials of the same
    architecture differ. A captured step therefore stays valid when `load_state_dict` or `restart_with` replaces the state.
    """

    def __init__(
        self,
        config: Settings,
        data_dir: Path | None,
        *,
        context: DistributedContext = SINGLE_PROCESS,
        shares_generator: bool = False,
        teachers: Sequence[Teacher] | None = None,
    ) -> None:
        """`shares_generator`: other trials draw random numbers from torch's generator between our steps.

        teachers: of the run, as its record has them; None: those that the configuration names, in the runs folder.
        """
        self.config, self.data_dir, self.context = config, data_dir, context
        self.device = resolve_device(config.device)
        wait_for_libraries()
        apply_process_settings(config)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")

        self.splits, self.fingerprint = load_splits(config.dataset, data_dir, config.val_size, config.train_size, self.device)
        self.channels_last, self.code = choose_channels_last(config, self.device), parts.identify_code(config)
        self.train_loader = self._build_loader("train", training=True)
        if teachers is None:
            teachers = find_teachers(config, lambda name: find_run_or_pretrained(name, resolve_runs_dir()))
        self.teachers = tuple(teachers)
        distillation = self._build_distillation()
        self.model = self._build_model()
        if self.device.type == "cpu":
            chunk_conv_pools(self.model)
        self.ema = None
        if config.ema:
            twin = parts.copy_model(self.model, config, self.memory_format)
            self.ema = ExponentialMovingAverage(self.model, twin, config.ema)
        self.optimizer = self._build_optimizer()
        self.probe_runner = parts.build_probe_runner(config, self.model)
        self.meter = context.make_meter(self.device)
        self.step = Step(
            self.model,
            self.train_loader,
            self.optimizer,
            self.meter,
            self.probe_runner,
            context,
            self.ema,
            self._mix_batch if config.mixup or config.cutmix else None,
            torch.tensor(config.label_smoothing, device=self.device) if config.label_smoothing else None,
            self.bf16,
            distillation,
        )
        self.step_index = self.train_loader.step_index
        if blocks := [module for module in self.model.modules() if isinstance(module, DropPath)]:
            self._plan_drop_path(blocks)
        self.is_compiled, self.shares_generator = False, shares_generator
        self._evaluation_functions: dict[str, GraphedCallable] = {}
        self._reset_progress()

    def _reset_progress(self) -> None:
        num_steps = self.train_loader.num_steps
        self.steps_per_epoch = min(num_steps, self.config.max_steps or num_steps)
        self.epoch, self.next_step = 1, 0  # the step to take next
        self.epoch_seconds = 0.0  # training time of this epoch so far
        self.has_ended = False
        self.rng_state: Tensor | None = torch.get_rng_state() if self.shares_generator else None

    def _build_model(self) -> nn.Module:
        """The seed's model, on the device. Seeds torch's and Python's generators, whose next numbers are the training's."""
        config = self.config
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        model: Any = parts.build_model(config)
        model.to(self.device, memory_format=self.memory_format)
        if hasattr(model, "init_from_data"):
            model.init_from_data(data.normalize(self.splits["train"][0][:5000], config.normalize))
        return cast(nn.Module, model)

    def _build_distillation(self) -> Distillation | None:
        """What the network learns from its teachers; None without one. The teachers' networks are loaded."""
        if not self.teachers:
            return None
        check_same_data(self.teachers, self.fingerprint)
        config, device = self.config, self.device
        networks = tuple(load_network(each, config.normalize, device, self.memory_format) for each in self.teachers)
        weight, temperature = (
            torch.tensor(value, device=device) for value in (config.distill_weight, config.distill_temperature)
        )
        return Distillation(networks, weight, temperature)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _build_optimizer(self) -> Optimizer:
        optimizer = parts.build_optimizer(self.config, self.model)
        optimizer.schedule = parts.build_schedule(self.config)
        return optimizer

    def _build_loader(self, split: str, *, training: bool = False) -> data.Loader:
        config, (images, labels) = self.config, self.splits[split]
        default_size = EVAL_BATCH_SIZES.get(self.device.type, DEFAULT_EVAL_BATCH_SIZE)
        return data.Loader(
            images,
            labels,
            batch_size=config.batch_size if training else config.eval_batch_size or default_size,
            augment=data.Augment.from_keys(config) if training else None,
            seed=config.seed,
            batch_format=data.BatchFormat(
                normalize=config.normalize,
                dtype=torch.bfloat16 if self.bf16 else torch.float32,
                channels_last=self.channels_last,
            ),
            epoch_options=data.EpochOptions(
                shuffle=training,
                drop_last=training,
                mixing=(config.mixup or config.cutmix) if training else 0.0,
                keep=config.keep if training else 1.0,
                shard=self.context.shard if training and not (config.mixup or config.cutmix) else (0, 1),
            ),
        )

    def _mix_batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self.train_loader.mixing_draws
        assert drawn is not None
        kind = "mixup" if self.config.mixup else "cutmix"
        return mix(images, F.one_hot(labels, 10).float(), kind, drawn.index_select(0, self.step_index)[0])

    def _plan_drop_path(self, blocks: list[DropPath]) -> None:
        """Let the loader's plan decide which branches stochastic depth drops, so that each trial of a pack has its own."""
        self.train_loader.drop_path_rates = [block.rate for block in blocks]
        (own_images,) = self.context.shard_batch(torch.zeros(self.config.batch_size, device=self.device))
        self.path_scales = torch.zeros((len(blocks), len(own_images)), device=self.device)
        for block, scales in zip(blocks, self.path_scales, strict=True):
            block.scales = scales
        self.step.select_draws = self._select_path_scales

    def _select_path_scales(self) -> None:
        planned = self.train_loader.path_scales
        assert planned is not None
        (own_images,) = self.context.shard_batch(planned.index_select(0, self.step_index)[0].T)  # (B, blocks) of this rank
        self.path_scales.copy_(own_images.T)

    # -- the next trial --

    def restart_with(self, config: Settings) -> bool:
        """Go to the start of another run, in place. Returns False, unchanged, where that run needs a new Trainer."""
        if configuration.graph_signature(config) != configuration.graph_signature(self.config):
            return False
        if parts.identify_code(config) != self.code:
            return False
        apply_process_settings(config)
        before, self.config = self.config, config
        model = self._build_model()
        if not self.optimizer.reinitialize_from(self._build_optimizer()):
            self.config = before
            return False
        self.model.load_state_dict(model.state_dict())
        with torch.no_grad():
            for ours, fresh in zip(self.model.buffers(), model.buffers(), strict=True):
                ours.copy_(fresh)  # also the buffers that are not in a state_dict
        if self.ema:
            self.ema.averaged_model.load_state_dict(model.state_dict())
            self.ema.num_updates.zero_()
        self.train_loader.reseed(config.seed)
        if self.device.type == "cuda":
            self.probe_runner.load_state_dict({})  # the probes are part of the captured step
            self._load_histograms({})
        else:
            self.step.probe_runner = self.probe_runner = parts.build_probe_runner(config, self.model)
            if self.is_compiled:
                self.probe_runner.compile(compile_once)
        self.meter.sums.zero_()
        if self.step.smoothing is not None:
            self.step.smoothing.fill_(config.label_smoothing)
        if self.step.distillation is not None:
            self.step.distillation.weight.fill_(config.distill_weight)
            self.step.distillation.temperature.fill_(config.distill_temperature)
        self._reset_progress()
        return True

    def clear_gradients(self) -> None:
        """Drop the gradients that an interrupted step has left."""
        self.model.zero_grad(set_to_none=True)

    def compile_step(self) -> None:
        """Compile the forward and backward passes, the update, the probes and the sums with torch.compile."""
        self.is_compiled = True
        self.step.forward = compile_once(forward, self.config.compile == "max")
        self.meter.accumulate_sums = compile_once(accumulate_sums)
        self.probe_runner.compile(compile_once)
        self.optimizer.compile()
        if self.device.type == "cuda":
            self.train_loader.fused_augment = compile_once(augment_fused)
            if self.bf16 and self.channels_last:
                from cifar.kernels.fuse import fuse_model  # imports Triton, which only a machine with a GPU has

                with self.autocast():
                    fuse_model(self.model, torch.zeros_like(self.splits["test"][0][:1], dtype=torch.float32))
            if self.step.mix is None:
                self.step.fused_forward = self._fused_forward

    def _fused_forward(self, options: ForwardOptions) -> ForwardResult:
        loader = self.train_loader
        assert loader.epoch_buffer is not None
        function = compile_once(forward_stored_batch, self.config.compile == "max")
        return cast(ForwardResult, function(self.model, loader.epoch_buffer, self.step_index, loader.channels_last, options))

    # -- an epoch --

    def begin_epoch(self) -> None:
        """Put everything on the device that the epoch's steps need from the host. Never waits for the device."""
        self.model.train()
        self.train_loader.begin_epoch(self.epoch, self.next_step)
        self.optimizer.plan_lrs([self.progress_at(step) for step in range(self.steps_per_epoch)])
        if recorder := self.probe_runner.histograms:
            recorder.is_active = is_looked_at(self.epoch, self.config.epochs, self.config.histograms)

    def prefetch_next_epoch(self) -> None:
        """Compute the next epoch's order and random draws in a thread, while the GPU trains this epoch."""
        if self.device.type == "cuda" and self.epoch < self.config.epochs:
            self.train_loader.prefetch_plan(self.epoch + 1)

    @property
    def has_freezing_params(self) -> bool:
        return bool(self.optimizer.freezing_params)

    @property
    def params_frozen(self) -> bool:
        return self.optimizer.params_frozen(self.progress_at(self.next_step))

    def progress_at(self, step: int) -> float:
        """The fraction of the whole training that is done before step `step` of this epoch."""
        return ((self.epoch - 1) * self.steps_per_epoch + step) / (self.config.epochs * self.steps_per_epoch)

    def evaluate(self, split: str, views: str = "none", share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Logits (N, 10) and labels (N,) of a split. The next call may write into the same tensors.

        `share`: of the images, those that one view leaves unsure, that get all `views`.
        """
        self.context.broadcast_weights(self.eval_model)  # each rank has its own BatchNorm statistics
        key = f"{split} {views} {share}"
        if key not in self._evaluation_functions:
            self._evaluation_functions[key] = self._build_evaluation(split, views, share)
        evaluation = self._evaluation_functions[key]
        if self.device.type == "cuda" and evaluation.graph is None:
            wait_for_prefetch()
        return cast(tuple[Tensor, Tensor], evaluation())

    def _build_evaluation(self, split: str, views: str, share: float) -> GraphedCallable:
        loader = self._build_loader(split)

        def evaluate_split(compiled_logits: Any = None) -> tuple[Tensor, Tensor]:
            model = functools.partial(compiled_logits, self.eval_model) if compiled_logits else None
            batches = loader.iter_batches(1)
            options: Any = {"autocast": self.autocast(), "views": views, "compiled_model": model}
            if share < 1 and VIEWS[views][0] > 1:
                return evaluate_unsure_views(self.eval_model, batches, share=share, **options)
            return evaluate(self.eval_model, batches, **options)

        compiled_function = None
        if self.is_compiled and VIEWS[views][0] > 1:  # several forward passes per image are worth compiling, one is not
            compiled_function = functools.partial(evaluate_split, compile_once(compute_logits))
        return GraphedCallable(evaluate_split, self.device, compiled_function)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def eval_model(self) -> nn.Module:
        """The model whose accuracy is reported: the moving average where there is one."""
        return self.ema.averaged_model if self.ema else self.model

    # -- checkpoints --

    def _load_histograms(self, saved: dict[str, Tensor]) -> None:
        if self.probe_runner.histograms:
            self.probe_runner.histograms.load_state_dict(saved)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on: tensors and plain values, which `weights_only` can load.

        Batches are not in it: an epoch's batches depend on seed and epoch alone, and with `keep` on the losses in "batches".
        """
        return {
            "epoch": self.epoch,
            "batch": self.next_step,
            "seconds": self.epoch_seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.ema.averaged_model.state_dict() if self.ema else {},
            "average_updates": self.ema.num_updates if self.ema else 0,
            "watcher": self.probe_runner.state_dict(),
            # between two epochs there are none; they are as large as the weights of a small network
            "histograms": recorder.state_dict() if (recorder := self.probe_runner.histograms) and self.next_step else {},
            "meter": self.meter.sums,
            "batches": self.train_loader.state_dict(),
            "torch": torch.get_rng_state() if self.rng_state is None else self.rng_state,
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "mps": torch.mps.get_rng_state() if self.device.type == "mps" else None,
            "python": random.getstate(),
            "threads": torch.get_num_threads(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a `state_dict()`, in place."""
        self.epoch, self.next_step, self.epoch_seconds = state["epoch"], state["batch"], state["seconds"]
        self.step_index.fill_(self.next_step)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.averaged_model.load_state_dict(state["average"])
            self.ema.num_updates.copy_(state["average_updates"])
        self.probe_runner.load_state_dict(state["watcher"])
        self._load_histograms(state.get("histograms", {}))  # older checkpoints have none
        self.meter.sums.copy_(state["meter"])
        self.train_loader.load_state_dict(state.get("batches", {}))  # older checkpoints have none
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        if state["mps"] is not None and self.device.type == "mps":
            torch.mps.set_rng_state(state["mps"])
        random.setstate(state["python"])
        if self.device.type == "cpu":
            torch.set_num_threads(state["threads"])  # sums differ in the last bit with the number of threads


def forward_stored_batch(
    model: nn.Module,
    epoch_buffer: tuple[Tensor, Tensor],
    step_index: Tensor,
    channels_last: bool,
    options: ForwardOptions,
) -> ForwardResult:
    """`forward` of batch `step_index` (1,) of a stored epoch: images (steps, B, ...) and labels (steps, B).

    One function, so that torch.compile fuses the selection of the batch with the first operations on it.
    """
    images, labels = select_batch(*epoch_buffer, step_index, channels_last)
    return forward(model, images, labels, labels, options)


@functools.lru_cache(maxsize=2)
def load_splits(
    dataset: str, data_dir: Path | None, val_size: int, train_size: int, device: torch.device
) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """train, test and, with a `val_size`, val; and the dataset's fingerprint. Read once for all trials of a process.

    Images are (N, 3, 32, 32) uint8 and labels (N,) int64, on the device.
    """
    arrays = data.load_dataset(dataset, data_dir)
    train, val = data.split_indices(arrays.train_labels, val_size)
    train = train[:train_size] if train_size else train

    def copy_to_device(*parts: np.ndarray) -> tuple[Tensor, Tensor]:
        images, labels = (torch.from_numpy(each if each.flags.writeable else each.copy()).to(device) for each in parts)
        return images, labels

    def select(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(rows) == len(arrays.train_labels):  # all of them: nobody else has these arrays, so no copy is needed
            return arrays.train_images, arrays.train_labels
        return arrays.train_images[rows], arrays.train_labels[rows]

    splits = {"train": copy_to_device(*select(train)), "test": copy_to_device(arrays.test_images, arrays.test_labels)}
    if val_size:
        splits["val"] = copy_to_device(*select(val))
    return splits, arrays.fingerprint
