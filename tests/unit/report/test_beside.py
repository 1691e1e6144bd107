"""Work in a copy of the process: its result, its errors, and what happens where it dies or nobody waits."""

from __future__ import annotations

import errno
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cifar.report import beside
from cifar.report.beside import map_beside, share_beside, start_beside
from helpers.processes import is_alive, wait_until


def test_the_result_comes_from_another_process() -> None:
    """In a process of its own: here another test's thread may be left, and then the work is done by the original."""
    program = (
        "import os; from cifar.report.beside import start_beside\n"
        "with start_beside(lambda: (os.getpid(), b'x' * 200_000)) as wait: pid, content = wait()\n"  # more than a pipe holds
        "print(len(content), pid != os.getpid(), len(os.sched_getaffinity(0)) > 1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    length, is_elsewhere, has_cores = done.stdout.split()
    assert length == "200000" and is_elsewhere == has_cores


def test_a_full_disk_is_raised_here_and_other_errors_too() -> None:
    def fill() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), start_beside(fill) as wait:
        wait()
    with pytest.raises(ZeroDivisionError), start_beside(lambda: 1 // 0) as wait:
        wait()


def test_a_copy_that_is_killed_leaves_the_work_to_the_original() -> None:
    original = os.getpid()

    def die_elsewhere() -> int:
        if os.getpid() != original:
            os.kill(os.getpid(), signal.SIGKILL)
        return 5

    with start_beside(die_elsewhere) as wait:
        assert wait() == 5


def test_a_copy_that_is_killed_while_it_answers_leaves_the_work_to_the_original() -> None:
    original = os.getpid()

    class HalfSent:
        def __reduce__(self) -> tuple[type, tuple[()]]:
            os.kill(os.getpid(), signal.SIGKILL)
            return (HalfSent, ())

    def answer() -> object:
        return 5 if os.getpid() == original else HalfSent()

    with start_beside(answer) as wait:
        assert wait() == 5
    reader, writer = os.pipe()
    os.write(writer, pickle.dumps(b"x" * 1000)[:100])
    os.close(writer)
    with os.fdopen(reader, "rb") as file, pytest.raises((EOFError, pickle.UnpicklingError)):
        pickle.loads(beside._read_all(file))


def test_a_copy_ends_with_the_original_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time; from pathlib import Path; from cifar.report.beside import start_beside\n"
        "def work():\n    Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)\n"
        "with start_beside(work) as wait:\n"
        "    while not Path(sys.argv[1]).exists() or not Path(sys.argv[1]).read_text(): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: there is no copy")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "pid")], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_alive(pid))


def test_a_copy_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    with pytest.raises(KeyError), start_beside(work):
        raise KeyError
    if (tmp_path / "pid").exists():
        assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_with_other_threads_the_work_is_done_here() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with start_beside(os.getpid) as wait:
            assert wait() == os.getpid()
    finally:
        done.set()
        thread.join()


def run_alone(program: str) -> str:
    """What a program prints. In a process of its own, which has no threads."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_parts_are_worked_on_by_all_cores_and_come_back_in_order() -> None:
    program = (
        "import os; from cifar.report.beside import map_beside\n"
        "found = map_beside(lambda part: [(item, os.getpid()) for item in part], list(range(1000)))\n"
        "processes = len({pid for _, pid in found})\n"
        "print([item for item, _ in found] == list(range(1000)), processes, len(os.sched_getaffinity(0)))"
    )
    is_ordered, processes, cores = run_alone(program).split()
    assert is_ordered == "True" and int(processes) == min(int(cores), beside.MAX_COPIES + 1)
    assert map_beside(lambda part: [2 * item for item in part], [3]) == [6]
    assert map_beside(lambda part: part, list[int]()) == []


def test_tasks_are_shared_with_copies_and_each_is_done_once(tmp_path: Path) -> None:
    def work(number: int) -> int:
        with (tmp_path / "done").open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.01)
        return 10 * number

    with share_beside([functools.partial(work, number) for number in range(20)]) as finish:
        assert finish() == [10 * number for number in range(20)]
    assert sorted(map(int, (tmp_path / "done").read_text().split())) == [*range(20)]
    with share_beside([]) as finish:
        assert finish() == []


def test_tasks_of_a_copy_that_is_killed_are_done_here() -> None:
    original = os.getpid()

    def work(number: int) -> int:
        if os.getpid() != original:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with share_beside([functools.partial(work, number) for number in range(5)]) as finish:
        time.sleep(0.2)
        assert finish() == [*range(5)]
