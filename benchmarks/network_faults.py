"""What a broken W&B server costs a training command: from its start to its exit, in pairs with an undisturbed one.

    python benchmarks/network_faults.py [--pairs 5] [--faults slow,429,500,hanging,dying] [--json FILE]

The server is the tests' (tests/helpers/protocol), in a process of its own; the client is the real wandb with wandb-core. The
command is `python -m cifar train`, online; a plug-in probe writes down the time of every optimizer step. After each command
with a fault the server gets well, `python -m cifar push RUN` sends what is missing, and every epoch and artifact has to be
there once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 6
WORK = {
    "model": "resnet8", "epochs": EPOCHS, "train_size": 1280, "val_size": 200, "batch_size": 64, "threads": 1,
    "probes": "clock", "probe_every": 1, "device": "cpu",
}  # fmt: skip
FAULTS: dict[str, dict[str, Any]] = {  # what a server that is ill from the start does, and one that dies on the way
    "slow": {"kind": "slow", "value": 10.0},  # seconds before every answer
    "429": {"kind": "status", "value": 429},
    "500": {"kind": "status", "value": 500},
    "hanging": {"kind": "hang"},
    "dying": {},
}
ARTIFACTS = ["dataset", "model", "predictions"]  # that a finished run makes and uses
ALLOWED_RATIO, ALLOWED_SECONDS = 0.05, 2.0  # beyond the undisturbed command
CLOCK = """
import os, time
from cifar.registry import probes

