"""Processes that compile the networks of the next trials: real ones, with torch.compile on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cifar.agent.compile_ahead import CompileAhead
from cifar.config.resolve import resolve_config
from cifar.sweeps.local import LocalBackend
from cifar.tracking.run_dir import RunDir
from cifar.training.compile_cache import FOLDER_VARIABLE, hold_compile_lock, is_compiled, step_key
from helpers.agent_processes import TINY, create_sweep, start_agent
from helpers.paths import ROOT
from helpers.processes import find_alive, list_descendants, wait_for_exit, wait_until

SMALL = {**TINY, "epochs": 1, "model": "conv", "width": 4, "depth": 1, "compile": "on", "threads": 1, "device": "cpu"}
NETWORKS = "parameters: {seed: {values: [0, 1]}, width: {values: [4, 6]}}"
HITS = """
import sys; from pathlib import Path
from torch._dynamo.utils import counters
from cifar.config.resolve import resolve_config
from cifar.training.run import create_run, train_run
config = resolve_config({values!r})
assert train_run(config, create_run(config, Path({runs!r}))) == "finished"
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of compiled code, for this process and its children."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return tmp_path / "inductor"


def start_preparer(values: dict[str, Any]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar.agent.preparer"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    process.stdin.write(json.dumps({"values": values, "data_dir": "", "ahead": 2, "gpu_share": 0.1}).encode() + b"\n")
    process.stdin.flush()
    return process


def answer_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout
    with process:
        return str(json.loads(process.stdout.read())["answer"])


def key_of(values: dict[str, Any]) -> str:
    return step_key(resolve_config(values), "cpu")


def create_networks(runs: Path) -> LocalBackend:
    return create_sweep(runs, NETWORKS, **{key: value for key, value in SMALL.items() if key not in ("width", "threads")})


def look_ahead(backend: LocalBackend, option: str = "2") -> CompileAhead:
    def train_as(values: Any) -> dict[str, Any]:
        return {"threads": 1, **values, **backend.info["fixed"]}

    return CompileAhead(backend, option, [{}], data_dir=None, training_values=train_as)


def has_lock(inductor: Path, key: str) -> bool:
    return (inductor / "cifar" / f"{key}.lock").exists()


def test_two_at_once_compile_once_a_killed_one_is_no_obstacle_and_the_run_finds_everything(runs: Path, inductor: Path) -> None:
    values = {**SMALL, "probes": "all"}
    killed = start_preparer(values)
    wait_until(lambda: has_lock(inductor, key_of(values)))
    assert answer_of(start_preparer({**values, "seed": 7, "lr": 0.03})) == "busy"  # the same step
    killed.kill()
    with killed:
        pass
    assert not is_compiled(key_of(values))
    assert answer_of(start_preparer(values)) == "ready"
    assert answer_of(start_preparer({**values, "seed": 8})) == "ready"
    code = HITS.format(values={**values, "seed": 9, "lr": 0.02, "epochs": 2, "test": "never"}, runs=str(runs))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    hits, misses = map(int, done.stdout.split()[-2:])
    assert hits > 0 and misses == 0


def test_what_cannot_be_trained_fails_with_a_reason_and_nothing_is_marked(inductor: Path) -> None:
    skipped = [start_preparer({**SMALL, **values}) for values in ({"compile": "off"}, {"max_macs": 10})]
    process = start_preparer({**SMALL, "model": "no such network"})
    assert [answer_of(each) for each in skipped] == ["skipped", "skipped"]
    assert process.stdout
    with process:
        answer = json.loads(process.stdout.read())
    assert answer["answer"] == "failed" and "no such network" in answer["reason"]
    assert not list((inductor / "cifar").glob("*")) if inductor.exists() else True


def test_a_run_that_waits_for_a_compiler_says_so_and_ends_at_the_first_ctrl_c(runs: Path, inductor: Path) -> None:
    pairs = [f"{key}={value}" for key, value in SMALL.items()]
    with hold_compile_lock(key_of(SMALL)):
        process = subprocess.Popen(
            [sys.executable, "-m", "cifar", "train", *pairs, "--wandb", "disabled"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr
        while "waiting for another process that compiles this network" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=60)
    (record,) = [RunDir(path.parent) for path in runs.glob("*/run.json")]
    assert process.returncode == 130 and "Traceback" not in error, output + error
    assert record.state == "interrupted" and "before its first step" in record.read_json("status")["reason"]


def test_a_trial_that_waits_for_a_compiler_is_given_back_at_the_first_ctrl_c(runs: Path, inductor: Path) -> None:
    backend = create_sweep(runs, "parameters: {seed: {values: [0]}}", **SMALL)
    (values,) = backend.peek_values(1) or []
    with hold_compile_lock(key_of({**values, **backend.info["fixed"]})):
        process = start_agent(backend, "workers=1", "compile_ahead='off'")
        logs = backend.folder / "logs"
        wait_until(lambda: any("waiting for another process" in path.read_text() for path in logs.glob("*.log")))
        process.send_signal(signal.SIGINT)
        code, output = wait_for_exit(process, 60)
    assert code == 130, output
    assert backend.count_states() == {"interrupted": 1}
    assert "before its first step" in RunDir(runs / backend.run_id(0)).read_json("status")["reason"]


def test_one_ends_with_its_agent(inductor: Path) -> None:
    process = start_preparer(SMALL)
    wait_until(lambda: has_lock(inductor, key_of(SMALL)))
    assert process.stdin
    process.stdin.close()
    assert process.wait(30) == 3


def test_an_agent_compiles_each_network_once_and_trains_every_cell(runs: Path) -> None:
    backend = create_networks(runs)
    code, output = wait_for_exit(start_agent(backend, "workers=1", "compile_ahead='2'"))
    assert code == 0, output
    assert [cell["state"] for cell in backend.list_cells()] == ["finished"] * 4
    assert "compiling ahead: the networks of the next trials, by up to 2 processes" in output
    assert all(RunDir(runs / backend.run_id(cell)).read_json("environment")["step"]["compiled"] for cell in range(4))
    lines = (backend.folder / "logs" / "compile-ahead.log").read_text().splitlines()
    begun = [line.split()[1] for line in lines if "begins" in line]
    assert len(begun) == 1, lines  # the worker itself compiled the first
    assert is_compiled(begun[0])  # on a CPU a worker marks nothing, so this is the other process's


def test_nothing_is_left_of_an_agent_that_is_killed(runs: Path) -> None:
    backend = create_networks(runs)
    process = start_agent(backend, "workers=1", "compile_ahead='2'")
    log = backend.folder / "logs" / "compile-ahead.log"
    wait_until(lambda: log.exists() and "begins" in log.read_text())
    left = list_descendants(process.pid)
    assert len(left) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not find_alive(left), 30)


def test_a_cancelled_sweep_ends_what_was_begun_for_it(runs: Path) -> None:
    backend = create_networks(runs)
    ahead = look_ahead(backend)
    ahead.update(99, [])
    begun = [each.process for each in ahead.running]
    assert len(begun) == 2  # one for each network
    assert ahead.prefer([], 1) == ahead.prefer([], 2) == "wait"  # both will be ready sooner than a worker could do it
    backend.stop_sweep(cancel=True)
    wait_until(lambda: ahead.update(99, []) or not ahead.running, 30)
    assert all(process.poll() is not None for process in begun)


def test_what_a_worker_has_is_left_to_it_and_no_more_than_may_be_claimed_is_begun(runs: Path) -> None:
    backend = create_networks(runs)
    trials = backend.peek_values(4) or []
    ahead = look_ahead(backend)
    try:
        ahead.update(2, trials[:1])
        assert [each.key for each in ahead.running] == [ahead._key(trials[1])]
        other = look_ahead(backend)
        other.update(1, [])
        assert [each.key for each in other.running] == [other._key(trials[0])]
        other.update(0, trials[:1])  # all are claimed, but its own worker waits for this one
        assert other.running
        other._next_look_time = 0.0
        other.update(0, [])
        assert not other.running
    finally:
        ahead.shut_down()
    assert not ahead.running
