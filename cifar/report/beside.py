"""Work in a copy of this process, on another core, while this one goes on."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

Result = TypeVar("Result")


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
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no memory or no process is left
        os.close(reader)
        os.close(writer)
        yield work
        return
    if child == 0:
        os.close(reader)
        _work_and_exit(work, os.fdopen(writer, "wb"))
    os.close(writer)

    def wait() -> Result:
        content = file.read()
        if not content:
            return work()
        result: Result | OSError = pickle.loads(content)  # our own copy has written it
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
