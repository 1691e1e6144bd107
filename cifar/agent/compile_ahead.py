"""Compiling ahead: while workers train, processes on idle cores compile the networks of the trials that come next.

What they compile is in the cache when a worker gets such a trial (training/compile_ahead.py). Each step is compiled by one
process of the machine: a lock says which, and who needs that step meanwhile waits. When such a process fails or is killed, its
lock is free, and the worker compiles as it would without them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cifar.agent.worker_process import worker_environment
from cifar.errors import UserError
from cifar.sweeps.backend import Backend, TrialFilter
from cifar.system import devices
from cifar.system.memory import available_bytes

LOOK_AHEAD = 200  # trials
LOOK_SECONDS = 1.0  # between two looks
IDLE_LOOK_SECONDS = 10.0  # where no trial in sight needs compiling
SHORT_SECONDS = 60.0  # until the next one is begun after GPU memory was short, or the system refused a process
MAX_SECONDS = 600.0  # of one process; then it hangs, and the worker compiles

MAX_PREPARERS = 16
CORES_OF_WORKER = 2  # the training's thread, and the one that draws the next epoch
CORES_OF_AGENT = 2  # the agent and the sidecar
CORES_OF_PREPARER = 2  # Python for the most part, and Triton's compilers
HOST_BYTES = 4 * 2**30  # of one process with its compilers
GPU_SHARE = 0.4  # of the memory that is free at the start: all these processes of a GPU together
GPU_BYTES = 4 * 2**30  # that each of them should have at least


def check_compile_ahead_option(option: str) -> None:
    """Raises UserError unless it is `auto`, `off` or a number of processes."""
    if not (option in ("auto", "off") or (option.isdigit() and 1 <= int(option) <= 256)):
        raise UserError(f"--compile-ahead {option}: write auto, off, or how many processes at most (1 to 256)")


def count_preparers(num_cores: int, num_workers: int, memory: int | None, gpu_bytes: Sequence[int]) -> int:
    """How many processes this machine has room for beside its workers. memory: free bytes; gpu_bytes: free on each GPU."""
    by_cores = (num_cores - CORES_OF_WORKER * num_workers - CORES_OF_AGENT) // CORES_OF_PREPARER
    by_memory = MAX_PREPARERS if memory is None else memory // HOST_BYTES - num_workers
    by_gpus = len(gpu_bytes) * min((int(GPU_SHARE * free / GPU_BYTES) for free in gpu_bytes), default=0)
    return max(0, min(by_cores, by_memory, by_gpus, MAX_PREPARERS))


@dataclass(frozen=True)
class Preparation:
    """A process that compiles a network. place: the index of its GPU."""

    key: str
    name: str
    place: int
    process: subprocess.Popen[bytes]
    start_time: float  # time.monotonic()


class CompileAhead:
    """Looks at the trials that come next, and starts and ends the processes that compile their networks.

    environments: of the workers; training_values: a trial's values -> its values as a worker trains them.
    """

    def __init__(
        self,
        backend: Backend,
        option: str,
        environments: Sequence[Mapping[str, str]],
        *,
        data_dir: Path | None,
        training_values: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        self.backend, self.option, self.data_dir, self.training_values = backend, option, data_dir, training_values
        self.num_workers = len(environments)
        self.places = list({json.dumps(dict(each), sort_keys=True): each for each in environments}.values())  # each GPU once
        self.running: list[Preparation] = []
        self.messages: list[str] = []  # to print
        self._is_off = option == "off" or (option == "auto" and not devices.has_nvidia_gpu())
        self._log = backend.folder / "logs" / "compile-ahead.log"
        self._gpu_name = ""
        self._has_begun = False
        self._max_processes: int | None = None  # not known before a network is to be compiled
        self._keys: dict[str, str] = {}  # a trial's values as text -> the key of its step; "" if it needs no compiling
        self._ready: set[str] = set()  # keys of which a process has said so
        self._given_up: set[str] = set()  # keys that are left to the workers
        self._next_look_time = self._resume_time = 0.0

    def update(self, num_left: float, claimed: Iterable[Mapping[str, Any]]) -> None:
        """Collect what is ready, and start what comes next. Never waits.

        num_left: how many trials this agent may still claim; claimed: the values of the trials that its workers have.
        """
        if self._is_off:
            return
        self._collect()
        now = time.monotonic()
        if now < self._next_look_time:
            return
        trials = self.backend.peek_values(int(min(LOOK_AHEAD, num_left))) if num_left > 0 else None
        needed = {self._key(values) for values in claimed}
        self._given_up |= needed  # the first worker that has such a trial compiles for all
        if trials is None:  # nothing is handed out any more; a worker may still wait for one of them
            self._end([each for each in self.running if each.key not in needed])
            trials = []
        keys: dict[str, Mapping[str, Any]] = {}  # the trials that come next, one for each key
        for trial_values in trials:
            if key := self._key(trial_values):
                keys.setdefault(key, trial_values)
        self._next_look_time = now + (LOOK_SECONDS if keys or needed - {""} else IDLE_LOOK_SECONDS)
        for key, values in keys.items():
            if len(self.running) >= self._find_max_processes() or now < self._resume_time:
                break
            if key not in self._given_up and self._rank(key, ()) == 1:
                self._start(key, values)

    def prefer(self, claimed: Iterable[Mapping[str, Any]], num_free: int) -> TrialFilter | Literal["wait"] | None:
        """Which of the next trials a free worker had better get: one whose network is compiled, else one that nobody compiles.

        "wait": none is compiled, and for each of `num_free` free workers one is being compiled, which will be ready before
        the worker could do that itself. None: the next trial, as it always is where the sweep's method decides the order.
        """
        if self._is_off or self.backend.sweep.method not in ("grid", "random"):
            return None
        claimed_keys = {self._key(values) for values in claimed}
        if not (claimed_keys - {""} or self.running):
            return None
        trials = self.backend.peek_values(LOOK_AHEAD) or []
        keys = [self._key(values) for values in trials]
        rank_of = {key: self._rank(key, claimed_keys) for key in set(keys)}
        best, num_begun = min(rank_of.values(), default=0), sum(each.key in rank_of for each in self.running)
        if num_begun and (best == 2 or (best == 1 and num_begun >= num_free)):
            return "wait"
        if not keys or rank_of[keys[0]] == best:
            return None
        wanted = {_as_text(values) for values, key in zip(trials, keys, strict=True) if rank_of[key] == best}
        return lambda values: _as_text(values) in wanted

    def shut_down(self) -> None:
        """End all processes at once: what they have not finished is of no use."""
        self._end(self.running)

    # -- networks ------------------------------------------------------------------------------------------------------

    def _key(self, values: Mapping[str, Any]) -> str:
        """The key of the step that a worker compiles for a trial; "" if it does not."""
        text = _as_text(values)
        if text not in self._keys:
            if len(self._keys) > 50 * LOOK_AHEAD:
                self._keys.clear()
            self._keys[text] = self._find_key(values)
        return self._keys[text]

    def _find_key(self, values: Mapping[str, Any]) -> str:
        from cifar.config.resolve import resolve_config
        from cifar.training.compile_ahead import needs_compiling
        from cifar.training.compile_cache import step_key

        try:
            config = resolve_config(self.training_values(values))
        except UserError:  # the worker says what is wrong
            return ""
        if not needs_compiling(config) or (self.option == "auto" and config.device == "cpu"):
            return ""
        self._find_max_processes()
        return step_key(config, "cpu" if config.device == "cpu" else self._gpu_name)

    def _is_ready(self, key: str) -> bool:
        from cifar.training.compile_cache import is_compiled

        return not key or key in self._ready or is_compiled(key)

    def _rank(self, key: str, claimed_keys: Collection[str]) -> int:
        """0: it is compiled, or need not be. 1: nobody compiles it. 2: a worker or another process of this machine does."""
        from cifar.training.compile_cache import is_being_compiled

        if self._is_ready(key):
            return 0
        is_begun = key in claimed_keys or any(each.key == key for each in self.running)
        return 2 if is_begun or is_being_compiled(key) else 1

    def _find_max_processes(self) -> int:
        if self._max_processes is None:
            found = devices.read_gpus(self.places)
            self._gpu_name = found[0][0] if found[0] else "cpu"
            # Workers on GPUs of another kind, or on those that nvidia-smi does not know, compile themselves.
            same = [n for n, gpu in enumerate(found) if (gpu[0] if gpu else "cpu") == self._gpu_name]
            self.places = [self.places[n] for n in same]
            free = [gpu[1] for n in same if (gpu := found[n])]
            room = count_preparers(devices.num_cores(), self.num_workers, available_bytes(), free)
            if not room and self.option == "auto":
                where = "no idle cores or too little free memory" if free else "no GPU that nvidia-smi names"
                self.messages.append(f"compiling ahead: off, as this machine has {where} for it")
            self._max_processes = int(self.option) if self.option.isdigit() else room
        return self._max_processes

    # -- processes -----------------------------------------------------------------------------------------------------

    def _start(self, key: str, values: Mapping[str, Any]) -> None:
        place = min(range(len(self.places)), key=lambda place: sum(each.place == place for each in self.running))
        most = self._find_max_processes()
        environment = {**worker_environment(), **self.places[place]}
        environment["CIFAR_RUNS"] = str(self.backend.runs_dir)  # where a trial's teachers are
        spare = devices.num_cores() - CORES_OF_WORKER * self.num_workers - CORES_OF_AGENT
        # Twice the share of each: its compilers rest while Python works.
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(16, max(2, 2 * spare // max(1, most)))))
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "cifar.agent.preparer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the agent
            )
        except OSError:  # no more processes, or no more open files, are allowed
            self._resume_time = time.monotonic() + SHORT_SECONDS
            return
        task: dict[str, Any] = {
            "values": dict(self.training_values(values)),
            "data_dir": str(self.data_dir) if self.data_dir else "",
            "ahead": 2,  # also what is captured only for several runs
            "gpu_share": GPU_SHARE / math.ceil(most / len(self.places)),
        }
        assert process.stdin
        with contextlib.suppress(OSError):  # it has died; `_collect` sees that
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
        if not self._has_begun:
            self._has_begun = True
            self.messages.append(f"compiling ahead: the networks of the next trials, by up to {most} processes")
        self.running.append(Preparation(key, str(task["values"].get("model", "")), place, process, time.monotonic()))
        self._write_log(self.running[-1], "begins")

    def _collect(self) -> None:
        """Take the answers of the processes that have ended."""
        for each in list(self.running):
            if each.process.poll() is None:
                if time.monotonic() - each.start_time > MAX_SECONDS:
                    self._given_up.add(each.key)
                    self._end([each])
                continue
            answer, reason = _read_answer(each.process)
            self._end([each], f"{answer} {reason}".strip())
            if answer == "short":
                self._resume_time = time.monotonic() + SHORT_SECONDS
            elif answer != "busy":  # else another process was a little quicker; if that one dies, this one is begun again
                (self._ready if answer == "ready" else self._given_up).add(each.key)

    def _end(self, ended: Iterable[Preparation], how: str = "ended") -> None:
        for each in list(ended):
            self.running.remove(each)
            if each.process.poll() is None:
                with contextlib.suppress(OSError):  # also the compilers that it has started
                    os.killpg(each.process.pid, signal.SIGKILL)
            each.process.communicate()  # which closes the pipes
            self._write_log(each, how)

    def _write_log(self, about: Preparation, what: str) -> None:
        seconds = time.monotonic() - about.start_time
        with contextlib.suppress(OSError), open(self._log, "a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {about.key} {about.name}: {what} ({seconds:.1f} s)\n")


def _read_answer(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """The answer of a process that has ended, and the reason for it."""
    assert process.stdout
    with contextlib.suppress(ValueError, KeyError, TypeError):
        answer = json.loads(process.stdout.read())
        return str(answer["answer"]), str(answer["reason"])
    return "failed", f"it ended with code {process.returncode}"


def _as_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)
