"""Loads cuDNN in a thread, while the main thread reads images and makes a run's folder: it takes a second."""

from __future__ import annotations

import contextlib
import threading

import torch
import torch.nn.functional as F

_loading: list[threading.Thread] = []  # one at most


def begin_loading_libraries(device: torch.device) -> None:
    """Begin to load it by a small convolution; nothing without a GPU. No random number is drawn, and no result is kept.

    cuBLAS is left alone: it takes a tenth of that, and reads settings of the run when it starts.
    """
    if device.type != "cuda" or _loading:
        return
    thread = threading.Thread(target=_convolve, args=(device,), name="gpu-libraries", daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads can be started
        thread.start()
        _loading.append(thread)


def wait_for_libraries() -> None:
    """Until it is loaded: a step is captured only while no other thread uses the GPU."""
    while _loading:
        _loading.pop().join()


def _convolve(device: torch.device) -> None:
    with contextlib.suppress(Exception), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        images = torch.ones((2, 16, 8, 8), dtype=torch.bfloat16, device=device).to(memory_format=torch.channels_last)
        filters = torch.ones((16, 16, 3, 3), dtype=torch.bfloat16, device=device, requires_grad=True)
        F.conv2d(images, filters, padding=1).sum().backward()
        torch.cuda.current_stream(device).synchronize()
