"""What torch.compile has left on disk: a marker for each step that was compiled, and a lock while a process compiles one.

Both lie in Inductor's own folder, so that a new folder has no markers. They are for all processes of a machine: the workers of
an agent, those that compile ahead for it, and other agents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cifar import kernels
from cifar.config.resolve import graph_signature
from cifar.config.schema import Settings
from cifar.system.disk import cache_folder
from cifar.system.variables import read_variable
from cifar.training.parts import describe_plugins

if TYPE_CHECKING:
    from filelock import FileLock

FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # PyTorch's
MAX_WAIT_SECONDS = 900.0  # for another process; then this one compiles too, as the other may hang
POLL_SECONDS = 0.2  # between two looks whether the lock is free, or whether to wait no longer

_held_keys: set[str] = set()  # of the locks that this process has: a second one in the same process would wait for itself


def compiler_folder() -> Path:
    """Where Inductor keeps what it has compiled."""
    return Path(read_variable(FOLDER_VARIABLE) or cache_folder() / "inductor")


def step_key(config: Settings, device_name: str) -> str:
    """The same for two runs whose steps are one program to torch.compile. `device_name`: as CUDA names the GPU, or "cpu"."""
    parts = [graph_signature(config), torch.__version__, kernels.digest_sources(), device_name]
    if plugins := describe_plugins(config):
        parts.append({part: about["sha256"] for part, about in plugins.items()})
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_compiled(key: str) -> bool:
    """Whether a process of this machine has compiled that step, so that its kernels are in the cache."""
    return _marker_path(key).exists()


def mark_compiled(key: str) -> None:
    """Note on disk that the step's kernels are in the cache now."""
    marker = _marker_path(key)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{time.time()}\n")


def is_being_compiled(key: str) -> bool:
    """Whether a process of this machine holds the step's lock now."""
    with hold_compile_lock(key, wait_seconds=0.0) as is_held:
        return not is_held


@contextlib.contextmanager
def hold_compile_lock(
    key: str,
    wait_seconds: float = MAX_WAIT_SECONDS,
    *,
    on_wait: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[bool]:
    """While it is held no other process compiles that step. Gives whether we have it, after that time at most.

    on_wait: called once, if it is not free at once. should_stop: asked again and again meanwhile; True ends the waiting.

    The system frees the lock of a process that dies. Where a folder takes no locks, we have it always: then a step may be
    compiled twice, which is slower and nothing worse.
    """
    if key in _held_keys:
        yield True
        return
    lock = _acquire(key, wait_seconds, on_wait, should_stop)
    if lock is not None and not lock.is_locked:
        yield False
        return
    _held_keys.add(key)
    try:
        yield True
    finally:
        _held_keys.discard(key)
        if lock is not None:
            lock.release()


def _acquire(key: str, wait_seconds: float, on_wait: Callable[[], None], should_stop: Callable[[], bool]) -> FileLock | None:
    """The lock, held if it could be had in that time. None where the folder takes no locks."""
    from filelock import FileLock, Timeout

    path = _marker_path(key).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
    except OSError:
        return None
    deadline, has_waited = time.monotonic() + wait_seconds, False
    while True:
        try:
            lock.acquire(timeout=0)
            return lock
        except Timeout:
            pass
        except (OSError, NotImplementedError):
            return None
        if time.monotonic() >= deadline or should_stop():
            return lock
        if not has_waited:
            has_waited = True
            on_wait()
        time.sleep(POLL_SECONDS)


def _marker_path(key: str) -> Path:
    return compiler_folder() / "cifar" / key
