"""Many agents without PyTorch against one sweep on PostgreSQL: claims a second, and how long a claim takes.

    python -m benchmarks.engine_agents [--agents 64] [--killed 16] [--cells 2000] [--json FILE]

The server: CIFAR_POSTGRES, or one of Debian's package. The trials do nothing. Measured are claims of one agent alone, of 8, and
of all; of all, some are killed (-9) in the middle, and at the end each cell has to have ended once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.sweep_engine import postgres_url
from benchmarks.trial_rate import SWEEP
from helpers.engine_agents import read_claims, start_agents
from helpers.local_sweeps import create_local_sweep


def measure(num_agents: int, num_killed: int, num_cells: int, url: str, folder: Path) -> dict[str, Any]:
    """A sweep of that many cells, done by that many agents."""
    runs = folder / f"runs-{num_agents}"
    backend = create_local_sweep(runs, SWEEP.format(last=num_cells - 1), url=url)
    agents = start_agents(num_agents, backend.id, runs, url)
    start = time.time()
    (runs / "go").touch()
    while num_killed and len(read_claims(runs)) < num_cells // 2:
        time.sleep(0.1)
    for agent in agents[:num_killed]:
        agent.kill()
    codes = Counter(agent.wait() for agent in agents)
    wall = time.time() - start
    claims = [claim for claim in read_claims(runs) if "ended" not in claim]
    ended = Counter(claim["cell"] for claim in read_claims(runs) if claim.get("ended") == "finished")
    counts = backend.count_states()
    assert counts == {"finished": num_cells} and max(ended.values()) == 1, (counts, ended.most_common(3))
    times = sorted(claim["time"] for claim in claims)
    spread = times[int(0.9 * len(times))] - times[0]  # the last ones wait for the lease of those that were killed
    seconds = [claim["seconds"] for claim in claims]
    return {
        "agents": num_agents, "killed": num_killed, "exit_codes": dict(codes), "cells": num_cells, "states": counts,
        "wall_seconds": round(wall, 1), "claims_a_second": round(0.9 * len(times) / spread, 1),
        "median_claim_ms": round(1e3 * statistics.median(seconds), 2),
        "p95_claim_ms": round(1e3 * sorted(seconds)[int(0.95 * len(seconds))], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--agents", type=int, default=64)
    parser.add_argument("--killed", type=int, default=16)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    options = parser.parse_args()
    os.environ.setdefault("CIFAR_LEASE", "10")
    with tempfile.TemporaryDirectory() as folder, postgres_url() as server:
        if not server:
            sys.exit("no PostgreSQL: name a server by CIFAR_POSTGRES, or install Debian's package postgresql")
        sizes = [(1, 0), (8, 0), (options.agents, options.killed)]
        found = [measure(agents, killed, options.cells, server, Path(folder)) for agents, killed in sizes]
    document = {
        "what": "the local sweep engine on PostgreSQL, nothing trained",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),  # others on the same cores make it slower
        "platform": platform.platform(),
        "found": found,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
