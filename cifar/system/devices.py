"""Where an agent's workers run: the GPUs that are free, and what pins a worker to one.

A GPU with a process of another user, or of one that is not to be seen from here (another container's), is left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cifar.errors import UserError

SMI_SECONDS = 30.0
CPU_WORKERS = 4  # at most; one a core takes less CPU time than one trial of many threads (LOG.md)
_GPUS = ["--query-gpu=index,uuid,name", "--format=csv,noheader"]
_APPS = ["--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi; `index` counts by PCI address."""

    index: int
    uuid: str
    name: str


@dataclass(frozen=True)
class App:
    """A process that computes on a GPU."""

    uuid: str
    pid: int
    name: str
    mib: int  # 0 where the driver does not tell


def parse_gpus(text: str) -> list[Gpu]:
    """`0, GPU-5f3c..., NVIDIA H200` a line."""
    rows = [[field.strip() for field in line.split(",", 2)] for line in text.splitlines()]
    return [Gpu(int(row[0]), row[1], row[2]) for row in rows if len(row) == 3 and row[0].isdigit()]


def parse_apps(text: str) -> list[App]:
    """`GPU-5f3c..., 4711, python3, 1024` a line; names may hold commas, and the driver may hide name and memory."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) >= 4 and fields[1].isdigit():
            name = ",".join(fields[2:-1])
            found.append(App(fields[0], int(fields[1]), name, int(fields[-1]) if fields[-1].isdigit() else 0))
    return found


def choose(
    wanted: str, gpus: list[Gpu], apps: list[App], visible: str | None, mine: Callable[[int], bool]
) -> tuple[list[Gpu], list[str]]:
    """The GPUs to use of `all` or `0,1`, and a sentence for each that is skipped. Raises UserError where none is left.

    `visible` is CUDA_VISIBLE_DEVICES, which a batch system may have set: `all` means those.
    """
    known = {str(gpu.index): gpu for gpu in gpus}
    if wanted == "all":
        allowed = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
        asked = [gpu for gpu in gpus if allowed is None or any(_is(gpu, name) for name in allowed)]
    else:
        names = [name.strip() for name in wanted.split(",")]
        for name in names:
            if name not in known:
                raise UserError(f"--gpus {wanted}: there is no GPU '{name}' here (known: {', '.join(known)}, or all)")
        asked = [known[name] for name in dict.fromkeys(names)]
    free, skipped = [], []
    for gpu in asked:
        others = [app for app in apps if app.uuid == gpu.uuid and not mine(app.pid)]
        if others:
            who = ", ".join(f"process {app.pid} ({app.name or 'unnamed'}, {app.mib:,} MiB)" for app in others)
            skipped.append(f"GPU {gpu.index} is skipped: in use by {who}")
        else:
            free.append(gpu)
    if not free:
        raise UserError(
            f"no GPU is free for --gpus {wanted}: {'; '.join(skipped) or 'none is there'}; try again later, or --workers"
        )
    return free, skipped


def _is(gpu: Gpu, name: str) -> bool:
    return name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name))


def any_gpu() -> bool:
    """Whether there is a GPU here, asked without importing PyTorch."""
    return sys.platform == "darwin" or Path("/dev/nvidia0").exists()


def default_workers() -> int:
    """Trials at a time: one where there is a GPU to share, else one a core, up to CPU_WORKERS."""
    return 1 if any_gpu() else min(CPU_WORKERS, cores())


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pins(gpus: str, per_gpu: int) -> tuple[list[Mapping[str, str]], list[str]]:
    """What the environment of each worker has, every GPU's first worker first; and what there is to say."""
    free, said = choose(gpus, parse_gpus(_smi(_GPUS)), parse_apps(_smi(_APPS)), os.environ.get("CUDA_VISIBLE_DEVICES"), _mine)
    each = f", {per_gpu} workers each" if per_gpu > 1 else ""
    said.append(f"on {'GPUs' if len(free) > 1 else 'GPU'} {', '.join(f'{gpu.index} ({gpu.name})' for gpu in free)}{each}")
    # nvidia-smi's numbers are CUDA's only in this order
    return [
        {"CUDA_VISIBLE_DEVICES": str(gpu.index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} for _ in range(per_gpu) for gpu in free
    ], said


def _smi(options: list[str]) -> str:
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except FileNotFoundError:
        raise UserError("--gpus: there is no nvidia-smi here; without NVIDIA GPUs take --workers N") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"--gpus: nvidia-smi does not answer ({error}); see whether the driver is well") from None


def _mine(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.getuid()
    except OSError:
        return False
