"""What the workers of one agent share, measured beside a sweep: CPUs, the agent and its database, the sidecar, the disk.

    python -m benchmarks.fleet_profile OUT.json sweep FILE ...   # `python -m cifar sweep FILE ...`, with clocks in the agent

`Watch` samples the CPU seconds of a process and all its children every half second: what a process has used after its last
sample is missing. The clocks in the agent are around calls of the sweep's backend and around its waiting for events.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.5
KINDS = {  # of processes, by a word in their command line; the first that fits
    "pictures": ("cifar.sidecar", "--draw"),
    "sidecar": ("cifar.sidecar",),
    "wandb-core": ("wandb-core",),
    "compiling": ("compile_worker",),
    "workers": ("cifar.agent.worker",),
}
DATABASE_CALLS = ("claim_trial", "finish_trial", "heartbeat", "report_metric", "count_states", "list_cells", "list_all_cells")


class Watch:
    """The CPU seconds of a process and its children, by kind of process, while it lives."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._psutil, self._root = psutil, psutil.Process(pid)
        self._seconds: dict[tuple[int, float], float] = {}  # (pid, when it was started) -> CPU seconds
        self._kinds: dict[tuple[int, float], str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_end, daemon=True)
        self._thread.start()

    def _sample_until_end(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            with contextlib.suppress(self._psutil.Error):
                for process in [self._root, *self._root.children(recursive=True)]:
                    with contextlib.suppress(self._psutil.Error):  # it has just ended
                        self._sample(process)

    def _sample(self, process: Any) -> None:
        key = process.pid, process.create_time()
        times = process.cpu_times()
        if key not in self._kinds or self._kinds[key] == "other":  # a child that was just forked has its parent's words
            words = process.cmdline()
            fits = (kind for kind, parts in KINDS.items() if all(any(part in word for word in words) for part in parts))
            self._kinds[key] = "agent" if process == self._root else next(fits, "other")
        self._seconds[key] = times.user + times.system

    def end(self) -> dict[str, float]:
        """Stop -> the CPU seconds of each kind."""
        self._ended.set()
        self._thread.join()
        found: dict[str, float] = defaultdict(float)
        for key, seconds in self._seconds.items():
            found[self._kinds[key]] += seconds
        return dict(found)


def write_again(folder: Path, share: float = 0.1) -> float:
    """Seconds that the disk takes to write all files of a runs folder again, one after the other, each flushed to the disk.

    A `share` of the run folders is written, and scaled.
    """
    runs = sorted(path for path in folder.iterdir() if (path / "run.json").exists())
    chosen = runs[: max(1, round(share * len(runs)))]
    files = [path for run in chosen for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    contents = [path.read_bytes() for path in files]
    target = folder / "written_again"
    begun = time.perf_counter()
    for content in contents:
        with open(target, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    target.unlink(missing_ok=True)
    return seconds * len(runs) / len(chosen)


@contextlib.contextmanager
def clocks(found: dict[str, float]) -> Iterator[None]:
    """Add the seconds of the agent's loop ("loop"), of its calls of the backend ("database") and of its waiting for events
    ("waiting") to `found`."""
    from cifar.agent.agent import Agent
    from cifar.agent.events import EventQueue
    from cifar.sweeps.local import LocalBackend

    depths: dict[str, int] = defaultdict(int)  # a call may call another one of its kind

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            depths[name] += 1
            begun = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                depths[name] -= 1
                if not depths[name]:
                    found[name] = found.get(name, 0.0) + time.perf_counter() - begun
                    found[f"{name} calls"] = found.get(f"{name} calls", 0) + 1

        return call

    with contextlib.ExitStack() as stack:
        for owner, method, name in (
            *((LocalBackend, method, "database") for method in DATABASE_CALLS),
            (EventQueue, "next_event", "waiting"),
            (Agent, "_supervise_workers", "loop"),
        ):
            original = getattr(owner, method)
            setattr(owner, method, timed(name, original))
            stack.callback(setattr, owner, method, original)
        yield


def main(arguments: list[str]) -> int:
    from cifar.cli.app import main as cifar

    out, *words = arguments
    found: dict[str, float] = {}
    begun = time.perf_counter()
    with clocks(found):
        code = cifar(words)
    Path(out).write_text(json.dumps({**found, "wall": time.perf_counter() - begun}))
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
