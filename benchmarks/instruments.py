"""What instruments and the W&B mirror cost: training time with both over training time with neither.

    python -m benchmarks.instruments [--n 20] [--only worksheet1]   # about 4 minutes on one H200
    python -m benchmarks.instruments --device cpu --mirror server   # about half an hour on two free cores

Interleaved pairs, the order within a pair alternating; the seconds are the record's, of training. On: all probes at their
default cadence, histograms in each epoch that is looked at (in trainings as short as these that is each), and the companion
that mirrors to an offline W&B run, or to the tests' server. Off: no probes, no histograms, no companion at work. Beside it,
`wandb.watch` (all, at the same cadence) on a plain loop against that loop without it.

Where wandb is not installed, the companion draws the pictures only: then this is the cost of probes and histograms.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.common import SMOKE, Missing, Peer, Result, command, parser_of, shown

if TYPE_CHECKING:
    from cifar.integrations.wandb.settings import Mode

# Trainings long enough to time and short enough to repeat; batch 512 is the one whose throughput is compared elsewhere.
NETWORKS: dict[str, dict[str, Any]] = {
    "worksheet1": {"experiment": "worksheet1", "epochs": 8},
    "resnet20": {"experiment": "resnet20", "epochs": 2, "batch_size": 512},
    "airbench94": {"experiment": "airbench94"},
}
# The same for two cores. The probes look at one step of 50, as by default. A small batch makes them count for more.
CPU_NETWORKS: dict[str, dict[str, Any]] = {
    "worksheet1": {"experiment": "worksheet1", "epochs": 3, "max_steps": 100},
    "resnet20": {"experiment": "resnet20", "epochs": 2, "max_steps": 50, "batch_size": 64},
}
MOST = {"cuda": 1.03, "cpu": 1.05}  # of the time without


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    with contextlib.ExitStack() as stack:
        if options.mirror == "server":
            stack.enter_context(_server())
        mode: Mode = "online" if options.mirror == "server" else "offline"
        ours = stack.enter_context(Ours(options, result, mirror=options.mirror != "none", mode=mode))
        networks = CPU_NETWORKS if ours.device.type == "cpu" else NETWORKS
        for name in options.only or (["worksheet1"] if options.smoke else networks):
            values = {**networks[name], "test": "never"} if name != "airbench94" else NETWORKS[name]
            seconds, whole, cpu = ({True: list[float](), False: list[float]()} for _ in range(3))
            for on in (True, False):  # what is compiled or captured is made once
                ours.train({**values, **_instruments(on)}, mirrored=on, ahead=options.n + 1)  # as a sweep's worker has it
            for pair in range(options.n):
                for on in (True, False) if pair % 2 else (False, True):
                    done = ours.train({**values, "seed": pair, **_instruments(on)}, mirrored=on, ahead=options.n - pair)
                    seconds[on].append(done.seconds)
                    whole[on].append(done.run_seconds)
                    cpu[on].append(done.cpu_seconds)
            how = {"offline": "offline mirror", "server": "mirror to a server", "none": "no mirror"}[options.mirror]
            what = f"{name}: training with instruments and {how} / without"
            watched, bare = (result.add(f"{name}, {on}", "training", "s", seconds[on == "on"]) for on in ("on", "off"))
            result.claim(what, watched, bare, inverse=True, at_most=MOST.get(ours.device.type, 1.05))
            result.claim(f"{what}, means", watched, bare, inverse=True, of="mean", ratio=False)
            for more, found in (("with evaluation and writing", whole), ("CPU seconds of the trainer", cpu)):
                watched, bare = (result.add(f"{name}, {on}, {more}", more, "s", found[on == "on"]) for on in ("on", "off"))
                result.claim(f"{what}, {more}", watched, bare, inverse=True)
            _watch(result, options, name, int(values.get("batch_size", 2000 if name == "airbench94" else 128)))


def _instruments(on: bool) -> dict[str, str]:
    return {} if on else {"probes": "none", "histograms": "off"}


@contextlib.contextmanager
def _server() -> Iterator[None]:
    """The tests' server in a process of its own, and this process's environment as its client needs it."""
    from benchmarks.network_faults import Server

    server = Server()
    before = dict(os.environ)
    os.environ.update(server.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.close()


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
    parser.add_argument("--mirror", choices=["offline", "server", "none"], default="offline", help="what the mirror sends to")
    parser.add_argument("--watch-n", type=int, default=5, help="pairs of wandb.watch; 0: none")
    return command(parser, "5", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
