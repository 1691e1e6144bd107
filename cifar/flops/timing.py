"""How long a forward pass takes."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from cifar.flops.networks import borrow, materialize_lazy_modules, widen_weights


def measure_microseconds_per_image(model: nn.Module, device: torch.device | str = "cpu", batch: int = 64) -> float:
    """Median microseconds of a forward pass in evaluation mode, per image. Uses a copy; the model does not change."""
    device = torch.device(device)
    images = torch.zeros(batch, 3, 32, 32, device=device)
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    seconds: list[float] = []
    with borrow(model) as network:
        materialize_lazy_modules(network)
        network.to(device).eval()
        widen_weights(network, images)
        with torch.inference_mode():
            network(images)  # allocates memory and chooses kernels
            while len(seconds) < 3 or (len(seconds) < 20 and sum(seconds) < 0.1):
                synchronize()
                start = time.perf_counter()
                network(images)
                synchronize()
                seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds) / batch
