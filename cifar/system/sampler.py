"""Measures a process and its machine, under the names and units of W&B's own client (its core/internal/monitor and xpu).

    sampler = Sampler(pid, gpu_uuid)
    sampler.take()   # {"system.cpu": 51.2, "system.gpu.0.temp": 43, ...}

psutil and NVML are imported here only. The process beside the training imports both. A training on a GPU imports NVML alone,
to read the energy counter when it begins, when it saves a checkpoint and when it ends (energy.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

MIB = 2**20
ROOT = "/"  # the disk whose use is measured, as W&B does


class Sampler:
    """One process, and one GPU if `gpu_uuid` names one. Sums (network, disk) count from when this object was made.

    Raises ImportError where psutil is not installed, and LookupError if there is no such process.
    """

    def __init__(self, pid: int, gpu_uuid: str = "") -> None:
        import psutil

        self._psutil: Any = psutil
        try:
            self._process = psutil.Process(pid)
            self._cpu_mark = self._process.create_time(), 0.0  # time, and CPU seconds up to then
        except psutil.Error as error:
            raise LookupError(f"process {pid}: {error}") from None
        self._gpu = find_gpu(gpu_uuid) if gpu_uuid else None
        self._disks_before, self._network_before = self._disk_sums(), self._network_sums()

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        try:
            return bool(self._process.is_running() and self._process.status() != self._psutil.STATUS_ZOMBIE)
        except self._psutil.Error:
            return False

    def take(self) -> dict[str, float]:
        """All that can be measured now. What a machine does not tell is left out."""
        found: dict[str, float] = {}
        for measure in (self._measure_memory, self._measure_process, self._measure_disk, self._measure_network):
            with contextlib.suppress(self._psutil.Error, OSError, AttributeError, NotImplementedError):
                measure(found)
        if self._gpu:
            found.update(self._gpu.take())
        return {f"system.{name}": value for name, value in found.items()}

    def _measure_memory(self, found: dict[str, float]) -> None:
        memory = self._psutil.virtual_memory()
        found["memory_percent"] = memory.percent
        found["proc.memory.availableMB"] = memory.available / MIB
        self._total_memory = memory.total

    def _measure_process(self, found: dict[str, float]) -> None:
        with self._process.oneshot():
            resident = self._process.memory_info().rss
            times = self._process.cpu_times()
            found["proc.memory.rssMB"] = resident / MIB
            found["proc.memory.percent"] = 100 * resident / self._total_memory
            found["proc.cpu.threads"] = self._process.num_threads()
        now, used = time.time(), times.user + times.system
        before, used_before = self._cpu_mark
        if now > before:  # of all cores that the process may use, since the last sample
            found["cpu"] = 100 * max(0.0, used - used_before) / (now - before) / self._num_cores()
        self._cpu_mark = now, used

    def _num_cores(self) -> int:
        with contextlib.suppress(AttributeError):  # not on a Mac
            return len(self._process.cpu_affinity()) or 1
        return self._psutil.cpu_count() or 1

    def _measure_disk(self, found: dict[str, float]) -> None:
        usage = self._psutil.disk_usage(ROOT)
        found[f"disk.{ROOT}.usagePercent"] = usage.percent
        found[f"disk.{ROOT}.usageGB"] = usage.used / 2**30
        for name, (num_read, num_written) in self._disk_sums().items():
            read_before, written_before = self._disks_before.get(name, (num_read, num_written))
            found[f"disk.{name}.in"] = (num_read - read_before) / MIB
            found[f"disk.{name}.out"] = (num_written - written_before) / MIB

    def _measure_network(self, found: dict[str, float]) -> None:
        for name, now, before in zip(("sent", "recv"), self._network_sums(), self._network_before, strict=True):
            found[f"network.{name}"] = now - before

    def _disk_sums(self) -> dict[str, tuple[int, int]]:
        """Bytes read and written by now, for each disk that holds `ROOT`; for all where that cannot be known."""
        with contextlib.suppress(self._psutil.Error, OSError, RuntimeError, AttributeError, NotImplementedError):
            sums = self._psutil.disk_io_counters(perdisk=True) or {}
            roots = [part.device.removeprefix("/dev/") for part in self._psutil.disk_partitions() if part.mountpoint == ROOT]
            names = [name for name in roots if name in sums] or [n for n in sums if not n.startswith(("loop", "ram", "zram"))]
            return {name: (sums[name].read_bytes, sums[name].write_bytes) for name in names}
        return {}

    def _network_sums(self) -> tuple[int, int]:
        with contextlib.suppress(self._psutil.Error, OSError, AttributeError, NotImplementedError):
            if sums := self._psutil.net_io_counters():
                return sums.bytes_sent, sums.bytes_recv
        return 0, 0


class GpuSampler:
    """One NVIDIA GPU, by NVML. `index`: its number on this machine, as nvidia-smi shows it."""

    def __init__(self, nvml: Any, handle: Any, index: int) -> None:
        self._nvml, self._handle, self.index = nvml, handle, index

    def take(self) -> dict[str, float]:
        nvml, handle, found = self._nvml, self._handle, dict[str, float]()

        def measure(function: Callable[[], dict[str, float]]) -> None:
            with contextlib.suppress(nvml.NVMLError):  # not every card tells everything
                found.update({f"gpu.{self.index}.{name}": value for name, value in function().items()})

        def power() -> dict[str, float]:
            watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
            return {"powerWatts": watts}

        def power_limit() -> dict[str, float]:
            limit = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
            used = found.get(f"gpu.{self.index}.powerWatts")
            share = {"powerPercent": 100 * used / limit} if used is not None and limit else {}
            return {"enforcedPowerLimitWatts": limit, **share}

        def utilization() -> dict[str, float]:
            rates = nvml.nvmlDeviceGetUtilizationRates(handle)
            return {"gpu": rates.gpu, "memory": rates.memory}

        def memory() -> dict[str, float]:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            return {"memoryAllocated": 100 * memory.used / memory.total, "memoryAllocatedBytes": memory.used}

        measure(utilization)
        measure(memory)
        measure(lambda: {"temp": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)})
        measure(power)
        measure(power_limit)
        measure(lambda: {"smClock": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)})
        measure(lambda: {"memoryClock": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)})
        return found

    def read_joules(self) -> float | None:
        """What the card has used since its driver was loaded. None where it does not tell, or is cut into parts (MIG)."""
        nvml = self._nvml
        with contextlib.suppress(nvml.NVMLError):  # of a card that cannot be cut
            if nvml.nvmlDeviceGetMigMode(self._handle)[0]:
                return None
        with contextlib.suppress(nvml.NVMLError):
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000  # it counts millijoules
        return None

    def list_processes(self) -> list[int] | None:
        """The processes that compute on it, by number. None where the driver does not tell."""
        with contextlib.suppress(self._nvml.NVMLError):
            return [int(process.pid) for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)]
        return None

    def describe(self) -> dict[str, Any]:
        """What it is: name, memory in bytes, cores, and the version of CUDA that its driver knows."""
        nvml, found = self._nvml, dict[str, Any]()
        questions: dict[str, Callable[[], Any]] = {
            "name": lambda: nvml.nvmlDeviceGetName(self._handle),
            "memory_total": lambda: int(nvml.nvmlDeviceGetMemoryInfo(self._handle).total),
            "cuda_cores": lambda: int(nvml.nvmlDeviceGetNumGpuCores(self._handle)),
            "uuid": lambda: nvml.nvmlDeviceGetUUID(self._handle),
            "cuda_version": lambda: _format_cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2()),
        }
        for name, ask in questions.items():
            with contextlib.suppress(nvml.NVMLError):
                value = ask()
                found[name] = value.decode() if isinstance(value, bytes) else value
        return found


def is_relative(pid: int) -> bool:
    """Whether a process is this one's parent, or another child of that parent. Of another machine's process, it says no."""
    import psutil

    if pid <= 0:
        return False
    with contextlib.suppress(psutil.Error):
        return pid == os.getppid() or bool(psutil.Process(pid).ppid() == os.getppid())
    return False


def find_gpu(uuid: str) -> GpuSampler | None:
    """The GPU of this UUID; None where NVML does not know it, or is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    nvml: Any = pynvml
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        return GpuSampler(nvml, handle, int(nvml.nvmlDeviceGetIndex(handle)))
    return None


def _format_cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"  # 13020: CUDA 13.2
