"""What goes wrong in a trial or on its machine, with real processes: its state, its retries, and what the agent does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cifar import registry
from cifar.agent import worker_process
from cifar.agent.agent import run_agent
from cifar.agent.failures import FailureTracker, exit_code_event
from cifar.agent.options import AgentOptions, PathOptions
from cifar.config import resolve as configuration
from cifar.errors import DiskFullError
from cifar.sweeps.local import LocalBackend
from cifar.system.disk import MIN_FREE_BYTES, DiskSpaceGate, is_caused_by_full_disk
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from helpers.agent_processes import BROKEN, create_sweep, list_epochs_of_cell, start_agent
from helpers.processes import wait_for_exit, wait_until

HOGS = """
import resource
import torch
from pathlib import Path

class Hog(ConvNet):
    def forward(self, x):
        if self.training:
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, resource.getrlimit(resource.RLIMIT_AS)[1]))
            torch.empty(2**30)
        return super().forward(x)

@models.register("hog")
def hog(*, hog_width: int = 4) -> nn.Module:
    return Hog(width=hog_width, depth=1)
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "plugin" / "models").mkdir(parents=True)
    (tmp_path / "plugin" / "models" / "broken.py").write_text(BROKEN + HOGS)
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "plugin"))
    yield
    for name in ("broken", "killer", "hog", "pair"):
        registry.models._entries.pop(name, None)


@pytest.mark.slow
def test_killed_and_out_of_memory_are_tried_once_more_in_another_process(runs: Path, broken: None) -> None:
    backend = create_sweep(runs, "parameters: {model: {values: [killer, conv4, hog]}}")
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    cells = backend.list_cells()
    assert code == 1 and "stopped after 3 failures in a row" in output, output  # the first tries' ends and the second ones'
    assert [cell["state"] for cell in cells] == ["killed", "finished", "killed"]
    assert [cell["attempt"] for cell in cells] == [2, 1, 2]
    assert "SIGKILL" in cells[0]["reason"] and output.count("it will be tried again") == 2
    reason, record = cells[2]["reason"], RunDir(runs / cells[2]["run_id"])
    assert "out of memory" in reason and "GiB" in reason and "batch_size 64" in reason
    assert record.state == "killed" and record.read_json("status")["reason"] == reason
    assert "can't allocate memory" in (record.path / "traceback.txt").read_text()


DIES_AT_ITS_END = """
import os, pathlib, signal
from cifar.tracking.run_dir import RunDir

set_status = RunDir.set_status

def deadly(self, state, **told):
    set_status(self, state, **told)
    if state == "finished":
        os.kill(os.getpid(), signal.SIGKILL)

if "cifar.agent.worker" in pathlib.Path("/proc/self/cmdline").read_text():
    RunDir.set_status = deadly
"""


@pytest.mark.slow
def test_a_worker_that_dies_between_its_runs_end_and_the_word_of_it_has_finished(runs: Path, broken: None) -> None:
    (Path(os.environ["CIFAR_PLUGINS"]) / "models" / "deadly.py").write_text(DIES_AT_ITS_END)
    backend = create_sweep(runs, "parameters: {model: {value: conv4}}")
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    (cell,), record = backend.list_cells(), RunDir(runs / backend.run_id(0))
    assert (code, cell["state"], cell["attempt"], record.state) == (0, "finished", 1, "finished"), output
    assert cell["value"] == record.read_json("summary")["val/acc"]


@pytest.mark.slow
def test_three_failures_in_a_row_stop_the_agent_with_the_last_traceback(runs: Path, broken: None) -> None:
    backend = create_sweep(runs, "parameters: {model: {value: broken}, seed: {values: [0, 1, 2, 3]}}")
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    assert code == 1 and "stopped after 3 failures in a row" in output
    assert "raise RuntimeError" in output and output.rstrip().endswith("RuntimeError: a bug in the model")
    assert backend.count_states() == {"waiting": 1, "failed": 3} and [c["attempt"] for c in backend.list_cells()] == [
        1,
        1,
        1,
        0,
    ]
    assert LocalBackend(backend.id, runs).retry_cells() == 3 and backend.count_states() == {"waiting": 4}


PAIR = """
from torch import nn
from cifar.registry import models

class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x.flatten(1))
        return y, y

@models.register("pair")
def pair() -> nn.Module:
    return Pair(3072, 10)
"""


