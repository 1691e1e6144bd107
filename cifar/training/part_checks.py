"""What `profile` and `--dry-run` accept trains: one real step of a run's parts on a few random images, before a folder is made.

Plug-ins are checked so, and what is wrong with one is said in a sentence. The package's own parts have tests instead. A network
that fails on channels-last images and trains on contiguous ones is trained on those.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cifar import data
from cifar.config.resolve import graph_signature
from cifar.config.schema import Settings
from cifar.errors import PartError, UserError
from cifar.kernels.cpu_conv_pool import chunk_conv_pools
from cifar.optim.optimizer import check_multiplier
from cifar.optim.parameter_roles import describe_unclear
from cifar.system.user_code import describe_error, find_user_line, locate_error, pass_interrupt, read_error_text
from cifar.training.ema import ExponentialMovingAverage
from cifar.training.evaluation import DEFAULT_EVAL_BATCH_SIZE, EVAL_BATCH_SIZES
from cifar.training.parts import (
    build_model,
    build_optimizer,
    build_probe_runner,
    build_schedule,
    copy_model,
    describe_output_problem,
    identify_code,
    selected_entries,
)
from cifar.training.step import ForwardOptions, forward

NUM_IMAGES = 2  # of the small training step: the fewest that BatchNorm takes
EXTRA_SECONDS = 0.25  # a step of the run's own batch size is tried, too, if it takes no longer than this
SMALL_LR = 1e-6  # at a lower one a step may be too small for the parameters' precision
MAX_SCHEDULE_POINTS = 10_000
MAX_INIT_IMAGES = 5000  # what a network's own `init_from_data` gets in a training


@dataclass(frozen=True)
class CheckedParts:
    """What the check of a run's parts has found."""

    channels_last: bool  # the memory format that the network is trained in
    notes: tuple[str, ...] = ()  # sentences for the user


_checked: dict[tuple[Any, ...], CheckedParts | str] = {}  # what decides about the outcome -> that, or what is wrong


def check_parts(config: Settings, device: torch.device) -> CheckedParts:
    """Build the run's parts and take a step with them, if one of them is a plug-in. Random states stay as they are.

    Raises UserError with one sentence where they cannot be trained. Asked again for a run of the same kind, it knows.
    """
    entries = selected_entries(config)
    if not any(entry.is_plugin for entry in entries.values()) and config.batch_size > 1:
        return CheckedParts(config.channels_last)
    if entries["schedule"].is_plugin:
        with _keep_random_state(device):
            _check_schedule(config)
    key = (json.dumps(graph_signature(config), sort_keys=True, default=str), str(device), identify_code(config))
    if key not in _checked:
        with _keep_random_state(device), _process_settings(config, device), contextlib.redirect_stdout(sys.stderr):
            try:
                _checked[key] = _check_network(config, device)
            except UserError as error:
                _checked[key] = str(error)
            except Exception as error:
                if is_out_of_memory(error):  # says nothing about the part; the training will meet it, or will not
                    return CheckedParts(config.channels_last)
                raise
    found = _checked[key]
    if isinstance(found, str):
        raise PartError(found)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the GPU or of the machine was not enough."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in read_error_text(error)


def choose_channels_last(config: Settings, device: torch.device) -> bool:
    """Whether the network is trained in channels-last format: `channels_last`, unless it cannot be."""
    if not config.channels_last:
        return False
    with contextlib.suppress(UserError):  # whether it trains at all has been asked before the run was made
        return check_parts(config, device).channels_last
    return True


@contextlib.contextmanager
def _keep_random_state(device: torch.device) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


def _read_generators(device: torch.device) -> tuple[Any, ...]:
    """Equal to another reading if no random number was drawn between the two."""
    cuda = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes(), cuda, random.getstate()


@contextlib.contextmanager
def _process_settings(config: Settings, device: torch.device) -> Iterator[None]:
    """What a training sets for its process, and can make a network fail."""
    before = torch.are_deterministic_algorithms_enabled()
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            if config.deterministic:
                torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def _stage(part: str, doing: str, find_line: Callable[[], str] = lambda: "") -> Iterator[None]:
    """What fails in here is said in a sentence: whose fault it is, and at which of their lines.

    find_line: where to look if no line of theirs is in the traceback.
    """
    try:
        yield
    except UserError as error:
        names_part = str(error).startswith((part.partition(" (")[0], "probe ", "two probes "))
        raise PartError(str(error) if names_part else f"{part}: {error}") from error
    except BaseException as error:
        pass_interrupt(error)
        if is_out_of_memory(error):
            raise
        line = "" if locate_error(error) else find_line()
        raise PartError(f"{part} fails {doing}: {describe_error(error)}" + f" ({line})" * bool(line)) from error


