"""Processes that own a run's folder, on this machine or as if on another one, with and without locks of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from helpers.paths import ROOT

# Read by Python at its start, where PYTHONPATH names its folder. Only the processes of a test that asks for it have that.
STARTUP = """
import os

if os.environ.get("TEST_NO_FLOCK"):  # as on a file system without locks
    import errno, fcntl

    def flock(handle, operation):
        raise OSError(getattr(errno, os.environ["TEST_NO_FLOCK"]), "No locks available")

    fcntl.flock = flock

if os.environ.get("TEST_HOST"):  # as on another machine that shares the folder
    import pathlib, socket

    socket.gethostname = lambda: os.environ["TEST_HOST"]
    read_text = pathlib.Path.read_text
    told = {"/proc/sys/kernel/random/boot_id": "boot of ", "/etc/machine-id": "machine of "}
    pathlib.Path.read_text = lambda path, *rest, **options: (
        told[str(path)] + os.environ["TEST_HOST"] if str(path) in told else read_text(path, *rest, **options)
    )

if os.environ.get("TEST_CLOCK"):  # a file: seconds to add to the time of day
    import time

    now = time.time

    def jumping():
        try:
            with open(os.environ["TEST_CLOCK"]) as file:
                return now() + float(file.read() or 0)
        except OSError:
            return now()

    time.time = jumping
"""


def startup_environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a process that runs STARTUP first. `variables`: TEST_NO_FLOCK=ENOLCK, TEST_HOST, TEST_CLOCK."""
    (folder / "startup").mkdir(exist_ok=True)
    (folder / "startup" / "sitecustomize.py").write_text(STARTUP)
    path = os.pathsep.join([str(folder / "startup"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, **variables}


def start_python(code: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that talks by lines: its standard input and output are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=ROOT, env=environment or dict(os.environ), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


OWNER = """
import sys
from pathlib import Path
from cifar.errors import UserError
from cifar.tracking.run_dir import RunDir

run = RunDir(Path(sys.argv[1]))
try:
    run.acquire()
except UserError as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("owns", flush=True)
for line in sys.stdin:  # each asks for one row
    try:
        run.append_row({"by": line.strip()})
        print("wrote", flush=True)
    except UserError as error:
        print("stopped", error, flush=True)
        sys.exit(2)
run.release()
"""


def start_owner(folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that owns a run, writes a row for each line that it gets, and gives the run back at the end of its input."""
    return start_python(OWNER, str(folder), environment=environment)


def ask_for_row(owner: subprocess.Popen[str], name: str) -> str:
    """What the owner answers."""
    assert owner.stdin
    owner.stdin.write(f"{name}\n")
    owner.stdin.flush()
    return read_line(owner)


def read_line(owner: subprocess.Popen[str]) -> str:
    assert owner.stdout
    return owner.stdout.readline().strip()


WARM = """
import json, os, sys, time
import torch, torch.distributed
import cifar.training.run, cifar.sidecar
from cifar.cli.app import main

def start(words, log):
    pid = os.fork()
    if pid == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = 1
        try:
            code = main(words)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid

print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    pids = []
    for number, offset in enumerate(asked["offsets"]):
        time.sleep(offset)
        pids.append(start(asked["words"], f"{asked['log']}.{number}"))
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class WarmCommands:
    """Starts commands as processes of their own, which need not import PyTorch first: one process has, and is forked."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._log = folder / "command"
        self._process = start_python(WARM, environment=environment)
        assert read_line(self._process) == "ready"

    def run(self, words: list[str], offsets: list[float]) -> list[tuple[int, str]]:
        """Run the same command several times, each started so many seconds after the one before -> exit codes, output."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"words": words, "offsets": offsets, "log": str(self._log)}) + "\n")
        self._process.stdin.flush()
        codes = json.loads(read_line(self._process))
        return [(code, Path(f"{self._log}.{number}").read_text()) for number, code in enumerate(codes)]

    def close(self) -> None:
        self._process.communicate(timeout=20)
