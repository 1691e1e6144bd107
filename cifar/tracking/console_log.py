"""output.log in a run's folder: what the run printed, a line each, without secrets. W&B shows the same lines as the run's logs.

Lines are only added, also by a resumed run: how many lines W&B has says which ones it lacks. What the run's code prints ends
at MAX_BYTES or MAX_LINES; what this program says of the run (epochs, its end, a traceback) has room beyond that.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import BinaryIO

from cifar.errors import UserError
from cifar.system.files import UnreadableFileError, is_regular_file, open_file, read_bytes
from cifar.system.names import escape_controls
from cifar.system.redact import redact
from cifar.tracking.run_dir import RunDir

FILE = "output.log"
MAX_BYTES, MAX_LINES = 10_000_000, 100_000
OWN_BYTES, OWN_LINES = 2_000_000, 20_000  # more, for our own lines
MAX_FILE_BYTES = 2 * (MAX_BYTES + OWN_BYTES)  # that is read
CHECK_SECONDS = 1.0  # how often is made sure that the folder is still this process's
FULL = f"-- more than {MAX_BYTES // 1_000_000} MB or {MAX_LINES:,} lines: what else the code prints is not recorded --"


class ConsoleLog:
    """Adds lines to one run's output.log. No method raises where the disk is full or the folder is lost: training finds out."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir, self._lock, self._pid = run_dir, threading.Lock(), os.getpid()
        self._file: BinaryIO | None = None
        self._num_bytes = self._num_lines = 0
        self._is_full = self._is_closed = False
        self._next_check = 0.0

    @property
    def has_lines(self) -> bool:
        """Whether an earlier process, or this one, has written lines."""
        with contextlib.suppress(OSError):
            return (self._run_dir.path / FILE).stat().st_size > 0
        return False

    def write_lines(self, text: str) -> None:
        """Add lines of ours: an epoch, a traceback. After `close`, nothing."""
        self._write([escape_controls(line, keeps_lines=True) for line in text.split("\n")], is_own=True)

    def write_output(self, lines: list[str]) -> None:
        """Add lines that the run's code printed."""
        self._write(lines, is_own=False)

    def close(self) -> None:
        """The run has ended: what is printed from now on is not of it. Called before its status says so."""
        with self._lock:
            self._is_closed = True
            if self._file:
                self._file.close()
                self._file = None

    def _write(self, lines: list[str], *, is_own: bool) -> None:
        with self._lock, contextlib.suppress(OSError, UserError):
            if self._is_closed or os.getpid() != self._pid or not lines:
                return
            file = self._open()
            max_bytes = MAX_BYTES + OWN_BYTES * is_own
            max_lines = MAX_LINES + OWN_LINES * is_own
            if self._is_full and not is_own:
                return
            content = redact("\n".join(lines) + "\n").encode("utf-8", "replace")
            if self._num_bytes + len(content) > max_bytes or self._num_lines + len(lines) > max_lines:
                if is_own or self._is_full:
                    return
                self._is_full, content, lines = True, f"{FULL}\n".encode(), [FULL]
            file.write(content)  # unbuffered: one call of the system, so that two writers do not mix their lines
            self._num_bytes += len(content)
            self._num_lines += len(lines)

    def _open(self) -> BinaryIO:
        if time.monotonic() >= self._next_check:
            self._run_dir.check_ownership()
            self._next_check = time.monotonic() + CHECK_SECONDS
        if self._file is None:
            path = self._run_dir.path / FILE
            if os.path.lexists(path) and not is_regular_file(path):
                raise OSError(f"{path} is no file")
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (`close` closes it)
            content = _read_content(path)
            self._num_bytes, self._num_lines = len(content), content.count(b"\n")
            self._is_full = FULL.encode() in content
            if content and not content.endswith(b"\n"):  # killed in the middle of a line
                self._num_bytes += self._file.write(b"\n")
                self._num_lines += 1
        return self._file


def _read_content(path: Path) -> bytes:
    with contextlib.suppress(UnreadableFileError):
        return read_bytes(path, MAX_FILE_BYTES)
    return b""


def write_last_words(run_dir: RunDir, printed: list[str], end: str) -> None:
    """Add what a process printed before it died, as far as it could not write it itself, and how it ended."""
    known = set(_read_content(run_dir.path / FILE).decode("utf-8", "replace").splitlines()[-1000:])
    log = ConsoleLog(run_dir)
    log.write_output([line for line in printed if line not in known])
    log.write_lines(end)
    log.close()


class ConsoleReader:
    """The lines of a run's output.log, as it grows."""

    def __init__(self, folder: Path) -> None:
        self._path, self._offset = folder / FILE, 0

    def read_lines(self, limit: int = MAX_LINES + OWN_LINES) -> list[str]:
        """The complete lines that are new since the last call, `limit` at most; [] where there is no such file."""
        lines = list[str]()
        with contextlib.suppress(OSError, UnreadableFileError):
            if self._path.stat().st_size <= self._offset:
                return []
            with open_file(self._path, MAX_FILE_BYTES) as file:
                file.seek(self._offset)
                while len(lines) < limit and (line := file.readline()).endswith(b"\n"):
                    lines.append(line[:-1].decode("utf-8", "replace"))
                    self._offset += len(line)
        return lines


def count_lines(folder: Path) -> int:
    """How many complete lines a run's output.log has."""
    return _read_content(folder / FILE).count(b"\n")
