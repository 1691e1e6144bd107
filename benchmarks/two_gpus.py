"""Trials an hour of two GPUs of one host over those of one of them.

    python -m benchmarks.two_gpus [--trials 64]   # about 4 minutes on two H200s

`python -m cifar sweep FILE --gpus 0` and `--gpus 0,1`, in turn; the same trials as `benchmarks.trials`. The rate is that
between the ends of trials, after each GPU's first pack: start-up and compiling are once a sweep, however long it is. The
wall clock of the whole sweep, start-up and all, is beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.common import Missing, Result, command, parser_of
from benchmarks.trials import run_sweep
from cifar.agent.packing import MAX_PACK_SIZE


def measure(result: Result, options: argparse.Namespace) -> None:
    import torch

    found = torch.cuda.device_count()
    if options.device == "cpu" or found < 2:
        raise Missing(f"needs two GPUs, there {'is' if found == 1 else 'are'} {found}")
    if options.trials < 4 * MAX_PACK_SIZE:
        raise Missing(f"needs {4 * MAX_PACK_SIZE} trials: two packs for each GPU")
    runs: dict[str, list[dict[str, Any]]] = {"0": [], "0,1": []}
    for pair in range(options.n):
        for gpus in list(runs) if pair % 2 else reversed(list(runs)):
            first = min(MAX_PACK_SIZE * len(gpus.split(",")), options.trials // 2)  # trials of the first packs
            arguments = ["--gpus", gpus, "--per-gpu", str(options.per_gpu)]
            runs[gpus].append(run_sweep(options, options.trials, *arguments, parallel=first))
    hourly, wall = (
        [result.add(f"--gpus {gpus}", what, unit, [value(run) for run in of]) for gpus, of in runs.items()]
        for what, unit, value in (
            ("trials an hour, after each GPU's first pack", "1/h", lambda run: 3600 / run["gap"]),
            (f"{options.trials} trials, wall clock", "s", lambda run: run["wall"]),
        )
    )
    result.claim("trials an hour, two GPUs / one", hourly[1], hourly[0], inverse=True, at_least=1.9)
    result.claim("the whole sweep's wall clock, one GPU / two", wall[1], wall[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("two_gpus", __doc__, n=2, what_n="pairs")
    parser.add_argument("--trials", type=int, default=64, choices=(4, 16, 32, 64))
    parser.add_argument("--per-gpu", type=int, default=1)
    return command(parser, "9", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