def _check_schedule(config: Settings) -> None:
    """Ask the schedule for every step's factor, or for as many as there is time for."""
    entry = selected_entries(config)["schedule"]
    part = f"schedule '{entry.name}' ({entry.file})"
    steps = max(1, config.images_per_epoch // config.batch_size) * config.epochs
    with _stage(part, "when it is asked for a factor of lr"):
        schedule = build_schedule(config)
        for index in range(0, steps, -(-steps // MAX_SCHEDULE_POINTS)):
            check_multiplier(schedule(index / steps), index / steps)


# -- the network -------------------------------------------------------------------------------------------------------


def _check_network(config: Settings, device: torch.device) -> CheckedParts:
    formats = [True, False] if config.channels_last else [False]
    first_error: UserError | None = None
    for channels_last in formats:
        try:
            notes = _try_format(config, device, channels_last)
        except UserError as error:
            first_error, last_error = first_error or error, error
            continue
        if first_error:
            why = str(first_error).partition(" fails ")[2] or str(first_error)
            notes = (
                f"model '{config.model}' is trained on contiguous images, because with channels_last=true it fails {why}",
                *notes,
            )
        return CheckedParts(channels_last, notes)
    raise last_error


def _try_format(config: Settings, device: torch.device, channels_last: bool) -> tuple[str, ...]:
    """Train, evaluate and train again in this memory format -> notes. Raises UserError where that fails."""
    small, eval_sizes = min(config.batch_size, NUM_IMAGES), _list_eval_sizes(config, device)
    try:
        trial = _Trial(config, device, channels_last)
        trial.take_step(small, is_first=True)
    except UserError:
        if small == config.batch_size:
            raise
        trial = _Trial(config, device, channels_last)  # a network may need more images, as one with statistics of parts
        trial.take_step(config.batch_size, is_first=True)
        small = config.batch_size
    try:
        trial.evaluate(small + 1)
    except UserError:
        for num_images in eval_sizes:
            trial.evaluate(num_images)
    start = time.perf_counter()
    trial.take_step(small)
    seconds_per_image = (time.perf_counter() - start) / small
    if small < config.batch_size and seconds_per_image * config.batch_size < EXTRA_SECONDS:
        trial.take_step(config.batch_size)
        if seconds_per_image * max(eval_sizes) < EXTRA_SECONDS:
            trial.evaluate(max(eval_sizes))
    return tuple(trial.notes.values())


def _list_eval_sizes(config: Settings, device: torch.device) -> list[int]:
    """How many images the batches of a run's evaluations have."""
    batch_size = EVAL_BATCH_SIZES.get(device.type, DEFAULT_EVAL_BATCH_SIZE)
    splits = [config.val_size] * bool(config.val_size) + [10_000]
    return sorted({size for count in splits for size in (min(batch_size, count), count % batch_size) if size})


class _Trial:
    """The parts of a run, on the device, with images that are noise."""

    def __init__(self, config: Settings, device: torch.device, channels_last: bool) -> None:
        self.config, self.device, self.channels_last = config, device, channels_last
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        entries = selected_entries(config)
        self.model_part = f"model '{config.model}' ({entries['model'].file})"
        self.optimizer_part = f"optimizer '{config.optimizer}' ({entries['optimizer'].file})"
        plugged = [f"'{e.name}' ({e.file})" for part, e in entries.items() if part.startswith("probe ") and e.is_plugin]
        self.probe_part = f"probe {plugged[0]}" if len(plugged) == 1 else "a probe"
        self.notes: dict[str, str] = {}  # sentences for the user
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        self.model = self._build_model()
        self.shapes = self._read_shapes()
        with _stage(self.optimizer_part, "when it is built"):
            self.optimizer = build_optimizer(config, self.model)
            self.optimizer.plan_lrs([0.0, 0.5])
        self.check_groups()
        with _stage(self.probe_part, "at its start"):
            self.probe_runner = build_probe_runner(config, self.model)
        self.ema = None
        if config.ema:
            with _stage(self.model_part, "when it is copied for its moving average (ema)"):
                self.ema = ExponentialMovingAverage(self.model, copy_model(self.model, config, self.memory_format), config.ema)
        self.step_index = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _build_model(self) -> nn.Module:
        with _stage(self.model_part, "when it is built"):
            model = build_model(self.config)
        named = {name for name, _ in model.named_parameters()}
        if not [parameter for parameter in model.parameters() if parameter.requires_grad]:
            raise PartError(f"{self.model_part} has no parameters that train; give it some, as nn.Parameter or in modules")
        if unknown := [name for name in _own_roles(model) if name not in named]:
            raise PartError(f"{self.model_part}: its `roles` name '{unknown[0]}', which is no parameter of it; correct it")
        if unclear := describe_unclear(model):
            self.notes["roles"] = unclear
        with _stage(self.model_part, f"when it is moved to {self.device}"):
            model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        if init_from_data := getattr(model, "init_from_data", None):
            with _stage(self.model_part, "in init_from_data"):
                init_from_data(torch.randn(MAX_INIT_IMAGES, 3, 32, 32, device=self.device))
        if self.device.type == "cpu":
            chunk_conv_pools(model)
        return model

    def draw_images(self, count: int) -> Tensor:
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, device=self.device)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return data.normalize(images, self.config.normalize, dtype=dtype, channels_last=self.channels_last)

    def take_step(self, num_images: int, *, is_first: bool = False) -> None:
        """A training step, as `training.step.Step` takes it. The first one has probes, and a checkpoint after it."""
        self._run_network(num_images)
        if is_first:
            with self._watched_probes():
                self.probe_runner.after_backward()
                self.probe_runner.before_update()
        with _stage(self.optimizer_part, "in its step"), self._watched_update(is_first):
            self.optimizer.step()
        if is_first:
            self._check_shapes()
            with self._watched_probes():
                self.probe_runner.after_update()
                self.probe_runner.read_and_reset()
        with _stage(self.optimizer_part, "in its step"):
            self.optimizer.zero_grad()
            if is_first:
                self.optimizer.load_state_dict(self.optimizer.state_dict())
        if is_first:
            with _stage(self.model_part, "when its weights are stored and loaded again"):
                self._load_weights_again()
        if self.ema:
            self.ema.update()

    def check_groups(self) -> None:
        """Each parameter is in one group at most, under its name, with an lr that a training can use."""
        known, seen = {id(parameter) for parameter in self.model.parameters()}, set[int]()
        for group in getattr(self.optimizer, "groups", ()) if selected_entries(self.config)["optimizer"].is_plugin else ():
            if len(group.names) != len(group.params):
                raise PartError(
                    f"{self.optimizer_part} has a group of {len(group.params)} parameters and {len(group.names)} names; "
                    "give it a name for each"
                )
            for name, parameter in zip(group.names, group.params, strict=True):
                if id(parameter) not in known:
                    raise PartError(
                        f"{self.optimizer_part} has a tensor '{name}' in a group that is no parameter of the network, but a "
                        "copy or a view; take the tensors of `parameters`"
                    )
                if id(parameter) in seen:
                    raise PartError(f"{self.optimizer_part} has '{name}' in two groups; put it into one")
                seen.add(id(parameter))
            lr = float(group.hyper["lr"])
            if not 0 <= lr < float("inf"):
                raise PartError(f"{self.optimizer_part} has a group with lr={lr}; give a finite number of 0 or more")

    @contextlib.contextmanager
    def _watched_update(self, is_first: bool) -> Iterator[None]:
        """A plug-in's first step with a positive lr changes parameters, in place."""
        if not is_first or not selected_entries(self.config)["optimizer"].is_plugin:
            yield
            return
        moving = [p for p in self.model.parameters() if p.grad is not None and bool(p.grad.any())]
        before = [parameter.detach().clone() for parameter in moving]
        yield
        is_same = moving and all(torch.equal(old, new.detach()) for old, new in zip(before, moving, strict=True))
        lrs = [float(group.hyper["lr"]) for group in getattr(self.optimizer, "groups", ())]
        if is_same and lrs and min(lrs) > SMALL_LR:
            raise PartError(
                f"{self.optimizer_part} changes no parameter in its step; a rule changes the tensors of `params` in place "
                "(param.sub_(...))"
            )

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what is stored with the weights."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        for path, module in self.model.named_modules():
            stored = {k: b for k, b in module._buffers.items() if b is not None and k not in module._non_persistent_buffers_set}
            shapes |= {f"{path}.{name}".lstrip("."): tuple(buffer.shape) for name, buffer in stored.items()}
        return shapes

    def _check_shapes(self) -> None:
        """What the optimizer does not know would not be trained, and what has another shape could not be loaded again."""
        after = self._read_shapes()
        if new := [name for name in after if name not in self.shapes]:
            raise PartError(
                f"{self.model_part} makes '{new[0]}' in its forward pass, too late to be trained and to be loaded again; make "
                "it in __init__, or use a lazy module (nn.LazyLinear)"
            )
        for name, shape in self.shapes.items():
            if after.get(name) != shape:
                now = f"has the shape {after[name]} after one" if name in after else "is gone after one"
                raise PartError(
                    f"{self.model_part} changes '{name}' in its forward pass: it has the shape {shape} before a training step "
                    f"and {now}, so that its weights could not be loaded again; keep its shape, or keep it out of the buffers"
                )

    def _load_weights_again(self) -> None:
        state = self.model.state_dict()
        self.model.load_state_dict(state)
        if plain := {name: value for name, value in state.items() if not isinstance(value, Tensor)}:
            buffer = io.BytesIO()
            torch.save(plain, buffer)
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)

    def _run_network(self, num_images: int) -> None:
        """Forward and backward pass of a training step."""
        model, images = self.model.train(), self.draw_images(num_images)
        labels = torch.randint(10, (num_images,), device=self.device)
        self.optimizer.set_lr_from_plan(self.step_index)
        doing = f"in a training step of {num_images} image{'s' * (num_images > 1)}"
        with _stage(self.model_part, doing):
            smoothing = torch.tensor(self.config.label_smoothing, device=self.device) if self.config.label_smoothing else None
            options = ForwardOptions(smoothing, self.bf16, self.config.keep < 1)
            checked = self._check_output(model, num_images, doing)
            loss, _, _ = forward(checked, images, labels, labels, options)
        if not loss.requires_grad:
            raise PartError(f"{self.model_part} cannot be trained: {NO_GRADIENT}")
        doing = f"in the backward pass of {num_images} images"
        with _stage(self.model_part, doing, lambda: self._find_forward_line(num_images)):
            loss.backward()
        if any(parameter.grad is not None and parameter.grad.layout != torch.strided for parameter in model.parameters()):
            raise PartError(f"{self.model_part} has sparse gradients, which no optimizer here takes; write sparse=False")
        if all(parameter.grad is None for parameter in model.parameters()):
            raise PartError(f"{self.model_part} cannot be trained: {NO_GRADIENT}")

    @contextlib.contextmanager
    def _watched_probes(self) -> Iterator[None]:
        """Probes may only look: they change no weight and no gradient, and draw no random numbers."""

        def read_versions() -> list[tuple[str, int, int]]:
            named = self.model.named_parameters()
            return [(name, p._version, -1 if p.grad is None else p.grad._version) for name, p in named]

        before, random_before = read_versions(), _read_generators(self.device)
        with _stage(self.probe_part, "in a training step"):
            yield
        for (name, *versions), (_, *versions_after) in zip(before, read_versions(), strict=True):
            if versions != versions_after:
                raise PartError(f"{self.probe_part} changes '{name}' or its gradient; a probe may only look")
        if random_before != _read_generators(self.device):
            raise PartError(f"{self.probe_part} draws random numbers, which would change the training; a probe may only look")

    def _find_forward_line(self, num_images: int) -> str:
        """The line of the forward pass whose backward pass fails, as autograd's anomaly mode finds it; "" if it does not."""
        images, labels = self.draw_images(num_images), torch.zeros(num_images, dtype=torch.int64, device=self.device)
        with warnings.catch_warnings(record=True) as caught, contextlib.suppress(Exception):
            warnings.simplefilter("always")
            with torch.autograd.detect_anomaly(check_nan=False):
                forward(self.model, images, labels, labels, ForwardOptions(None, self.bf16))[0].backward()
        return next((line for warning in caught if (line := find_user_line(str(warning.message)))), "")

    def evaluate(self, num_images: int) -> None:
        """The forward pass of an evaluation, whose last batch may have any size."""
        doing = f"in an evaluation of {num_images} images (it has to take any number)"
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        model = self.ema.averaged_model if self.ema else self.model
        images = self.draw_images(num_images)
        with torch.inference_mode(), _stage(self.model_part, doing), autocast:
            self._check_output(model.eval(), num_images, doing)(images)

    def _check_output(self, model: nn.Module, num_images: int, doing: str) -> Any:
        """The network as a function that looks at what it returns. No hook: scripted modules take none."""

        def run(images: Tensor) -> Any:
            output = model(images)
            if problem := describe_output_problem(output, num_images):
                raise PartError(f"{self.model_part} fails {doing}: {problem}")
            if not output.detach().isfinite().all():
                self.notes.setdefault("values", NOT_FINITE.format(model=self.config.model))
            return output

        return run


NOT_FINITE = (
    "model '{model}' puts out NaN or infinite values for random images, before any training; if it does for the real ones, "
    "the run ends as diverged at its first step"
)
NO_GRADIENT = (
    "no gradient reaches any of its parameters; its output must depend on them by operations that can be differentiated "
    "(no argmax, .detach(), .data or torch.no_grad())"
)


def _own_roles(model: nn.Module) -> dict[str, str]:
    roles = getattr(model, "roles", {})
    return dict(roles) if isinstance(roles, dict) else {}
