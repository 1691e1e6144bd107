"""What happens to a live agent: stopped beyond its lease, a clock that jumps, others that tidy, read or remove its runs, and
a machine that has no files, processes or database left. Each with real processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar.cli.app import main
from cifar.states import TRIAL_STATES
from cifar.sweeps.local import LocalBackend
from cifar.system.ownership import RunLock, find_owner
from cifar.tracking.run_dir import RunDir
from helpers.agent_processes import create_sweep, list_epochs_of_cell, start_agent
from helpers.owners import startup_environment
from helpers.paths import ROOT
from helpers.processes import list_workers, wait_for_exit, wait_until

pytestmark = pytest.mark.slow
EPOCHS = 100
START_SECONDS = 240  # against hanging; on a busy machine a start takes long
ONE = "parameters: {model: {value: conv4}}"
TWO = "parameters: {model: {value: conv4}, seed: {values: [0, 1]}}"


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Lines of an agent's output, up to one with these words in it."""
    lines: list[str] = []
    while not lines or words not in lines[-1]:
        assert process.stdout
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    return "".join(lines)


def test_an_agent_stopped_beyond_its_lease_loses_its_trial_and_nothing_is_trained_twice(runs: Path) -> None:
    backend = create_sweep(runs, ONE, epochs=EPOCHS, checkpoint_every=4)
    first = start_agent(backend, "workers=1")
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 3, START_SECONDS)
    (worker,) = list_workers(first.pid)
    for pid in (first.pid, worker):  # the worker so that it does not come to its end meanwhile
        os.kill(pid, signal.SIGSTOP)
    second = start_agent(backend, "workers=1")
    said = read_until(second, "waits: ")
    assert f"trial 000 waits: run {backend.run_id(0)} is being trained by process {worker} on " in said
    for pid in (first.pid, worker):
        os.kill(pid, signal.SIGCONT)
    ends = [wait_for_exit(process) for process in (first, second)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "trial 000 was taken over by another agent" in ends[0][1]
    assert list_epochs_of_cell(backend, 0) == list(range(1, EPOCHS + 1))
    assert [(cell["state"], cell["attempt"]) for cell in backend.list_cells()] == [("finished", 2)]


def test_an_agent_waits_for_a_run_that_a_person_trains_and_does_the_rest_meanwhile(runs: Path) -> None:
    backend = create_sweep(runs, TWO, epochs=60, checkpoint_every=4)
    record = RunDir.create(runs, backend.run_id(0), {"name": "by hand"}, {})
    with RunLock(record.path):
        agent = start_agent(backend, "workers=1")
        read_until(agent, "trial 001 finished")
        assert agent.poll() is None and backend.count_states() == {"running": 1, "finished": 1}
        shutil.rmtree(record.path)  # it was not of the sweep
    code, output = wait_for_exit(agent)
    assert code == 0 and backend.count_states() == {"finished": 2}, output
    assert list_epochs_of_cell(backend, 0) == list(range(1, 61))


def test_a_clock_that_jumps_changes_nothing(runs: Path, tmp_path: Path) -> None:
    """A year ahead, two years back: the trial goes on, and no other agent takes it."""
    backend, clock = create_sweep(runs, ONE, epochs=120, checkpoint_every=4), tmp_path / "clock"
    clock.write_text("0")
    agents = []
    for _ in range(2):
        environment = startup_environment(tmp_path, TEST_CLOCK=str(clock))
        agents.append(start_agent(backend, "workers=1", **environment))
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 3, START_SECONDS)
    for jump in (3.2e7, -6.4e7, 0.0):
        clock.write_text(str(jump))
        time.sleep(2.0)
    ends = [wait_for_exit(agent) for agent in agents]
    assert [code for code, _ in ends] == [0, 0], ends
    assert list_epochs_of_cell(backend, 0) == list(range(1, 121))
    assert [(cell["state"], cell["attempt"]) for cell in backend.list_cells()] == [("finished", 1)]


