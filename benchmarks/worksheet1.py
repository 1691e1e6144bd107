"""Worksheet 1, 25 epochs at batch 128, instruments and W&B mirror on, beside the notebooks' way.

    python -m benchmarks.worksheet1 [--n 5] [--workers 14] [--peer-epochs 25]   # about 2 minutes on one H200

Ours and the notebooks' way take turns: a training of ours, then n-th part of the notebooks' epochs. Ours is the seconds of
training in the record; theirs is their epochs' wall clock, without evaluations too, scaled to 25 epochs where it ran fewer.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Sequence

from benchmarks.common import SMOKE, Missing, Peer, Result, command, parser_of


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    epochs = SMOKE["epochs"] if options.smoke else 25
    share = max(1, math.ceil((epochs if options.smoke else options.peer_epochs) / options.n))
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Ours(options, result))
        peer = _peer(stack, result, options)
        begun = time.perf_counter()
        first = ours.train({"experiment": "worksheet1", "seed": options.n}, ahead=options.n + 1)
        result.add("ours", "first training of the process, wall clock", "s", [time.perf_counter() - begun])
        result.add("ours", "first training of the process, training", "s", [first.seconds])
        mine, theirs, rows = [], [], []
        for seed in range(options.n):
            mine.append(ours.train({"experiment": "worksheet1", "seed": seed}, ahead=options.n - seed))
            if peer:
                rows += [peer.ask("epoch") for _ in range(share)]
                theirs.append(sum(row["seconds"] for row in rows[-share:]) * epochs / share)
        scored = peer.ask("test") if peer and len(rows) >= epochs else None
    seconds = result.add("ours", f"training, {epochs} epochs", "s", [run.seconds for run in mine])
    steps = [1e6 * row["system/seconds"] * run.rows[-1]["epoch"] / run.rows[-1]["step"] for run in mine for row in run.rows]
    result.add("ours", "a step", "µs", steps)
    accuracy = result.add("ours", "test accuracy", "%", [100 * run.summary["test/acc"] for run in mine])
    notebook = None
    if theirs:
        scaled = "" if share * options.n >= epochs else f", scaled from {share * options.n} epochs"
        notebook = result.add(f"notebooks' way, {options.workers} workers", f"training, {epochs} epochs{scaled}", "s", theirs)
        result.add(f"notebooks' way, {options.workers} workers", "an epoch", "s", [row["seconds"] for row in rows])
    if scored:
        result.add("notebooks' way", f"test accuracy after {len(rows)} epochs", "%", [100 * scored["acc"]])
    result.claim("worksheet 1, 25 epochs: training", seconds, at_most=2.5)
    if notebook:
        result.claim("worksheet 1: times faster than the notebooks' way", seconds, notebook, at_least=25.0)
    result.claim("worksheet 1: test accuracy, mean", accuracy, of="mean", at_least=78.0)


def _peer(stack: contextlib.ExitStack, result: Result, options: argparse.Namespace) -> Peer | None:
    arguments = ["--workers", str(options.workers), "--device", options.device, "--dataset", options.dataset]
    if options.smoke:
        arguments += ["--train-size", str(SMOKE["train_size"]), "--batch-size", str(SMOKE["batch_size"]), "--width", "4"]
    try:
        return stack.enter_context(Peer("benchmarks.peers.notebook", *arguments))
    except Missing as missing:
        result.skip("the notebooks' way", str(missing))
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("worksheet1", __doc__, n=5, what_n="trainings of ours")
    parser.add_argument("--peer-epochs", type=int, default=25, help="epochs of the notebooks' way in all [default: 25]")
    return command(parser, "4", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
