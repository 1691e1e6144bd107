"""Agents that have the sweep engine only: they claim trials and end them, and no PyTorch is in them.

python -m helpers.engine_agents SWEEP RUNS URL LOG [STEP]    # one agent; it waits for RUNS/go

LOG gets each claim as a line of JSON, some of them with the memory of the process. STEP: a Python file with a function
`train_one_step(lr, seed)` that is a trial; without it a trial does nothing.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.paths import TESTS

MEMORY_EVERY = 250  # claims


def start_agents(number: int, sweep: str, runs: Path, url: str, step: Path | None = None) -> list[subprocess.Popen[bytes]]:
    """Start agents, and wait until each is ready. They begin when `runs`/go is there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    (runs / "claims").mkdir(exist_ok=True)
    agents = []
    for n in range(number):
        log = runs / "claims" / f"{len(list((runs / 'claims').iterdir())):03d}.jsonl"
        log.touch()
        command = [
            sys.executable,
            "-m",
            "helpers.engine_agents",
            sweep,
            str(runs),
            url,
            str(log),
            *([str(step)] if step else []),
        ]
        agents.append(subprocess.Popen(command, env={**environment, "CIFAR_AGENT": str(n)}, stdout=subprocess.PIPE))
    for agent in agents:
        assert agent.stdout is not None and agent.stdout.readline() == b"ready\n"
    return agents


def read_claims(runs: Path) -> list[dict[str, Any]]:
    """What all agents have logged: cell, attempt, the seconds of the claim, its time; and "ended" where the trial has."""
    logs = sorted((runs / "claims").iterdir())
    return [json.loads(line) for log in logs for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_memory() -> dict[str, float]:
    """MiB of this process: resident, and its share of it (pages that n processes have count as 1/n)."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    sizes = {line[0]: int(line[1]) / 1024 for line in lines}
    return {"rss_mib": round(sizes["Rss:"], 1), "pss_mib": round(sizes["Pss:"], 1)}


def load_step(file: str) -> Callable[[float, int], float]:
    spec = importlib.util.spec_from_file_location("step", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train_one_step  # type: ignore[no-any-return]


def main(sweep: str, runs: str, url: str, log: str, step: str = "") -> None:
    from cifar.sweeps.local import LocalBackend, Trial

    backend = LocalBackend(sweep, Path(runs), url)
    train = load_step(step) if step else lambda lr, seed: 0.5
    assert "torch" not in sys.modules
    print("ready", flush=True)
    while not (Path(runs) / "go").exists():
        time.sleep(0.01)
    with open(log, "a", buffering=1) as file:
        for number in itertools.count():
            start = time.perf_counter()
            trial = backend.claim_trial(f"agent {os.getpid()}")
            seconds = time.perf_counter() - start
            if trial is None:
                return
            if not isinstance(trial, Trial):
                time.sleep(0.05)
                continue
            about = {"cell": trial.cell, "attempt": trial.attempt, "seconds": seconds, "time": time.time()}
            about |= read_memory() if number % MEMORY_EVERY == 0 else {}
            file.write(json.dumps(about) + "\n")
            state = backend.finish_trial(trial, "finished", train(trial.values["lr"], trial.values["seed"]))
            file.write(json.dumps({**about, "ended": state}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
