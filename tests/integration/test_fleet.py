"""Many processes, ended the hard way: every cell once, whatever is killed, and the offline W&B run as whole as the record.

Real trainings through the command line. A plug-in probe is the witness: trials themselves append what they do to one file.
Processes are found by a variable in their environment, so none is missed for its name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cifar.config.yaml_loader import parse_yaml
from cifar.tracking.histograms import read_histograms
from cifar.tracking.run_dir import RunDir
from helpers.fleet import GONE_SECONDS, SWEEP, Fleet, list_epochs
from helpers.leet import inspect_only
from helpers.processes import wait_for_exit, wait_until
from helpers.weights import hash_weights

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")]

EPOCHS = 30  # of a run that is killed: long enough, by the witness's pauses, to be in the middle of it
PAUSE = "0.25"  # seconds
KILLED = f"  width: {{value: 4}}\n  epochs: {{value: {EPOCHS}}}\n  checkpoint_every: {{value: 5}}\n  mixup: {{value: 0.2}}\n"
ALONE = ["unshare", "-rn", "bash", "-c", 'exec "$@" <&-', "bash"]  # no network, no standard input


def session(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return 0


def mirrored(record: RunDir) -> bool:
    return any(path.stat().st_size > 0 for path in record.path.glob("wandb/offline-run-*/*.wandb"))


def is_whole(record: RunDir, last: int = EPOCHS, before: list[dict[str, Any]] | None = None) -> None:
    """Finished, every epoch once, those `before` a kill kept and not trained again; W&B's file holds just the same."""
    rows = list(record.read_rows())
    assert record.state == "finished" and list_epochs(record) == list(range(1, last + 1))
    if before is not None:  # the last one may have come after the last checkpoint
        assert len(before) > 2 and rows[: len(before) - 1] == before[:-1], "trained again from the beginning"
    seen = inspect_only(record)
    assert seen.rows == rows and seen.steps == list_epochs(record) and seen.exit_code == 0
    assert seen.histogram_epochs == [line["epoch"] for line in read_histograms(record)] != []
    costs = {key: record.read_json("run")["cost"][key] for key in ("macs", "params")}
    assert seen.config == {**record.read_json("config"), **costs, "cifar_schema": 2} and seen.run["run_id"] == record.id


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Fleet]:
    world = Fleet(tmp_path, XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"])
    yield world
    world.close()


def test_a_killed_worker_and_a_killed_agent_cost_nothing_and_leave_nothing(world: Fleet) -> None:
    backend = world.create_sweep(KILLED + "  witness: {values: [0, 1]}\n", "--dataset", "stand-in")
    world.environment["WITNESS_PAUSE"] = PAUSE
    runs = [RunDir(world.runs / backend.run_id(cell)) for cell in (0, 1)]
    with world.hold_runs():
        agents = {name: world.start("agent", backend.id, "--workers", "1", "--wandb", "offline", name=name) for name in "ab"}
        wait_until(lambda: all(len(list_epochs(record)) > 4 and mirrored(record) for record in runs))
        begun = {pid: key for pid, _, key in world.read_witness("begins")}
        assert sorted(begun.values()) == [0, 1]
        (holder,) = begun.keys() & world.find_processes("a").keys()
        assert world.list_kinds("a") == world.list_kinds("b") == {"cifar.agent.worker", "cifar.sidecar", "wandb-core"}
        assert [cell["state"] for cell in backend.list_cells()] == ["running"] * 2
        before = [list(record.read_rows()) for record in runs]
        os.kill(holder, signal.SIGKILL)
        killed = time.monotonic()
        world.kill(agents["b"], "b")
    wait_until(lambda: [key for _, _, key in world.read_witness("begins")].count(begun[holder]) == 2)
    time.sleep(max(0.0, killed + GONE_SECONDS - time.monotonic()))
    assert not [pid for pid in world.find_processes("a") if holder in (pid, session(pid))]
    code, output = wait_for_exit(agents["a"])
    assert code == 0 and not world.find_processes(), output
    assert backend.count_states() == {"finished": 2} and [cell["attempt"] for cell in backend.list_cells()] == [2, 2], output
    assert Counter(key for _, _, key in world.read_witness("begins")) == {0: 2, 1: 2}
    assert [record.id for record in world.load_records()] == [record.id for record in runs]
    world.environment["WITNESS_PAUSE"] = "0"
    for record, kept in zip(runs, before, strict=True):
        is_whole(record, before=kept)
        known = {other.id for other in world.load_records()}
        world.run("train", "--from", record.id, "--wandb", "disabled")
        (undisturbed,) = [other for other in world.load_records() if other.id not in known]
        assert undisturbed.read_json("config") == record.read_json("config")
        assert hash_weights(undisturbed) == hash_weights(record)
        for row, other in zip(record.read_rows(), undisturbed.read_rows(), strict=True):
            assert not [key for key in row if row[key] != other[key] and not key.startswith("system/")]


# -- no network, no account, no input ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("UNSHARE -RN IS NOT ALLOWED HERE: that everything works without a network was not shown")
    world = Fleet(tmp_path_factory.mktemp("cut-off"), prefix=ALONE, WITNESS_PAUSE=PAUSE)
    yield world
    world.close()
    shutil.rmtree(world.folder / "home")  # the stand-in data is large


def test_cut_off_a_sweep_runs_and_is_reported(cut_off: Fleet) -> None:
    file = cut_off.folder / "once.yaml"
    file.write_text(SWEEP + "  width: {values: [2, 4]}\n  epochs: {value: 3}\n  dataset: {value: auto}\n")
    output = cut_off.run("sweep", str(file))
    assert "STAND-IN" in output and "2 finished" in output
    assert len(cut_off.load_records()) == 2
    for record in cut_off.load_records():
        is_whole(record, 3)
    (page,) = cut_off.runs.glob("sweeps/*/report/report.html")
    page.unlink()
    assert "STAND-IN" in cut_off.run("report") and page.exists()


@pytest.mark.parametrize("victim", ["agent", "train"])
def test_cut_off_what_was_killed_goes_on(cut_off: Fleet, victim: str) -> None:
    known = [record.id for record in cut_off.load_records()]
    if victim == "agent":
        backend = cut_off.create_sweep(KILLED, "--dataset", "stand-in")
        first, again, workers = ["agent", backend.id], ["agent", backend.id], {"cifar.agent.worker"}
    else:
        pairs = [f"{key}={given['value']}" for key, given in parse_yaml(SWEEP + KILLED, "sweep")["parameters"].items()]
        first, again, workers = ["train", *pairs, "--dataset", "stand-in"], ["train", "--resume"], set()
    with cut_off.hold_runs():
        process = cut_off.start(*first, name=victim)
        (record,) = wait_until(lambda: [record for record in cut_off.load_records() if record.id not in known])
        wait_until(lambda: len(list_epochs(record)) > 4 and mirrored(record))
        assert cut_off.list_kinds(victim) == {"cifar.sidecar", "wandb-core", *workers}
        cut_off.kill(process, victim)
    before = list(record.read_rows())
    assert len(before) < EPOCHS and record.state == "running"
    cut_off.run(*again, *([record.id] if victim == "train" else []))
    is_whole(record, before=before)
    assert str(cut_off.runs) in cut_off.run("report", backend.id if victim == "agent" else record.id)
