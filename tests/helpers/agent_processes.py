"""Tiny local sweeps, and agents that train them in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cifar.config.yaml_loader import parse_yaml
from cifar.sweeps import local, spec
from cifar.sweeps.local import LocalBackend
from cifar.tracking.run_dir import RunDir
from helpers.paths import ROOT

METRIC = "method: grid\nmetric: {name: val/acc, goal: maximize}\n"
TINY = {
    "dataset": "stand-in", "val_size": 200, "train_size": 256, "batch_size": 64, "probes": "none", "epochs": 2,
    "optimizer": "sgd",
}  # fmt: skip
BROKEN = """
import os, signal
from torch import nn
from cifar.models.conv import ConvNet
from cifar.registry import models

class Broken(ConvNet):
    def __init__(self, kind):
        super().__init__(width=4, depth=1)
        self.kind, self.calls = kind, 0
    def forward(self, x):
        self.calls += self.training
        is_due = self.calls > 3  # later than where parts are tried before the run is made, and in each epoch
        if is_due and self.kind == "raises":
            raise RuntimeError("a bug in the model")
        if is_due:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

@models.register("broken", kind="raises")
@models.register("killer", kind="dies")
def broken(*, kind: str = "raises") -> nn.Module:
    return Broken(kind)
"""


def create_sweep(runs: Path, text: str, **fixed: Any) -> LocalBackend:
    text = METRIC + text
    read = spec.parse_sweep(parse_yaml(text, "sweep"), text, "sweep", "tiny")
    fixed = {**{k: v for k, v in TINY.items() if k not in read.swept_keys}, **fixed}
    return LocalBackend(local.create_sweep(read, runs, fixed=fixed, threads=1), runs)


def start_agent(backend: LocalBackend, *options: str, **environment: str) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path; from cifar.agent.agent import run_agent;"
        "from cifar.agent.options import AgentOptions, PathOptions;"
        f"paths = PathOptions(runs_dir=Path({str(backend.runs_dir)!r}));"
        f"sys.exit(run_agent({backend.id!r}, AgentOptions(wandb='disabled', {', '.join(options)}), paths))"
    )
    environment = {**os.environ, "CIFAR_LEASE": "4", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process


def list_epochs_of_cell(backend: LocalBackend, cell: int) -> list[int]:
    return [row["epoch"] for row in RunDir(backend.runs_dir / backend.run_id(cell)).read_rows()]
