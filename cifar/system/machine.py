"""What the machine of a run is, for its record: processors, memory, disk, GPU, and the installed packages.

It is found by the process beside the training, since listing packages takes longer than a step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from pathlib import Path
from typing import Any

from cifar.system.redact import mask_secrets, redact
from cifar.system.sampler import ROOT, find_gpu


def describe_machine(gpu_uuid: str = "") -> dict[str, Any]:
    """The content of machine.json, without secrets. What cannot be found is left out."""
    found = dict(_describe_host())
    gpu = find_gpu(gpu_uuid) if gpu_uuid else None
    if gpu:
        about = gpu.describe()
        found["cuda_version"] = about.pop("cuda_version", "")
        found["gpus"] = [about]
    if remote := git_remote():
        found["git_remote"] = remote
    return found


def _describe_host() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with contextlib.suppress(ImportError, OSError):
        import psutil

        found["cpu_count"], found["cpu_count_logical"] = psutil.cpu_count(logical=False), psutil.cpu_count()
        found["memory_total"] = psutil.virtual_memory().total
        usage = psutil.disk_usage(ROOT)
        found["disk"] = {ROOT: {"total": usage.total, "used": usage.used}}
    slurm = {name.removeprefix("SLURM_").lower(): value for name, value in os.environ.items() if name.startswith("SLURM_")}
    if slurm:
        found["slurm"] = mask_secrets(slurm)
    return found


@functools.cache
def list_packages() -> tuple[str, ...]:
    """The installed packages, `name==version`, sorted."""
    import importlib.metadata  # not for commands that only start

    found = set()
    for package in importlib.metadata.distributions():
        with contextlib.suppress(KeyError, UnicodeDecodeError, TypeError):  # metadata that is damaged
            if name := package.metadata["Name"]:
                found.add(f"{name}=={package.version}")
    return tuple(sorted(found, key=str.lower))


@functools.cache
def git_remote() -> str:
    """Where this code's repository comes from, without passwords; "" where there is none."""
    command = ["git", "-C", str(code_folder()), "config", "--get", "remote.origin.url"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return redact(subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip())
    return ""


def code_folder() -> Path:
    return Path(__file__).resolve().parent
