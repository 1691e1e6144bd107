"""GPUs by what nvidia-smi says, true or pretended: which are free, who has the others, and what a worker sees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cifar import registry
from cifar.errors import UserError
from cifar.system import devices
from cifar.tracking.run_dir import RunDir
from helpers.agent_processes import create_sweep, start_agent
from helpers.processes import wait_for_exit

GPUS = "0, GPU-aaaa-1, NVIDIA H200\n1, GPU-bbbb-2, NVIDIA H200\n2, GPU-cccc-3, NVIDIA A100-SXM4-80GB\n"
APPS = "GPU-aaaa-1, 4711, python3, 1024\nGPU-aaaa-1, 4712, /opt/a, b/train, [N/A]\nGPU-cccc-3, 99, [Not Found], 5\n"
SMI = """#!/bin/sh
case "$1" in
  --query-gpu=*) cat "$FAKE_SMI/gpus" ;;
  --query-compute-apps=*) cat "$FAKE_SMI/apps" ;;
  *) exit 9 ;;
esac
"""
SEES = """
import os
from cifar.registry import probes

@probes.register("sees")
class Sees:
    labels, layers = {}, []
    def start(self, parameters):
        with open(os.environ["SEEN"], "a") as file:
            file.write(os.environ["CUDA_VISIBLE_DEVICES"] + " " + os.environ["CUDA_DEVICE_ORDER"] + "\\n")
    def after_update(self, parameters):
        pass
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "smi"
    folder.mkdir()
    (folder / "gpus").write_text(GPUS)
    (folder / "apps").write_text(APPS)
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("FAKE_SMI", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def test_what_nvidia_smi_prints_is_read() -> None:
    assert [(gpu.index, gpu.uuid) for gpu in devices.parse_gpus(GPUS)] == [
        (0, "GPU-aaaa-1"),
        (1, "GPU-bbbb-2"),
        (2, "GPU-cccc-3"),
    ]
    assert devices.parse_gpu_processes(APPS) == [
        devices.GpuProcess("GPU-aaaa-1", 4711, "python3", 1024),
        devices.GpuProcess("GPU-aaaa-1", 4712, "/opt/a,b/train", 0),
        devices.GpuProcess("GPU-cccc-3", 99, "[Not Found]", 5),
    ]
    assert devices.parse_gpus("No devices were found\n") == [] == devices.parse_gpu_processes("No running processes found\n")


def test_gpus_in_use_by_others_are_skipped_and_named() -> None:
    gpus, apps = devices.parse_gpus(GPUS), devices.parse_gpu_processes(APPS)

    def chosen(wanted: str, visible: str | None = None, mine: tuple[int, ...] = ()) -> list[int]:
        free, said = devices.select_gpus(wanted, gpus, apps, visible, lambda pid: pid in mine)
        assert all("is skipped: in use by process" in line for line in said)
        return [gpu.index for gpu in free]

    assert chosen("all") == chosen("0,1") == [1] and chosen("1, 1") == [1]
    assert chosen("all", mine=(4711, 4712)) == [0, 1] and chosen("2,0", mine=(99, 4711, 4712)) == [2, 0]
    assert chosen("all", visible="1,2", mine=(99,)) == [1, 2] and chosen("all", visible="GPU-bbbb") == [1]
    with pytest.raises(UserError, match=r"GPU 0 is skipped: in use by process 4711 \(python3, 1,024 MiB\), process 4712"):
        chosen("0")
    for wanted, visible, said in (("7", None, "known: 0, 1, 2"), ("x", None, "known: 0"), ("all", "", "none is there")):
        with pytest.raises(UserError, match=said):
            chosen(wanted, visible)


def test_workers_are_spread_over_the_gpus(smi: Path) -> None:
    pins, said = devices.assign_gpus("all", 2)
    assert [pin["CUDA_VISIBLE_DEVICES"] for pin in pins] == ["1", "1"] and "GPU 1 (NVIDIA H200), 2 workers each" in said[-1]
    (smi / "apps").write_text(f"GPU-aaaa-1, {os.getpid()}, python3, 7\n")  # one's own
    assert [pin["CUDA_VISIBLE_DEVICES"] for pin in devices.assign_gpus("0,2", 2)[0]] == ["0", "2", "0", "2"]
    (smi / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(UserError, match="does not answer"):
        devices.assign_gpus("all", 1)


def test_without_nvidia_smi_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--workers N"):
        devices.assign_gpus("all", 1)


@pytest.mark.slow
def test_each_worker_sees_its_gpu_alone_and_the_threads_are_divided(
    runs: Path, smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (smi / "apps").write_text("GPU-cccc-3, 1999999999, train.py, 5\n")
    (tmp_path / "plugin" / "probes").mkdir(parents=True)
    (tmp_path / "plugin" / "probes" / "sees.py").write_text(SEES)
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "plugin"))
    backend = create_sweep(
        runs, "parameters: {model: {value: conv4}, seed: {values: [0, 1, 2, 3]}}", device="cpu", probes="sees"
    )
    registry.probes._entries.pop("sees")
    code, output = wait_for_exit(start_agent(backend, "gpus='all'", SEEN=str(tmp_path / "seen")))
    assert code == 0 and "GPU 2 is skipped: in use by process 1999999999 (train.py, 5 MiB)" in output, output
    assert "on GPUs 0 (NVIDIA H200), 1 (NVIDIA H200)" in output
    assert set((tmp_path / "seen").read_text().splitlines()) == {"0 PCI_BUS_ID", "1 PCI_BUS_ID"}
    assert RunDir(runs / backend.run_id(0)).read_json("config")["threads"] == 1  # fixed with the sweep
