"""What is found on this machine, and what to do about what is not. Looks only; prints nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cifar.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding. state: ok, note (works, could be better), bad (has to be mended)."""

    name: str
    state: str
    found: str
    advice: str = ""


def examine(runs: Path, data_dir: Path | None) -> Iterator[Check]:
    """All findings, one by one; importing PyTorch is part of it."""
    yield _python()
    yield from _versions()
    yield _accelerator()
    yield _data(data_dir)
    yield _writable("runs folder", runs, "name another place with --runs-dir or CIFAR_RUNS")
    yield _cache()
    yield _wandb()


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} at {sys.executable}, {os.cpu_count()} cores")


def _versions() -> Iterator[Check]:
    from cifar.system import environment

    found = environment.versions()
    missing = [package for package in environment.PACKAGES if package not in found]
    text = ", ".join(f"{name} {version}" for name, version in found.items() if name != "python")
    if missing:
        yield Check("packages", "bad", f"{text}; missing: {', '.join(missing)}", "pip install -c constraints.txt -e .")
        return
    wandb = found["wandb"]
    if not wandb.startswith("0.31."):
        yield Check("wandb", "note", wandb, "tested with 0.31 only: pip install 'wandb>=0.31,<0.32'")
    yield Check("packages", "ok", text)


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        free, total = torch.cuda.mem_get_info()
        return Check("GPU", "ok", f"{', '.join(names)}; {free / GIB:.0f} of {total / GIB:.0f} GiB free on the first")
    if torch.backends.mps.is_available():
        return Check("GPU", "ok", "Apple MPS")
    advice = "none is needed; if there is an NVIDIA GPU, `nvidia-smi` and the CUDA build of PyTorch have to agree"
    return Check("GPU", "note", f"none; the CPU with {torch.get_num_threads()} threads", advice)


def _data(data_dir: Path | None) -> Check:
    from cifar import data

    try:
        place = data.locate(data_dir)
        if place is None:
            advice = "`python -m cifar data` downloads it (162 MiB); or set CIFAR_DATA; or use --dataset stand-in"
            return Check("CIFAR-10", "note", "not here", advice)
        images = data.load("cifar10", data_dir)
    except UserError as error:
        return Check("CIFAR-10", "bad", str(error), "mend or remove what is named")
    return Check(
        "CIFAR-10", "ok", f"{place}, {len(images.train_labels):,} + {len(images.test_labels):,} images, MD5s as published"
    )


def _writable(name: str, folder: Path, advice: str) -> Check:
    """Whether a file can be written there, and how much space is left. Leaves no folder behind."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free / GIB
    except OSError as error:
        return Check(name, "bad", f"{folder} cannot be written ({error.strerror})", advice)
    if free < 2:
        return Check(name, "note", f"{folder}, {free:.1f} GiB free", "`python -m cifar gc` tidies")
    return Check(name, "ok", f"{folder}, {free:.0f} GiB free")


def _cache() -> Check:
    from cifar import data

    folder = data.cache_folder()
    size = 0
    with contextlib.suppress(OSError):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    check = _writable("cache", folder, "set XDG_CACHE_HOME to a folder that can be written")
    return Check(check.name, check.state, f"{check.found}, {size / 2**20:.0f} MiB in use", check.advice)


def _wandb() -> Check:
    from cifar.integrations.wandb import settings as mode

    try:
        chosen = mode.mode_from_environment("auto")
    except UserError as error:
        return Check("W&B", "note", str(error))
    if chosen == "online":
        return Check("W&B", "ok", f"online, with the key of {mode.credentials()}")
    if chosen == "disabled":
        return Check("W&B", "note", "disabled by WANDB_MODE", "unset it to mirror runs")
    why = "no key is configured" if not mode.credentials() else "WANDB_MODE or `wandb offline` says so"
    return Check(
        "W&B", "note", f"offline: {why}; runs are mirrored to files", "`wandb login` if you have an account; none is needed"
    )
