"""The marker and the lock of a compiled step, between real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from cifar.config.resolve import resolve_config
from cifar.training import compile_cache, run
from cifar.training.compile import find_step_key
from cifar.training.compile_cache import hold_compile_lock, is_compiled, mark_compiled
from cifar.training.loop import RunHooks
from cifar.training.trainer_cache import _cached_runners, clear_trainer_cache
from helpers.run_configs import TINY

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


def test_who_waits_says_so_once_and_gets_what_becomes_free() -> None:
    process, pipe = start_holder("a")
    said, asked = [], iter(range(9))

    def free_at_third_look() -> bool:
        if next(asked) == 2:
            pipe.send("end")
            process.join(30)
        return False

    with hold_compile_lock("a", on_wait=lambda: said.append("waits"), should_stop=free_at_third_look) as is_held:
        assert is_held and said == ["waits"] and next(asked) == 3
    with hold_compile_lock("b", on_wait=lambda: said.append("b"), should_stop=lambda: True) as is_held:
        assert is_held and said == ["waits"], "a free one is taken at once"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_who_is_asked_to_stop_waits_no_longer(error: type[BaseException] | None) -> None:
    process, pipe = start_holder("a")

    def stop() -> bool:
        if error:
            raise error
        return True

    if error:
        with pytest.raises(error), hold_compile_lock("a", should_stop=stop):
            pass
    else:
        with hold_compile_lock("a", should_stop=stop) as is_held:
            assert not is_held
    pipe.send("end")
    process.join(30)
    with hold_compile_lock("a", wait_seconds=0.0) as is_held:
        assert is_held


def test_runs_that_wait_for_a_compiler_end_when_all_are_asked_to(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = {**TINY, "compile": "on", "max_steps": 1}
    configs = [resolve_config({**values, "seed": seed}) for seed in (0, 1)]
    process, pipe = start_holder(find_step_key(configs[0], torch.device("cpu")))
    records = [run.create_run(config, runs) for config in configs]
    asked = {"first": "preempted", "second": ""}
    looks = iter(range(99))

    def poll_second() -> str:
        if next(looks) == 1:
            asked["second"] = "interrupted"
        return asked["second"]

    polls = (lambda: asked["first"], poll_second)
    loops = [
        run.RunLoop(config, record, RunHooks(poll_stop=poll))
        for config, record, poll in zip(configs, records, polls, strict=True)
    ]
    run.train_runs(loops)
    assert [record.state for record in records] == ["preempted", "interrupted"]
    assert capfd.readouterr().err.count("waiting for another process that compiles this network\n") == 1
    for record in records:
        assert record.read_json("status")["reason"] == "asked to end before its first step here" and not record.is_owned
        assert not record.metrics_bytes() and not (record.path / "checkpoint.pt").exists()
        assert (record.path / "output.log").read_text().splitlines()[-1].endswith(": asked to end before its first step here")
    assert not _cached_runners, "no trainer is left that was to be compiled"
    pipe.send("end")
    process.join(30)
    clear_trainer_cache()
    config = configs[0].model_copy(update={"compile": "off"})
    assert run.train_run(config, records[0]) == "finished", "it goes on"
