"""What is found on this machine, and what to do about what is not. It changes nothing and prints nothing."""

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
    """One finding. state: ok, note (works, could be better), bad (has to be repaired)."""

    name: str
    state: str
    found: str
    advice: str = ""


def examine_machine(runs: Path, data_dir: Path | None) -> Iterator[Check]:
    """All findings, one by one; importing PyTorch is part of it."""
    yield _check_python()
    yield from _check_packages()
    yield _check_gpu()
    yield from _check_cpu_precision()
    yield _check_dataset(data_dir)
    yield _check_writable("runs folder", runs, "name another place with --runs-dir or CIFAR_RUNS")
    yield _check_cache()
    yield _check_wandb()


def _check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} at {sys.executable}, {os.cpu_count()} cores")


def _check_packages() -> Iterator[Check]:
    from cifar.system import environment

    found = environment.installed_versions()
    missing = [package for package in environment.PACKAGES if package not in found]
    text = ", ".join(f"{name} {version}" for name, version in found.items() if name != "python")
    if missing:
        yield Check("packages", "bad", f"{text}; missing: {', '.join(missing)}", "pip install -c constraints.txt -e .")
        return
    wandb = found["wandb"]
    if not wandb.startswith("0.31."):
        yield Check("wandb", "note", wandb, "tested with 0.31 only: pip install 'wandb>=0.31,<0.32'")
    yield Check("packages", "ok", text)


def _check_gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        free, total = torch.cuda.mem_get_info()
        return Check("GPU", "ok", f"{', '.join(names)}; {free / GIB:.0f} of {total / GIB:.0f} GiB free on the first")
    if torch.backends.mps.is_available():
        return Check("GPU", "ok", "Apple MPS")
    advice = "none is needed; if there is an NVIDIA GPU, `nvidia-smi` and the CUDA build of PyTorch have to agree"
    threads = torch.get_num_threads()
    return Check("GPU", "note", f"none; the CPU with {threads} thread{'s' * (threads > 1)}", advice)


def _check_cpu_precision() -> Iterator[Check]:
    """Whether this CPU multiplies matrices in bfloat16 much faster (AMX); only where there is no GPU."""
    import torch

    if torch.cuda.is_available() or not torch.cpu._is_amx_tile_supported():
        return
    yield Check("CPU", "note", "has matrix units for bfloat16 (AMX)", "precision=bf16 trains convolutional networks faster")


def _check_dataset(data_dir: Path | None) -> Check:
    from cifar import data

    try:
        place = data.find_cifar10(data_dir)
        if place is None:
            advice = "`python -m cifar data` downloads it (162 MiB); or set CIFAR_DATA; or use --dataset stand-in"
            return Check("CIFAR-10", "note", "not here", advice)
        images = data.load_dataset("cifar10", data_dir)
    except UserError as error:
        return Check("CIFAR-10", "bad", str(error), "repair or remove what is named")
    return Check(
        "CIFAR-10", "ok", f"{place}, {len(images.train_labels):,} + {len(images.test_labels):,} images, MD5s as published"
    )


def _check_writable(name: str, folder: Path, advice: str) -> Check:
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


def _check_cache() -> Check:
    from cifar import data

    folder = data.cache_folder()
    size = 0
    with contextlib.suppress(OSError):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    check = _check_writable("cache", folder, "set XDG_CACHE_HOME to a folder that can be written")
    return Check(check.name, check.state, f"{check.found}, {size / 2**20:.0f} MiB in use", check.advice)


def _check_wandb() -> Check:
    from cifar.integrations.wandb.settings import find_credentials, mode_from_environment

    try:
        chosen = mode_from_environment("auto")
    except UserError as error:
        return Check("W&B", "note", str(error))
    if chosen == "online":
        return Check("W&B", "ok", f"online, with the key of {find_credentials()}")
    if chosen == "disabled":
        return Check("W&B", "note", "disabled by WANDB_MODE", "unset it to mirror runs")
    why = "no key is configured" if not find_credentials() else "WANDB_MODE or `wandb offline` says so"
    return Check(
        "W&B", "note", f"offline: {why}; runs are mirrored to files", "`wandb login` if you have an account; none is needed"
    )
