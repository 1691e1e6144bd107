"""Work in a copy of this process, on another core, while this one goes on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")
MAX_COPIES = 7  # of this process at a time; their results are sent one after the other
MIN_PART = 100  # items for which a copy is worth its start
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


def map_beside(work: Callable[[list[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """`work` of parts of the items, one on each core -> the results of all of them, in the items' order.

    The results are sent as pickles. Where there is no other core, all is done here.
    """
    size = max(MIN_PART, -(-len(items) // min(_count_cores(), MAX_COPIES + 1)))
    first, *others = [list(items[start : start + size]) for start in range(0, len(items), size)] or [[]]
    with contextlib.ExitStack() as copies:
        waiting = [copies.enter_context(start_beside(functools.partial(work, part))) for part in others]
        return [*work(first), *(result for wait in waiting for result in wait())]


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@contextlib.contextmanager
def share_beside(tasks: Sequence[Callable[[], Any]]) -> Iterator[Callable[[], list[Any]]]:
    """Begin with tasks (at most 256), the last one first, in copies of this process, one on each other core.

    -> a function that works on those that are left, too, and returns the results of all in the tasks' order.
    """
    reader, writer = os.pipe()  # of numbers of tasks: whoever reads one does it
    os.write(writer, bytes(reversed(range(len(tasks)))))
    os.close(writer)

    def work() -> dict[int, Any]:
        found = {}
        while number := os.read(reader, 1):
            found[number[0]] = tasks[number[0]]()
        return found

    try:
        with contextlib.ExitStack() as copies:
            num_copies = min(_count_cores() - 1, MAX_COPIES, len(tasks))
            waiting = [copies.enter_context(start_beside(work)) for _ in range(num_copies)]

            def finish() -> list[Any]:
                found = work()
                for wait in waiting:
                    found |= wait()
                return [found[place] if place in found else task() for place, task in enumerate(tasks)]

            yield finish
    finally:
        os.close(reader)


def _read_all(file: BinaryIO) -> bytearray:
    """All that the copy writes. Raises TimeoutError where it writes nothing for a long time."""
    content = bytearray()
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
