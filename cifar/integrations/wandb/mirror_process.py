"""wandb-core, the process of wandb that sends runs to the server: find it and end it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

_num_core_stops = 0
core_lock = threading.RLock()  # held while wandb-core is started or reset, so that one that just starts is not killed as dead


def num_core_stops() -> int:
    """How often `stop_core` was called. A W&B run that was opened before the last stop is dead."""
    return _num_core_stops


def kill_core() -> None:
    """Kill this process's wandb-core now. It has a session of its own, so it would outlive this process for a while."""
    for pid in list_core_pids():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def stop_core() -> None:
    """Kill wandb-core, and let the next run start another one. Mirrors open their runs again."""
    global _num_core_stops
    kill_core()  # so that who waits for it, and holds the lock, waits no longer
    with core_lock:
        _num_core_stops += 1
        kill_core()
        if "wandb" in sys.modules:
            import wandb

            with contextlib.suppress(Exception, SystemExit):  # it exits with the killed core's code
                wandb.teardown()


def is_core_death(error: Exception) -> bool:
    """Whether wandb says by this error that its wandb-core is gone, and not that the server is."""
    return isinstance(error, ConnectionError) or "service process is not running" in str(error)


def reset_dead_core() -> bool:
    """If wandb-core was killed from outside, let the next run start another one. True if that was so."""
    with core_lock:
        if "wandb" not in sys.modules or list_core_pids():
            return False
        stop_core()
        return True


def list_core_pids() -> list[int]:
    """The wandb-core processes that this process started and that have not ended."""
    if Path("/proc/self/stat").exists():
        processes = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # "pid (name) state parent ..."; a name may hold any character
                start, _, end = stat.read_text().rpartition(")")
                state, parent = end.split()[:2]
                processes.append((stat.parent.name, parent, state, start.partition("(")[2]))
    else:
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat=,comm="], capture_output=True, text=True, check=False
        ).stdout
        processes = [
            (pid, parent, state, name) for pid, parent, state, name in (row.split(None, 3) for row in listing.splitlines())
        ]
    own_pid = str(os.getpid())
    return [
        int(pid) for pid, parent, state, name in processes if parent == own_pid and "wandb-core" in name and state[0] != "Z"
    ]
