"""What may be deleted from a runs folder. Never a result, unless that was asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cifar.errors import UserError
from cifar.states import CONCLUSIVE_STATES, ENDED_STATES
from cifar.tracking.run_dir import RunDir, list_run_dirs

HOUR = 3600.0


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing needs any more, and why."""

    path: Path
    reason: str
    size: int  # bytes


def is_being_written(run_dir: RunDir) -> bool:
    """Whether the process that last wrote the status still runs. A pid that another program has got since does not count."""
    status = run_dir.read_json("status")
    pid = status.get("pid", 0)
    if status.get("state") != "running" or not pid or pid == os.getpid():
        return False
    with contextlib.suppress(OSError):
        return b"cifar" in Path(f"/proc/{pid}/cmdline").read_bytes()
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return not Path("/proc/self").exists()  # without /proc: believe the pid


def find_leftovers(runs_dir: Path, *, days: float, finished: bool = False, now: float | None = None) -> list[Leftover]:
    """Checkpoints of ended runs, temporary files older than an hour, unfinished runs untouched for `days`.

    With `finished`, whole runs that ended more than `days` ago too.
    """
    now = time.time() if now is None else now
    found = []
    for run_dir in list_run_dirs(runs_dir):
        try:
            state = run_dir.state
        except UserError:  # damaged: its owner decides
            continue
        age = (now - max(file.stat().st_mtime for file in [run_dir.path, *run_dir.path.iterdir()])) / (24 * HOUR)
        if is_being_written(run_dir):
            continue
        if state not in ENDED_STATES and age > days:
            found.append(_measure_leftover(run_dir.path, f"{state}, untouched for {age:.0f} days"))
        elif state in ENDED_STATES and finished and age > days:
            found.append(_measure_leftover(run_dir.path, f"{state} {age:.0f} days ago"))
        else:
            checkpoint = run_dir.path / "checkpoint.pt"
            is_unneeded = state in CONCLUSIVE_STATES or (state in ENDED_STATES and age > days)
            if is_unneeded and checkpoint.exists():
                found.append(_measure_leftover(checkpoint, f"the run is {state}"))
            for file in run_dir.path.glob(".*.*"):
                if file.is_file() and now - file.stat().st_mtime > HOUR:
                    found.append(_measure_leftover(file, "a write that never ended"))
    return found


def remove_leftover(leftover: Leftover) -> None:
    """Delete it. It is no error if it is gone already."""
    if leftover.path.is_dir():
        shutil.rmtree(leftover.path, ignore_errors=True)
    else:
        leftover.path.unlink(missing_ok=True)


def _measure_leftover(path: Path, reason: str) -> Leftover:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return Leftover(path, reason, sum(file.stat().st_size for file in files))
