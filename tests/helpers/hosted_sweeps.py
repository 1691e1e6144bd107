"""Tiny sweeps on the tests' W&B server, commands that talk to it, and runs that have to be there as they were trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from cifar.tracking.run_dir import RunDir
from helpers.paths import ROOT
from helpers.protocol import Server
from helpers.system_fields import assert_shown_as_recorded
from helpers.workspace import list_columns

HEAD = "# Question: which?\nname: tiny\ndescription: Which network, at <which> rate?\n"
HEAD += "method: grid\nmetric: {name: val/acc, goal: maximize}\n"
TINY = """  dataset: {value: stand-in}
  val_size: {value: 200}
  train_size: {value: 256}
  batch_size: {value: 64}
  probes: {value: none}
  optimizer: {value: sgd}
"""
GRID = HEAD + "parameters:\n" + TINY + "  model: {values: [conv4, conv8]}\n  lr: {values: [0.01, 0.02]}\n"


def start_command(server: Server, *arguments: str, stdout: Any = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT,
    )  # fmt: skip


def assert_as_trained(server: Server, runs: Path, run_id: str, epochs: int) -> None:
    """The run on the server is the record on disk, to the last digit."""
    record, run = RunDir(runs / run_id), server.runs[run_id]
    assert run.rows == list(record.read_rows()) and [row["epoch"] for row in run.rows] == list(range(1, epochs + 1))
    assert [row["_step"] for row in run.history] == list(range(1, epochs + 1))
    cost = record.read_json("run")["cost"]
    shown = {"cifar_schema": 2, "macs": cost["macs"], "params": cost["params"]}
    assert run.config == {**record.read_json("config"), **shown}
    assert run.summary.items() >= {**list_columns(record.read_json("summary")), "state": record.state}.items()
    assert run.sweep and run.group == run.sweep == record.read_json("run")["sweep"]
    question = yaml.safe_load(server.sweeps[run.sweep].text).get("description")
    assert run.notes == (question or record.read_json("run")["command"])
    assert run.display_name == record.read_json("run")["name"][:128] and any("pictures" in name for name in run.files)
    assert_shown_as_recorded(run, record.path)
