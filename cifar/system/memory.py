"""Memory: how much this machine, or the container around us, has left (on Linux), and a pause of garbage collection."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Bytes that new processes can have without others being pushed out; None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(1024 * int(lines.get("MemAvailable", "").split()[0]))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - used + _read_file_cache(cgroup)))
    return min(found, default=None)


def _read_file_cache(cgroup: Path) -> int:
    """Bytes of files that a container keeps in memory: the system gives them up where a process needs the space."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(" ", 1) for line in (cgroup / "memory.stat").read_text().splitlines() if " " in line)
        return int(lines["inactive_file"])
    return 0


@contextlib.contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """No search for cycles of objects meanwhile: beside the many objects of many runs it takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
