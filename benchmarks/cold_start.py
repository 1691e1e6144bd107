"""From the command to the first step and to a scored network: new processes, with empty and with warm caches, wall clock.

    python -m benchmarks.cold_start [--n 5] [--runs airbench94 worksheet1:on] [--timelines FILE.json]   # 4 minutes on one H200

Beside them, in turn, a process that imports PyTorch and starts CUDA; "above the start" is without what that one takes, and
"above start and training" is without the run's epochs either (the median of all but the first, times their number).
Empty: the folders of compiled kernels (inductor, Triton, CUDA, our own) are new. Warm: the same folders again. Images and
Python's byte code are at hand in both, as is what the operating system keeps of files. A run is over when the record says
`finished`; airbench's (`AIRBENCH=~/cifar10-airbench`, --peer-n 1) when its first run, without its warm-up, has its accuracy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import timeline
from benchmarks.common import Missing, Peer, Result, child_environment, command, parser_of
from benchmarks.ours import pairs, settings
from cifar import data
from cifar.tracking.run_dir import list_run_dirs

SHORT_EPOCHS = 3  # of every experiment but the one that is trained to its accuracy
WHOLE = "airbench94"
FIRST_STEP_SECONDS, WARM_SECONDS, EMPTY_SECONDS = 1.5, 2.0, 6.0  # wanted above the start; the last two to 94 %
START = "import time, torch; torch.zeros(1, device='{device}').item(); print(time.time())"


@dataclass
class Kind:
    """Runs of one command."""

    name: str  # EXPERIMENT or EXPERIMENT:COMPILE, as the option takes it
    place: Path  # the folder of its caches
    most: int = 1  # warm runs
    empty: list[dict[str, Any]] = field(default_factory=list)
    warm: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.name.partition(":")[0] == WHOLE


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


def run_once(options: argparse.Namespace, kind: Kind, seed: int, *, with_samples: bool = False) -> dict[str, Any]:
    """One `cifar train` -> when it took its first step, was finished and ended, its training seconds, and its timeline."""
    experiment, _, compiled = kind.name.partition(":")
    runs, file = kind.place / f"runs{seed}", kind.place / f"timeline{seed}.json"
    values = settings(options, {"seed": seed, **({} if kind.is_whole else {"epochs": SHORT_EPOCHS})})
    arguments = ["train", "--experiment", experiment, *pairs(values), "--runs-dir", str(runs), "--wandb", "offline"]
    arguments += [f"compile={compiled}"] if compiled else []
    begun = time.time()
    environment = child_environment(**caches(kind.place), **{timeline.BEGUN: str(begun)})
    program = ["benchmarks.timeline", str(file), *(["--samples"] if with_samples else []), *arguments]
    done = subprocess.run(
        [sys.executable, "-m", *program], cwd=kind.place, env=environment, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.time() - begun
    if done.returncode:
        raise Missing(f"`cifar {' '.join(arguments)[:200]}` ended with {done.returncode}: {done.stdout.strip()[-600:]}")
    (record,) = list_run_dirs(runs)
    epochs = [row["system/seconds"] for row in record.read_rows()]
    found = json.loads(file.read_text())
    return {
        "run": kind.name,
        "first step": found["marks"]["first step"],
        "finished": record.read_json("status")["time"] - begun,
        "end": end,
        "training": statistics.median(epochs[1:] or epochs) * len(epochs),
        "accuracy": record.read_json("summary").get("test/acc"),
        "step": record.read_json("environment")["step"],
        "timeline": found,
    }


def start_once(options: argparse.Namespace) -> float:
    """Seconds until a new process has imported PyTorch and started the device. Its end is not in them."""
    import torch

    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    begun = time.time()
    program = [sys.executable, "-c", START.format(device=device)]
    done = subprocess.run(program, env=child_environment(), check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout) - begun


def measure(result: Result, options: argparse.Namespace) -> None:
    deadline, starts = time.monotonic() + options.seconds, list[float]()
    with contextlib.ExitStack() as stack:
        names = [WHOLE] if options.smoke else options.runs  # compiling takes a CPU minutes
        kinds = []
        for name in names:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cifar-cold-")))
            run, _, most = name.partition("/")
            kinds.append(Kind(run, place, int(most or options.n)))
        start_once(options), data.load_dataset(options.dataset)  # files come from the disk here
        with ThreadPoolExecutor(len(kinds) if options.together else 1) as threads:  # each waits for its process
            for kind, found in zip(kinds, threads.map(lambda kind: run_once(options, kind, 0), kinds), strict=True):
                kind.empty.append(found)
        _keep_timelines(options, kinds)
        for number in range(options.n):
            for kind in (kind for kind in kinds if number < kind.most):
                starts.append(start_once(options))
                kind.warm.append(run_once(options, kind, 1 + number))
                _keep_timelines(options, kinds)
                if time.monotonic() > deadline:
                    break
            if time.monotonic() > deadline:
                result.note(f"ended after {options.seconds:.0f} s, with fewer warm runs than wanted")
                break
        if options.samples:
            for kind in kinds:
                if time.monotonic() < deadline and kind.most == options.n:
                    kind.warm.append(run_once(options, kind, 1000, with_samples=True))
            _keep_timelines(options, kinds)
            for kind in kinds:  # a thread that looks at stacks takes time itself: these are for reading only
                kind.warm = [each for each in kind.warm if not each["timeline"]["stacks"]]
        for number in range(1, options.empty_n):
            for kind in kinds:
                with tempfile.TemporaryDirectory(prefix="cifar-cold-") as folder:
                    kind.empty.append(run_once(options, Kind(kind.name, Path(folder)), 2000 + number))
    start = result.add("PyTorch", "import and CUDA's start", "s", starts)
    for kind in kinds:
        _add_figures(result, kind, start["median"])
    _airbench(result, options)


def _keep_timelines(options: argparse.Namespace, kinds: Sequence[Kind]) -> None:
    if options.timelines:
        options.timelines.write_text(json.dumps([each for kind in kinds for each in (*kind.empty, *kind.warm)]))


def _add_figures(result: Result, kind: Kind, start: float) -> None:
    for name, runs, wanted in (("empty", kind.empty, EMPTY_SECONDS), ("warm", kind.warm, WARM_SECONDS)):
        if not runs:
            continue
        what = f"{kind.name}, {name} caches"
        first = result.add("ours", f"{what}: first step, above the start", "s", [each["first step"] - start for each in runs])
        result.add("ours", f"{what}: command to the record's end", "s", [each["finished"] for each in runs])
        result.add("ours", f"{what}: command to its end", "s", [each["end"] for each in runs])
        above = [each["finished"] - start - each["training"] for each in runs]
        above_both = result.add("ours", f"{what}: to the record's end, above start and training", "s", above)
        if name == "warm":
            result.claim(f"first step of {kind.name}, {name} caches", first, ratio=False, at_most=FIRST_STEP_SECONDS)
        if kind.is_whole:
            accuracy = [100 * each["accuracy"] for each in runs if each["accuracy"] is not None]
            result.add("ours", f"{what}: test accuracy", "%", accuracy)
            result.claim(f"{kind.name} to 94 % above start and training, {name}", above_both, ratio=False, at_most=wanted)


def _airbench(result: Result, options: argparse.Namespace) -> None:
    """The same way: an own process, empty caches, then the same caches again."""
    if not options.peer_n:
        result.skip("cifar10-airbench", "--peer-n 0")
        return
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
        return
    for name, values in (("empty", cold), ("warm", warm)):
        result.add("airbench", f"command to accuracy, {name} caches", "s", values)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("cold_start", __doc__, n=5, what_n="warm starts of each run")
    parser.add_argument(
        "--runs", nargs="+", default=[WHOLE, "worksheet1", "resnet20:on", f"{WHOLE}:on/1", "worksheet1:on/1"],
        metavar="EXPERIMENT[:COMPILE][/N]",
        help="what to start; without COMPILE as the experiment has it; N: so many warm starts",
    )  # fmt: skip
    parser.add_argument("--empty-n", type=int, default=1, help="starts of each with empty caches")
    parser.add_argument("--together", action="store_true", help="those with empty caches at once: quicker, on many cores")
    parser.add_argument("--samples", action="store_true", help="one more of each, in which the stack is looked at")
    parser.add_argument("--seconds", type=float, default=1e9, help="after so many no other warm run begins")
    parser.add_argument("--timelines", type=Path, metavar="FILE.json", help="where to write the timelines of all runs")
    parser.add_argument("--peer-n", type=int, default=0, help="cold and warm starts of airbench; each compiles for minutes")
    return command(parser, "3", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
