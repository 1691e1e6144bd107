"""One training step on tensors. It knows nothing of configuration, of CIFAR-10 or of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- what a step works with --------------------------------------------------------------------------------------------


class BatchSource(Protocol):
    """Gives the batch of the step that `step_index` names."""

    step_index: Tensor  # (1,) int64: the step of the epoch that comes next; the step itself increments it
    batch_size: int
    selects_hard: bool  # each epoch takes the images with the largest losses, so it needs the loss of each image

    def next_batch(self) -> tuple[Tensor, Tensor]: ...
    def record_losses(self, losses: Tensor) -> None: ...


class Optimizer(Protocol):
    """Updates the weights. Its learning rates are on the device, planned ahead for each step of the epoch."""

    @property
    def freezing_params(self) -> Sequence[Tensor]: ...
    def set_lr_from_plan(self, step_index: Tensor) -> None: ...
    def step(self) -> None: ...
    def zero_grad(self) -> None: ...


class ProbeRunner(Protocol):
    """Measures gradients after the backward pass, and weights before and after the update. Never changes them."""

    def after_backward(self) -> None: ...
    def before_update(self) -> None: ...
    def after_update(self) -> None: ...


class DistributedContext(Protocol):
    """The processes that train one network together."""

    world_size: int

    def shard_batch(self, *batch: Tensor) -> tuple[Tensor, ...]: ...
    def average_gradients(self, model: nn.Module) -> None: ...


class WeightAverage(Protocol):
    """A moving average of the weights."""

    def update(self) -> None: ...


# -- the epoch's loss and accuracy -------------------------------------------------------------------------------------


class EpochMeter:
    """Training loss and accuracy of an epoch: summed on the device, read once at its end."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums = torch.zeros(3, dtype=dtype, device=device)  # loss, correct answers, images
        self.last_loss = torch.zeros(())  # of the last step, on a CPU only: on a GPU reading it would wait for the device
        self.accumulate_sums = accumulate_sums

    def update(self, loss: Tensor, correct: Tensor, count: int, step_index: Tensor) -> None:
        """Add one step. Increments `step_index`.

        loss: 0-d, the mean over the batch. correct: 0-d, how many of the `count` images were classified correctly.
        """
        if loss.device.type == "cpu":
            self.last_loss = loss.detach()
        self.accumulate_sums(self.sums, step_index, loss.detach(), correct, count)

    def read_and_reset(self) -> tuple[float, float]:
        """(mean loss, accuracy as a fraction). The only place where the host waits for the device."""
        loss, correct, images = self.sums.tolist()
        self.sums.zero_()
        return loss / max(images, 1), correct / max(images, 1)


def accumulate_sums(sums: Tensor, step_index: Tensor, loss: Tensor, correct: Tensor, count: int) -> None:
    """Add one step to the sums of an epoch and 1 to `step_index`, in place. A plain function, for torch.compile."""
    step_index.add_(1)
    sums.add_(torch.stack((loss.to(sums.dtype) * count, correct.to(sums.dtype), torch.full_like(sums[2], count))))


# -- the forward pass --------------------------------------------------------------------------------------------------

ForwardResult = tuple[Tensor, Tensor, Tensor | None]
"""(mean loss, number of correct answers), both 0-d, and the loss of each image (B,) if that was asked for."""


class Distillation(NamedTuple):
    """What a network learns from others (Hinton, Vinyals, Dean 2015, arXiv:1503.02531, sec. 2)."""

    teachers: tuple[nn.Module, ...]  # in evaluation mode, without gradients; they get the student's images
    weight: Tensor  # 0-d: the share of the loss that is the teachers'
    temperature: Tensor  # 0-d: what logits are divided by


class ForwardOptions(NamedTuple):
    """How the loss is computed. torch.compile makes one program for each combination of the booleans."""

    smoothing: Tensor | None = None  # 0-d: label smoothing, None for none
    bf16: bool = False  # autocast to bfloat16
    per_sample: bool = False  # return the loss of each image too
    skip_frozen: bool = False  # parameters whose schedule has ended need no gradient
    distillation: Distillation | None = None


