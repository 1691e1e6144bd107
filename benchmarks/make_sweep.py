"""`make sweep` on the CPU: from the command to the report, with data at hand, the set-up of its environment apart.

python -m benchmarks.make_sweep [--n 1]   # about three minutes on two cores
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT, SMOKE, Missing, Result, child_environment, command, parser_of
from cifar.tracking.run_dir import list_run_dirs


def measure(result: Result, options: argparse.Namespace) -> None:
    seconds, training = [], []
    for _ in range(options.n):
        with tempfile.TemporaryDirectory(prefix="cifar-sweep-") as folder:
            extra = [f"--dataset {options.dataset}", f"--runs-dir {folder}/runs", "--set device=cpu"]
            if options.smoke:
                extra += [
                    f"--set train_size={SMOKE['train_size']}",
                    "--set max_steps=1",
                    "--set epochs=1",
                    "--set val_size=100",
                ]
            begun = time.perf_counter()
            done = subprocess.run(
                ["make", "-C", str(ROOT), "sweep", f"PYTHON={sys.executable}", f"ARGS={' '.join(extra)}"],
                env=child_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                check=False,
            )  # fmt: skip
            seconds.append(time.perf_counter() - begun)
            if done.returncode:
                raise Missing(f"`make sweep` ended with {done.returncode}: {done.stdout.strip()[-300:]}")
            records = list(list_run_dirs(Path(folder) / "runs"))
            training.append(sum(row["system/seconds"] for record in records for row in record.read_rows()))
    whole = result.add("ours", "make sweep, wall clock", "s", seconds, trials=len(records))
    result.add("ours", "of it training, all workers together", "s", training)
    result.claim("make sweep (seven networks, two epochs, report)", whole, at_most=300.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("make_sweep", __doc__, n=1, what_n="sweeps")
    return command(parser, "8", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
