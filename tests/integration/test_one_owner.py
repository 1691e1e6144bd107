"""Two processes that want one run: one goes on, one is refused, and the record is the one of an undisturbed run.

CIFAR_PAIRS=200 python -m pytest -m slow tests/integration/test_one_owner.py    # all 200 pairs, and 20 without locks of files

Real commands, at random offsets.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cifar.config.resolve import resolve_config
from cifar.system.ownership import LEASE_FILE, LOCK_FILE, RunLock, find_owner
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from helpers.owners import WarmCommands, startup_environment
from helpers.paths import ROOT
from helpers.processes import wait_until
from helpers.weights import hash_run

PAIRS = int(os.environ.get("CIFAR_PAIRS", "4"))
EPOCHS = 30
VALUES: dict[str, Any] = {
    "dataset": "stand-in", "model": "conv4", "epochs": EPOCHS, "batch_size": 64, "train_size": 512, "val_size": 200,
    "probes": "none", "checkpoint_every": 3, "mixup": 0.2, "threads": 1, "device": "cpu",
}  # fmt: skip


def start(runs: Path, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cifar", *words, "--runs-dir", str(runs)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def resume(runs: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return start(runs, "train", "--resume", "one", "--wandb", "disabled", environment=environment)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    config = resolve_config(VALUES)
    whole = run.create_run(config, tmp_path_factory.mktemp("undisturbed"), run.RunMetadata(run_id="one"))
    assert run.train_run(config, whole) == "finished"
    return whole


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose process was killed early, with all that it left."""
    runs = tmp_path_factory.mktemp("killed")
    record = run.create_run(resolve_config(VALUES), runs, run.RunMetadata(run_id="one"))
    process = resume(runs)
    wait_until(lambda: len(list(record.read_rows())) >= 2)
    process.kill()
    process.communicate()
    assert record.state == "running" and len(list(record.read_rows())) < EPOCHS
    assert (record.path / LEASE_FILE).exists() and (record.path / LOCK_FILE).exists()
    return record


def is_one_sentence(said: str) -> bool:
    return said.startswith("error: run one is ") and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("num_pairs", "refused"), [(PAIRS, ""), (max(2, PAIRS // 10), "ENOLCK")], ids=["locks", "no locks"])
def test_of_two_that_resume_a_killed_run_one_goes_on(
    undisturbed: RunDir, killed: RunDir, tmp_path: Path, num_pairs: int, refused: str
) -> None:
    chance, ways = random.Random(), Counter[str]()
    environment = startup_environment(tmp_path, **({"TEST_NO_FLOCK": refused} if refused else {}))
    commands = WarmCommands(tmp_path, environment)
    for pair in range(num_pairs):
        runs = tmp_path / f"pair-{pair}"
        shutil.copytree(killed.path, runs / "one")
        words = ["train", "--resume", "one", "--wandb", "disabled", "--runs-dir", str(runs)]
        offset = chance.choice([0.0, chance.uniform(0, 0.1), chance.uniform(0, 4)])
        ends = commands.run(words, [0.0, offset])
        assert sorted(code for code, _ in ends) == [0, 2], (pair, offset, ends)
        (said,) = [said for code, said in ends if code == 2]
        assert is_one_sentence(said), said
        ways[said.split("run one is ")[1].split()[0]] += 1
        record = RunDir(runs / "one")
        assert record.state == "finished" and hash_run(record) == hash_run(undisturbed), pair
        assert not (record.path / LEASE_FILE).exists() and not (record.path / LOCK_FILE).exists()
        shutil.rmtree(runs)
    commands.close()
    print(f"{num_pairs} pairs {refused}: the second was told that the run is", dict(ways))
    assert ways["being"] >= num_pairs / 4  # they did meet


@pytest.mark.slow
def test_a_run_that_is_trained_is_refused_to_all_who_would_write(
    killed: RunDir, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cifar.cli.app import main

    shutil.copytree(killed.path, runs / "one")
    record = RunDir(runs / "one")
    with RunLock(record.path):
        before = {path.name: path.read_bytes() for path in record.path.iterdir()}
        for words in (("train", "--resume", "one"), ("push", "one")):
            assert main([*words]) == 2
            assert re.search(r"^error: run one is being trained by process \d+ on \S+ since .*\n$", capsys.readouterr().err)
        old = time.time() - 90 * 86400
        for path in [*record.path.iterdir(), record.path]:
            os.utime(path, (old, old))
        assert main(["gc"]) == 0 and "0 things" in capsys.readouterr().out
        for words in (("config", "--from", "one"), ("report", "one")):  # readers need nobody's leave
            main([*words])
        files = {path.name: path.read_bytes() for path in record.path.iterdir() if path.name in before}
        assert files == before
    for path in [*record.path.iterdir(), record.path]:
        os.utime(path, (old, old))
    assert main(["gc"]) == 0 and not record.path.exists()


@pytest.mark.slow
def test_a_stopped_trainer_whose_run_went_on_elsewhere_ends_in_one_sentence(
    undisturbed: RunDir, killed: RunDir, tmp_path: Path
) -> None:
    """Two machines and no locks: the first is stopped beyond the lease, the second takes the run, the first is woken."""
    runs = tmp_path / "shared"
    shutil.copytree(killed.path, runs / "one")
    record = RunDir(runs / "one")
    there = startup_environment(tmp_path, TEST_NO_FLOCK="ENOLCK", TEST_HOST="elsewhere", CIFAR_LEASE="2")
    here = startup_environment(tmp_path, TEST_NO_FLOCK="ENOLCK", CIFAR_LEASE="2")
    first = resume(runs, there)
    wait_until(lambda: (owner := find_owner(record.path)) and owner.host == "elsewhere" and len(list(record.read_rows())) > 4)
    os.kill(first.pid, signal.SIGSTOP)
    second = resume(runs, here)
    wait_until(lambda: (owner := find_owner(record.path)) and owner.pid == second.pid)
    os.kill(first.pid, signal.SIGCONT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 2 and "error: run one was taken over while this process" in said.splitlines()[-1], said
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert record.state == "finished" and hash_run(record) == hash_run(undisturbed)


@pytest.mark.slow
def test_a_run_removed_while_it_trains_ends_in_one_sentence(killed: RunDir, runs: Path) -> None:
    shutil.copytree(killed.path, runs / "one")
    process = resume(runs)
    record, before = RunDir(runs / "one"), len(list(killed.read_rows()))
    wait_until(lambda: len(list(record.read_rows())) > before)
    with contextlib.suppress(FileNotFoundError):  # a temporary file goes while it is looked at
        shutil.rmtree(record.path)
    shutil.rmtree(record.path, ignore_errors=True)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: the folder of run one was removed" in said.splitlines()[-1], said
    assert "Traceback" not in said and not list(record.path.glob("*.json*"))
