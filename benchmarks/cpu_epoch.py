"""On the CPU: an epoch of worksheet 1 beside one of the notebooks' way.

    python -m benchmarks.cpu_epoch [--n 5] [--workers 2] [--threads 2]   # about 7 minutes on two cores

One training of ours, instruments and mirror on; after each of its epochs the notebooks' way trains one in a process of its
own. Both on as many threads as there are cores, two. The first epoch of each is left out.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from benchmarks.common import SMOKE, Peer, Result, command, parser_of


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    options.device = "cpu"
    arguments = ["--workers", str(options.workers), "--device", "cpu", "--dataset", options.dataset]
    if options.smoke:
        arguments += ["--train-size", str(SMOKE["train_size"]), "--batch-size", str(SMOKE["batch_size"]), "--width", "4"]
    mine, theirs = [], []
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Ours(options, result))
        peer = stack.enter_context(Peer("benchmarks.peers.notebook", *arguments, environment=threads))
        peer.ask("epoch")

        def after(row: dict[str, Any]) -> None:
            if row["epoch"] > 1:
                mine.append(row["system/seconds"])
                theirs.append(peer.ask("epoch")["seconds"])

        epochs = options.n + 1 if not options.smoke else SMOKE["epochs"]
        ours.train({"experiment": "worksheet1", "test": "never", "epochs": epochs, "threads": options.threads}, on_epoch=after)
    epoch = result.add("ours", "an epoch of worksheet 1", "s", mine)
    other = result.add(f"notebooks' way, {options.workers} workers", "an epoch of worksheet 1", "s", theirs)
    what = f"{options.threads} CPU threads, an epoch of worksheet 1: times faster than the notebooks' way"
    result.claim(what, epoch, other, at_least=1.6)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("cpu_epoch", __doc__, n=5, what_n="epochs of each")
    parser.set_defaults(workers=2)
    parser.add_argument("--threads", type=int, default=2, help="of each side [default: 2]")
    return command(parser, "8", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
