"""The GPU's energy counter against an integral of its sampled power: do both say the same of a load?

    python benchmarks/energy.py [--n 3] [--seconds 30] [--json FILE]

The load is matrix products at full power, in half of each second, so that the power moves. The counter is read as a training
reads it (cifar/system/energy.py). Power is sampled 20 times a second and integrated by trapezoids. Both begin and end together.
Exit code 1: they are more than 5 % apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SAMPLES_PER_SECOND = 20
MAX_DIFFERENCE = 0.05  # of the counter, relative to the integral


class PowerIntegral:
    """Joules by sampled power, from `start` to `stop`."""

    def __init__(self, uuid: str) -> None:
        import pynvml

        self._nvml: Any = pynvml
        self._nvml.nvmlInit()
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        self.samples: list[tuple[float, float]] = []  # seconds, watts
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _take(self) -> None:
        self.samples.append((time.perf_counter(), self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000))

    def _sample(self) -> None:
        while not self._is_over.wait(1 / SAMPLES_PER_SECOND):
            self._take()

    def start(self) -> None:
        self._take()
        self._thread.start()

    def stop(self) -> float:
        self._is_over.set()
        self._thread.join()
        self._take()
        return integrate(self.samples)


def integrate(samples: list[tuple[float, float]]) -> float:
    """The integral of (seconds, watts), by trapezoids: joules."""
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in itertools.pairwise(samples))


def load_gpu(seconds: float) -> None:
    """Matrix products for half of each second, and none for the other half."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pause = time.perf_counter() + 0.5
        while time.perf_counter() < min(pause, end):
            for _ in range(8):
                a @ a
            torch.cuda.synchronize()
        time.sleep(max(0.0, min(0.5, end - time.perf_counter())))


def measure(seconds: float) -> dict[str, Any]:
    import torch

    from cifar.system.energy import EnergyMeter
    from cifar.system.environment import gpu_uuid

    uuid = gpu_uuid(torch.empty(0, device="cuda").device)
    load_gpu(1.0)  # libraries load, clocks rise
    meter, integral = EnergyMeter([uuid]), PowerIntegral(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    integral.start()
    load_gpu(seconds)
    sampled, counted = integral.stop(), meter.read()
    problem = meter.problem
    start = time.perf_counter()
    for _ in range(20):
        EnergyMeter([uuid]).read()
    reading = (time.perf_counter() - start) / 20
    return {
        "counter_joules": counted,
        "problem": problem,
        "sampled_joules": sampled,
        "seconds": integral.samples[-1][0] - integral.samples[0][0],
        "samples": len(integral.samples),
        "ratio": counted / sampled if counted is not None else None,
        "seconds_of_a_reading": reading,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=3, help="repetitions")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load each")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to compare")
        return 0
    found = []
    for number in range(options.n):
        found.append(each := measure(options.seconds))
        counted = f"{each['counter_joules']:,.1f} J" if each["counter_joules"] is not None else f"unknown ({each['problem']})"
        ratio = f", ratio {each['ratio']:.4f}" if each["ratio"] is not None else ""
        print(
            f"{number}: counter {counted}, {each['samples']} samples of power {each['sampled_joules']:,.1f} J in "
            f"{each['seconds']:.1f} s{ratio}; a meter is made and read in {1000 * each['seconds_of_a_reading']:.2f} ms",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "measured": found}, indent=1))
    ratios = [each["ratio"] for each in found if each["ratio"] is not None]
    if len(ratios) < len(found):
        print("the counter could not be read every time")
        return 1
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(f"{torch.cuda.get_device_name()}: median ratio {statistics.median(ratios):.4f}, at most {100 * worst:.2f} % apart")
    return int(worst > MAX_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
