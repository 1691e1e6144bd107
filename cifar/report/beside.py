"""Work in a copy of this process, on another core, while this one goes on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

Result = TypeVar("Result")
MAX_SILENT_SECONDS = 300.0  # a copy of a process whose libraries had threads may hang
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@contextlib.contextmanager
def start_beside(work: Callable[[], Result]) -> Iterator[Callable[[], Result]]:
    """Begin `work` in a copy of this process -> a function that waits for its result, or raises its OSError.

    Where that is not safe (other threads might hold a lock), has no core of its own or does not work out, that function does
    the work itself. At the end of the block the copy is gone.
    """
    is_safe = threading.active_count() == 1 and hasattr(os, "fork") and hasattr(os, "sched_getaffinity")
    if not is_safe or len(os.sched_getaffinity(0)) < 2:
        yield work
        return
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no memory or no process is left
        os.close(reader)
        os.close(writer)
        yield work
        return
    if child == 0:
        _end_with_parent(parent)
        os.close(reader)
        _work_and_exit(work, os.fdopen(writer, "wb"))
    os.close(writer)

    def wait() -> Result:
        try:
            result: Result | OSError = pickle.loads(_read_all(file))  # our own copy has written it
        except (EOFError, pickle.UnpicklingError, TimeoutError):  # it was killed, as where memory runs out, or hangs
            return work()
        if isinstance(result, OSError):
            raise result
        return result

    with os.fdopen(reader, "rb") as file:
        try:
            yield wait
        finally:
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _read_all(file: BinaryIO) -> bytes:
    """All that the copy writes. Raises TimeoutError where it writes nothing for a long time."""
    content = b""
    while True:
        if not select.select([file], [], [], MAX_SILENT_SECONDS)[0]:
            raise TimeoutError
        piece = os.read(file.fileno(), 1 << 20)
        if not piece:
            return content
        content += piece


def _end_with_parent(parent: int) -> None:
    """In the copy: be killed when the original ends, however it ends. Linux has that; elsewhere the copy comes to its end."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(0)


def _work_and_exit(work: Callable[[], object], file: BinaryIO) -> None:
    """In the copy: nothing of the original's is run at its end. Without a result the original does the work."""
    try:
        try:
            result = work()
        except OSError as error:
            result = error
        with file:
            file.write(pickle.dumps(result))
    finally:
        os._exit(0)
