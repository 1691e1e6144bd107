"""system_metrics.jsonl in a run's folder: samples of the training process and its machine, and machine.json beside it.

The sidecar writes them, because the training has other things to do. A sample is a line of JSON: `_timestamp` (Unix time), and
values under W&B's own names. The first one is taken at once, one more every INTERVAL_SECONDS, and the last one when the run has
ended. A long run is sampled less often: each MAX_SAMPLES // 5 samples double the time between two.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar.system.files import UnreadableFileError, is_regular_file, load_json, read_bytes
from cifar.system.machine import describe_machine, list_packages
from cifar.system.sampler import Sampler, is_relative
from cifar.tracking.run_dir import RunDir, write_atomic

FILE, MACHINE_FILE, PACKAGES_FILE = "system_metrics.jsonl", "machine.json", "requirements.txt"
INTERVAL_SECONDS = 15.0  # as W&B's client
MAX_SAMPLES = 10_000  # of ten days
MAX_FILE_BYTES = 64 * 2**20


class SystemMetricsRecorder:
    """Samples the process that trains one run. It has to be this process's parent or a sibling: else a pid says nothing."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._path = run_dir.path / FILE
        self._sampler: Sampler | None = None
        self._pid = 0
        self._num_samples, self._last_time = -1, 0.0  # not read yet
        self._next_time = 0.0

    def poll(self) -> None:
        """Take a sample if it is time. Raises OSError where the disk is full, and ImportError without psutil."""
        status = self._run_dir.read_json("status")
        if status.get("state") != "running":
            self.finish()
        elif time.monotonic() >= self._next_time:
            self._take(status)

    def finish(self) -> None:
        """The run has ended, or waits to go on: take the last sample, unless that was done."""
        status = self._run_dir.read_json("status")
        self._read_file()
        if float(status.get("time") or 0.0) > self._last_time:
            self._take(status)
            self._last_time = time.time()  # once, also where nothing could be measured
        self._sampler, self._pid, self._next_time = None, 0, 0.0

    def _take(self, status: dict[str, Any]) -> None:
        pid = int(status.get("pid") or 0)
        if pid != self._pid and not self._begin(pid, is_over=status.get("state") != "running"):
            return
        self._read_file()
        if self._sampler is None or not self._sampler.is_alive() or self._num_samples >= MAX_SAMPLES:
            return
        if os.path.lexists(self._path) and not is_regular_file(self._path):
            return
        self._last_time = time.time()
        line = json.dumps({"_timestamp": self._last_time, **self._sampler.take()}, separators=(",", ":")) + "\n"
        with open(self._path, "ab", buffering=0) as file:
            file.write(line.encode())
        self._num_samples += 1
        self._next_time = time.monotonic() + INTERVAL_SECONDS * 2 ** (self._num_samples // (MAX_SAMPLES // 5))

    def _begin(self, pid: int, *, is_over: bool) -> bool:
        """Sample this process from now on. False if it is none of ours, or has not said yet which GPU it has."""
        environment = self._run_dir.read_json("environment")
        if not is_relative(pid) or (environment.get("pid") != pid and not is_over):
            return False
        gpu_uuid = str(environment.get("gpu_uuid") or "")
        try:
            self._sampler, self._pid = Sampler(pid, gpu_uuid), pid
        except LookupError:  # it has just ended
            return False
        self._describe_machine(gpu_uuid)
        return True

    def _describe_machine(self, gpu_uuid: str) -> None:
        write_atomic(self._run_dir.path / PACKAGES_FILE, "".join(f"{line}\n" for line in list_packages()).encode())
        write_atomic(self._run_dir.path / MACHINE_FILE, json.dumps(describe_machine(gpu_uuid), indent=1).encode())

    def _read_file(self) -> None:
        """How many samples there are, and when the last one was taken: by an earlier sidecar, perhaps."""
        if self._num_samples < 0:
            samples = list(read_samples(self._run_dir.path))
            self._num_samples = len(samples)
            self._last_time = max((float(sample["_timestamp"]) for sample in samples), default=0.0)


def read_samples(folder: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The samples from number `start`. A line that is damaged or still being written ends them."""
    with contextlib.suppress(UnreadableFileError):
        lines = read_bytes(folder / FILE, MAX_FILE_BYTES).split(b"\n")[:-1]
        for line in lines[start:]:
            try:
                sample = load_json(line)
            except ValueError:
                return
            if not isinstance(sample, dict) or not isinstance(sample.get("_timestamp"), int | float):
                return
            yield sample
