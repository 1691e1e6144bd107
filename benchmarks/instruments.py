"""What instruments and the W&B mirror cost: training time with both over training time with neither.

    python -m benchmarks.instruments [--n 20] [--only worksheet1]   # about 4 minutes on one H200

Interleaved pairs, the order within a pair alternating; the seconds are the record's, of training. On: all probes at their
default cadence, and the companion that mirrors to an offline W&B run. Off: no probes, no companion at work. Beside it,
`wandb.watch` (all, at the same cadence) on a plain loop against that loop without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.common import SMOKE, Missing, Peer, Result, command, parser_of, shown

# Trainings long enough to time and short enough to repeat; batch 512 is the one whose throughput is compared elsewhere.
NETWORKS: dict[str, dict[str, Any]] = {
    "worksheet1": {"experiment": "worksheet1", "epochs": 8},
    "resnet20": {"experiment": "resnet20", "epochs": 2, "batch_size": 512},
    "airbench94": {"experiment": "airbench94"},
}


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    with Ours(options, result) as ours:
        for name in options.only or (["worksheet1"] if options.smoke else NETWORKS):
            values = {**NETWORKS[name], "test": "never"} if name != "airbench94" else NETWORKS[name]
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for on in (True, False):  # what is compiled or captured is made once
                ours.train({**values, **_instruments(on)}, mirrored=on, ahead=options.n + 1)  # as a sweep's worker has it
            for pair in range(options.n):
                for on in (True, False) if pair % 2 else (False, True):
                    done = ours.train({**values, "seed": pair, **_instruments(on)}, mirrored=on, ahead=options.n - pair)
                    seconds[on].append(done.seconds)
            watched = result.add(f"{name}, on", "training", "s", seconds[True])
            bare = result.add(f"{name}, off", "training", "s", seconds[False])
            result.claim(f"{name}: training with instruments and mirror / without", watched, bare, inverse=True, at_most=1.03)
            _watch(result, options, name, int(values.get("batch_size", 2000 if name == "airbench94" else 128)))


def _instruments(on: bool) -> dict[str, str]:
    return {} if on else {"probes": "none"}


def _watch(result: Result, options: argparse.Namespace, model: str, batch_size: int) -> None:
    if not options.watch_n:
        return
    size = SMOKE["batch_size"] if options.smoke else batch_size
    steps = 4 if options.smoke else 25 if model == "airbench94" else 100
    every = 2 if options.smoke else 25 if model == "airbench94" else 50  # as our probes look
    arguments = [
        "--model", model, "--device", options.device, "--dataset", options.dataset, "--batch-size", str(size),
        "--steps", str(steps), "--every", str(every), "--width", "4" if options.smoke else "0",
    ]  # fmt: skip
    try:
        with Peer("benchmarks.peers.watched", *arguments) as peer:
            pairs = [
                [peer.ask(each)["seconds"] for each in ("plain", "watched")] for _ in range(min(options.watch_n, 2 * options.n))
            ]
    except Missing as missing:
        result.skip(f"wandb.watch, {model}", str(missing))
        return
    plain, watched = (result.add(f"{model}, {name}", f"{steps} steps", "s", [pair[i] for pair in pairs])
                      for i, name in enumerate(("plain loop", "plain loop with wandb.watch")))  # fmt: skip
    result.claim(f"{model}: a plain loop with wandb.watch / without (beside it)", watched, plain, inverse=True)
    result.note(f"wandb.watch, {model}: {shown(watched)} for {steps} steps, a look every {every}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("instruments", __doc__, n=20, what_n="pairs a network")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), help="some of the networks")
    parser.add_argument("--watch-n", type=int, default=5, help="pairs of wandb.watch; 0: none")
    return command(parser, "5", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
