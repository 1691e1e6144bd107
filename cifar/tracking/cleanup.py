"""What may be deleted from a runs folder. Never a result, unless that was asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cifar.errors import DiskFullError, UserError
from cifar.states import CONCLUSIVE_STATES, ENDED_STATES
from cifar.system.ownership import LEASE_FILE, LeaseObserver, OwnershipLostError, RunLock, lease_seconds
from cifar.tracking.run_dir import CACHE_FILE, CACHE_FOLDER, MADE_FILE, RunDir, list_run_dirs

HOUR = 3600.0


@dataclass(frozen=True)
class _Run:
    run_dir: RunDir
    state: str  # when it was found
    observer: LeaseObserver


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing needs any more, and why."""

    path: Path
    reason: str
    size: int  # bytes
    run: _Run | None  # that it is, or belongs to; None for what belongs to no run


def is_being_written(run_dir: RunDir) -> bool:
    """Whether a process without a lease, of a version that had none, trains this run.

    It is the one that last wrote the status, if that still runs. A pid that another program has got since does not count.
    """
    if (run_dir.path / LEASE_FILE).exists():
        return False  # its owner is known
    status = run_dir.read_json("status")
    pid = status.get("pid", 0)
    if status.get("state") != "running" or not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    with contextlib.suppress(OSError):
        return b"cifar" in Path(f"/proc/{pid}/cmdline").read_bytes()
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return not Path("/proc/self").exists()  # without /proc: believe the pid


def find_leftovers(
    runs_dir: Path, *, days: float, finished: bool = False, now: float | None = None, damaged: list[str] | None = None
) -> list[Leftover]:
    """Checkpoints of ended runs, temporary files older than an hour, unfinished runs untouched for `days`, the reports' cache.

    With `finished`, whole runs that ended more than `days` ago too. Nothing of a run that a process owns. Where another
    machine may own one, that one's lease is watched for its whole time, once for all such runs. `damaged` gets a sentence for
    each run that cannot be read; it is left alone.
    """
    now = time.time() if now is None else now
    found: list[Leftover] = []
    for run_dir in list_run_dirs(runs_dir):
        observer = LeaseObserver(run_dir.path)
        try:
            found += _find_in_run(run_dir, observer, days=days, finished=finished, now=now)
        except (UserError, OSError) as error:  # damaged, or it has just gone: its owner decides
            if damaged is not None:
                damaged.append(str(error))
    cache = runs_dir / CACHE_FOLDER  # other programs have folders of this name: only what reports write there is ours
    if cache.is_dir() and not cache.is_symlink():
        files = [cache / name for name in (CACHE_FILE, MADE_FILE)]
        files += [*cache.glob(f".{CACHE_FILE}.*"), *cache.glob(f".{MADE_FILE}.*")]
        reason = "the next report makes it again"
        found += [_measure_leftover(None, file, reason) for file in files if file.is_file() and not file.is_symlink()]
    return _keep_free(found)


def _find_in_run(run_dir: RunDir, observer: LeaseObserver, *, days: float, finished: bool, now: float) -> list[Leftover]:
    state, owner = run_dir.state, observer.find_owner()
    age = (now - max(file.lstat().st_mtime for file in [run_dir.path, *run_dir.path.iterdir()])) / (24 * HOUR)
    if is_being_written(run_dir) or (owner and owner[1]):
        return []
    run = _Run(run_dir, state, observer)
    if state not in ENDED_STATES and age > days:
        return [_measure_leftover(run, run_dir.path, f"{state}, untouched for {age:.0f} days")]
    if state in ENDED_STATES and finished and age > days:
        return [_measure_leftover(run, run_dir.path, f"{state} {age:.0f} days ago")]
    found = []
    checkpoint = run_dir.path / "checkpoint.pt"
    is_unneeded = state in CONCLUSIVE_STATES or (state in ENDED_STATES and age > days)
    if is_unneeded and checkpoint.exists():
        found.append(_measure_leftover(run, checkpoint, f"the run is {state}"))
    for file in run_dir.path.glob(".*.*"):
        if file.is_file() and now - file.stat().st_mtime > HOUR:
            found.append(_measure_leftover(run, file, "a write that never ended"))
    return found


def _keep_free(leftovers: list[Leftover]) -> list[Leftover]:
    """Those whose run no other machine has: it has shown no sign of life for the time of a lease."""
    deadline = time.monotonic() + lease_seconds() + 1.0
    while (held := [each for each in leftovers if each.run and each.run.observer.find_owner()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [each for each in leftovers if each not in held]


def remove_leftover(leftover: Leftover) -> str:
    """Delete it -> "", or why it was kept. It is no error if it is gone already."""
    run = leftover.run
    if run is None:
        with contextlib.suppress(OSError):
            leftover.path.unlink()
            leftover.path.parent.rmdir()  # if that was all
        return ""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(DiskFullError):  # no space even for the lock's file: what is found free is deleted
            try:
                lock = RunLock(run.run_dir.path, "removed", run.observer)
                lock.acquire(wait=False)
                stack.callback(lock.release)
                if run.run_dir.state != run.state:
                    return f"run {run.run_dir.id} has gone on meanwhile"
            except OwnershipLostError:
                return ""
            except UserError as error:
                return str(error)
        if leftover.path.is_dir():
            shutil.rmtree(leftover.path, ignore_errors=True)
        else:
            leftover.path.unlink(missing_ok=True)
    if leftover.path == run.run_dir.path:
        with contextlib.suppress(OSError):  # a network file system keeps the lock's file until it is closed
            leftover.path.rmdir()
    return ""


def _measure_leftover(run: _Run | None, path: Path, reason: str) -> Leftover:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return Leftover(path, reason, sum(file.lstat().st_size for file in files), run)