def forward(model: nn.Module, images: Tensor, targets: Tensor, labels: Tensor, options: ForwardOptions) -> ForwardResult:
    """The cross-entropy of a batch. A plain function, for torch.compile.

    images (B, 3, H, W); targets are labels (B,) or class probabilities (B, classes); labels (B,) decide what is correct.
    Label smoothing spreads that fraction of the target over all classes (Szegedy et al. 2016, sec. 7).
    """
    if options.skip_frozen:
        pass  # Dynamo guard: torch 2.11 does not guard on requires_grad, so read the flag to force a recompile
    with torch.autocast(images.device.type, torch.bfloat16, enabled=options.bf16):
        logits = model(images)  # (B, 3, H, W) -> (B, 10)
    logits = logits.float()
    correct = (logits.detach().argmax(1) == labels).sum()
    smoothing = options.smoothing
    distillation = options.distillation
    if options.per_sample:
        losses = F.cross_entropy(logits, targets, reduction="none")
        if smoothing is not None:
            losses = torch.lerp(losses, -F.log_softmax(logits, 1).mean(1), smoothing)
        if distillation is not None:
            losses = torch.lerp(losses, distillation_losses(logits, images, distillation, options.bf16), distillation.weight)
        return losses.mean(), correct, losses.detach()
    loss = F.cross_entropy(logits, targets)
    if smoothing is not None:
        # -log_softmax.mean() is the cross-entropy with equal probabilities for all classes
        loss = torch.lerp(loss, -F.log_softmax(logits, 1).mean(), smoothing)
    if distillation is not None:
        taught = distillation_losses(logits, images, distillation, options.bf16).mean()
        loss = torch.lerp(loss, taught, distillation.weight)
    return loss, correct, None


def distillation_losses(logits: Tensor, images: Tensor, distillation: Distillation, bf16: bool) -> Tensor:
    """T^2 KL(teachers || student) of each image: logits (B, classes), images (B, 3, H, W) -> (B,).

    Both are softened by the temperature T. Of several teachers the mean of the softened probabilities counts. T^2 keeps the
    gradients as large as those of the labels, whatever T is.
    """
    teachers, _, temperature = distillation
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        taught = [teacher(images) for teacher in teachers]
    with torch.no_grad():
        probabilities = torch.stack([F.softmax(each.float() / temperature, 1) for each in taught]).mean(0)
    student = F.log_softmax(logits / temperature, 1)
    return temperature * temperature * F.kl_div(student, probabilities, reduction="none").sum(1)


@contextmanager
def _disable_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """The backward pass then stops at the first layer that still learns."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def run_backward(loss: Tensor, gradient: Tensor) -> None:
    """`loss.backward(gradient)` of a 0-d loss, without its check that both have one shape.

    For that check torch imports sympy, which takes a process that compiles nothing 0.4 s before its first step. A version of
    torch without this function makes the check.
    """
    run_engine = getattr(torch.autograd.graph, "_engine_run_backward", None)
    if run_engine is None:
        loss.backward(gradient)
    else:
        run_engine((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


# -- the step ----------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One step of training. It changes tensors in place and reads nothing on the host, so it can be a CUDA graph."""

    model: nn.Module
    source: BatchSource
    optimizer: Optimizer
    meter: EpochMeter
    probe_runner: ProbeRunner
    context: DistributedContext
    ema: WeightAverage | None = None
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # mixup or CutMix: images, labels -> images, targets
    smoothing: Tensor | None = None
    bf16: bool = False
    distillation: Distillation | None = None
    forward: Callable[..., ForwardResult] = forward
    fused_forward: Callable[[ForwardOptions], ForwardResult] | None = None  # selects the next batch and runs `forward` on it
    select_draws: Callable[[], None] | None = None  # gives the network the random numbers of this step

    def __post_init__(self) -> None:
        self.loss_gradient = torch.ones((), device=self.meter.sums.device)  # made once: backward() would make it in each step

    def __call__(self, with_probes: bool, skip_frozen: bool = False) -> None:
        """Take one step. With `skip_frozen`, parameters whose schedule has ended get no gradients."""
        self.optimizer.set_lr_from_plan(self.source.step_index)
        if self.select_draws:
            self.select_draws()
        with _disable_gradients(self.optimizer.freezing_params if skip_frozen else ()):
            options = ForwardOptions(self.smoothing, self.bf16, self.source.selects_hard, skip_frozen, self.distillation)
            loss, correct, losses = self.fused_forward(options) if self.fused_forward else self._forward_next_batch(options)
            run_backward(loss, self.loss_gradient)
        if losses is not None:
            self.source.record_losses(losses)
        self.context.average_gradients(self.model)

        if with_probes:
            self.probe_runner.after_backward()
            self.probe_runner.before_update()
        self.optimizer.step()
        if with_probes:
            self.probe_runner.after_update()

        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update()
        self.meter.update(loss, correct, self.source.batch_size // self.context.world_size, self.source.step_index)

    def _forward_next_batch(self, options: ForwardOptions) -> ForwardResult:
        images, labels = self.source.next_batch()
        if self.mix is None:  # of several processes, each has a loader that makes its shard of the batch
            return self.forward(self.model, images, labels, labels, options)
        inputs, targets, labels = self.context.shard_batch(*self.mix(images, labels), labels)
        return self.forward(self.model, inputs, targets, labels, options)
