"""Where a run runs: versions, device, state of the code. Nothing that names a person, and no secrets."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "wandb", "ultralytics-thop", "optuna", "matplotlib", "pydantic", "typer", "rich")


def describe_environment(device: torch.device, fingerprint: str) -> dict[str, Any]:
    """The content of environment.json. `fingerprint`: of the dataset. Takes some milliseconds."""
    return {
        "versions": dict(installed_versions()),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "git": git_state(),
        "data_fingerprint": fingerprint,
        "started": time.time(),
    }


@functools.cache  # one answer for all trials of this process: its code stays as it was when it was loaded
def installed_versions() -> dict[str, str]:
    """The versions of Python and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, `Apple MPS`, or the CPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple MPS"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"


@functools.cache
def git_state() -> dict[str, Any]:
    """The commit of this code, and whether files differ from it; {} outside a checkout."""
    here = Path(__file__).resolve().parent

    def call_git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return {
            "commit": call_git("rev-parse", "HEAD"),
            "dirty": bool(call_git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}
