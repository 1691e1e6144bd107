"""Child processes of tests: waiting for them, and who descends from them and still lives."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """What `condition` returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def wait_for_exit(process: subprocess.Popen[str], seconds: float = 280) -> tuple[int, str]:
    """The exit code and all that was printed."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def list_descendants(parent: int) -> set[int]:
    """The process ids of all that descend from `parent`."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ProcessLookupError):
            continue
    found, grown = {parent}, True
    while grown:
        more = {child for child, its in parents.items() if its in found} - found
        found, grown = found | more, bool(more)
    return found - {parent}


def list_workers(parent: int) -> list[int]:
    return [pid for pid in list_descendants(parent) if b"cifar.agent.worker" in _read_proc(pid, "cmdline")]


def is_alive(pid: int) -> bool:
    return bool(stat := _read_proc(pid, "stat")) and stat.rpartition(b")")[2].split()[0] != b"Z"


def find_alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if is_alive(pid)}


def _read_proc(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):  # it may be gone between any two looks
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""
