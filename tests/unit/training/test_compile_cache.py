"""The marker and the lock of a compiled step, between real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cifar.training import compile_cache
from cifar.training.compile_cache import hold_compile_lock, is_compiled, mark_compiled

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, str(tmp_path / "inductor"))
    return tmp_path / "inductor"


def hold(key: str, pipe: Connection) -> None:
    """Hold the lock until a message comes."""
    with hold_compile_lock(key) as is_held:
        pipe.send(is_held)
        pipe.recv()


def start_holder(key: str) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(key, theirs))
    process.start()
    assert ours.poll(30) and ours.recv() is True
    return process, ours


def test_one_process_at_a_time_has_a_step_and_other_steps_are_free() -> None:
    process, pipe = start_holder("a")
    with hold_compile_lock("a", wait_seconds=0.0) as is_held:
        assert not is_held
    with hold_compile_lock("b", wait_seconds=0.0) as is_held:
        assert is_held
    pipe.send("end")
    process.join(30)
    with hold_compile_lock("a", wait_seconds=0.0) as is_held:
        assert is_held


def test_a_process_that_is_killed_is_no_obstacle() -> None:
    process, _ = start_holder("a")
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    with hold_compile_lock("a", wait_seconds=0.0) as is_held:
        assert is_held
    assert not is_compiled("a")


def test_who_has_a_step_has_it_again_and_frees_it_at_the_end() -> None:
    with hold_compile_lock("a") as outer, hold_compile_lock("a", wait_seconds=0.0) as inner:
        assert outer and inner
    process, pipe = start_holder("a")
    pipe.send("end")
    process.join(30)


def test_an_error_frees_the_lock() -> None:
    with pytest.raises(RuntimeError), hold_compile_lock("a"):
        raise RuntimeError("of the compiler")
    process, pipe = start_holder("a")
    pipe.send("end")
    process.join(30)


def test_markers_are_in_the_compilers_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark_compiled("a")
    assert is_compiled("a") and not is_compiled("b")
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, str(folder / "another"))
    assert not is_compiled("a")


def test_a_folder_that_takes_no_locks_stops_nobody(folder: Path) -> None:
    folder.write_text("a file in its place")
    with hold_compile_lock("a", wait_seconds=0.0) as is_held:
        assert is_held
