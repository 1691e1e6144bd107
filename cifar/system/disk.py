"""Disks: the cache folder, recognising a full disk, and waiting until there is space again."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cifar.errors import DiskFullError
from cifar.system.user_code import read_error_text
from cifar.system.variables import read_path

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
DISK_POLL_SECONDS = 1.0
MIN_FREE_BYTES = 8 * 2**20  # that have to be free before an agent goes on, the first time
MAX_FREE_BYTES = 2**33  # that are asked for, however often the disk was full


def is_disk_full_error(error: BaseException) -> bool:
    """Whether this error itself says that the disk is full."""
    return isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS)


def is_caused_by_full_disk(error: BaseException | None) -> bool:
    """Whether this error or one of its causes says that the disk is full, also in the words of a database."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = read_error_text(error).lower()
        if is_disk_full_error(error) or "disk is full" in text or "no space left" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def cache_folder() -> Path:
    """Where data, compiled code and runs from W&B are kept between commands: $XDG_CACHE_HOME/cifar, else ~/.cache/cifar."""
    return read_path("XDG_CACHE_HOME", "~/.cache") / "cifar"


def free_bytes(folder: Path) -> int:
    """Free bytes for this user at `folder`; 0 where not even a small file can be written (a quota, say)."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
        stat = os.statvfs(folder)
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            return 0
        raise
    return stat.f_bavail * stat.f_frsize


class DiskSpaceGate:
    """An agent's wait for disk space. Each wait asks for twice as much, until a trial has ended without a full disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_waiting = folder, False
        self.required_bytes, self._next = MIN_FREE_BYTES, 0.0

    def begin_wait(self) -> str:
        """The disk is full -> the message to print; "" if the wait has begun already."""
        if self.is_waiting:
            return ""
        self.is_waiting, self._next = True, 0.0
        message = (
            f"no space left on the disk of {self.folder}: waiting until {self.required_bytes / 2**20:.0f} MiB are free; "
            "nothing is lost; Ctrl-C ends"
        )
        self.required_bytes = min(2 * self.required_bytes, MAX_FREE_BYTES)
        return message

    def has_recovered(self) -> bool:
        """Whether the wait has just ended, because enough space is free."""
        if not self.is_waiting or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + DISK_POLL_SECONDS
        self.is_waiting = free_bytes(self.folder) < self.required_bytes // 2
        return not self.is_waiting

    def reset_requirement(self) -> None:
        """A trial has ended without a full disk: the next wait asks for the least space again."""
        self.required_bytes = MIN_FREE_BYTES

    @contextlib.contextmanager
    def catch_disk_full(self, messages: list[str]) -> Iterator[None]:
        """A full disk inside begins the wait, and `messages` gets what to print. Any other error is raised."""
        try:
            yield
        except Exception as error:
            if not is_caused_by_full_disk(error):
                raise
            if message := self.begin_wait():
                messages.append(message)
