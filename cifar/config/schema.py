"""The configuration keys that every run has: names, types, limits, defaults and meanings.

The chosen model, optimizer, schedule and probes add the keyword-only parameters of their builders (`cifar.config.resolve`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cifar import registry

MAX_THREADS = 4096  # PyTorch starts as many as it is told
PART_REGISTRIES = {"model": registry.models, "optimizer": registry.optimizers, "schedule": registry.schedules}


def _bool_to_on_off(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _join_names(value: Any) -> Any:
    """Names, in a list or with commas between them -> the names with commas between them. Nothing (`teacher=`) -> ""."""
    if value is None:
        return ""
    if isinstance(value, str):
        return ",".join(parse_teachers(value))
    if isinstance(value, list | tuple) and all(isinstance(name, str | int) and not isinstance(name, bool) for name in value):
        return ",".join(parse_teachers(",".join(map(str, value))))
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"a run's name that looks like a number has to be quoted: \"'{value}'\"")
    return value


def parse_teachers(value: str) -> list[str]:
    """The key `teacher` -> the names of runs that it holds."""
    return [name.strip() for name in value.split(",") if name.strip()]


class Settings(BaseModel):
    """The keys that every run has, with their limits. `cifar.config.resolve` adds those of the chosen parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=False, allow_inf_nan=False)

    experiment: str = Field("", description="name of a file in experiments/, or a path: the values to start from")
    dataset: Literal["cifar10", "stand-in", "auto"] = Field(
        "cifar10", description="auto: CIFAR-10 where it can be had within 10 s, else the generated stand-in"
    )
    val_size: int = Field(5000, ge=0, le=45000, description="images cut from the training set for validation; 0: none")
    train_size: int = Field(0, ge=0, le=50000, description="train on the first N images after the cut only; 0: all")
    keep: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the training images in an epoch: those whose loss was largest when last seen"
    )
    test: Literal["never", "final"] = Field("never", description="final: score the test set once, after the last epoch")
    model: str = Field("worksheet1", description="a name of `python -m cifar models`")
    optimizer: str = Field("adam", description="a registered optimizer: sgd, adam, adamw, muon, or a plug-in")
    schedule: str = Field("constant", description="how lr moves with progress: cosine, linear, onecycle, step, ...")
    probes: str = Field("all", description="all, none, or names separated by commas")
    epochs: int = Field(25, ge=1, le=10**6, description="passes over the training images")
    max_steps: int = Field(0, ge=0, description="end every epoch after N steps; 0: no limit (for trying things out)")
    batch_size: int = Field(128, ge=1, description="images a step")
    seed: int = Field(0, ge=0, lt=2**63, description="weights, order, augmentation; the validation cut's own is fixed")
    flip: Literal["none", "random", "alternating"] = Field("random", description="horizontal flip of training images")
    crop: int = Field(4, ge=0, le=16, description="pixels of padding before a random 32x32 crop; 0: no crop")
    crop_padding: Literal["zero", "reflect"] = Field("zero", description="what the padding holds")
    cutout: int = Field(0, ge=0, le=32, description="side of the square that is blanked, in pixels; 0: none")
    random_erasing: float = Field(
        0.0, ge=0.0, le=1.0, description="how often a box of 2 to 33 % of the image is blanked (Zhong et al. 2017); 0: never"
    )
    augment_policy: Literal["none", "trivialaugment", "randaugment"] = Field(
        "none", description="random changes of shape and colour before flip and crop: one of 14 operations, or several"
    )
    randaugment_num_ops: int = Field(2, ge=1, le=14, description="operations that randaugment applies, one after the other")
    randaugment_magnitude: int = Field(9, ge=0, le=30, description="strength of randaugment's operations")
    contrast: float = Field(
        0.0, ge=0.0, lt=1.0, description="training images differ from the mean colour by 1 ± up to this share; 0: no jitter"
    )
    brightness: float = Field(
        0.0, ge=0.0, le=1.0, description="training images get brighter or darker by up to this share of the range; 0: no jitter"
    )
    normalize: Literal["half", "dataset"] = Field(
        "half", description="half: (x - 0.5) / 0.5 as in the worksheets; dataset: the training set's mean and std"
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of the target spread over all classes")
    teacher: Annotated[str, BeforeValidator(_join_names)] = Field(
        "", description="runs that teach this one, separated by commas: ids, names, paths or model artifacts; empty: none"
    )
    distill_weight: float = Field(0.5, ge=0.0, le=1.0, description="share of the loss that is the teachers'; the rest: labels")
    distill_temperature: float = Field(
        4.0, gt=0.0, le=1000.0, description="what logits of student and teachers are divided by in the teachers' part"
    )
    mixup: float = Field(0.0, ge=0.0, description="alpha of mixup's Beta distribution; 0: off")
    cutmix: float = Field(0.0, ge=0.0, description="alpha of CutMix's Beta distribution; 0: off")
    ema: float = Field(0.0, ge=0.0, lt=1.0, description="decay a step of the averaged weights that are evaluated; 0: off")
    tta: Literal["none", "flip", "flip+shift"] = Field("none", description="views averaged at the test: 1, 2 or 6")
    tta_share: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the test images that get all views of tta: those that one view leaves unsure"
    )
    eval_batch_size: int = Field(0, ge=0, description="images at once in an evaluation; 0: 125 on a CPU, else 1,000")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on CUDA, fp32 elsewhere")
    channels_last: bool = Field(True, description="NHWC memory format for convolutions")
    deterministic: bool = Field(False, description="deterministic kernels on the GPU; on the CPU they always are")
    compile: Annotated[Literal["auto", "on", "max", "off"], BeforeValidator(_bool_to_on_off)] = Field(
        "auto", description="torch.compile the step; auto: on a GPU, where the work ahead pays for it; max: tune it for minutes"
    )
    cudnn_trials: int = Field(
        10, ge=0, le=1000, description="on a GPU, algorithms of cuDNN that are timed for a convolution; 0: all there are"
    )
    capture: bool = Field(True, description="on a GPU, replay the step as a CUDA graph")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int = Field(0, ge=0, le=MAX_THREADS, description="CPU threads of a trial; 0: torch's choice (a sweep fixes it)")
    probe_every: int = Field(50, ge=1, description="the probes measure one of N steps")
    histograms: Annotated[Literal["on", "every", "off"], BeforeValidator(_bool_to_on_off)] = Field(
        "on", description="of gradients and updates, where the probes look; on: in about 22 epochs of the run; every: in each"
    )
    checkpoint_every: int = Field(0, ge=0, description="steps between two checkpoints; 0: about every 30 s")
    max_macs: float = Field(0.0, ge=0.0, description="skip the run if its model needs more MACs than this; 0: no limit")

    @model_validator(mode="after")
    def _check_combinations(self) -> Settings:
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix are alternatives; set one of them to 0")
        if self.keep < 1 and (self.mixup or self.cutmix):
            raise ValueError(
                "keep ranks images by their losses, and mixup and cutmix blend two in one; set keep to 1, or them to 0"
            )
        if len(set(parse_teachers(self.teacher))) < len(parse_teachers(self.teacher)):
            raise ValueError(f"teacher = '{self.teacher}': a name stands there twice; once is enough")
        if self.train_size > 50000 - self.val_size:
            raise ValueError(f"train_size is {self.train_size}, but only {50000 - self.val_size} images are left to train on")
        if self.batch_size > self.images_per_epoch:
            kept = f": keep {self.keep} leaves {self.images_per_epoch} an epoch" * (self.keep < 1)
            raise ValueError(f"batch_size {self.batch_size} is more than the images there are to train on{kept}")
        return self

    @property
    def images_per_epoch(self) -> int:
        """Training images in an epoch."""
        return round(self.keep * (self.train_size or 50000 - self.val_size))

    def kwargs_for(self, kind: str) -> dict[str, Any]:
        """The keyword arguments that build the chosen `model`, `optimizer` or `schedule`, or one probe by its name."""
        entry = registry.probes[kind] if kind not in PART_REGISTRIES else PART_REGISTRIES[kind][getattr(self, kind)]
        return {name: getattr(self, name) for name in entry.keys}

    def to_dict(self) -> dict[str, Any]:
        """All keys and values, as JSON takes them."""
        return self.model_dump(mode="json")
