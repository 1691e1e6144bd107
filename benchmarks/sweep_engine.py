"""How quick the local sweep engine is with many cells: making a sweep, a claim, a heartbeat, a count, and `sweeps status`.

    python benchmarks/sweep_engine.py [--cells 100 1000 10000] [--claims 100] [--json FILE]

On SQLite, and on PostgreSQL where CIFAR_POSTGRES names a server or Debian's package is installed. Nothing is trained: a trial
is claimed, sends a heartbeat, and ends. The commands are timed as processes, from their start to their end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cifar.sweeps.local import LocalBackend, Trial
from helpers import postgres

ROOT = Path(__file__).resolve().parent.parent

SWEEP = """
method: grid
metric: {{name: val/acc, goal: maximize}}
run_cap: {cells}
parameters:
  model: {{value: conv}}
  seed: {{distribution: int_uniform, min: 0, max: {last_seed}}}
  lr: {{values: [0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01]}}
  label_smoothing: {{values: [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09]}}
"""


@contextlib.contextmanager
def postgres_url() -> Iterator[str]:
    """The URL of a server, started here if none is given; "" where there is none."""
    with contextlib.ExitStack() as stack:
        given = os.environ.get("CIFAR_POSTGRES", "")
        yield given or (stack.enter_context(postgres.server(is_durable=True)) if postgres.binaries() else "")


def run_cifar(*arguments: str) -> float:
    """Run a command -> the seconds that it took, PyTorch's import included."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "cifar", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def time_calls(call: Callable[[], Any], number: int) -> dict[str, float]:
    """The median and the 95th percentile of a call, in milliseconds."""
    seconds = []
    for _ in range(number):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    median, high = np.percentile(seconds, (50, 95))
    return {"n": number, "median_ms": round(1e3 * median, 2), "p95_ms": round(1e3 * high, 2)}


def measure(cells: int, num_claims: int, url: str, home: Path) -> dict[str, Any]:
    """A sweep of that many cells, made and asked."""
    file, runs = home / f"grid-{cells}.yaml", home / f"runs-{cells}-{bool(url)}"
    file.write_text(SWEEP.format(cells=cells, last_seed=max(1, math.ceil(cells / 100) - 1)))
    place = ("--runs-dir", str(runs))
    options = (*place, "--dataset", "stand-in", "--wandb", "disabled", *(("--storage", url) if url else ()))
    create_seconds = run_cifar("sweep", str(file), "--no-agent", *options)
    (sweep_id,) = (folder.name for folder in (runs / "sweeps").iterdir())
    backend, trials = LocalBackend(sweep_id, runs, url), list[Trial]()

    def claim() -> None:
        trial = backend.claim_trial("benchmark")
        assert isinstance(trial, Trial)
        trials.append(trial)

    found: dict[str, Any] = {"cells": cells, "create_seconds": round(create_seconds, 2)}
    found["count"] = time_calls(backend.count_states, 20)
    claims, ends = [], []
    number = min(num_claims, cells)
    for _ in range(number):
        claims.append(time_calls(claim, 1)["median_ms"])
        ends.append(time_calls(lambda: backend.finish_trial(trials[-1], "finished", 0.5), 1)["median_ms"])
    for name, values in (("claim", claims), ("finish", ends)):
        median, high = np.percentile(values, (50, 95))
        found[name] = {"n": number, "median_ms": round(float(median), 2), "p95_ms": round(float(high), 2)}
    if number < cells:
        claim()
        found["heartbeat"] = time_calls(lambda: backend.heartbeat(trials[-1]), 20)
    found["status_seconds"] = round(run_cifar("sweeps", "status", sweep_id, *place, *(("--storage", url) if url else ())), 2)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--claims", type=int, default=100, help="that are timed, of each sweep")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, postgres_url() as server:
        measured = {}
        for name, url in {"sqlite": "", **({"postgresql": server} if server else {})}.items():
            measured[name] = [measure(cells, options.claims, url, Path(folder)) for cells in options.cells]
    document = {
        "what": "the local sweep engine, nothing trained",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),  # others on the same cores make it slower
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("optuna", "sqlalchemy")},
        **measured,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
