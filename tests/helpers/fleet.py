"""Commands in a world of their own, found by a variable in their environment, and a witness of what their trials do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cifar.sweeps.local import LocalBackend
from cifar.tracking.run_dir import RunDir
from helpers.paths import ROOT
from helpers.processes import wait_for_exit

GONE_SECONDS = 5.0
WITNESS = """
import os, time, traceback
from cifar.registry import probes

@probes.register("witness")
class Witness:
    labels, layers = {}, []

    def __init__(self, *, witness: int = 0) -> None:
        self.key, self.epochs = witness, 0

    def start(self, parameters):
        self.size = sum(p.numel() for p in parameters.values())
        self.tell("begins")

    def is_check(self):  # of the parts, before the run is made
        return any("part_checks" in frame.filename for frame in traceback.extract_stack())

    def after_backward(self, parameters):  # of the first step of each epoch
        if self.is_check():
            return
        self.tell("trains")
        time.sleep(float(os.environ["WITNESS_PAUSE"]))
        self.epochs += 1
        while self.epochs > 8 and os.path.exists(os.environ["WITNESS_LOG"] + ".hold"):
            time.sleep(0.02)

    def tell(self, what):
        if self.is_check():
            return
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


class Fleet:
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
    def hold_runs(self) -> Iterator[None]:
        """Inside, no run gets beyond its ninth epoch."""
        hold = self.folder / "witness.log.hold"
        hold.touch()
        yield
        hold.unlink()

    def run(self, *words: str) -> str:
        code, output = wait_for_exit(self.start(*words))
        assert code == 0, output
        return output

    def create_sweep(self, text: str, *options: str) -> LocalBackend:
        """Made by the command, and not run."""
        (self.folder / "sweep.yaml").write_text(SWEEP + text)
        output = self.run("sweep", str(self.folder / "sweep.yaml"), "--no-agent", *options)
        return LocalBackend(re.findall(r"python -m cifar agent (\w+)", output)[0], self.runs)

    def read_witness(self, what: str) -> list[tuple[int, int, int]]:
        """What the witness wrote down: process, parameters, its key."""
        lines = [line.split() for line in (self.folder / "witness.log").read_text().splitlines()]
        return [(int(line[1]), int(line[2]), int(line[3])) for line in lines if line[0] == what]

    def find_processes(self, name: str = "") -> dict[int, str]:
        """The live processes of the command of that name, or all of this world: id -> what they run."""
        found, mark = {}, f"CIFAR_TEST_MARK={self.folder}/{name}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or somebody else's
                if any(variable.startswith(mark) for variable in (folder / "environ").read_bytes().split(b"\0")):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found  # a zombie's environment is empty

    def list_kinds(self, name: str) -> set[str]:
        commands = " ".join(self.find_processes(name).values())
        return {kind for kind in ("cifar.agent.worker", "cifar.sidecar", "wandb-core") if kind in commands}

    def kill(self, process: subprocess.Popen[str], name: str) -> None:
        """kill -9, and nothing of it is left five seconds later."""
        process.kill()
        killed = time.monotonic()
        process.wait()
        while left := self.find_processes(name):
            assert time.monotonic() - killed < GONE_SECONDS, left
            time.sleep(0.02)

    def close(self) -> None:
        for pid in self.find_processes():  # only after a test that failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def load_records(self) -> list[RunDir]:
        return [RunDir(path.parent) for path in sorted(self.runs.glob("*/run.json"))]


def list_epochs(record: RunDir) -> list[int]:
    return [row["epoch"] for row in record.read_rows()]