@pytest.mark.slow
def test_a_network_that_cannot_be_trained_fails_with_a_sentence_and_the_sweep_goes_on(runs: Path, broken: None) -> None:
    (Path(os.environ["CIFAR_PLUGINS"]) / "models" / "pair.py").write_text(PAIR)
    backend = create_sweep(runs, "parameters: {model: {values: [pair, conv4]}}")
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    failed, finished = backend.list_cells()
    assert (code, failed["state"], failed["attempt"], finished["state"]) == (0, "failed", 1, "finished"), output
    assert "its output is a tuple; it has to be a floating-point tensor (B, 10)" in failed["reason"]
    record = RunDir(runs / failed["run_id"])
    assert record.state == "failed" and record.read_json("status")["reason"] == failed["reason"]
    assert record.read_json("run")["cell"] == 0 and not (record.path / "traceback.txt").exists()
    assert "Traceback" not in output


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("NO FILE SYSTEM CAN BE MOUNTED HERE: that a full disk pauses the agent was not shown")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, left: int) -> Path:
    """A file that takes all of the disk but `left` bytes. What has been freed since the last call goes too."""
    ballast = disk / "ballast"
    with open(ballast, "ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - left)
    return ballast


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 2**17], ids=["full for all", "full for a checkpoint only"])
def test_a_full_disk_pauses_the_agent(disk: Path, left: int) -> None:
    """What is `left` is enough to write down how a trial ended: then this is said before the pause."""
    backend = create_sweep(disk / "runs", "parameters: {model: {value: conv16}}", epochs=40, checkpoint_every=1)
    process = start_agent(backend, "workers=1")
    lines: list[str] = []

    def says(words: str) -> bool:
        assert process.stdout
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
        return words in lines[-1]

    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 2)
    wait_until(lambda: fill(disk, left) and says("no space left on the disk of"))
    assert "Ctrl-C ends" in lines[-1]
    time.sleep(3)  # what is to be written down is tried again and again
    assert process.poll() is None
    (disk / "ballast").unlink()
    wait_until(lambda: says("going on"))
    assert sum("no space left on the disk of" in line for line in lines) == 1
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 5)
    before = len(list_epochs_of_cell(backend, 0))
    wait_until(lambda: fill(disk, left) and says("no space left on the disk of"))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    (disk / "ballast").unlink()
    assert before - 1 <= len(list_epochs_of_cell(backend, 0)) < 40  # the last one may have lacked its checkpoint
    code, output = wait_for_exit(start_agent(backend, "workers=1"))
    assert code == 0, output
    assert list_epochs_of_cell(backend, 0) == list(range(1, 41)) and backend.count_states() == {"finished": 1}


@pytest.mark.slow
def test_a_trial_whose_worker_found_no_space_at_its_start_is_kept(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, start, full = create_sweep(runs, "parameters: {model: {value: conv4}}"), worker_process._start_process, [True]

    def once(*given: Any) -> Any:
        if full:
            full.clear()
            raise OSError(28, "No space left on device")
        return start(*given)

    monkeypatch.setattr(worker_process, "_start_process", once)
    options = AgentOptions(wandb="disabled", workers=1)
    assert run_agent(backend.id, options, PathOptions(runs_dir=runs)) == 0 and not full
    assert backend.count_states() == {"finished": 1} and backend.list_cells()[0]["attempt"] == 1


def test_a_pause_asks_for_more_room_each_time_until_a_trial_gets_through(tmp_path: Path, monkeypatch: Any) -> None:
    free = [0]
    monkeypatch.setattr("cifar.system.disk.free_bytes", lambda folder: free[0])
    monkeypatch.setattr("cifar.system.disk.DISK_POLL_SECONDS", 0.0)
    pause, said = DiskSpaceGate(tmp_path), list[str]()
    with pause.catch_disk_full(said):
        raise RuntimeError("a database says") from OSError(28, "No space left on device")
    assert len(said) == 1 and pause.is_waiting and not pause.has_recovered() and not pause.begin_wait()
    free[0] = MIN_FREE_BYTES
    assert pause.has_recovered() and not pause.is_waiting and not pause.has_recovered()
    assert "16 MiB" in pause.begin_wait() and not pause.has_recovered()
    free[0] = 2 * MIN_FREE_BYTES
    assert pause.has_recovered()
    pause.reset_requirement()
    assert "8 MiB" in pause.begin_wait()
    with pytest.raises(ValueError), pause.catch_disk_full(said):
        raise ValueError("something else")
    assert (
        is_caused_by_full_disk(DiskFullError())
        and not is_caused_by_full_disk(OSError(2, "x"))
        and not is_caused_by_full_disk(None)
    )


def test_a_slot_retries_a_cause_once_and_another_slot_is_preferred() -> None:
    failures = FailureTracker(3)
    assert failures.should_retry(4, 0, "SIGKILL") and not failures.should_retry(4, 0, "SIGKILL")
    assert (
        failures.should_retry(4, 0, "memory") and failures.should_retry(4, 1, "SIGKILL") and not failures.should_retry(4, 2, "")
    )
    assert failures.best_slot(4, [0, 1, 3]) == 3 and failures.best_slot(4, [1, 0]) == 1 and failures.best_slot(5, [0]) == 0
    for state, bad, row in (("interrupted", True, 1), ("failed", True, 2), ("preempted", False, 2), ("pruned", False, 0)):
        failures.count_trial(state, is_failure=bad)
        assert failures.num_in_a_row == row
    assert exit_code_event(-11)["reason"] == "its process was killed by SIGSEGV" and exit_code_event(3)["state"] == "failed"


def test_memory_that_ran_out_is_named_with_the_batch_size() -> None:
    import torch

    config = configuration.resolve_config({"model": "conv", "batch_size": 77})
    said = run.describe_out_of_memory(MemoryError(), config)
    assert said.startswith("out of memory (") and "batch_size 77" in said
    assert not run.describe_out_of_memory(ValueError("no"), config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 1)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 80 * 2**30}))
        assert "out of GPU memory (80 GiB) at batch_size 77" in run.describe_out_of_memory(
            torch.cuda.OutOfMemoryError(), config
        )
