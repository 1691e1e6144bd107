"""The teachers of a run: finished runs whose networks it learns from, beside the labels (`teacher`, `distill_weight`, ...).

teachers = find_teachers(config, find_run)   # when the run is made: what can be wrong is said, with what to do
describe_teachers(teachers)                  # goes into run.json
read_teachers(run_dir)                       # when it is trained, also by another process
load_networks(teachers, ...)                 # ready for the training step
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar.config.schema import Settings, parse_teachers
from cifar.data.augment import MEAN, STD
from cifar.errors import PartError, UserError
from cifar.flops import keep_random_state
from cifar.system.files import is_regular_file, shorten_repr
from cifar.system.names import is_id
from cifar.tracking.pretrained import describe_missing_weights, find_pretrained, is_pretrained
from cifar.tracking.records import is_amount, is_text
from cifar.tracking.run_dir import RunDir
from cifar.training.parts import describe_output_problem
from cifar.training.recorded import evaluation_settings, load_model

MAX_TEACHERS = 16
WEIGHTS_FILE = "weights.pt"


@dataclass(frozen=True)
class Teacher:
    """A run that teaches another one, as the other's run.json keeps it."""

    run: str  # its id
    path: str  # of its folder
    sha256: str  # of its weights
    macs: float
    normalize: str  # of the images that its network takes
    fingerprint: str = ""  # of the data set that it was trained on; "": not known
    train_flops: float | None = None  # of its own training; None: not known


# -- when the run is made ----------------------------------------------------------------------------------------------


def find_teachers(config: Settings, find_run: Callable[[str], RunDir]) -> tuple[Teacher, ...]:
    """The teachers that a configuration names. Raises PartError where one cannot teach this run.

    find_run: a name, an id, a path -> the run's folder; raises UserError.
    """
    names = parse_teachers(config.teacher)
    if len(names) > MAX_TEACHERS:
        raise PartError(f"teacher: {len(names)} runs are named, and at most {MAX_TEACHERS} can teach one")
    try:
        return tuple(_examine(config, find_run(name)) for name in names)
    except PartError:
        raise
    except UserError as error:
        raise PartError(f"teacher: {error}") from error


def _examine(config: Settings, record: RunDir) -> Teacher:
    """Raises PartError for a run that has not finished, or that has seen images which its student may not learn from."""
    if not is_regular_file(record.path / WEIGHTS_FILE):
        if is_pretrained(record.path):
            raise PartError(f"teacher: {describe_missing_weights(record.id)}")
        raise PartError(f"teacher: run {record.id} has no weights, it is {record.state}; train it to its end first")
    theirs, about = evaluation_settings(record), record.read_json("run")
    if why := describe_leak(config, theirs):
        raise PartError(f"teacher: run {record.id} {why}")
    summary, cost = record.read_json("summary"), about.get("cost") or {}
    flops = summary.get("train_flops")
    if flops is None and cost.get("macs") is not None:  # a run of an earlier version
        images = max((int(row.get("step") or 0) for row in record.read_rows()), default=0) * theirs.batch_size
        flops = 6 * cost["macs"] * images if images else None
    return Teacher(
        run=record.id,
        path=str(record.path.resolve()),
        sha256=_digest(record.path / WEIGHTS_FILE),
        macs=float(cost.get("macs") or 0),
        normalize=theirs.normalize,
        fingerprint=str(record.read_json("environment").get("data_fingerprint") or ""),
        train_flops=None if flops is None else float(flops),
    )


def describe_leak(student: Settings, teacher: Settings) -> str:
    """Why a teacher's training images are not all among its student's, in words; "" if they are, or if there is no cut.

    The cuts of different sizes lie in each other, so a larger cut leaves fewer images to train on.
    """
    if teacher.dataset != student.dataset:
        return f"was trained on {teacher.dataset}, and this run is on {student.dataset}; take a teacher of the same images"
    if not student.val_size:
        return ""  # nothing is chosen by validation images
    advice = "what it teaches would tell of validation images; take a teacher with"
    if teacher.val_size < student.val_size:
        return (
            f"was trained on images that this run keeps for validation (val_size {teacher.val_size}, here {student.val_size}): "
            f"{advice} val_size={student.val_size}"
        )
    if not student.train_size or (teacher.val_size == student.val_size and 0 < teacher.train_size <= student.train_size):
        return ""
    return (
        f"was trained on images that this run does not train on (train_size {teacher.train_size}, here {student.train_size}): "
        f"take a teacher with val_size={student.val_size} and train_size={student.train_size}"
    )


def describe_teachers(teachers: Sequence[Teacher]) -> list[dict[str, Any]]:
    """For run.json."""
    return [asdict(teacher) for teacher in teachers]


# -- when it is trained ------------------------------------------------------------------------------------------------


