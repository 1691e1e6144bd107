"""How long `report` takes over a thousand runs: from their folders, and from a W&B server; each for the first time, and again.
From folders also when one run has changed.

    python benchmarks/report_scale.py [--runs 1000] [--epochs 100] [--layers 4] [--repeats 3] [--json FILE]
    python -m benchmarks.report_scale --large                 # 10,000 runs of a random search, from folders only
    python benchmarks/report_scale.py --runs 100 --layers 22 --histograms 22 [--history-only]    # deep networks on W&B

Each figure is the wall time of a whole `python -m cifar report`, start and imports included. The runs are those of the tests
(8 networks x 5 learning rates x seeds, 4 metrics a layer); the server is the tests' own, and its time is in the figures. With
`--design search` each run is a point of its own: it has its own value of eight settings, and files of the size that runs write.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cifar.config.schema import Settings
from cifar.report.run_cache import SETTLE_SECONDS
from cifar.system.environment import device_name
from cifar.tracking.run_dir import CACHE_FOLDER, RunDir
from helpers.fake_runs import ACCURACY, NETWORKS, write
from helpers.on_server import put
from helpers.protocol import Server

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Size:
    """How many runs of which length. `histograms`: epochs of each run that have them, in its history on the server."""

    runs: int
    epochs: int
    layers: int
    histograms: int
    history_only: bool
    design: str


def write_searched(runs: Path, n: int, size: Size) -> RunDir:
    """The folder of one run of a random search, with documents of the size that runs write."""
    draw = random.Random(n)
    model = draw.choice(list(NETWORKS))
    searched = {
        "lr": 10 ** draw.uniform(-2.5, 0),
        "weight_decay": 10 ** draw.uniform(-5, -2.5),
        "momentum": draw.uniform(0.8, 0.99),
        "batch_size": draw.choice((64, 128, 256, 512)),
        "label_smoothing": draw.choice((0.0, 0.05, 0.1, 0.2)),
        "schedule": draw.choice(("cosine", "linear", "constant")),
        "crop_padding": draw.choice(("zero", "reflect")),
    }
    loss = 0.05 * math.log10(searched["lr"] / 0.1) ** 2 + 0.02 * math.log10(searched["weight_decay"] / 5e-4) ** 2
    loss += {"cosine": 0.0, "linear": 0.005, "constant": 0.04}[searched["schedule"]] + 0.1 * searched["label_smoothing"]
    config = {name: field.default for name, field in Settings.model_fields.items()}
    config |= {"nesterov": True, "decay_norm_and_bias": False, "warmup": 0.05, "final_lr": 0.0, "dropout": 0.0}
    accuracy = ACCURACY[model] - loss + draw.gauss(0, 0.004)
    for name in ("model", "dataset", "optimizer", "epochs", "seed", "test"):
        config.pop(name)  # arguments below; `test` is one of another meaning
    record = write(
        runs, f"r{n:05d}", model=model, seed=draw.randrange(3), accuracy=accuracy, epochs=size.epochs, layers=size.layers,
        swept=("model", "seed", *searched), measured=SUMMARY, **{**config, **searched},
    )  # fmt: skip
    record.write_json("labels", {**METRIC_LABELS, "layers": [f"layer{i}.conv" for i in range(size.layers)]})
    record.write_json("environment", {**record.read_json("environment"), **ENVIRONMENT})
    return record


METRIC_LABELS = {
    name: {"label": f"what {name} is called", "unit": "fraction"}
    for name in ("train/loss", "train/acc", "train/lr", "val/loss", "val/acc", "system/seconds", "system/memory_gib")
}
SUMMARY = {"train/loss": 0.4217, "train/acc": 0.8712, "val/loss": 0.5123, "train_flops": 4.1e14, "images_per_second": 40_000.0}
ENVIRONMENT = {
    "cores": 16,
    "platform": "Linux-6.18.44-x86_64-with-glibc2.36",
    "host": "node",
    "user": "user",
    "cwd": "/home/user/cifar",
    "program": "-m cifar",
    "args": ["agent", "--count", "100", "--pack", "8", "abcd1234"],
    "step": {"captured": True, "not_captured_because": "", "compiled": True, "compile": "auto", "together": 1},
}


def fill(server: Server, runs: Path, size: Size, *, is_local: bool) -> None:
    """Run folders, and the same runs on the server."""
    for n in range(size.runs):
        if size.design == "search":
            record = write_searched(runs, n, size)
        else:
            model, seed = list(NETWORKS)[n % 8], n // 40
            options = {"lr": 0.1 + n // 8 % 5, "layers": size.layers, "epochs": size.epochs}
            record = write(runs, f"r{n:04d}", model=model, seed=seed, **options)
        if is_local:
            continue
        put(server, record, with_metrics=not size.history_only)
        lines = server.runs[record.id].history_lines
        lines[: size.histograms] = [add_histograms(line, size.layers) for line in lines[: size.histograms]]


def add_histograms(line: str, layers: int) -> str:
    """A row of the history with histograms, as the mirror sends them."""
    edges = [float(f"{0.5 / 2**i:.4g}") for i in range(16)]
    bins = [*(-edge for edge in edges), 0.0, *reversed(edges)]
    histogram = {"_type": "histogram", "values": [37 * i % 1009 for i in range(32)], "bins": bins}
    names = [f"{kind}/layer{i}.conv" for kind in ("gradients", "updates") for i in range(layers)]
    return json.dumps({**json.loads(line), **dict.fromkeys(names, histogram)})


def timed(place: str, home: Path, server: Server) -> dict[str, float]:
    """One report -> wall and CPU seconds, and requests to the server."""
    left_out = ("WANDB_", "PYTHONDONTWRITEBYTECODE")  # an installation has its bytecode
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    folders = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    folders |= {"PYTHONPYCACHEPREFIX": str(home / "bytecode"), "MPLCONFIGDIR": str(home / "fonts")}
    environment = {**kept, **folders, **server.environment()}
    server.requests.clear()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "cifar", "report", place, "--out", str(home / "out")],
        env=environment, cwd=home, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "requests": len(server.requests), "peak_mib": after.ru_maxrss / 1024}


def change_run(folder: Path) -> None:
    """Another accuracy in the last epoch of a run, so that nearly all of a report changes."""
    file = folder / "metrics.jsonl"
    *lines, last = file.read_text().splitlines()
    row = json.loads(last)
    file.write_text("".join(f"{line}\n" for line in [*lines, json.dumps({**row, "val/acc": 0.999 * row["val/acc"]})]))


def summed_up(measured: list[dict[str, float]]) -> dict[str, object]:
    seconds = sorted(each["seconds"] for each in measured)
    return {
        "n": len(seconds),
        "median_seconds": round(statistics.median(seconds), 2),
        "range_seconds": [round(seconds[0], 2), round(seconds[-1], 2)],
        "median_cpu_seconds": round(statistics.median(each["cpu"] for each in measured), 2),
        "requests": int(measured[-1]["requests"]),
        "peak_mib": round(measured[-1]["peak_mib"]),  # of the largest process so far
    }


def measure(size: Size, repeats: int, *, is_local: bool) -> dict[str, object]:
    """Everything in a folder of its own -> what was measured."""
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        home, runs = Path(folder), Path(folder) / "runs"
        fill(server, home / "few", replace(size, runs=80, epochs=2), is_local=True)
        timed(str(home / "few"), home, server)  # so that all is imported once
        fill(server, runs, size, is_local=is_local)
        time.sleep(SETTLE_SECONDS)  # the cache takes no run whose files have just changed
        num_bytes = sum(file.stat().st_size for file in runs.glob("*/metrics.jsonl"))
        local, again, changed, cold, warm = [], [], [], [], []
        for _ in range(repeats):
            shutil.rmtree(runs / CACHE_FOLDER, ignore_errors=True)
            local.append(timed(str(runs), home, server))
            again.append(timed(str(runs), home, server))
            change_run(next(folder for folder in sorted(runs.iterdir()) if folder.name[0] == "r"))
            changed.append(timed(str(runs), home, server))
        for _ in range(0 if is_local else repeats):
            shutil.rmtree(home / "cache", ignore_errors=True)
            cold.append(timed("me/cifar", home, server))
            warm.append(timed("me/cifar", home, server))
        server.assert_understood()
    what = f"{size.runs} runs ({size.design}) x {size.epochs} epochs x {size.layers} layers"
    return {
        "what": f"`report` of {what} ({num_bytes / 1e6:.0f} MB of metrics)",
        "histograms": f"{size.histograms} epochs of each run",
        "read_from": "history" if size.history_only else "metrics.jsonl",
        "device": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),  # others on the same cores make it slower
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("wandb", "matplotlib")},
        "local": summed_up(local),
        "local_again": summed_up(again),
        "local_one_run_changed": summed_up(changed),
        **({} if is_local else {"wandb_cold": summed_up(cold), "wandb_warm": summed_up(warm)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--layers", type=int, default=4, help="of each network, with 4 metrics each [4, as worksheet 1 has]")
    parser.add_argument(
        "--histograms", type=int, default=0, help="epochs with histograms in the history on W&B [0]; a run has 22"
    )
    parser.add_argument("--history-only", action="store_true", help="W&B has no metrics.jsonl, as of earlier versions")
    parser.add_argument("--local", action="store_true", help="nothing of W&B")
    parser.add_argument("--design", choices=("grid", "search"), default="grid", help="what differs between the runs [grid]")
    parser.add_argument("--large", action="store_true", help="--runs 10000 --design search --local")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    options = parser.parse_args()
    if options.large:
        options.runs, options.design, options.local = 10_000, "search", True
    size = Size(options.runs, options.epochs, options.layers, options.histograms, options.history_only, options.design)
    text = json.dumps(measure(size, options.repeats, is_local=options.local), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
