"""System metrics have W&B's names and units, and are of the process that was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar.system import sampler as sampler_module
from cifar.system.machine import describe_machine, list_packages
from cifar.system.sampler import GpuSampler, Sampler, is_relative

# As W&B's client calls them: core/internal/monitor/system.go of wandb 0.31.
NAMES = {
    "system.cpu",
    "system.memory_percent",
    "system.proc.memory.availableMB",
    "system.proc.memory.rssMB",
    "system.proc.memory.percent",
    "system.proc.cpu.threads",
    "system.disk./.usagePercent",
    "system.disk./.usageGB",
    "system.network.sent",
    "system.network.recv",
}


def test_a_sample_has_the_names_and_units_of_wandb() -> None:
    sampler = Sampler(os.getpid())
    first = sampler.take()
    assert first.keys() >= NAMES
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert first["system.proc.memory.rssMB"] == pytest.approx(resident, rel=0.2)
    assert first["system.proc.cpu.threads"] >= 1 and 0 <= first["system.memory_percent"] <= 100
    used = os.statvfs("/")
    assert first["system.disk./.usageGB"] == pytest.approx((used.f_blocks - used.f_bfree) * used.f_frsize / 2**30, rel=0.1)


def test_it_is_the_other_process_that_is_measured() -> None:
    content = "x = bytearray(120_000_000); print(len(x), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", content], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdin
        child.stdout.readline()
        sample = Sampler(child.pid).take()
        assert 110 < sample["system.proc.memory.rssMB"] < 200 and sample["system.proc.cpu.threads"] == 1
        child.stdin.close()
    with pytest.raises(LookupError):
        Sampler(child.pid)


def test_only_a_relative_is_measured() -> None:
    child = "from cifar.system.sampler import is_relative; import os, sys; "
    child += "print(is_relative(os.getppid()), is_relative(int(sys.argv[1])), is_relative(1), is_relative(0), is_relative(-5))"
    with subprocess.Popen(["sleep", "60"]) as sibling:
        done = subprocess.run([sys.executable, "-c", child, str(sibling.pid)], capture_output=True, text=True, check=True)
        sibling.kill()
    assert done.stdout.split() == ["True", "True", "False", "False", "False"] or os.getpid() == 1
    assert not is_relative(2**30)


class Nvml:
    """As much of NVML as a sample asks for; this machine has no GPU. The temperature is not supported by this card."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0
    NVML_CLOCK_MEM = 1
    nvmlDeviceGetPowerUsage = staticmethod(lambda handle: 350_000)  # milliwatts
    nvmlDeviceGetEnforcedPowerLimit = staticmethod(lambda handle: 700_000)
    nvmlDeviceGetClockInfo = staticmethod(lambda handle, kind: (1980, 2619)[kind])

    @staticmethod
    def nvmlDeviceGetUtilizationRates(handle: object) -> object:
        return type("Rates", (), {"gpu": 97, "memory": 41})

    @staticmethod
    def nvmlDeviceGetMemoryInfo(handle: object) -> object:
        return type("Memory", (), {"used": 2**30, "total": 4 * 2**30})

    @classmethod
    def nvmlDeviceGetTemperature(cls, handle: object, kind: int) -> int:
        raise cls.NVMLError("not supported")


def test_a_gpu_has_the_names_and_units_of_wandb() -> None:
    assert GpuSampler(Nvml, object(), 3).take() == {  # xpu/src/gpu_nvidia.rs of wandb 0.31
        "gpu.3.gpu": 97,
        "gpu.3.memory": 41,
        "gpu.3.memoryAllocated": 25.0,
        "gpu.3.memoryAllocatedBytes": 2**30,
        "gpu.3.powerWatts": 350.0,
        "gpu.3.enforcedPowerLimitWatts": 700.0,
        "gpu.3.powerPercent": 50.0,
        "gpu.3.smClock": 1980,
        "gpu.3.memoryClock": 2619,
    }


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JWT", "a-secret-of-slurm-123")
    found = describe_machine("GPU-of-another-machine")
    assert found["cpu_count_logical"] == os.cpu_count() and "gpus" not in found
    assert found["slurm"]["job_id"] == "4711" and found["slurm"]["jwt"] == "***"
    assert any(line.startswith("torch==") for line in list_packages()) and list(list_packages()) == sorted(
        list_packages(), key=str.lower
    )
    assert sampler_module.find_gpu("none") is None
