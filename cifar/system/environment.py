"""Where a run runs: versions, device, state of the code, the command, the host and the user. No secrets."""

from __future__ import annotations

import contextlib
import functools
import getpass
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cifar.system.redact import MASK, is_secret_name, redact

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
        "pid": os.getpid(),
        **({"gpu_uuid": uuid} if (uuid := gpu_uuid(device)) else {}),
        **_describe_process(),
    }


@functools.cache
def _describe_process() -> dict[str, Any]:
    """Who runs it, where, and by which command; the rest of the machine is in machine.json (machine.py)."""
    found: dict[str, Any] = {"host": socket.gethostname()}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container may have no user of this number
        found["user"] = getpass.getuser()
    with contextlib.suppress(OSError):  # the folder was deleted
        found["cwd"] = os.getcwd()
    found["executable"] = sys.executable
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = str(getattr(main, "name", ""))
    if module.startswith("cifar.agent"):
        return found  # a worker's command says nothing about its trial
    is_ours = module.startswith("cifar") or Path(sys.argv[0]).name == "cifar"
    return {**found, "program": "-m cifar" if is_ours else sys.argv[0], "args": mask_arguments(sys.argv[1:])}


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets: what `redact` finds, and what follows an option whose name says so."""
    masked, is_secret = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        is_named = argument.startswith("-") and is_secret_name(name.lstrip("-").replace("-", "_"))
        if is_secret and not argument.startswith("-"):
            masked.append(MASK)
        else:
            masked.append(f"{name}={MASK}" if is_named and value else redact(argument))
        is_secret = is_named and not value
    return masked


def gpu_uuid(device: torch.device) -> str:
    """By which NVML finds the GPU, also where CUDA_VISIBLE_DEVICES hides others; "" for no NVIDIA GPU."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


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


DIFF_VARIABLE, DIFF_FILE = "CIFAR_SAVE_DIFF", "diff.patch"  # on: `--save-diff` sets it, also for the processes that it starts
MAX_DIFF_BYTES = 1_000_000
CODE_FOLDER = Path(__file__).resolve().parent


@functools.cache
def git_diff(folder: Path = CODE_FOLDER) -> bytes:
    """How a checkout differs from its commit (`git diff HEAD`), without secrets, cut where it is large; b"" if not."""
    command = ["git", "-C", str(folder), "diff", "HEAD", "--no-color", "--no-ext-diff"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run(command, capture_output=True, timeout=20, check=True).stdout.decode("utf-8", "replace")
        content = redact(text).encode("utf-8", "replace")
        if len(content) > MAX_DIFF_BYTES:
            content = content[:MAX_DIFF_BYTES].rpartition(b"\n")[0] + b"\n# the rest is left out: it is too large\n"
        return content
    return b""
