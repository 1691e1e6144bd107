"""Room on a disk: telling that it ran out, and waiting until there is some again."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cifar.errors import DiskFull

FULL = (errno.ENOSPC, errno.EDQUOT)
LOOK_SECONDS = 1.0
LEAST = 8 * 2**20  # bytes that have to be free before an agent goes on
MOST = 2**33


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind this error, also one that a database reports in its own words."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        words = str(error).lower()
        if (
            isinstance(error, DiskFull)
            or (isinstance(error, OSError) and error.errno in FULL)
            or "disk is full" in words
            or "no space left" in words
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def room(folder: Path) -> int:
    """Free bytes for this user at `folder`; 0 where not even a small file can be written (a quota, say)."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
        stat = os.statvfs(folder)
    except OSError as error:
        if error.errno in FULL:
            return 0
        raise
    return stat.f_bavail * stat.f_frsize


class Pause:
    """An agent's wait for room. Each pause without an end of a trial between them asks for twice as much."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on = folder, False
        self.need, self._next = LEAST, 0.0

    def begin(self) -> str:
        """The disk is full -> what to say, once."""
        if self.on:
            return ""
        self.on, self._next = True, 0.0
        said = (
            f"no space left on the disk of {self.folder}: waiting until {self.need / 2**20:.0f} MiB are free; "
            "nothing is lost; Ctrl-C ends"
        )
        self.need = min(2 * self.need, MOST)
        return said

    def over(self) -> bool:
        """Whether there has just come room enough."""
        if not self.on or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + LOOK_SECONDS
        self.on = room(self.folder) < self.need // 2
        return not self.on

    def ended(self) -> None:
        """A trial got through."""
        self.need = LEAST

    @contextlib.contextmanager
    def catching(self, tell: list[str]) -> Iterator[None]:
        """A full disk inside begins the pause; `tell` gets what to say. Any other error goes on."""
        try:
            yield
        except Exception as error:
            if not is_full(error):
                raise
            if said := self.begin():
                tell.append(said)
