"""Latency: how long a trained network takes for one image, or for a batch, that is on the device already."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cifar.config.schema import Settings
from cifar.kernels.cpu_conv_pool import chunk_conv_pools
from cifar.training.trainer import apply_process_settings, resolve_device

MIN_CALLS, MAX_CALLS = 30, 2000  # that are timed
SECONDS = 2.0  # of timed calls, for each batch size and each way, where that is more than MIN_CALLS
WARMUP_CALLS, WARMUP_SECONDS = 10, 0.3  # before: libraries choose their kernels, clocks rise


@dataclass(frozen=True)
class Latency:
    """Seconds of `num_calls` forward passes of one size, from the call until the device has done its work."""

    batch_size: int
    how: str  # eager, or captured: a CUDA graph
    num_calls: int
    median: float
    p5: float
    p95: float

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.median


@dataclass(frozen=True)
class LatencyReport:
    """What was measured, and how. `notes` are sentences for the user."""

    latencies: tuple[Latency, ...]
    device: torch.device
    precision: str
    notes: tuple[str, ...] = ()

    def find_fastest(self, batch_size: int) -> Latency:
        """Of the ways in which a batch was computed, the one with the lowest median."""
        return min((each for each in self.latencies if each.batch_size == batch_size), key=lambda each: each.median)


def measure_latency(model: nn.Module, config: Settings, batch_sizes: Sequence[int]) -> LatencyReport:
    """Time forward passes in evaluation mode, as the suite evaluates: eager, and on an NVIDIA GPU also as a CUDA graph.

    Images are random, as times do not depend on them. The network is moved to the device of `config`.
    """
    device = resolve_device(config.device)
    apply_process_settings(config)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device, memory_format=memory_format).eval()  # type: ignore[call-overload]
    if device.type == "cpu":
        chunk_conv_pools(model)
    found, notes = list[Latency](), list[str]()
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        for batch_size in batch_sizes:
            images = torch.randn(batch_size, 3, 32, 32).to(device, dtype, memory_format=memory_format)
            found.append(_time_calls(lambda images=images: model(images), device, batch_size, "eager"))  # type: ignore[misc]
            if device.type == "cuda":
                try:
                    graph = _capture(model, images)
                except torch.cuda.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    notes.append(f"a batch of {batch_size} cannot be captured as a CUDA graph: {str(error).splitlines()[0]}")
                else:
                    found.append(_time_calls(graph.replay, device, batch_size, "captured"))
    return LatencyReport(tuple(found), device, "bf16" if bf16 else "fp32", tuple(notes))


def _capture(model: nn.Module, images: Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph


def _time_calls(function: Callable[[], object], device: torch.device, batch_size: int, how: str) -> Latency:
    synchronize = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    start, num_warm = time.perf_counter(), 0
    while num_warm < WARMUP_CALLS or time.perf_counter() - start < WARMUP_SECONDS:
        function()
        synchronize()
        num_warm += 1
    seconds: list[float] = []
    spent = 0.0
    while len(seconds) < MIN_CALLS or (len(seconds) < MAX_CALLS and spent < SECONDS):
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
        spent += seconds[-1]
    p5, median, p95 = (float(value) for value in np.percentile(seconds, (5, 50, 95)))
    return Latency(batch_size, how, len(seconds), median, p5, p95)
