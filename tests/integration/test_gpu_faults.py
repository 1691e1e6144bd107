"""One of several GPUs fails: the others go on, its trials are done there, and the lines say what happened.

On a machine without GPUs a pretended nvidia-smi lists some, and trials are trained on the CPU by workers that are pinned to
them; a network of the test then fails on one of them. The last tests want two true GPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cifar import registry
from cifar.sweeps.local import LocalBackend
from cifar.tracking.run_dir import RunDir
from helpers.agent_processes import create_sweep, start_agent
from helpers.processes import wait_for_exit, wait_until

SMI = """#!/bin/sh
case "$1" in
  --query-gpu=*) printf '0, GPU-a, pretended\\n1, GPU-b, pretended\\n2, GPU-c, pretended\\n' ;;
  *) ;;
esac
"""
PICKY = """
import os, signal, time
import torch
from torch import nn
from cifar.models.conv import ConvNet
from cifar.registry import models

class Picky(ConvNet):
    calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls > 3 and os.environ.get("CUDA_VISIBLE_DEVICES") == os.environ["BAD_GPU"]:  # after the check of the parts
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "memory":
                torch.empty(2**44, device=x.device)
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        time.sleep(0.25 * (x.device.type == "cpu"))  # so that the bad GPU's next worker comes before the others have done all
        return super().forward(x)

@models.register("picky")
def picky(*, fault: str = "dies") -> nn.Module:
    model = Picky(width=4, depth=1)
    model.fault = fault
    return model
"""
PAIR = os.environ.get("CIFAR_TEST_GPUS", "0,1")  # of which the second one fails
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs here: true GPUs that fail are NOT tested")
HOLDS = """
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free - {} * 2**30), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def picky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "plugin" / "models").mkdir(parents=True)
    (tmp_path / "plugin" / "models" / "picky.py").write_text(PICKY)
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "plugin"))
    monkeypatch.setenv("BAD_GPU", PAIR.split(",")[1])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield
    registry.models._entries.pop("picky", None)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def seeds(runs: Path, count: int, model: str, **fixed: object) -> LocalBackend:
    text = f"parameters: {{model: {{value: {model}}}, seed: {{values: {list(range(count))}}}}}"
    return create_sweep(runs, text, **fixed)


def pids_on_gpu(gpu: str, agent: int) -> list[int]:
    """The workers of an agent that are pinned to a GPU."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_worker = b"cifar.agent.worker" in (folder / "cmdline").read_bytes()
            pinned = f"CUDA_VISIBLE_DEVICES={gpu}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if is_worker and pinned and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == agent:
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("fault", ["dies", "raises"])
def test_a_gpu_that_fails_each_trial_is_set_aside_and_the_others_do_all(runs: Path, smi: None, picky: None, fault: str) -> None:
    backend = seeds(runs, 12, "picky", fault=fault, device="cpu")
    code, output = wait_for_exit(start_agent(backend, "gpus='0,1'", BAD_GPU="1"))
    cells = backend.list_cells()
    assert code == 0 and [cell["state"] for cell in cells] == ["finished"] * 12, output
    assert sorted(cell["attempt"] for cell in cells) == [1] * 10 + [2] * 2, output  # two were lost to it, and no more
    what = "its process was killed by SIGKILL" if fault == "dies" else "uncorrectable ECC error"
    assert output.count("(on GPU 1: ") == 2 and output.count("it will be tried again") == 2 and what in output, output
    assert output.count("GPU 1 is set aside, the other GPUs do its trials: ") == 1, output
    assert output.count("GPU 1 was set aside: ") == 1 and "in a row" not in output, output


def test_a_worker_that_is_killed_once_costs_its_gpu_nothing(runs: Path, smi: None, picky: None) -> None:
    backend = seeds(runs, 4, "conv4", device="cpu", epochs=12)
    agent = start_agent(backend, "gpus='0,1,2'")
    wait_until(lambda: backend.count_states().get("running", 0) == 3 and len(list(runs.glob("*/metrics.jsonl"))) >= 3)
    (victim,) = pids_on_gpu("1", agent.pid)
    os.kill(victim, signal.SIGKILL)
    code, output = wait_for_exit(agent)
    cells = backend.list_cells()
    assert code == 0 and [cell["state"] for cell in cells] == ["finished"] * 4, output
    assert sorted(cell["attempt"] for cell in cells) == [1, 1, 1, 2] and "set aside" not in output, output
    assert output.count("(on GPU 1: its process was killed by SIGKILL") == 1, output
    assert all(len(list(RunDir(runs / cell["run_id"]).read_rows())) == 12 for cell in cells)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs that nvidia-smi lists have to be missing")
def test_without_a_gpu_that_works_nothing_is_trained_on_the_cpu_instead(runs: Path, smi: None) -> None:
    backend = seeds(runs, 5, "conv4")
    code, output = wait_for_exit(start_agent(backend, "gpus='all'"))
    assert code == 1 and "stopped: no GPU is left that works" in output and "Traceback" not in output, output
    assert all(f"GPU {gpu} was set aside" in output for gpu in range(3)) and "PyTorch cannot use this GPU" in output, output
    assert set(backend.count_states()) <= {"waiting", "interrupted"}, output
    assert not list(runs.glob("*/metrics.jsonl"))


@TWO_GPUS
@pytest.mark.parametrize("fault", ["dies", "memory"])
def test_a_true_gpu_that_fails_each_trial_is_set_aside(runs: Path, picky: None, fault: str) -> None:
    backend = seeds(runs, 60, "picky", fault=fault, epochs=40)
    code, output = wait_for_exit(start_agent(backend, f"gpus={PAIR!r}", "pack='off'"))
    assert code == 0 and {cell["state"] for cell in backend.list_cells()} == {"finished"}, output
    assert output.count(f"GPU {PAIR.split(',')[1]} is set aside") == 1 and "(on GPU " in output, output
    assert fault == "dies" or "out of GPU memory" in output, output


@TWO_GPUS
@pytest.mark.parametrize(("pack", "gib"), [("off", 0.3), ("auto", 1.5)])  # too little for a context, and for 16 trials
def test_a_true_gpu_whose_memory_somebody_has_is_set_aside(runs: Path, picky: None, pack: str, gib: float) -> None:
    bad = PAIR.split(",")[1]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS.format(gib)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": bad, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        sizes = {"epochs": 40} if pack == "off" else {"epochs": 3, "train_size": 20_000}  # 123 MB of images a trial
        backend = seeds(runs, 60, "conv4", **sizes)
        code, output = wait_for_exit(start_agent(backend, f"gpus={PAIR!r}", f"pack={pack!r}"))
    finally:
        holder.communicate("")
    assert code == 0 and {cell["state"] for cell in backend.list_cells()} == {"finished"}, output
    assert output.count(f"GPU {bad} is set aside") == 1 and "(on GPU " in output, output
    assert pack == "off" or "of which other processes have" in output, output
