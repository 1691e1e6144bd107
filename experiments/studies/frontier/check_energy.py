"""The joules in the rows' records beside an integral of the GPUs' sampled power over the same time.

    python experiments/studies/frontier/check_energy.py

rows_energy.csv: of each run its GPU, begin and end (seconds of one clock), how many trials were trained side by side, and its
joules as recorded: by the card's energy counter, from the first step on; of a pack each trial has its share. rows_power.csv.gz:
the power that `nvidia-smi -l 1` printed beside, once a second. A run's time has its start-up in it, the joules have not: so
the integral is up to 1 % larger where a process began. Exit code 1: a ratio is more than 5 % from 1.
"""

from __future__ import annotations

import csv
import gzip
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
MAX_DIFFERENCE = 0.05


def integrate(seconds: np.ndarray, watts: np.ndarray, begun: float, ended: float) -> float:
    """Joules between two moments, by trapezoids."""
    inside = seconds[(seconds > begun) & (seconds < ended)]
    times = np.concatenate([[begun], inside, [ended]])
    return float(np.trapezoid(np.interp(times, seconds, watts), times))


def main() -> int:
    samples = defaultdict(list)
    with gzip.open(HERE / "rows_power.csv.gz", "rt", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            samples[line["gpu"]].append((float(line["second"]), float(line["watts"])))
    power = {gpu: np.array(values).T for gpu, values in samples.items()}
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)  # a run, or the trials of a pack
    with open(HERE / "rows_energy.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            groups[line["experiment"] if line["together"] != "1" else line["run"]].append(line)
    ratios = []
    for lines in sorted(groups.values(), key=lambda lines: float(lines[0]["begun"])):
        begun, ended = min(float(line["begun"]) for line in lines), max(float(line["ended"]) for line in lines)
        counted = sum(float(line["joules"]) for line in lines)
        seconds, watts = power[lines[0]["gpu"]]
        sampled = integrate(seconds, watts, begun, ended)
        ratios.append(sampled / counted)
        seeds = " ".join(sorted(line["seed"] for line in lines))
        print(f"{lines[0]['experiment']:24} seed {seeds:6} {counted:8.0f} J counted {sampled:8.0f} J sampled {ratios[-1]:.4f}")
    print(
        f"sampled over counted: mean {statistics.mean(ratios):.4f} (std {statistics.stdev(ratios):.4f}, n = {len(ratios)}), "
        f"{min(ratios):.4f} to {max(ratios):.4f}"
    )
    return int(any(abs(ratio - 1) > MAX_DIFFERENCE for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
