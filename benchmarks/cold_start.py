"""From the command to a scored 94 % network: a new process, with empty and with warm caches, wall clock.

    AIRBENCH=~/cifar10-airbench python -m benchmarks.cold_start [--n 3] [--peer-n 1]   # about 4 minutes on one H200

Empty: the folders of compiled kernels (inductor, Triton, CUDA, our own) are new. Warm: the same folders again. Images and
Python's byte code are at hand in both, as is what the operating system keeps of files. A run is over when the record says
`finished`; airbench's when its first run, without its warm-up, has its accuracy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Missing, Peer, Result, command, parser_of
from benchmarks.ours import cifar, pairs, settings
from cifar import data
from cifar.tracking.run_dir import RunDir, list_run_dirs


def caches(place: Path) -> dict[str, str]:
    """Environment of a process whose compiled things go below `place`; the stand-in's images are brought along."""
    images = place / "xdg" / "cifar"
    images.mkdir(parents=True, exist_ok=True)
    for file in data.cache_folder().glob("*.npz"):
        if not (images / file.name).exists():
            os.link(file, images / file.name) if file.stat().st_dev == place.stat().st_dev else shutil.copy(file, images)
    named = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
    found = data.find_cifar10(None)
    here = {"CIFAR_DATA": str(found)} if found else {}
    return {**here, "XDG_CACHE_HOME": str(place / "xdg"), **{name: str(place / folder) for name, folder in named.items()}}


def once(options: argparse.Namespace, place: Path, seed: int) -> tuple[float, float, RunDir]:
    """One `cifar train` -> seconds to its accuracy, to its end, and its record."""
    runs = place / f"runs{seed}"
    values = settings(options, {"seed": seed})
    arguments = ["train", "--experiment", "airbench94", *pairs(values), "--runs-dir", str(runs), "--wandb", "offline"]
    begun, seconds = cifar(*arguments, cwd=place, **caches(place))
    (record,) = list_run_dirs(runs)
    return record.read_json("status")["time"] - begun, seconds, record


def measure(result: Result, options: argparse.Namespace) -> None:
    cold, warm, accuracy, ends = [], [], [], []
    for seed in range(options.n):
        with tempfile.TemporaryDirectory(prefix="cifar-cold-") as folder:
            place = Path(folder)
            seconds, _, record = once(options, place, seed)
            cold.append(seconds)
            accuracy.append(100 * record.read_json("summary")["test/acc"])
            for again in range(options.n if seed == options.n - 1 else 1):
                seconds, end, record = once(options, place, 100 + 10 * seed + again)
                warm.append(seconds)
                ends.append(end)
                accuracy.append(100 * record.read_json("summary")["test/acc"])
    ours = [
        result.add("ours", f"command to accuracy, {caches_are} caches", "s", values)
        for caches_are, values in (("empty", cold), ("warm", warm))
    ]
    result.add("ours", "command to its end, warm caches", "s", ends)
    result.add("ours", "test accuracy, 6 views", "%", accuracy)
    theirs = _airbench(result, options)
    for mine, peer, bound in zip(ours, theirs, (30.0, 12.0), strict=True):
        result.claim(f"from the command to 94 %, {mine['what'].split(', ')[1]}", mine, peer, ratio=False, at_most=bound)


def _airbench(result: Result, options: argparse.Namespace) -> list[dict[str, object] | None]:
    """The same way: an own process, empty caches, then the same caches again."""
    if not options.peer_n:
        result.skip("cifar10-airbench", "--peer-n 0")
        return [None, None]
    cold, warm = [], []
    try:
        for _ in range(options.peer_n):
            with tempfile.TemporaryDirectory(prefix="cifar-cold-") as folder:
                place = Path(folder)
                from benchmarks.peers.airbench import write_images

                write_images(place / "cifar10", options.dataset)
                for seconds in (cold, warm):
                    begun = time.perf_counter()
                    arguments = ["94", "--folder", folder, "--no-warm-up"]
                    with Peer("benchmarks.peers.airbench", *arguments, environment=caches(place)) as peer:
                        peer.ask()
                        seconds.append(time.perf_counter() - begun)
    except Missing as missing:
        result.skip("cifar10-airbench", str(missing))
        return [None, None]
    return [
        result.add("airbench", f"command to accuracy, {name} caches", "s", values)
        for name, values in (("empty", cold), ("warm", warm))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("cold_start", __doc__, n=3, what_n="cold starts; as many warm ones and two more")
    parser.add_argument("--peer-n", type=int, default=1, help="cold and warm starts of airbench; each compiles for minutes")
    return command(parser, "3", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
