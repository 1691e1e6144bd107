"""The CPUs and GPUs of this machine: which GPUs are free, and the environment variables that pin a worker to one.

A GPU is left alone if a process of another user runs on it, or one that cannot be seen from here (in another container).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar.errors import UserError

SMI_SECONDS = 30.0
MAX_CPU_WORKERS = 4  # by default; one worker for each core takes less CPU time than one trial of many threads (LOG.md)
_QUERY_GPUS = ["--query-gpu=index,uuid,name", "--format=csv,noheader"]
_QUERY_MEMORY = ["--query-gpu=index,uuid,memory.free,name", "--format=csv,noheader,nounits"]
_QUERY_PROCESSES = ["--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it. `index` counts by PCI address."""

    index: int
    uuid: str
    name: str


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU."""

    uuid: str
    pid: int
    name: str
    mib: int  # of GPU memory; 0 if the driver does not tell


def parse_gpus(text: str) -> list[Gpu]:
    """Parse lines such as `0, GPU-5f3c..., NVIDIA H200`."""
    rows = [[field.strip() for field in line.split(",", 2)] for line in text.splitlines()]
    return [Gpu(int(row[0]), row[1], row[2]) for row in rows if len(row) == 3 and row[0].isdigit()]


def parse_gpu_processes(text: str) -> list[GpuProcess]:
    """Parse lines such as `GPU-5f3c..., 4711, python3, 1024`. Names may have commas; the driver may hide name and memory."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) >= 4 and fields[1].isdigit():
            name = ",".join(fields[2:-1])
            found.append(GpuProcess(fields[0], int(fields[1]), name, int(fields[-1]) if fields[-1].isdigit() else 0))
    return found


def select_gpus(
    wanted: str, gpus: list[Gpu], processes: list[GpuProcess], visible: str | None, is_own: Callable[[int], bool]
) -> tuple[list[Gpu], list[str]]:
    """The free GPUs of those that are wanted (`all` or `0,1`), and a message for each that is skipped.

    visible: CUDA_VISIBLE_DEVICES, which a batch system may have set: `all` means these. is_own: whether a process (by pid) is
    this user's. Raises UserError if no GPU is left.
    """
    known = {str(gpu.index): gpu for gpu in gpus}
    if wanted == "all":
        allowed = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
        asked = [gpu for gpu in gpus if allowed is None or any(_is_named(gpu, name) for name in allowed)]
    else:
        names = [name.strip() for name in wanted.split(",")]
        for name in names:
            if name not in known:
                raise UserError(f"--gpus {wanted}: there is no GPU '{name}' here (known: {', '.join(known)}, or all)")
        asked = [known[name] for name in dict.fromkeys(names)]
    free, skipped = [], []
    for gpu in asked:
        others = [app for app in processes if app.uuid == gpu.uuid and not is_own(app.pid)]
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


def _is_named(gpu: Gpu, name: str) -> bool:
    return name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name))


def read_gpus(environments: Sequence[Mapping[str, str]]) -> list[tuple[str, int] | None]:
    """Name, as CUDA gives it, and free bytes of the first GPU that a process with each environment sees, without using it.

    None where there is none, or where nvidia-smi does not tell.
    """
    try:
        rows = [line.split(", ", 3) for line in _query_nvidia_smi(_QUERY_MEMORY).splitlines()]
        gpus = [(Gpu(int(row[0]), row[1], row[3].strip()), int(row[2]) * 2**20) for row in rows if len(row) == 4]
    except (UserError, ValueError):
        return [None for _ in environments]

    def find(environment: Mapping[str, str]) -> tuple[str, int] | None:
        visible = {**os.environ, **environment}.get("CUDA_VISIBLE_DEVICES")
        first = None if visible is None else visible.split(",")[0].strip()
        return next(((gpu.name, free) for gpu, free in gpus if first is None or _is_named(gpu, first)), None)

    return [find(environment) for environment in environments]


def has_gpu() -> bool:
    """Whether this machine has a GPU, found out without importing PyTorch."""
    return sys.platform == "darwin" or has_nvidia_gpu()


def has_nvidia_gpu() -> bool:
    """The same, for GPUs of NVIDIA."""
    return Path("/dev/nvidia0").exists()


def default_num_workers() -> int:
    """One worker on a GPU; without one, a worker for each core, up to MAX_CPU_WORKERS."""
    return 1 if has_gpu() else min(MAX_CPU_WORKERS, num_cores())


def num_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def assign_gpus(gpus: str, per_gpu: int) -> tuple[list[Mapping[str, str]], list[str]]:
    """The environment variables of each worker (the first worker of every GPU first), and messages to print."""
    free, messages = select_gpus(
        gpus,
        parse_gpus(_query_nvidia_smi(_QUERY_GPUS)),
        parse_gpu_processes(_query_nvidia_smi(_QUERY_PROCESSES)),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        _is_own_process,
    )
    suffix = f", {per_gpu} workers each" if per_gpu > 1 else ""
    messages.append(f"on {'GPUs' if len(free) > 1 else 'GPU'} {', '.join(f'{gpu.index} ({gpu.name})' for gpu in free)}{suffix}")
    # nvidia-smi's numbers are CUDA's only in this order
    return [
        {"CUDA_VISIBLE_DEVICES": str(gpu.index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} for _ in range(per_gpu) for gpu in free
    ], messages


def _query_nvidia_smi(options: list[str]) -> str:
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except FileNotFoundError:
        raise UserError("--gpus: there is no nvidia-smi here; without NVIDIA GPUs take --workers N") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"--gpus: nvidia-smi does not answer ({error}); see whether the driver is well") from None


def _is_own_process(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.getuid()
    except OSError:
        return False
