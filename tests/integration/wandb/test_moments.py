"""Hosted sweeps that are struck at random moments: what the server says of a run is true all the while, and after `push` whole.

CIFAR_MOMENTS says how many strikes there are, CIFAR_MOMENTS_SECONDS in how many seconds: wandb-core killed, the server lost
(and back with an older state, or with none of its runs), the agent killed.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cifar.tracking.run_dir import RunDir
from helpers.hosted_sweeps import HEAD, TINY, start_command
from helpers.processes import list_descendants, wait_for_exit, wait_until
from helpers.protocol import Run, Server
from helpers.workspace import list_columns

MOMENTS = int(os.environ.get("CIFAR_MOMENTS", "5"))
SECONDS = float(os.environ.get("CIFAR_MOMENTS_SECONDS", 20 * MOMENTS))  # for all strikes; a busy machine has fewer of them
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240 + 60 * MOMENTS)]
SEED = int(os.environ.get("CIFAR_SEED", "0"))
# 4 steps an epoch: a checkpoint after every second epoch
SWEEP = (
    HEAD.replace("grid", "random")
    + "parameters:\n"
    + TINY
    + """  model: {value: conv4}
  lr: {min: 0.01, max: 0.05}
  epochs: {value: 9}
  checkpoint_every: {value: 8}
"""
)


def clean(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key[0] != "_" and not isinstance(value, dict)}


def is_same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def find_untruth(run: Run, record: RunDir) -> str:
    """What is wrong with a run that the server calls finished."""
    status = record.read_json("status")
    if status.get("state") not in ("finished", "pruned", "skipped"):
        return f"finished there, {status.get('state')} here"
    rows, summary = list(record.read_rows()), list_columns(record.read_json("summary"))
    if [clean(row) for row in run.history] != rows:
        return f"finished with epochs {[row.get('epoch') for row in run.history]} of {len(rows)}"
    expected = {**{key: rows[-1][key] for key in ("epoch", "val/acc", "train/loss")}, **summary, "state": status["state"]}
    wrong = [key for key, value in expected.items() if not is_same(run.summary.get(key), value)]
    return f"finished with a wrong summary: {wrong}" if wrong else ""


class Monitor(threading.Thread):
    """Looks at the server's state all the while, and writes down what is not true."""

    def __init__(self, server: Server, runs: Path) -> None:
        super().__init__(daemon=True)
        self.server, self.runs, self.untruths, self.num_looks = server, runs, dict[str, str](), 0
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(0.02):
            with self.server.world.lock:
                finished = [run for run in self.server.runs.values() if run.state == "finished"]
                for run in finished:
                    self.num_looks += 1
                    if (untruth := find_untruth(run, RunDir(self.runs / run.id))) and run.id not in self.untruths:
                        self.untruths[run.id] = untruth


class Strikes:
    """A sweep with an agent that is started again after each of its deaths."""

    def __init__(self, server: Server, runs: Path) -> None:
        self.server, self.runs, self.chance = server, runs, random.Random(SEED)
        self.sweep = server.world.add_sweep("me", "cifar", SWEEP)
        self.memories = [server.world.remember()]
        self.done = Counter[str]()
        self.last = ""
        self.start_agent()

    def start_agent(self) -> None:
        words = ("-m", "cifar", "agent", f"me/cifar/{self.sweep.id}", "--workers", "2")
        with open(self.runs.parent / "agent.log", "ab") as log:
            self.agent = start_command(self.server, *words, stdout=log)
        self.num_runs_before = len(list(self.runs.glob("*/summary.json")))

    def wait_for_moment(self) -> None:
        """Until a run trains, and then a random time."""
        try:
            wait_until(self._trains, 240)
        except AssertionError:
            log = (self.runs.parent / "agent.log").read_text()[-3000:]
            raise AssertionError(f"nothing trains after {self.done}, last {self.last}:\n{log}") from None
        time.sleep(self.chance.uniform(0.0, 3.0))
        self.memories = [*self.memories[-1:], self.server.world.remember()]

    def _trains(self) -> bool:
        if self.agent.poll() is not None:
            self.start_agent()
        records = [RunDir(path.parent) for path in self.runs.glob("*/metrics.jsonl")]
        return any(record.state == "running" for record in records if self._is_alive(record))

    def _is_alive(self, record: RunDir) -> bool:
        return record.read_json("status").get("pid") in list_descendants(self.agent.pid)

    def strike(self, kind: str) -> None:
        if kind == "core":
            cores = [pid for pid in list_descendants(self.agent.pid) if self._runs(pid, b"wandb-core")]
            if not cores:
                return
            os.kill(self.chance.choice(cores), signal.SIGKILL)
        elif kind == "agent":
            self.agent.kill()
            self.agent.wait()
            self.start_agent()
        else:
            self.server.die()
            time.sleep(self.chance.uniform(0.2, 2.0))
            if kind == "old state":
                self.server.world.restore(self.memories[0])
            elif kind == "no state":
                self.server.world.restore({})
            self.server.revive()
        self.done[kind] += 1
        self.last = kind

    @staticmethod
    def _runs(pid: int, name: bytes) -> bool:
        try:
            return name in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def end(self) -> None:
        """The sweep hands out no more, and its agent ends its runs."""
        self.sweep.state = "FINISHED"
        try:
            self.agent.wait(120)
        except subprocess.TimeoutExpired:
            self.agent.kill()
            self.agent.wait()


def test_what_the_server_says_is_true_at_every_moment(wandb_server: Server, runs: Path) -> None:
    runs.mkdir()
    strikes, monitor = Strikes(wandb_server, runs), Monitor(wandb_server, runs)
    monitor.start()
    kinds = ["core", "agent", "lost", "old state", "core", "no state", "agent"]
    deadline = time.monotonic() + SECONDS
    while sum(strikes.done.values()) < MOMENTS and time.monotonic() < deadline:
        strikes.wait_for_moment()
        strikes.strike(kinds[sum(strikes.done.values()) % len(kinds)])
    strikes.end()
    records = [RunDir(path.parent) for path in runs.glob("*/run.json")]
    open_records = [record for record in records if record.state == "running"]
    for record in open_records[:3]:  # of killed agents; W&B hands out no run twice
        words = ("-m", "cifar", "train", "--resume", record.id, "--wandb", "online")
        code, output = wait_for_exit(start_command(wandb_server, *words))
        assert code == 0, output
    for num_sent in (None, 0):
        code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "push", strikes.sweep.id))
        assert code == 0, output
        assert num_sent is None or f"({num_sent} sent now)" in output, output
    monitor.is_over.set()
    monitor.join()
    ended = [record for record in records if record.state == "finished"]
    print(f"{dict(strikes.done)}, {len(records)} runs, {len(ended)} ended, {monitor.num_looks} looks: {monitor.untruths}")
    assert strikes.done and len(ended) >= 2 and monitor.num_looks and not monitor.untruths
    for record in ended:
        run = wandb_server.runs[record.id]
        assert run.state == "finished" and not find_untruth(run, record), record.id
        made, used = wandb_server.artifacts.made_by(record.id), wandb_server.artifacts.used_by(record.id)
        assert sorted(each.type for each in (*made, *used)) == ["dataset", "model", "predictions"], record.id
        assert sum("media/images" in name for name in run.files) == len(list((record.path / "pictures").glob("*.png")))
    wandb_server.unknown[:] = [line for line in wandb_server.unknown if "history rows" not in line]