def test_tidying_reading_and_removing_beside_a_live_agent(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = create_sweep(runs, TWO, epochs=60, checkpoint_every=4)
    agent = start_agent(backend, "workers=1")
    record = RunDir(runs / backend.run_id(0))
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 3 and (record.path / "checkpoint.pt").exists(), START_SECONDS)
    (worker,) = list_workers(agent.pid)
    os.kill(worker, signal.SIGSTOP)  # so that it does not come to its end meanwhile
    assert find_owner(record.path)
    assert main(["gc", "--days", "0", "--finished"]) == 0 and "0 things" in capsys.readouterr().out
    assert main(["sweeps", "status", backend.id]) == 0 and main(["report", backend.id]) in (0, 2)
    shutil.rmtree(record.path)
    os.kill(worker, signal.SIGCONT)
    code, output = wait_for_exit(agent)
    assert code == 0 and f"the folder of run {record.id} was removed while it was being trained" in output, output
    assert backend.count_states() == {"finished": 1, "failed": 1} and "Traceback" not in output
    assert LocalBackend(backend.id, runs).retry_cells() == 1
    assert wait_for_exit(start_agent(backend, "workers=1"))[0] == 0
    assert list_epochs_of_cell(backend, 0) == list(range(1, 61)) and backend.count_states() == {"finished": 2}


def limited(limit: str, backend: LocalBackend) -> tuple[int, str]:
    """An agent of the command line under a limit of the shell."""
    agent = f"{sys.executable} -m cifar agent {backend.id} --workers 1 --wandb disabled"
    done = subprocess.run(
        ["bash", "-c", limit.format(agent=agent)], cwd=ROOT, env={**os.environ, "CIFAR_RUNS": str(backend.runs_dir)},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("limit", [8, 13, 18, 31])
def test_few_files_end_an_agent_in_one_sentence(runs: Path, limit: int) -> None:
    backend = create_sweep(runs, TWO)
    code, said = limited(f"ulimit -n {limit}; exec {{agent}}", backend)
    assert code == 2 and said.splitlines()[-1].startswith("error: too many open files"), said
    assert "Traceback" not in said and set(backend.count_states()) <= set(TRIAL_STATES[:4])  # open


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="the limit binds another user only")
@pytest.mark.parametrize("limit", [1, 3])
def test_few_processes_end_an_agent_in_one_sentence(runs: Path, limit: int) -> None:
    backend = create_sweep(runs, TWO)
    person = "setpriv --reuid=64321 --clear-groups --inh-caps=-all,+dac_override --ambient-caps=-all,+dac_override"
    code, said = limited(f"exec {person} prlimit --nproc={limit} {{agent}}", backend)
    if "setpriv:" in said:
        pytest.skip("CAPABILITIES CANNOT BE SET HERE: that few processes end in one sentence was not shown")
    assert code == 2 and "no more processes can be started" in said.splitlines()[-1], said
    assert "Traceback" not in said and backend.count_states() in ({"waiting": 2}, {"waiting": 1, "interrupted": 1})


def test_a_locked_database_is_waited_for(runs: Path) -> None:
    backend = create_sweep(runs, ONE, epochs=40, checkpoint_every=4)
    agent = start_agent(backend, "workers=1")
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 3, START_SECONDS)
    with sqlite3.connect(backend.folder / "study.db", timeout=30) as connection:
        connection.execute("begin exclusive")
        time.sleep(6)  # beyond the lease
        connection.rollback()
    connection.close()
    code, output = wait_for_exit(agent)
    assert code == 0 and backend.count_states() == {"finished": 1}, output
    assert list_epochs_of_cell(backend, 0) == list(range(1, 41)) and backend.list_cells()[0]["attempt"] == 1


def test_a_read_only_disk_is_one_sentence_and_the_sweep_goes_on_later(runs: Path) -> None:
    backend = create_sweep(runs, TWO, epochs=3)
    mount = ["mount", "--bind", str(runs), str(runs)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("NO FOLDER CAN BE MOUNTED READ-ONLY HERE: what an agent says there was not shown")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(runs)], check=True)
        code, said = limited("exec {agent}", backend)
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)
    assert code == 2 and said.splitlines()[-1].startswith("error: read-only file system at "), said
    assert "Traceback" not in said and backend.count_states() == {"waiting": 2}
    assert wait_for_exit(start_agent(backend, "workers=1"))[0] == 0 and backend.count_states() == {"finished": 2}
