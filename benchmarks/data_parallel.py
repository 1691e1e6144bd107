"""One run on N GPUs by `torchrun` over the same on one: images a second, and the accuracy.

    python -m benchmarks.data_parallel --gpus 4 --set compile=on   # ResNet-56, about 6 minutes on four H200s

Three kinds of runs, each by the command line, with pictures and an offline mirror: batches of 512 on one GPU (all seeds at
the same time, a GPU each), batches of 512 x N on N GPUs, batches of 512 on N GPUs. Images a second are those of the record:
the median over epochs of a run, from an epoch's first batch to its last step; the first epoch is left out. lr is that of the
whole batch: with N times the batch it is N times as large (the linear rule of Goyal et al. 2017, with warm-up). BatchNorm
normalises each GPU's share of a batch by itself.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import SMOKE, Missing, Result, child_environment, command, installed, parser_of
from benchmarks.many_gpus import choose_gpus
from benchmarks.ours import pairs, settings
from cifar.tracking.run_dir import list_run_dirs

BATCH, LR = 512, 0.2
BOUND = 0.9  # times N, of one GPU's images a second


def train(options: argparse.Namespace, seed: int, gpus: list[str], factor: int) -> dict[str, Any]:
    """One run of `factor` times the batch on these GPUs (of the CPU in a smoke test) -> its figures. Raises Missing."""
    values: dict[str, Any] = {"experiment": options.experiment, "batch_size": BATCH * factor, "lr": LR * factor, "warmup": 0.15}
    values |= {"epochs": options.epochs, "seed": seed, "dataset": options.dataset}
    values = settings(options, values, {**SMOKE, "batch_size": SMOKE["batch_size"] * factor})
    values |= {"device": "cpu"} if options.smoke else {"device": "cuda"}
    experiment = str(values.pop("experiment"))
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(gpus))] if len(gpus) > 1 else []
    with tempfile.TemporaryDirectory(prefix="cifar-parallel-") as folder:
        runs = Path(folder) / "runs"
        words = ["-m", "cifar", "train", "--experiment", experiment, *pairs(values), "--runs-dir", str(runs)]
        words += ["--wandb", "offline" if installed("wandb") else "disabled"]
        environment = child_environment(
            CUDA_VISIBLE_DEVICES=",".join(gpus), CUDA_DEVICE_ORDER="PCI_BUS_ID", CIFAR_CAPTURE_RANKS="on"
        )
        clock = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *many, *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - clock
        if done.returncode:
            raise Missing(f"`{' '.join([*many, *words])[:200]}` ended with {done.returncode}: {done.stdout.strip()[-800:]}")
        records = list_run_dirs(runs)
        mirrors = list(runs.rglob("*.wandb"))
        if len(records) != 1 or len(mirrors) != int(installed("wandb")):
            raise Missing(f"one record and one W&B run are wanted, not {len(records)} and {len(mirrors)}")
        environment_found = records[0].read_json("environment")
        rows = list(records[0].read_rows())[1:]
        return {
            "images": statistics.median(row["system/images_per_second"] for row in rows),
            "accuracy": 100 * records[0].read_json("summary")["test/acc"],
            "seconds": seconds,
            "training": sum(row["system/seconds"] for row in rows),
            "step": environment_found["step"],
            "ranks": environment_found.get("ranks", 1),
        }


def measure(result: Result, options: argparse.Namespace) -> None:
    import torch

    count, found = options.gpus, torch.cuda.device_count()
    if options.smoke:
        options.n = options.n_large = options.n_same = 1
    elif options.device == "cpu" or found < count or count < 2:
        raise Missing(f"needs {max(2, count)} GPUs, there {'is' if found == 1 else 'are'} {found}")
    gpus, what = choose_gpus(count), f"{options.experiment}: images a second, {count} GPUs / one"
    result.note(f"lr {LR} at batches of {BATCH}, times {count} at {count} times the batch (linear rule), warm-up 0.15")
    result.note("BatchNorm normalises each GPU's share of a batch by itself; rank 0's running statistics are evaluated")
    with ThreadPoolExecutor(1 if options.smoke else count) as pool:
        single = list(pool.map(lambda seed: train(options, seed, [gpus[seed % count]], 1), range(options.n)))
    one = report(result, f"one GPU, batches of {BATCH}", single)
    result.save(options.out)

    large = [train(options, seed, gpus, count) for seed in range(options.n_large)]
    many = report(result, f"{count} GPUs, batches of {BATCH * count}, lr {LR * count:g}", large)
    result.claim(f"{what}, {BATCH} a GPU", many["images"], one["images"], inverse=True, at_least=BOUND * count)
    after = f"accuracy after {options.epochs} epochs"
    rule = f"{after}, batches of {BATCH * count}, {count} GPUs, lr times {count}"
    result.claim(rule, many["accuracy"], one["accuracy"], of="mean", ratio=False)
    result.save(options.out)

    if same := [train(options, seed, gpus, 1) for seed in range(options.n_same)]:
        many = report(result, f"{count} GPUs, batches of {BATCH}", same)
        result.claim(f"{what}, {BATCH} in all", many["images"], one["images"], inverse=True)
        what = f"{after}, batches of {BATCH}, {count} GPUs"
        result.claim(what, many["accuracy"], one["accuracy"], of="mean", ratio=False)


def report(result: Result, who: str, runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of one kind of runs."""
    for run in runs:
        if not run["step"]["captured"]:
            result.note(f"{who}: steps are not captured ({run['step']['not_captured_because'] or 'no GPU'})")
    more = {"captured": runs[0]["step"]["captured"], "compiled": runs[0]["step"]["compiled"], "ranks": runs[0]["ranks"]}
    result.add(who, "the whole command, wall clock", "s", [run["seconds"] for run in runs])
    result.add(who, "training, without the first epoch", "s", [run["training"] for run in runs])
    return {
        "images": result.add(who, "images a second", "1/s", [run["images"] for run in runs], **more),
        "accuracy": result.add(who, "test accuracy", "%", [run["accuracy"] for run in runs]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("data_parallel", __doc__, n=3, what_n="seeds on one GPU")
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="GPUs of this host [default: 2]")
    parser.add_argument("--n-same", type=int, default=3, help="seeds on N GPUs with the batch of one [default: 3]")
    parser.add_argument("--n-large", type=int, default=1, help="seeds on N GPUs with N times the batch [default: 1]")
    parser.add_argument("--epochs", type=int, default=30, help="of each run [default: 30]")
    parser.add_argument("--experiment", default="resnet56", help="the network [default: resnet56]")
    return command(parser, "9", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
