"""A sweep over architectures with empty caches over the same sweep with warm ones: what of compiling is waited for.

    python -m benchmarks.architectures                              # 8 networks x 2 seeds; about 7 minutes on one H200
    python -m benchmarks.architectures --networks 16 --seeds 1      # on all visible GPUs
    python -m benchmarks.architectures --ways ahead off             # also with --compile-ahead off, as long again

`python -m cifar sweep FILE --gpus all`, from the command to its end, start-up and mirror included, `compile=on`, 30 epochs.
Empty: the folders of compiled kernels are new. Warm: the same folders again. Training seconds are the sum over all trials,
as their records have them; the rest of the GPUs' time is start-up, compiling and waiting.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cold_start import caches
from benchmarks.common import Missing, Result, command, parser_of
from benchmarks.ours import cifar, settings
from cifar.tracking.run_dir import RunDir, list_run_dirs

ADAM = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0}
SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4}
ADAMW = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}
EIGHT = (  # both rows in the order of sweeps/architectures.yaml
    {"model": "worksheet1", **ADAM},
    {"model": "conv32", **SGD},
    {"model": "resnet8", **SGD},
    {"model": "resnet20", **SGD},
    {"model": "resnet32", **SGD},
    {"model": "resnet56", **SGD},
    {"model": "vgg11", **SGD},
    {"model": "shufflenet_v2_x0_5", **SGD},
)
SIXTEEN = (
    EIGHT[0],
    {"model": "worksheet2", **ADAM},
    *EIGHT[1:5],
    {"model": "resnet44", **SGD},
    EIGHT[5],
    {"model": "preact_resnet18", **SGD},
    {"model": "wrn_16_4", **SGD},
    EIGHT[6],
    {"model": "vgg13", **SGD},
    {"model": "mobilenet_v2_x0_5", **SGD},
    EIGHT[7],
    {"model": "convmixer_256_8", **ADAMW},
    {"model": "vit_tiny", **ADAMW},
)
TOY_NETWORKS = ({"model": "conv4", **SGD}, {"model": "conv8", **SGD})
WAYS = ("ahead", "off")
CAPTIONS = {"ahead": "compiled ahead", "off": "--compile-ahead off"}


def sweep_file(place: Path, options: argparse.Namespace) -> Path:
    """The sweep's file: the seed is the outer loop, so that each network comes again after all the others."""
    values = settings(options, {"epochs": options.epochs, "batch_size": options.batch_size, "compile": "on"})
    values = {key: value for key, value in values.items() if key not in ("width", "tta")}
    networks = TOY_NETWORKS if options.smoke else (EIGHT if options.networks <= len(EIGHT) else SIXTEEN)[: options.networks]
    fixed = {key: {"value": value} for key, value in values.items() if key != "device" or options.device != "auto"}
    swept = {"seed": {"values": list(range(options.seeds))}, "model": {"values": list(networks)}}
    text = {
        "name": "networks",
        "method": "grid",
        "metric": {"name": "val/acc", "goal": "maximize"},
        "parameters": swept | fixed,
    }
    path = place / "networks.yaml"
    path.write_text(json.dumps(text))  # JSON is YAML
    return path


def run_sweep(place: Path, options: argparse.Namespace, way: str, state: str) -> dict[str, Any]:
    """One sweep with the caches below `place` -> its wall clock, and what its records say."""
    runs = place / f"runs-{state}"
    on_gpus = options.device != "cpu"
    ahead = "off" if way == "off" else "auto" if on_gpus else "1"
    workers = ["--gpus", options.gpus] if on_gpus else ["--workers", "1"]
    arguments = [*workers, "--compile-ahead", ahead, "--no-report", "--wandb", options.mirror, "--runs-dir", str(runs)]
    _, wall = cifar("sweep", str(sweep_file(place, options)), *arguments, cwd=place, **caches(place))
    records = list(list_run_dirs(runs))
    unfinished = [record.id for record in records if record.read_json("status").get("state") != "finished"]
    if unfinished or len(records) != options.num_trials:
        raise Missing(f"{len(records) - len(unfinished)} of {options.num_trials} trials finished")
    by_network = collections.Counter[str]()
    for record in records:
        by_network[record.read_json("config")["model"]] += sum(row["system/seconds"] for row in record.read_rows())
    print(f"  {CAPTIONS[way]}, {state} caches: {wall:.1f} s, training {by_network.total():.1f} s", file=sys.stderr, flush=True)
    return {
        "wall": wall,
        "training": by_network.total(),
        "by_network": {name: round(seconds, 2) for name, seconds in by_network.items()},
        "waited": sum(map(_waited_seconds, records)),
        "ahead": _read_log(runs),
    }


