"""Many processes, ended the hard way: every cell once, whatever is killed, and the offline W&B run as whole as the record.

Real trainings through the command line. A plug-in probe is the witness: trials themselves append what they do to one file.
Processes are found by a variable in their environment, so none is missed for its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from leet import inspect_only

from cifar.config.resolve import parse_yaml
from cifar.sweeps.local import Local
from cifar.tracking.run_dir import Record

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")]

ROOT = Path(__file__).parent.parent
GONE_SECONDS = 5.0
EPOCHS = 30  # of a run that is killed: long enough, by the witness's pauses, to be in the middle of it
WITNESS = """
import os, time
from cifar.registry import probes

@probes.register("witness")
class Witness:
    labels, layers = {}, []

    def __init__(self, *, witness: int = 0) -> None:
        self.key, self.epochs = witness, 0

    def start(self, parameters):
        self.size = sum(p.numel() for p in parameters.values())
        self.tell("begins")

    def after_backward(self, parameters):  # of the first step of each epoch
        self.tell("trains")
        time.sleep(float(os.environ["WITNESS_PAUSE"]))
        self.epochs += 1
        while self.epochs > 8 and os.path.exists(os.environ["WITNESS_LOG"] + ".hold"):
            time.sleep(0.02)

    def tell(self, what):
        line = f"{what} {os.getpid()} {self.size} {self.key}\\n"
        file = os.open(os.environ["WITNESS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())
        os.close(file)
"""
TOGETHER = """
import sys, time
from pathlib import Path
from cifar.agent import agent
from cifar.cli import app as cli
Path(sys.argv[1]).touch()
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
sys.exit(cli.main(sys.argv[3:]))
"""
SWEEP = """
method: grid
metric: {name: val/acc, goal: maximize}
parameters:
  model: {value: conv}
  train_size: {value: 512}
  val_size: {value: 200}
  batch_size: {value: 64}
  threads: {value: 1}
"""
PAUSE = "0.25"  # seconds
KILLED = f"  width: {{value: 4}}\n  epochs: {{value: {EPOCHS}}}\n  checkpoint_every: {{value: 5}}\n  mixup: {{value: 0.2}}\n"
ALONE = ["unshare", "-rn", "bash", "-c", 'exec "$@" <&-', "bash"]  # no network, no standard input


class World:
    """Commands with an environment of their own: no account, a bare home, one witness."""

    def __init__(self, folder: Path, *, prefix: list[str] | None = None, **environment: str) -> None:
        self.folder, self.runs, self.prefix = folder, folder / "runs", prefix or []
        (folder / "home").mkdir()
        (folder / "plugins" / "probes").mkdir(parents=True)
        (folder / "plugins" / "probes" / "witness.py").write_text(WITNESS)
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
        self.environment = {
            **kept, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "CIFAR_RUNS": str(self.runs), "CIFAR_LEASE": "4",
            "CIFAR_PLUGINS": str(folder / "plugins"), "WITNESS_LOG": str(folder / "witness.log"), "WITNESS_PAUSE": "0",
            **environment,
        }  # fmt: skip

    def start(self, *words: str, name: str = "") -> subprocess.Popen[str]:
        command = [*self.prefix, sys.executable, *(words if words[0] == "-c" else ("-m", "cifar", *words))]
        return subprocess.Popen(
            command, env={**self.environment, "CIFAR_TEST_MARK": f"{self.folder}/{name}"}, cwd=ROOT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no run gets beyond its ninth epoch."""
        hold = self.folder / "witness.log.hold"
        hold.touch()
        yield
        hold.unlink()

    def run(self, *words: str) -> str:
        code, output = ended(self.start(*words))
        assert code == 0, output
        return output

    def sweep(self, text: str, *options: str) -> Local:
        """Made by the command, and not run."""
        (self.folder / "sweep.yaml").write_text(SWEEP + text)
        output = self.run("sweep", str(self.folder / "sweep.yaml"), "--no-agent", *options)
        return Local(re.findall(r"python -m cifar agent (\w+)", output)[0], self.runs)

    def said(self, what: str) -> list[tuple[int, int, int]]:
        """What the witness wrote down: process, parameters, its key."""
        lines = [line.split() for line in (self.folder / "witness.log").read_text().splitlines()]
        return [(int(line[1]), int(line[2]), int(line[3])) for line in lines if line[0] == what]

    def marked(self, name: str = "") -> dict[int, str]:
        """The live processes of the command of that name, or all of this world: id -> what they run."""
        found, mark = {}, f"CIFAR_TEST_MARK={self.folder}/{name}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or somebody else's
                if any(variable.startswith(mark) for variable in (folder / "environ").read_bytes().split(b"\0")):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found  # a zombie's environment is empty

    def kinds(self, name: str) -> set[str]:
        commands = " ".join(self.marked(name).values())
        return {kind for kind in ("cifar.agent.worker", "cifar.sidecar", "wandb-core") if kind in commands}

    def kill(self, process: subprocess.Popen[str], name: str) -> None:
        """kill -9, and nothing of it is left five seconds later."""
        process.kill()
        killed = time.monotonic()
        process.wait()
        while left := self.marked(name):
            assert time.monotonic() - killed < GONE_SECONDS, left
            time.sleep(0.02)

    def close(self) -> None:
        for pid in self.marked():  # only after a test that failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def records(self) -> list[Record]:
        return [Record(path.parent) for path in sorted(self.runs.glob("*/run.json"))]


def ended(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def session(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return 0


def epochs(record: Record) -> list[int]:
    return [row["epoch"] for row in record.rows()]


def mirrored(record: Record) -> bool:
    return any(path.stat().st_size > 0 for path in record.path.glob("wandb/offline-run-*/*.wandb"))


def weights(record: Record) -> str:
    digest = hashlib.sha256()
    for name, tensor in torch.load(record.path / "weights.pt", weights_only=True).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_whole(record: Record, last: int = EPOCHS, before: list[dict[str, Any]] | None = None) -> None:
    """Finished, every epoch once, those `before` a kill kept and not trained again; W&B's file holds just the same."""
    rows = list(record.rows())
    assert record.state == "finished" and epochs(record) == list(range(1, last + 1))
    if before is not None:  # the last one may have come after the last checkpoint
        assert len(before) > 2 and rows[: len(before) - 1] == before[:-1], "trained again from the beginning"
    seen = inspect_only(record)
    assert seen.rows == rows and seen.steps == epochs(record) and seen.exit_code == 0
    assert seen.config == record.read("config") and seen.run["run_id"] == record.id


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"])
    yield world
    world.close()


def test_a_killed_worker_and_a_killed_agent_cost_nothing_and_leave_nothing(world: World) -> None:
    backend = world.sweep(KILLED + "  witness: {values: [0, 1]}\n", "--dataset", "stand-in")
    world.environment["WITNESS_PAUSE"] = PAUSE
    runs = [Record(world.runs / backend.run_id(cell)) for cell in (0, 1)]
    with world.held():
        agents = {name: world.start("agent", backend.id, "--workers", "1", "--wandb", "offline", name=name) for name in "ab"}
        until(lambda: all(len(epochs(record)) > 4 and mirrored(record) for record in runs))
        begun = {pid: key for pid, _, key in world.said("begins")}
        assert sorted(begun.values()) == [0, 1]
        (holder,) = begun.keys() & world.marked("a").keys()
        assert world.kinds("a") == world.kinds("b") == {"cifar.agent.worker", "cifar.sidecar", "wandb-core"}
        assert [cell["state"] for cell in backend.cells()] == ["running"] * 2
        before = [list(record.rows()) for record in runs]
        os.kill(holder, signal.SIGKILL)
        killed = time.monotonic()
        world.kill(agents["b"], "b")
    until(lambda: [key for _, _, key in world.said("begins")].count(begun[holder]) == 2)
    time.sleep(max(0.0, killed + GONE_SECONDS - time.monotonic()))
    assert not [pid for pid in world.marked("a") if holder in (pid, session(pid))]
    code, output = ended(agents["a"])
    assert code == 0 and not world.marked(), output
    assert backend.counts() == {"finished": 2} and [cell["attempt"] for cell in backend.cells()] == [2, 2], output
    assert Counter(key for _, _, key in world.said("begins")) == {0: 2, 1: 2}
    assert [record.id for record in world.records()] == [record.id for record in runs]
    world.environment["WITNESS_PAUSE"] = "0"
    for record, kept in zip(runs, before, strict=True):
        is_whole(record, before=kept)
        known = {other.id for other in world.records()}
        world.run("train", "--from", record.id, "--wandb", "disabled")
        (undisturbed,) = [other for other in world.records() if other.id not in known]
        assert undisturbed.read("config") == record.read("config")
        assert weights(undisturbed) == weights(record)
        for row, other in zip(record.rows(), undisturbed.rows(), strict=True):
            assert not [key for key in row if row[key] != other[key] and not key.startswith("system/")]


# -- no network, no account, no input ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("UNSHARE -RN IS NOT ALLOWED HERE: that everything works without a network was not shown")
    world = World(tmp_path_factory.mktemp("cut-off"), prefix=ALONE, WITNESS_PAUSE=PAUSE)
    yield world
    world.close()
    shutil.rmtree(world.folder / "home")  # the stand-in data is large


def test_cut_off_a_sweep_runs_and_is_reported(cut_off: World) -> None:
    file = cut_off.folder / "once.yaml"
    file.write_text(SWEEP + "  width: {values: [2, 4]}\n  epochs: {value: 3}\n  dataset: {value: auto}\n")
    output = cut_off.run("sweep", str(file))
    assert "STAND-IN" in output and "2 finished" in output
    assert len(cut_off.records()) == 2
    for record in cut_off.records():
        is_whole(record, 3)
    (page,) = cut_off.runs.glob("sweeps/*/report/report.html")
    page.unlink()
    assert "STAND-IN" in cut_off.run("report") and page.exists()


@pytest.mark.parametrize("victim", ["agent", "train"])
def test_cut_off_what_was_killed_goes_on(cut_off: World, victim: str) -> None:
    known = [record.id for record in cut_off.records()]
    if victim == "agent":
        backend = cut_off.sweep(KILLED, "--dataset", "stand-in")
        first, again, workers = ["agent", backend.id], ["agent", backend.id], {"cifar.agent.worker"}
    else:
        pairs = [f"{key}={given['value']}" for key, given in parse_yaml(SWEEP + KILLED, "sweep")["parameters"].items()]
        first, again, workers = ["train", *pairs, "--dataset", "stand-in"], ["train", "--resume"], set()
    with cut_off.held():
        process = cut_off.start(*first, name=victim)
        (record,) = until(lambda: [record for record in cut_off.records() if record.id not in known])
        until(lambda: len(epochs(record)) > 4 and mirrored(record))
        assert cut_off.kinds(victim) == {"cifar.sidecar", "wandb-core", *workers}
        cut_off.kill(process, victim)
    before = list(record.rows())
    assert len(before) < EPOCHS and record.state == "running"
    cut_off.run(*again, *([record.id] if victim == "train" else []))
    is_whole(record, before=before)
    assert str(cut_off.runs) in cut_off.run("report", backend.id if victim == "agent" else record.id)
