"""The energy of GPUs between two moments, by the counters of their cards: only where nobody else computes on them meanwhile.

meter = EnergyMeter(["GPU-5f3c..."])
...
meter.read()   # 1204.5: joules since the meter was made; or None, and `meter.problem` says why
meter.close()
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import socket
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

    uuids: of the GPUs, each once. This process computes on the first one, one other process on each of the others. A reading
    takes about a millisecond.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self.problem = "" if uuids else "no NVIDIA GPU"
        self._gpus: list[GpuSampler] = []
        self._watches: list[GpuWatch] = []
        for uuid in uuids:
            gpu = find_gpu(uuid)
            if gpu is None:
                self.problem = "NVML, which reads the energy counter, is not there"
                return
            self._gpus.append(gpu)
            if not self._watches:
                announce_use(uuid)
            self._watches.append(GpuWatch(uuid, num_expected=int(bool(self._watches))))
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

    def _sum_counters(self) -> float:
        """Joules since the driver was loaded, of all the GPUs together."""
        values = [gpu.read_joules() for gpu in self._gpus]
        if None in values:
            self.problem = self.problem or "this GPU has no energy counter for its user (an old card, or a part of one)"
        return sum(value for value in values if value is not None)

    def _check_alone(self) -> None:
        """Find out whether another process computes on one of the GPUs, or has done so since the meter was made."""
        for gpu, watch in zip(self._gpus, self._watches, strict=True):
            if self.problem:
                return
            processes = gpu.list_processes()
            if watch.has_company() or (processes is not None and len(processes) > 1):
                self.problem = "another process was on the GPU"
            elif not processes and read_variable(ALONE_VARIABLE) != "on":  # this process is there, and is not listed
                self.problem = (
                    "the driver does not say which processes are on the GPU, as in some containers; "
                    f"{ALONE_VARIABLE}=on says that nobody else uses it"
                )


# -- who is on a GPU, of our own processes -----------------------------------------------------------------------------

# NVML's list of processes has gaps: some containers hide processes, and one that came and went between two readings is not in
# it. So each of our processes that computes on a GPU holds a lock on a file of its own as long as it lives, and adds a byte to
# a file that is never cut.

_TOKEN = secrets.token_hex(8)
_announced: dict[str, int] = {}  # UUID -> the open file whose lock this process holds


def announce_use(uuid: str) -> None:
    """Let our other processes know that this one computes on a GPU from now on. If files cannot be written, nobody knows."""
    if not uuid or uuid in _announced:
        return
    folder = _presence_folder(uuid)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(_own_file(uuid), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the name is ours alone; whatever holds it is not waited for
        _announced[uuid] = file
        with open(folder / "visits", "ab") as visits:
            visits.write(b".")
        atexit.register(_forget_use, os.getpid(), _own_file(uuid))


def _forget_use(pid: int, own: Path) -> None:
    if os.getpid() == pid:  # not in a child that was forked
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)


class GpuWatch:
    """Whether others of our processes compute on a GPU, or have done so since this object was made.

    num_expected: others that belong to this training.
    """

    def __init__(self, uuid: str, num_expected: int = 0) -> None:
        self._folder, self._own, self._num_expected = _presence_folder(uuid), _own_file(uuid), num_expected
        self._num_visits = self._count_visits()

    def _count_visits(self) -> int:
        with contextlib.suppress(OSError):
            return (self._folder / "visits").stat().st_size
        return 0

    def has_company(self) -> bool:
        others = (path for path in self._folder.glob("*.lock") if path != self._own)
        return self._count_visits() != self._num_visits or sum(map(_is_held, others)) > self._num_expected


def _presence_folder(uuid: str) -> Path:
    return cache_folder() / "gpus" / uuid.removeprefix("GPU-")


def _own_file(uuid: str) -> Path:
    """Of this process alone: containers may share the folder, the host's name and process numbers."""
    return _presence_folder(uuid) / f"{socket.gethostname()}-{os.getpid()}-{_TOKEN}.lock"


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock on this file. The old file of one that is gone is deleted."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # so that two that look do not see each other
        if time.time() - os.stat(file).st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