def _waited_seconds(record: RunDir) -> float:
    """How long a trial's worker waited for the process that compiled its network. Each trial of a pack says the same."""
    step = record.read_json("environment")["step"]
    found = re.search(r"waited (\d+) s", step["compile"])
    return int(found[1]) / step["together"] if found else 0.0


def _read_log(runs: Path) -> dict[str, Any]:
    """What the sweep's log says of the processes that compile ahead."""
    lines = [line for log in runs.glob("sweeps/*/logs/compile-ahead.log") for line in log.read_text().splitlines()]
    begun = collections.Counter(line.split()[1] for line in lines if line.endswith("begins (0.0 s)"))
    ready = [float(found[1]) for line in lines if (found := re.search(r": ready \(([\d.]+) s\)$", line))]
    return {"networks": len(begun), "ready": len(ready), "most_often": max(begun.values(), default=0), "seconds": ready}


def measure(result: Result, options: argparse.Namespace) -> None:
    if options.smoke:
        options.seeds, options.networks = 1, len(TOY_NETWORKS)
    options.num_trials = options.seeds * options.networks
    what = f"{options.networks} networks x {options.seeds} seeds, {options.epochs} epochs, batch {options.batch_size}"
    walls: dict[tuple[str, str], dict[str, Any]] = {}
    training: dict[tuple[str, str], dict[str, Any]] = {}
    for way in options.ways:
        found: dict[str, list[dict[str, Any]]] = {"empty": [], "warm": []}
        for _ in range(options.n):
            with tempfile.TemporaryDirectory(prefix="cifar-networks-") as folder:
                for state, runs in found.items():
                    runs.append(run_sweep(Path(folder), options, way, state))
        for state, runs in found.items():
            who = f"{CAPTIONS[way]}, {state} caches"
            walls[way, state] = result.add(who, f"{what}: wall clock", "s", [run["wall"] for run in runs])
            seconds = [run["training"] for run in runs]
            training[way, state] = result.add(who, "training", "s", seconds, by_network=[run["by_network"] for run in runs])
            result.add(who, "workers waited for another process", "s", [run["waited"] for run in runs])
            if way == "ahead":
                times_begun = [run["ahead"]["most_often"] for run in runs]
                result.add(who, "networks compiled ahead", "", [run["ahead"]["ready"] for run in runs], of=runs[0]["ahead"])
                result.add(who, "most often that one was begun", "", times_begun)
    for way in options.ways:
        at_most = {"ahead": options.at_most}.get(way)
        empty, warm = walls[way, "empty"], walls[way, "warm"]
        result.claim(f"{what}, {CAPTIONS[way]}: wall clock, empty / warm", empty, warm, inverse=True, at_most=at_most)
        result.claim(f"{CAPTIONS[way]}: training, empty / warm", training[way, "empty"], training[way, "warm"], inverse=True)
    if len(options.ways) > 1:
        result.claim("wall clock with empty caches, off / ahead", walls["ahead", "empty"], walls["off", "empty"])
        result.claim("training with warm caches, ahead / off", training["ahead", "warm"], training["off", "warm"], inverse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("architectures", __doc__, n=1, what_n="pairs of sweeps")
    parser.add_argument("--networks", type=int, default=8, choices=range(1, len(SIXTEEN) + 1), metavar="1..16")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--gpus", default="all", help="as of `sweep` [default: all that CUDA_VISIBLE_DEVICES names]")
    parser.add_argument("--mirror", default="offline", choices=("offline", "disabled"), help="of W&B [default: offline]")
    parser.add_argument("--ways", nargs="+", default=["ahead"], choices=WAYS, help="[default: ahead]")
    parser.add_argument("--at-most", type=float, default=1.18, help="what empty / warm may be [default: 1.18]")
    return command(parser, "11", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
