"""Trials an hour of N GPUs of one host over those of one of them, and what the workers share.

    python -m benchmarks.many_gpus --gpus 4 --set compile=on   # about 5 minutes on four H200s

`python -m cifar sweep FILE --gpus ...`: first 16 short trials on one GPU, so that caches are warm, then 64 trials for each GPU
on N of them and 64 on one, in turn; worksheet 1, packed, with pictures and an offline mirror. The rate is that between the
ends of trials, after each GPU's first pack: start-up is once a sweep, however long it is. The wall clock of the whole sweep is
beside it. What is shared is measured in the sweep on N GPUs (benchmarks/fleet_profile.py): CPU seconds by kind of process,
the agent's time in calls of its database, the disk's time for the same files again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import fleet_profile
from benchmarks.common import Missing, Result, child_environment, command, installed, parser_of
from benchmarks.trials import sweep_file
from cifar.agent.packing import MAX_PACK_SIZE
from cifar.system.devices import num_cores
from cifar.tracking.run_dir import list_run_dirs

TRIALS = 64  # for each GPU
WANTED = {2: 1.9, 4: 3.8, 8: 7.4}  # times one GPU's trials an hour


def choose_gpus(count: int) -> list[str]:
    """The numbers of the first GPUs that this process may use, as nvidia-smi counts."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    known = visible if visible and all(name.isdigit() for name in visible) else [str(index) for index in range(count)]
    return known[:count]


def run_sweep(options: argparse.Namespace, workers: list[str], trials: int, first: int) -> dict[str, Any]:
    """One sweep with these options for its workers -> its wall clock, its rate after the `first` ends, and what was shared."""
    with tempfile.TemporaryDirectory(prefix="cifar-many-") as folder:
        place, runs = Path(folder), Path(folder) / "runs"
        words = ["sweep", str(sweep_file(place, options, trials)), "--no-report", "--wandb", "offline", "--runs-dir", str(runs)]
        begun, clock, log = time.time(), time.perf_counter(), place / "log"
        environment = child_environment()
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # the agent pins its workers
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fleet_profile", str(place / "agent.json"), *words, *workers], cwd=place,
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            watch = fleet_profile.Watch(process.pid) if installed("psutil") else None
            code = process.wait()
        wall, cpu = time.perf_counter() - clock, watch.end() if watch else {}
        print(f"  {' '.join(workers)}: {trials} trials, {wall:.1f} s", file=sys.stderr, flush=True)
        if code:
            raise Missing(f"`cifar {' '.join(words[:1] + workers)}` ended with {code}: {log.read_text()[-600:]}")
        statuses = [record.read_json("status") for record in list_run_dirs(runs)]
        ends = sorted(status["time"] for status in statuses if status.get("state") == "finished")
        if len(ends) < trials:
            raise Missing(f"{len(ends)} of {trials} trials finished: {log.read_text()[-600:]}")
        return {
            "wall": wall,
            "hourly": 3600 * (len(ends) - first) / (ends[-1] - ends[first - 1]),
            "to_first": ends[first - 1] - begun,
            "after_last": begun + wall - ends[-1],
            "cpu": cpu,
            "agent": json.loads((place / "agent.json").read_text()),
            "disk": fleet_profile.write_again(runs),
        }


def measure(result: Result, options: argparse.Namespace) -> None:
    import torch

    count, found = options.gpus, torch.cuda.device_count()
    if options.smoke:
        many, one, trials, first = ["--workers", str(count)], ["--workers", "1"], 4, 1
    elif options.device == "cpu" or found < count or count < 2:
        raise Missing(f"needs {max(2, count)} GPUs, there {'is' if found == 1 else 'are'} {found}")
    else:
        gpus = choose_gpus(count)
        many, one, trials, first = ["--gpus", ",".join(gpus)], ["--gpus", gpus[0]], options.trials, MAX_PACK_SIZE
        if not options.caches_are_warm:
            warm = argparse.Namespace(**{**vars(options), "set": [*options.set, "epochs=2"]})
            run_sweep(warm, one, MAX_PACK_SIZE, 1)
    if not installed("psutil"):
        result.skip("CPU seconds by kind of process", "psutil is not installed")
    runs: dict[str, list[dict[str, Any]]] = {"many": [], "one": []}
    for pair in range(options.n):
        for which in ("many", "one") if pair % 2 == 0 else ("one", "many"):
            times = count if which == "many" else 1
            arguments = many if which == "many" else one
            runs[which].append(run_sweep(options, arguments, times * trials, times * first))
    names = {"many": " ".join(many), "one": " ".join(one)}
    rates = {which: add(result, names[which], "trials an hour", "1/h", runs[which], "hourly") for which in runs}
    for which, of in runs.items():
        times = trials * (count if which == "many" else 1)
        add(result, names[which], f"{times} trials, wall clock", "s", of, "wall")
        add(result, names[which], "of it, until each worker's first pack had ended", "s", of, "to_first")
        add(result, names[which], "of it, pictures and mirror after the last trial", "s", of, "after_last")
    result.claim(
        f"trials an hour after the first packs, {count} GPUs / one",
        rates["many"],
        rates["one"],
        inverse=True,
        at_least=WANTED.get(count, 0.93 * count),
    )
    for which, of in runs.items():
        add_shares(result, names[which], of)


def add(result: Result, who: str, what: str, unit: str, runs: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return result.add(who, what, unit, [run[key] for run in runs])


def add_shares(result: Result, who: str, runs: list[dict[str, Any]]) -> None:
    """What the workers share, as shares of the sweep's wall clock. At 100 % of one core a process can do no more."""
    shares: dict[str, list[float]] = {}
    for run in runs:
        wall, cpu, agent = run["wall"], run["cpu"], run["agent"]
        of_all = wall * num_cores()
        for what, value in {
            "all CPUs: workers": sum(cpu.get(kind, 0.0) for kind in ("workers", "compiling", "other")) / of_all,
            "all CPUs: pictures": cpu.get("pictures", 0.0) / of_all,
            "all CPUs: mirror, by wandb-core": cpu.get("wandb-core", 0.0) / of_all,
            "one core: the sidecar (mirror, system metrics)": cpu.get("sidecar", 0.0) / wall,
            "one core: the agent": cpu.get("agent", 0.0) / wall,
            "the agent's time: calls of the database": agent.get("database", 0.0) / wall,
            "the agent's loop: not waiting for its workers": 1 - agent["waiting"] / agent["loop"],
            "the disk's time, the same files flushed again": run["disk"] / wall,
        }.items():
            shares.setdefault(what, []).append(100 * value)
    for what, values in shares.items():
        result.claim(f"share of the wall clock, {who}, {what}", result.add(who, what, "%", values))
    calls = [run["agent"].get("database calls", 0) for run in runs]
    milliseconds = [1e3 * run["agent"].get("database", 0.0) / max(1, number) for run, number in zip(runs, calls, strict=True)]
    result.add(who, f"a call of the database, mean of {calls[0]:.0f}", "ms", milliseconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("many_gpus", __doc__, n=1, what_n="pairs")
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="GPUs of this host [default: 2]")
    parser.add_argument("--trials", type=int, default=TRIALS, choices=(32, 64), help="for each GPU [default: 64]")
    parser.add_argument("--caches-are-warm", action="store_true", help="do not train 16 trials first, to fill the caches")
    return command(parser, "9", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