@probes.register("clock")
class Clock:
    labels, layers = {}, []

    def __init__(self, *, clock: int = 0) -> None:
        self.file = os.open(os.environ["CLOCK_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def start(self, parameters):
        pass

    def after_update(self, parameters):
        os.write(self.file, f"{time.monotonic()}\\n".encode())
"""


# -- the server's process ----------------------------------------------------------------------------------------------


def serve() -> None:
    """JSON lines in, one JSON line out for each: the first says where the server is."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.protocol import Fault, Server

    with Server() as server:
        print(json.dumps(server.environment()), flush=True)
        for line in sys.stdin:
            asked, answer = json.loads(line), {}
            if asked["do"] == "fail":
                server.fault = Fault(**asked["fault"])
            elif asked["do"] == "die":
                server.die()
            elif asked["do"] == "get well":
                server.heal()
                server.revive()
            else:
                run = server.runs.get(asked["run"])
                answer = {"rows": run.rows if run else [], "state": run.state if run else "", "strange": server.unknown}
                made, used = server.artifacts.made_by(asked["run"]), server.artifacts.used_by(asked["run"])
                answer["artifacts"] = sorted([artifact.type for artifact in (*made, *used)])
            print(json.dumps(answer), flush=True)


class Server:
    """The other end of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.environment: dict[str, str] = self._read()

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


# -- a command and what came of it -------------------------------------------------------------------------------------


class Place:
    """A folder with the commands' home, plug-in and runs."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        (folder / "plugins" / "probes").mkdir(parents=True)
        (folder / "plugins" / "probes" / "clock.py").write_text(CLOCK)
        (folder / "home").mkdir()
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "CIFAR_"))},
            **server.environment, "HOME": str(folder / "home"), "CIFAR_PLUGINS": str(folder / "plugins"),
            "CIFAR_RUNS": str(folder / "runs"), "CLOCK_LOG": str(folder / "clock"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "CIFAR_BENCHMARK": str(folder), "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "output", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "cifar", *words], env=self.environment, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def train(self, fault: str = "") -> dict[str, Any]:
        """The command once, with a server that is well or not -> seconds, stall, and what is wrong with its end."""
        (self.folder / "clock").unlink(missing_ok=True)
        known, dead = set(self.runs()), False
        if FAULTS.get(fault):
            self.server.ask("fail", fault=FAULTS[fault])
        began = time.monotonic()
        process = self.start("train", *(f"{key}={value}" for key, value in WORK.items()), "--dataset", "stand-in")
        while process.poll() is None:
            time.sleep(0.02)
            for run in set(self.runs()) - known if fault == "dying" and not dead else ():
                # half of its epochs are trained, and the server has some of them
                if len(rows_of(run)) >= EPOCHS // 2 and self.server.ask("look", run=run.name)["rows"]:
                    self.server.ask("die")
                    dead = True
        ended = time.monotonic()
        (run,) = set(self.runs()) - known
        wrong = [f"left behind: {name}" for name in self.left()]
        rows, state = rows_of(run), json.loads((run / "status.json").read_text())["state"]
        if process.returncode or state != "finished" or [row["epoch"] for row in rows] != list(range(1, EPOCHS + 1)):
            wrong.append(f"exit code {process.returncode}, {state}, {len(rows)} epochs on disk")
        if fault:
            if fault == "dying" and not dead:
                wrong.append("the server should have died in the middle of it")
            self.server.ask("get well")
            wrong += self.push(run)
        elif self.server.ask("look", run=run.name)["rows"] != rows:
            wrong.append("a server that is well has not got everything")
        steps = [float(line) for line in (self.folder / "clock").read_text().split()]
        stall = max(b - a for a, b in itertools.pairwise(steps))
        return {"seconds": ended - began, "stall": stall, "after": ended - steps[-1], "wrong": wrong}

    def runs(self) -> list[Path]:
        return [path.parent for path in self.folder.glob("runs/*/run.json")]

    def push(self, run: Path) -> list[str]:
        """What is still wrong on the server after what was missing is sent."""
        code = self.start("push", run.name).wait()
        seen = self.server.ask("look", run=run.name)
        wrong = [] if code == 0 else [f"push ends with {code}"]
        wrong += [] if seen["rows"] == rows_of(run) else [f"epochs on the server: {[row.get('epoch') for row in seen['rows']]}"]
        wrong += [] if seen["state"] == "finished" else [f"state on the server: {seen['state']}"]
        wrong += [] if seen["artifacts"] == ARTIFACTS else [f"artifacts on the server: {seen['artifacts']}"]
        return wrong + [f"the server was not taught: {what}" for what in seen["strange"]]

    def left(self) -> list[str]:
        """Processes of the command that are still there."""
        mark, found = f"CIFAR_BENCHMARK={self.folder}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


def rows_of(run: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"]
    except FileNotFoundError:
        return []


# -- pairs -------------------------------------------------------------------------------------------------------------


def summary(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """(undisturbed, disturbed) commands of one fault -> the numbers."""
    seconds = [(well["seconds"], ill["seconds"]) for well, ill in pairs]
    more = [ill - well for well, ill in seconds]
    allowed = [ALLOWED_RATIO * well + ALLOWED_SECONDS for well, _ in seconds]

    def spread(values: list[float]) -> dict[str, Any]:
        return {"median": round(statistics.median(values), 3), "range": [round(min(values), 3), round(max(values), 3)]}

    return {
        "n": len(pairs),
        "undisturbed_seconds": spread([well for well, _ in seconds]),
        "disturbed_seconds": spread([ill for _, ill in seconds]),
        "more_seconds": spread(more),
        "ratio": spread([ill / well for well, ill in seconds]),
        "last_step_to_exit_undisturbed_seconds": spread([well["after"] for well, _ in pairs]),
        "last_step_to_exit_disturbed_seconds": spread([ill["after"] for _, ill in pairs]),
        "longest_stall_undisturbed_seconds": spread([well["stall"] for well, _ in pairs]),
        "longest_stall_disturbed_seconds": spread([ill["stall"] for _, ill in pairs]),
        "within_5_percent_and_2_seconds": f"{sum(m <= a for m, a in zip(more, allowed, strict=True))} of {len(pairs)}",
        "wrong": [what for pair in pairs for each in pair for what in each["wrong"]],
    }


def measure(count: int, faults: list[str]) -> dict[str, Any]:
    pairs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {fault: [] for fault in faults}
    server = Server()
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Place(Path(folder), server)
            place.train()  # makes the stand-in images, and warms the disk's cache
            for n in range(count):
                for fault in faults:
                    first, second = (place.train(name) for name in (("", fault) if n % 2 == 0 else (fault, "")))
                    pairs[fault].append((first, second) if n % 2 == 0 else (second, first))
                    well, ill = pairs[fault][-1]
                    said = f"{n + 1} {fault:8} {well['seconds']:6.2f} s -> {ill['seconds']:6.2f} s"
                    print(said, *well["wrong"], *ill["wrong"], file=sys.stderr, flush=True)
            (example, *_) = Path(folder).glob("runs/*/environment.json")
            where = json.loads(example.read_text())
    finally:
        server.close()
    return {
        "what": "a training command, from start to exit, with a W&B server that is ill, in pairs with one that is well",
        "device": where["device"],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),  # others on the same cores make everything slower
        "platform": platform.platform(),
        "versions": {**where["versions"], "wandb": version("wandb")},
        "work": WORK,
        "faults": {fault: summary(found) for fault, found in pairs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of them, separated by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    text = json.dumps(measure(options.pairs, options.faults.split(",")), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