def read_teachers(record: RunDir) -> tuple[Teacher, ...]:
    """The teachers of a run, as its run.json has them. Raises UserError where one is gone or has other weights now.

    Raises PartError where its configuration names teachers and its run.json has none: it would train without them.
    """
    return tuple(_locate(each, record) for each in _read_recorded(record))


def read_common_teachers(records: Sequence[RunDir]) -> tuple[Teacher, ...]:
    """The teachers of runs that are trained side by side. Raises PartError where they differ, else as `read_teachers`."""
    kinds = {tuple((each.run, each.sha256) for each in _read_recorded(record)) for record in records}
    if len(kinds) > 1:
        names = ", ".join(record.id for record in records)
        raise PartError(f"the runs {names} have different teachers; train each alone")
    return read_teachers(records[0])


def _read_recorded(record: RunDir) -> list[Teacher]:
    known, config = record.read_json("run").get("teachers") or [], record.read_json("config")
    if not isinstance(known, list) or not all(map(_is_teacher, known)):
        raise UserError(f"{record.path / 'run.json'} is damaged (its teachers are no list of runs); restore it")
    if not known and parse_teachers(str(config.get("teacher") or "")):
        raise PartError(
            f"run {record.id} has the setting teacher = {shorten_repr(config['teacher'])}, and its run.json names no teacher; "
            f"train it anew: python -m cifar train --from {record.id}"
        )
    return [Teacher(**each) for each in known]


def _is_teacher(value: Any) -> bool:
    fields = Teacher.__dataclass_fields__
    return (
        isinstance(value, Mapping)
        and set(value) == set(fields)
        and is_id(value["run"])
        and all(is_text(value[name]) for name in ("path", "sha256", "normalize", "fingerprint"))
        and is_amount(value["macs"])
        and (value["train_flops"] is None or is_amount(value["train_flops"]))
    )


def _locate(teacher: Teacher, record: RunDir) -> Teacher:
    """The same teacher where its folder is now: where it was, beside the student's, or where pretrained networks are."""
    packed = find_pretrained(teacher.run)
    for folder in (Path(teacher.path), record.path.parent / teacher.run, *([packed.folder] if packed else [])):
        if is_regular_file(folder / WEIGHTS_FILE):
            if _digest(folder / WEIGHTS_FILE) != teacher.sha256:
                raise UserError(
                    f"the weights of {folder}, the teacher of run {record.id}, have changed since that run began; restore "
                    f"them, or train it again: python -m cifar train --from {record.id}"
                )
            return Teacher(**{**asdict(teacher), "path": str(folder)})
    raise UserError(
        f"the teacher of run {record.id} is gone: {teacher.path} has no {WEIGHTS_FILE}; restore it there, or put it beside the "
        f"run as {record.path.parent / teacher.run}"
    )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=8)
def load_network(teacher: Teacher, normalize: str, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    """A teacher's network for images normalised as its student takes them: in evaluation mode, without gradients.

    One for all trials of a process. The random state does not change.
    """
    with keep_random_state():
        network: nn.Module = load_model(RunDir(Path(teacher.path)))
        network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        network.eval().requires_grad_(False)
        with torch.no_grad():
            output = network(torch.zeros(2, 3, 32, 32, device=device))
    if problem := describe_output_problem(output, 2):
        raise UserError(f"the network of run {teacher.run} cannot teach: {problem}")
    if teacher.normalize == normalize:
        return network
    return Renormalised(network, normalize, teacher.normalize).to(device).eval().requires_grad_(False)


class Renormalised(nn.Module):
    """A network that takes images (B, 3, H, W) of another normalisation than the one that it was trained with."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: str, wanted: str) -> None:
        super().__init__()
        self.network = network
        (mean, std), (wanted_mean, wanted_std) = _find_moments(given), _find_moments(wanted)
        self.register_buffer("scale", (std / wanted_std).float())
        self.register_buffer("shift", ((mean - wanted_mean) / wanted_std).float())

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.network((images * self.scale + self.shift).to(images.dtype))
        return result


def _find_moments(normalize: str) -> tuple[Tensor, Tensor]:
    """What is subtracted from pixels in [0, 1], and what they are then divided by: (3, 1, 1) each."""
    mean, std = (MEAN, STD) if normalize == "dataset" else ((0.5,) * 3, (0.5,) * 3)
    return tuple(torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (mean, std))  # type: ignore[return-value]


def check_same_data(teachers: Sequence[Teacher], fingerprint: str) -> None:
    """Raise UserError for a teacher that was trained on other files than those of this run."""
    for teacher in teachers:
        if teacher.fingerprint and teacher.fingerprint != fingerprint:
            raise UserError(
                f"teacher: run {teacher.run} was trained on other images than those that are here (fingerprint "
                f"{teacher.fingerprint[:12]}, here {fingerprint[:12]}); take a teacher of the same data set"
            )
