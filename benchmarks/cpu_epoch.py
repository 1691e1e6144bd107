"""On the CPU: an epoch of ours beside one of the usual way, on as many threads as there are cores (two).

    python -m benchmarks.cpu_epoch                              # worksheet 1 beside the notebooks' loop; 7 minutes on two cores
    python -m benchmarks.cpu_epoch resnet20                     # 12,800 images an epoch, beside a good standard loop; 5 minutes
    python -m benchmarks.cpu_epoch resnet20 --set precision=bf16

One training of ours, instruments and mirror on; after each of its epochs the peer trains one in a process of its own. The
first epoch of each is left out. The peers work in fp32, as loops for a CPU do.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from benchmarks.common import SMOKE, Peer, Result, command, parser_of

KINDS = {"worksheet1": 2.2, "resnet20": 1.5}  # times as fast as the peer
BATCH_SIZE = 128
RESNET_IMAGES = 12_800  # an epoch of all images takes minutes


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    options.device = "cpu"
    mine, theirs = [], []
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    values = {"experiment": options.kind, "test": "never", "batch_size": BATCH_SIZE, "threads": options.threads}
    values["epochs"] = options.n + 1 if not options.smoke else SMOKE["epochs"]
    if options.kind == "resnet20":
        values["train_size"] = RESNET_IMAGES
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Ours(options, result))
        peer = stack.enter_context(Peer(*_peer_arguments(options), environment=threads))
        peer.ask("epoch")

        def after(row: dict[str, Any]) -> None:
            if row["epoch"] > 1:
                mine.append(row["system/images_per_second"])
                answer = peer.ask("epoch")
                theirs.append(answer["images"] / answer["seconds"])

        ours.train(values, on_epoch=after)
    epoch = result.add("ours", f"images a second, {options.kind}", "1/s", mine)
    who = "notebooks' way" if options.kind == "worksheet1" else "standard loop"
    other = result.add(f"{who}, {options.workers} workers", f"images a second, {options.kind}", "1/s", theirs)
    what = f"{options.threads} CPU threads, {options.kind}: images a second, times those of the {who}"
    result.claim(what, epoch, other, inverse=True, at_least=KINDS[options.kind])


def _peer_arguments(options: argparse.Namespace) -> list[str]:
    module = "benchmarks.peers.notebook" if options.kind == "worksheet1" else "benchmarks.peers.standard"
    arguments = [module, "--workers", str(options.workers), "--device", "cpu", "--dataset", options.dataset]
    if options.smoke:
        small = ["--train-size", str(SMOKE["train_size"]), "--batch-size", str(SMOKE["batch_size"]), "--width", "4"]
        return arguments + small
    if options.kind == "resnet20":
        arguments += ["--model", "resnet20", "--batch-size", str(BATCH_SIZE), "--train-size", str(RESNET_IMAGES)]
    return arguments


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("cpu_epoch", __doc__, n=5, what_n="epochs of each")
    parser.set_defaults(workers=2)
    parser.add_argument("kind", nargs="?", choices=list(KINDS), default="worksheet1", help="[default: worksheet1]")
    parser.add_argument("--threads", type=int, default=2, help="of each side [default: 2]")
    return command(parser, "worksheet1=8,resnet20=8", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
