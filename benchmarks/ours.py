"""Our side of a benchmark: trainings one after the other in this process, as a warm worker does them, and command lines."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.common import ROOT, SMOKE, Missing, Result, child_environment, installed, synchronize
from cifar import sidecar
from cifar.config import resolve as configuration
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.loop import RunHooks
from cifar.training.trainer import Trainer, resolve_device

if TYPE_CHECKING:
    from cifar.integrations.wandb.settings import Mode

SETTLE_SECONDS = 60.0


@dataclasses.dataclass
class Trained:
    """One finished training: its rows, its summary, and the seconds of what a row does not hold."""

    record: RunDir
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    test_seconds: float  # of the final evaluation with the run's own views
    prepare_seconds: float  # of weights that are made from images (whitening)
    stretch_seconds: float  # from the first epoch's beginning to the end of that evaluation, whatever lies between
    run_seconds: float  # from the call to the end of the run: also evaluation, writing, checkpoints
    cpu_seconds: float  # of all cores, that this process has spent in that time

    @property
    def seconds(self) -> float:
        """Of training, all epochs."""
        return sum(row["system/seconds"] for row in self.rows)


class Ours:
    """Trainings in a folder of their own, followed by one companion process that mirrors them to W&B.

    mode: "offline" writes files; "online" sends to the server that the environment names.
    """

    def __init__(self, options: argparse.Namespace, result: Result, *, mirror: bool = True, mode: Mode = "offline") -> None:
        self.options, self.device = options, resolve_device(options.device)
        self.toy: dict[str, Any] | None = None  # of --smoke, where SMOKE does not fit
        self._folder = tempfile.TemporaryDirectory(prefix="cifar-bench-")
        self.runs = Path(self._folder.name) / "runs"
        self.runs.mkdir()
        self._mode: Mode = mode if mirror and installed("wandb") else "disabled"
        if mirror and self._mode == "disabled":
            result.skip(f"the {mode} W&B mirror", "wandb is not installed")
        self._log = Path(self._folder.name) / "mirror.log"
        self._follower: sidecar.SidecarHandle | None = None

    def __enter__(self) -> Ours:
        self._follower = sidecar.SidecarHandle(self._mode, log=self._log)
        return self

    def __exit__(self, *_: object) -> None:
        if self._follower:
            self._follower.shut_down()
        self._folder.cleanup()

    def train(
        self,
        values: dict[str, Any],
        *,
        mirrored: bool = True,
        on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
        ahead: int = 1,
    ) -> Trained:
        """Train to the end. Returns when the companion has sent it, so that the next training is not slowed by the last.

        `ahead`: trainings of this kind that will be made here, this one included; what compiling pays for.
        """
        config = configuration.resolve_config(settings(self.options, values, self.toy))
        record = run.create_run(config, self.runs)
        if mirrored and self._follower:
            self._follower.follow_run(record.path)

        def seen(row: dict[str, Any]) -> bool:
            on_epoch(row)
            return True

        evaluations, prepared, begun = Log(), Log(), Log()
        from cifar.models.airbench import AirBench

        with contextlib.ExitStack() as clocks:
            clocks.enter_context(timed(Trainer, "evaluate", self.device, evaluations))
            clocks.enter_context(timed(AirBench, "init_from_data", self.device, prepared))
            if hasattr(Trainer, "begin_epoch"):
                clocks.enter_context(timed(Trainer, "begin_epoch", self.device, begun, first_only=True))
            hooks = RunHooks(should_continue=seen)
            clock, cpu = time.perf_counter(), time.process_time()
            state = run.train_run(config, record, hooks=hooks, num_planned_runs=ahead)
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        if state != "finished":
            raise Missing(f"the run ended {state}: {record.read_json('status').get('reason', '')}")
        if mirrored and self._follower:
            self._settle(record)
        rows = list(record.read_rows())
        final = next((call for call in evaluations if call.arguments[:2] == ("test", config.tta)), None)
        training = sum(row["system/seconds"] for row in rows)
        test = final.seconds if final else 0.0
        stretch = final.end - begun[0].begin if final and begun else training + test
        prepare = sum(call.seconds for call in prepared)
        return Trained(record, rows, record.read_json("summary"), test, prepare, stretch, clock, cpu)

    def _settle(self, record: RunDir) -> None:
        """Wait until the run is drawn and mirrored: until its wandb/mirror.json holds a digest."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            if self._mode == "disabled":
                if any((record.path / "pictures").glob("*.png")):
                    return
            else:
                with contextlib.suppress(FileNotFoundError, ValueError):
                    if json.loads((record.path / "wandb" / "mirror.json").read_bytes()).get(self._mode):
                        return
            time.sleep(0.05)
        raise Missing(f"the mirror did not finish within {SETTLE_SECONDS:.0f} s: {self._log.read_text()[-300:]}")


class Call(NamedTuple):
    begin: float
    end: float
    arguments: tuple[Any, ...]

    @property
    def seconds(self) -> float:
        return self.end - self.begin


Log = list[Call]


@contextlib.contextmanager
def timed(owner: Any, name: str, device: torch.device, log: Log, *, first_only: bool = False) -> Iterator[None]:
    """While it lasts, every call of the method `owner.name` is added to `log`, the device waited for before and after.

    `first_only`: later calls are let alone, so that nothing waits.
    """
    original = getattr(owner, name)

    def watched(self: Any, *arguments: Any, **more: Any) -> Any:
        if first_only and log:
            return original(self, *arguments, **more)
        synchronize(device)
        begun = time.perf_counter()
        found = original(self, *arguments, **more)
        synchronize(device)
        log.append(Call(begun, time.perf_counter(), (*arguments, *more.values())))
        return found

    setattr(owner, name, watched)
    try:
        yield
    finally:
        setattr(owner, name, original)


def settings(options: argparse.Namespace, values: dict[str, Any], toy: dict[str, Any] | None = None) -> dict[str, Any]:
    """A configuration's values on this benchmark's device and data; toy sizes where it only tries itself out."""
    common = {"dataset": options.dataset, "device": options.device}
    return {**common, **values, **configuration.parse_pairs(options.set), **((toy or SMOKE) if options.smoke else {})}


def pairs(values: dict[str, Any]) -> list[str]:
    """Values as the command line takes them."""
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in values.items()]


def cifar(*arguments: str, cwd: Path, **environment: str) -> tuple[float, float]:
    """`python -m cifar ARGUMENTS` -> (when it began, by time.time(), and seconds until it had ended)."""
    begun, clock = time.time(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "cifar", *arguments], cwd=cwd, env=child_environment(**environment), check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - clock
    if done.returncode:
        raise Missing(
            f"`python -m cifar {' '.join(arguments)[:200]}` ended with {done.returncode}: {done.stdout.strip()[-400:]}"
        )
    return begun, seconds


def takes(command: str, option: str) -> bool:
    """Whether `python -m cifar COMMAND` has the option."""
    asked = [sys.executable, "-m", "cifar", command, "--help"]
    environment = child_environment(COLUMNS="200", TERM="dumb", NO_COLOR="1")
    return option in subprocess.run(asked, env=environment, cwd=ROOT, capture_output=True, text=True, check=False).stdout
