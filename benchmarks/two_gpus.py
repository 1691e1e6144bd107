"""Trials an hour of two GPUs of one host over those of one of them.

    python -m benchmarks.two_gpus [--trials 64]   # about 4 minutes on two H200s

Wall clock of `python -m cifar sweep FILE --gpus 0` and `--gpus 0,1`, in turn; the same trials as `benchmarks.trials`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.common import Missing, Result, command, parser_of
from benchmarks.trials import run_sweep


def measure(result: Result, options: argparse.Namespace) -> None:
    import torch

    found = torch.cuda.device_count()
    if options.device == "cpu" or found < 2:
        raise Missing(f"needs two GPUs, there {'is' if found == 1 else 'are'} {found}")
    hourly: dict[str, list[float]] = {"0": [], "0,1": []}
    for pair in range(options.n):
        for gpus in list(hourly) if pair % 2 else reversed(list(hourly)):
            run = run_sweep(options, options.trials, "--gpus", gpus, "--per-gpu", str(options.per_gpu))
            hourly[gpus].append(3600 * run["trials"] / run["wall"])
    one, two = (result.add(f"--gpus {gpus}", "trials an hour", "1/h", values) for gpus, values in hourly.items())
    result.claim("trials an hour, two GPUs / one", two, one, inverse=True, at_least=1.9)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("two_gpus", __doc__, n=2, what_n="pairs")
    parser.add_argument("--trials", type=int, default=64, choices=(4, 16, 32, 64))
    parser.add_argument("--per-gpu", type=int, default=1)
    return command(parser, "9", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
