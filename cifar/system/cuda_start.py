"""Starts CUDA in a thread, for the seconds in which the main thread imports PyTorch: the driver takes one on a large host.

PyTorch finds the GPU's context when it starts CUDA itself, and starts as it would without this.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import threading

from cifar.system.variables import read_variable

MAX_WAIT_SECONDS = 5.0  # for the thread, at the end of a process that did not come to PyTorch


def start_cuda_ahead(device: str) -> None:
    """Begin to start CUDA on the GPU that the key `device` names. Nothing happens where there is none, or no driver."""
    if (index := choose_gpu(device)) is None:
        return
    # As PyTorch sets it, before CUDA starts: kernels are loaded when they are first called.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = threading.Thread(target=_create_context, args=(index,), name="cuda-start", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads can be started
        return
    atexit.register(thread.join, MAX_WAIT_SECONDS)  # a process that ends while the driver starts could crash


def choose_gpu(device: str) -> int | None:
    """The number of the GPU that PyTorch will take for this name, as far as that is known before it is there.

    Processes of one training (torchrun) choose theirs later.
    """
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", device, re.ASCII)
    return int(match[1] or 0) if match and not read_variable("LOCAL_RANK") else None


def _create_context(index: int) -> None:
    """Make the context that all CUDA code of this process shares. What fails here fails again in PyTorch, with its reason."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
