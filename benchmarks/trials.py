"""Trials an hour: a worksheet-1 sweep of 64 (4 learning rates, 4 weight decays, 4 seeds) packed, side by side, in turn.

    python -m benchmarks.trials [--trials 64] [--serial 8] [--per-gpu 4] [--peer-n 3]   # about 8 minutes on one H200
    python -m benchmarks.trials --ways packed "one after the other" --peer-n 0           # some of it

Wall clock of `python -m cifar sweep FILE`, start-up and W&B mirror included. A way that runs fewer than all trials is scaled
by the rate between its own trials' ends. The plain way is a new process a trial that runs the notebooks' way with
`wandb.init`; without `wandb agent`'s own pauses between trials (5 s), so it looks better here than it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import SMOKE, Missing, Result, child_environment, command, installed, parser_of
from benchmarks.ours import cifar, settings, takes
from cifar.tracking.run_dir import list_run_dirs

RATES, DECAYS, SEEDS = [3e-4, 1e-3, 2e-3, 4e-3], [1e-4, 1e-3, 1e-2, 1e-1], [0, 1, 2, 3]
WAYS = ("packed", "side by side", "one after the other")


def sweep_file(place: Path, options: argparse.Namespace, trials: int) -> Path:
    """The first `trials` of the 64: seeds first, so that what fits a pack comes together. More than 64 have more seeds."""
    seeds = SEEDS[: min(trials, 4)] if trials <= 64 else list(range(trials // 16))
    decays = DECAYS[: max(1, min(trials // 4, 4))]
    rates = RATES[: max(1, trials // 16)]
    values = settings(options, {"model": "worksheet1", "epochs": 25, "batch_size": 128, "optimizer": "adamw"})
    swept: dict[str, Any] = {"lr": {"values": rates}, "weight_decay": {"values": decays}, "seed": {"values": seeds}}
    fixed = {key: {"value": value} for key, value in values.items() if key != "device" or options.device != "auto"}
    text = {"name": "trials", "method": "grid", "metric": {"name": "val/acc", "goal": "maximize"}, "parameters": fixed | swept}
    path = place / f"trials{trials}.yaml"
    path.write_text(json.dumps(text))  # JSON is YAML
    return path


def run_sweep(options: argparse.Namespace, trials: int, *arguments: str, parallel: int = 1) -> dict[str, Any]:
    """One sweep -> its wall clock, the trials that finished, and the seconds between two of their ends."""
    with tempfile.TemporaryDirectory(prefix="cifar-trials-") as folder:
        place = Path(folder)
        file = sweep_file(place, options, trials)
        begun, wall = cifar(
            "sweep", str(file), "--no-report", "--wandb", "offline", "--runs-dir", str(place / "runs"), *arguments, cwd=place
        )
        statuses = [record.read_json("status") for record in list_run_dirs(place / "runs")]
    ends = sorted(status["time"] for status in statuses if status.get("state") == "finished")
    if len(ends) < len(statuses) or not ends:
        raise Missing(f"{len(ends)} of {len(statuses)} trials finished")
    first = min(parallel, len(ends) - 1)  # the first of each worker have its start-up
    gap = (ends[-1] - ends[first - 1]) / (len(ends) - first) if len(ends) > 1 and first else None
    return {"wall": wall, "trials": len(ends), "gap": gap, "to_last": ends[-1] - begun}


def arguments_of(way: str, options: argparse.Namespace) -> tuple[int, int, list[str]]:
    """(trials to run, how many run at once, options of the sweep)."""
    cuda = options.device != "cpu" and _cuda()
    pack = ["--pack", "off"] if takes("sweep", "--pack") else []
    if way == "packed":
        if not pack:
            raise Missing("`python -m cifar sweep` has no --pack here")
        if not cuda:
            raise Missing("trials are packed on GPUs")
        return options.trials, 1, ["--pack", options.pack, "--gpus", "0"]
    if way == "side by side":
        k = options.per_gpu
        workers = ["--gpus", "0", "--per-gpu", str(k)] if cuda else ["--workers", str(k)]
        return min(options.trials, 4 * k), k, [*workers, *pack]
    return min(options.trials, options.serial), 1, [*(["--gpus", "0"] if cuda else ["--workers", "1"]), *pack]


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def measure(result: Result, options: argparse.Namespace) -> None:
    if options.smoke:
        options.trials, options.serial, options.per_gpu, options.peer_n = 2, 2, 2, min(options.peer_n, 1)
    hourly: dict[str, dict[str, Any]] = {}
    whole: dict[str, dict[str, Any]] = {}
    for way in options.ways:
        try:
            trials, parallel, arguments = arguments_of(way, options)
            runs = [run_sweep(options, trials, *arguments, parallel=parallel) for _ in range(options.n)]
        except Missing as missing:
            result.skip(way, str(missing))
            continue
        name = f"{way}, {parallel} at once" if parallel > 1 else way
        all_of_them = [run["wall"] + (options.trials - run["trials"]) * (run["gap"] or 0.0) for run in runs]
        scaled = f", scaled from {trials}" if trials < options.trials else ""
        command_line = " ".join(["python -m cifar sweep", *arguments])
        whole[way] = result.add(name, f"{options.trials} trials, wall clock{scaled}", "s", all_of_them, command=command_line)
        if scaled:
            result.add(name, "between two trials' ends", "s", [run["gap"] for run in runs if run["gap"]])
        hourly[way] = result.add(name, "trials an hour", "1/h", [3600 * options.trials / seconds for seconds in all_of_them])
    plain = _plain(result, options)
    if not whole:
        return
    best = min(whole, key=lambda way: whole[way]["median"])
    serial = whole.get("one after the other")
    result.claim(f"{options.trials} trials, {best}: wall clock", whole[best], serial, ratio=False, at_most=90.0)
    if serial and best != "one after the other":
        result.claim(f"{options.trials} trials, {best}: times faster than a warm worker in turn", whole[best], serial)
    if plain:
        what = f"trials an hour, {best}: times those of a new process a trial with the notebooks' way"
        result.claim(what, hourly[best], plain, inverse=True, at_least=20.0)


def _plain(result: Result, options: argparse.Namespace) -> dict[str, Any] | None:
    """A new process a trial; where it trains fewer than 25 epochs, the rest is added at its own seconds an epoch."""
    if not options.peer_n:
        return None
    if not installed("wandb"):
        result.skip("a new process a trial", "wandb is not installed")
        return None
    epochs = SMOKE["epochs"] if options.smoke else 25
    run = min(epochs, options.peer_epochs)
    seconds = []
    small = ["--train-size", "128", "--width", "4"] if options.smoke else []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.peer_n):
            arguments = [
                "--trial", "--epochs", str(run), "--lr", str(RATES[number % 4]), "--seed", str(number), "--val-size", "5000",
                "--workers", str(options.workers), "--device", options.device, "--dataset", options.dataset, *small,
            ]  # fmt: skip
            begun = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.peers.notebook", *arguments], cwd=folder, env=child_environment(),
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            )  # fmt: skip
            wall = time.perf_counter() - begun
            if done.returncode:
                result.skip("a new process a trial", (done.stderr.strip().splitlines() or ["?"])[-1][:300])
                return None
            each = json.loads(done.stdout.strip().splitlines()[-1])["epoch_seconds"]
            seconds.append(wall + (epochs - run) * sorted(each)[len(each) // 2])
    who = f"new process a trial, notebooks' way, {options.workers} workers"
    scaled = f", scaled from {run} epochs" if run < epochs else ""
    result.add(who, f"a trial of {epochs} epochs, wall clock{scaled}", "s", seconds)
    return result.add(who, f"trials an hour, from {options.peer_n} trials", "1/h", [3600 / each for each in seconds])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("trials", __doc__, n=1, what_n="sweeps a way")
    parser.add_argument("--trials", type=int, default=64, choices=(4, 16, 32, 64), help="of the sweep [default: 64]")
    parser.add_argument(
        "--serial", type=int, default=8, choices=(4, 8, 16, 64), help="of them one after the other [default: 8]"
    )
    parser.add_argument("--per-gpu", type=int, default=4, help="processes side by side [default: 4]")
    parser.add_argument("--pack", default="auto", help="auto, or trials a pack [default: auto]")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--peer-n", type=int, default=3, help="trials of the plain way; 0: none")
    parser.add_argument("--peer-epochs", type=int, default=25, help="that it trains; fewer are scaled to 25")
    return command(parser, "6", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
