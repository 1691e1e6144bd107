"""Images a second at batch 512 beside a good standard PyTorch loop, fed by a DataLoader and from the device.

    python -m benchmarks.throughput resnet20 [--n 5]   # about a minute and a half on one H200, resnet56 two

One training of ours; after each of its epochs, which is then on record, the two peers train one each in processes of their
own. The first epoch of each (kernels chosen, graphs captured, workers started) is left out. Instruments and mirror are on.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from benchmarks.common import SMOKE, Missing, Peer, Result, command, parser_of

KINDS = {"resnet20": 5.0, "resnet56": 3.0}  # times the loop with a DataLoader
FROM_DEVICE = 1.5  # times the same loop fed from the device
PEERS = {"loader": "standard loop, {workers} workers", "device": "standard loop, fed from the device"}


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    rates: dict[str, list[float]] = {"ours": [], **{feed: [] for feed in PEERS}}
    with contextlib.ExitStack() as stack:
        peers = {feed: peer for feed in PEERS if (peer := _peer(stack, result, options, feed))}
        for peer in peers.values():
            peer.ask()

        def after(row: dict[str, Any]) -> None:
            if row["epoch"] > 1:
                rates["ours"].append(row["system/images_per_second"])
                for feed, peer in peers.items():
                    answer = peer.ask()
                    rates[feed].append(answer["images"] / answer["seconds"])

        ours = stack.enter_context(Ours(options, result))
        values = {"experiment": options.kind, "test": "never", "batch_size": 512, "epochs": options.n + 1, "lr": 0.2}
        ours.train(values, on_epoch=after)
    mine = result.add("ours", "images a second", "1/s", rates["ours"])
    for feed, name in PEERS.items():
        if rates[feed]:
            theirs = result.add(name.format(workers=options.workers), "images a second", "1/s", rates[feed])
            bound = KINDS[options.kind] if feed == "loader" else FROM_DEVICE
            what = f"{options.kind}, batch 512: images a second, times those of the {name.partition(',')[0]}"
            result.claim(
                what + ("" if feed == "loader" else " fed from the device"), mine, theirs, inverse=True, at_least=bound
            )


def _peer(stack: contextlib.ExitStack, result: Result, options: argparse.Namespace, feed: str) -> Peer | None:
    arguments = ["--model", options.kind, "--feed", feed, "--workers", str(options.workers)]
    arguments += ["--device", options.device, "--dataset", options.dataset]
    if options.smoke:
        arguments += ["--train-size", str(SMOKE["train_size"]), "--batch-size", str(SMOKE["batch_size"]), "--width", "4"]
    try:
        return stack.enter_context(Peer("benchmarks.peers.standard", *arguments))
    except Missing as missing:
        result.skip(PEERS[feed].format(workers=options.workers), str(missing))
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("throughput", __doc__, n=5, what_n="epochs of each")
    parser.add_argument("kind", choices=list(KINDS))
    return command(parser, "resnet20=7,resnet56=7", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
