"""What may be deleted from a runs folder: never a result that was not asked for by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cifar.errors import UserError
from cifar.tracking.run_dir import END_STATES, Record, all_records

HOUR = 3600.0
OVER = ("finished", "diverged", "pruned", "skipped")  # never resumed; a failed, killed or stopped run may be


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing needs any more, and why."""

    path: Path
    reason: str
    size: int  # bytes


def alive(record: Record) -> bool:
    """Whether the process that last wrote the status still runs; a pid that another program took over does not count."""
    status = record.read("status")
    pid = status.get("pid", 0)
    if status.get("state") != "running" or not pid or pid == os.getpid():
        return False
    with contextlib.suppress(OSError):
        return b"cifar" in Path(f"/proc/{pid}/cmdline").read_bytes()
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return not Path("/proc/self").exists()  # no /proc on this system: believe the pid


def leftovers(runs: Path, *, days: float, finished: bool = False, now: float | None = None) -> list[Leftover]:
    """Checkpoints of ended runs, temporary files older than an hour, unfinished runs untouched for `days`.

    With `finished`, whole runs that ended more than `days` ago too.
    """
    now = time.time() if now is None else now
    found = []
    for record in all_records(runs):
        try:
            state = record.state
        except UserError:  # damaged: for its owner to look at, not for a broom
            continue
        age = (now - max(file.stat().st_mtime for file in [record.path, *record.path.iterdir()])) / (24 * HOUR)
        if alive(record):
            continue
        if state not in END_STATES and age > days:
            found.append(_leftover(record.path, f"{state}, untouched for {age:.0f} days"))
        elif state in END_STATES and finished and age > days:
            found.append(_leftover(record.path, f"{state} {age:.0f} days ago"))
        else:
            if (state in OVER or (state in END_STATES and age > days)) and (record.path / "checkpoint.pt").exists():
                found.append(_leftover(record.path / "checkpoint.pt", f"the run is {state}"))
            for file in record.path.glob(".*.*"):
                if file.is_file() and now - file.stat().st_mtime > HOUR:
                    found.append(_leftover(file, "a write that never ended"))
    return found


def remove(leftover: Leftover) -> None:
    """Delete it; what is gone already is no error."""
    if leftover.path.is_dir():
        shutil.rmtree(leftover.path, ignore_errors=True)
    else:
        leftover.path.unlink(missing_ok=True)


def _leftover(path: Path, reason: str) -> Leftover:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return Leftover(path, reason, sum(file.stat().st_size for file in files))
