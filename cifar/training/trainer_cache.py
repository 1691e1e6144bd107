"""What a process keeps from trial to trial: parts, captured and compiled steps, as long as trials of the same form come."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cifar import kernels
from cifar.config.resolve import Settings, form
from cifar.data import cache_folder
from cifar.training.cudagraph import Steps
from cifar.training.distributed import ALONE, Team
from cifar.training.trainer import Training

KEPT = 2  # steps of different forms; their tensors stay on the device
SAVED = 0.3  # share of a captured step's time that compiling it saves, as a rule (LOG.md)
COLD_SECONDS, WARM_SECONDS = 45.0, 8.0  # what compiling takes the first time, and with its result on disk (LOG.md)

_kept: list[tuple[Path | None, Steps[Training]]] = []


def fit(configs: Sequence[Settings]) -> bool:
    """Whether these runs can be trained together: they differ in seed, schedule and scalars only."""
    first = form(configs[0])
    return all(form(config) == first for config in configs[1:])


def steps(configs: Sequence[Settings], data_dir: Path | None, team: Team = ALONE) -> Steps[Training]:
    """The parts of these runs, at their beginning: those of earlier ones where they fit, else new ones."""
    if team.size > 1:  # talks to other processes between launches, so it is neither captured nor kept
        return Steps([Training(config, data_dir, team=team) for config in configs], capture=False)
    for kept in _kept:
        place, found = kept
        fits = place == data_dir and len(found.trials) == len(configs)
        if fits and all(training.restart(config) for training, config in zip(found.trials, configs, strict=True)):
            _kept.remove(kept)
            _kept.append(kept)
            return found
    forget(KEPT - 1)
    made = Steps([Training(config, data_dir, shares=len(configs) > 1) for config in configs], capture=configs[0].capture)
    _kept.append((data_dir, made))
    return made


def forget(most: int = 0) -> None:
    """Free all but the most recent ones."""
    del _kept[: max(0, len(_kept) - most)]


def prepare(steps: Steps[Training], configs: Sequence[Settings], ahead: int) -> dict[str, Any]:
    """Decide about compiling, and capture. -> how steps are taken, for the record; `compile` is a sentence or empty.

    `ahead`: runs of this form that this process will make, these included.
    """
    first: Training = steps.trials[0]
    if steps.wanted and not steps.graphs and not steps.refused:
        for training in steps.trials:
            training.begin_epoch()  # a capture needs batches
    steps.leaves_out = ahead > len(configs)  # making it takes longer than it saves in one run
    said = ""
    if configs[0].compile in ("on", "max") and not first.compiled:
        _compile(steps)
    elif configs[0].compile == "auto" and steps.wanted and not steps.decided:
        said = _weigh(steps, configs, ahead)
    steps.prepare()
    if steps.refused and not steps.decided:
        said = f"this step is not captured as a CUDA graph, and slower for it: {steps.refused}"
    steps.decided = True
    return {
        "captured": bool(steps.graphs),
        "not_captured_because": steps.refused,
        "compiled": first.compiled,
        "compile": said,
        "together": len(steps.trials),
    }


def _weigh(steps: Steps[Training], configs: Sequence[Settings], ahead: int) -> str:
    """Compile, if the work ahead pays for it -> what to say about it."""
    first = steps.trials[0]
    alone = steps if len(steps.trials) == 1 else Steps([first])
    seconds = alone.measure() * len(steps.trials)  # side by side they take less, but capturing all of them takes seconds
    if not seconds:
        return ""
    work = seconds * first.steps * max(config.epochs for config in configs) * max(1, ahead / len(configs))
    cost = WARM_SECONDS if _marker(configs[0], first.device).exists() else COLD_SECONDS
    pays = SAVED * work > cost
    if pays:
        _compile(steps)
    return (
        f"compile: {'on' if pays else 'off'} (steps of {1e6 * seconds:.0f} us, {work:.0f} s of work ahead; "
        f"compiling takes about {cost:.0f} s and saves about {100 * SAVED:.0f} %)"
    )


def _compile(steps: Steps[Training]) -> None:
    first = steps.trials[0]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))  # outlives the process
    torch.compiler.config.cache_key_tag = kernels.version()  # what is on disk is found by operators' names, not their code
    for training in steps.trials:
        training.compile()
    steps.forget()
    steps.prepare()
    marker = _marker(first.config, first.device)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{time.time()}\n")


def _marker(config: Settings, device: torch.device) -> Path:
    """A file that says that this step has been compiled on a machine of this kind, so that its kernels are cached."""
    named = [
        form(config),
        torch.__version__,
        kernels.version(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    ]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_folder() / "inductor" / "cifar" / digest
