"""The energy of GPUs between two moments, by the counters of their cards: only where nobody else computes on them meanwhile.

meter = EnergyMeter(["GPU-5f3c..."])
...
meter.read()   # 1204.5: joules since the meter was made; or None, and `meter.problem` says why
meter.close()
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from cifar.system.disk import cache_folder
from cifar.system.sampler import GpuSampler, find_gpu
from cifar.system.variables import read_variable

ALONE_VARIABLE = "CIFAR_GPU_ALONE"  # on: the user says that nobody else computes on these GPUs
STALE_SECONDS = 86_400.0  # after which the file of a process that is gone is deleted


class EnergyMeter:
    """Joules of some GPUs since it was made. Once the number cannot be known, it stays unknown.

    uuids: of the GPUs, each once. A reading takes about a millisecond.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self.problem = "" if uuids else "no NVIDIA GPU"
        self._gpus: list[GpuSampler] = []
        self._presences: list[GpuPresence] = []
        for uuid in uuids:
            gpu = find_gpu(uuid)
            if gpu is None:
                self.problem = "NVML, which reads the energy counter, is not there"
                return
            self._gpus.append(gpu)
            self._presences.append(GpuPresence(uuid))
        self._before = self._sum_counters()
        self._check_alone()

    def read(self) -> float | None:
        """Joules since the meter was made, or None."""
        if not self.problem:
            now = self._sum_counters()
            self._check_alone()
            if not self.problem and now < self._before:
                self.problem = "the energy counter was set back"
        return None if self.problem else now - self._before

    def close(self) -> None:
        for presence in self._presences:
            presence.leave()

    def _sum_counters(self) -> float:
        """Joules since the driver was loaded, of all the GPUs together."""
        values = [gpu.read_joules() for gpu in self._gpus]
        if None in values:
            self.problem = self.problem or "this GPU has no energy counter for its user (an old card, or a part of one)"
        return sum(value for value in values if value is not None)

    def _check_alone(self) -> None:
        """Find out whether another process computes on one of the GPUs, or has done so since the meter was made."""
        for gpu, presence in zip(self._gpus, self._presences, strict=True):
            if self.problem:
                return
            processes = gpu.list_processes()
            if presence.has_company() or (processes is not None and len(processes) > 1):
                self.problem = "another process was on the GPU"
            elif not processes and read_variable(ALONE_VARIABLE) != "on":  # this process is there, and is not listed
                self.problem = (
                    "the driver does not say which processes are on the GPU, as in some containers; "
                    f"{ALONE_VARIABLE}=on says that nobody else uses it"
                )


class GpuPresence:
    """Makes this process known to others of this user that measure the same GPU, and knows of them.

    NVML's list of processes has gaps: some containers hide processes, and one that came and went between two readings is not
    in it. Each measuring process holds a lock on a file of its own, and adds a byte to a file that is never cut.
    """

    def __init__(self, uuid: str) -> None:
        folder = cache_folder() / "gpus" / uuid.removeprefix("GPU-")
        self._own: Path | None = None
        self._file: int | None = None
        self._visits, self._num_visits = folder / "visits", -1
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            own = folder / f"{os.getpid()}-{secrets.token_hex(4)}.lock"
            self._file = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            self._own = own
            fcntl.flock(self._file, fcntl.LOCK_EX)
            with open(self._visits, "ab") as file:
                file.write(b".")
            self._num_visits = self._visits.stat().st_size

    def has_company(self) -> bool:
        """Whether another one is there, or was since this one came. Where files cannot be written, it is not known: no."""
        if self._own is None:
            return False
        with contextlib.suppress(OSError):
            if self._visits.stat().st_size != self._num_visits:
                return True
            return any(_is_held(path) for path in self._own.parent.glob("*.lock") if path != self._own)
        return False

    def leave(self) -> None:
        if self._own is not None and self._file is not None:
            with contextlib.suppress(OSError):
                self._own.unlink(missing_ok=True)
            os.close(self._file)
            self._own = self._file = None


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock on this file. The old file of one that is gone is deleted."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.stat(file).st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
