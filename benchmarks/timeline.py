"""Where the seconds between a command and its first step go, and those after its last step; the program is left as it is.

    python -m benchmarks.timeline FILE.json [--samples] COMMAND ...     # as `python -m cifar COMMAND ...`
    python -m benchmarks.timeline --show FILE.json

FILE.json gets "marks" (first and last step, end), "spans" (functions of SPANS and imports: name, begin, seconds, depth) and,
with `--samples`, "stacks": a thread looks at the main thread's stack every few milliseconds. All times are seconds since the
process was started. A span holds what lies inside it. What a GPU still computes belongs to whoever waits for it.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import importlib.abc
import importlib.machinery
import json
import os
import runpy
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

BEGUN = "CIFAR_TIMELINE_BEGUN"  # time.time() when the parent started this process; without it the system's own clock ticks
SAMPLE_SECONDS = 0.003
MIN_IMPORT_SECONDS = 0.01  # shorter imports are not written down
MIN_STACK_SECONDS = 0.02  # nor are rarer stacks
SPANS: dict[str, tuple[str, ...]] = {
    "cifar.cli.run_steps": ("begin_ahead", "prepare_data", "create_run_dir", "print_result"),
    "cifar.cli.train": ("gather_layers", "_train_run"),
    "cifar.config.resolve": ("resolve_config",),
    "cifar.data.cifar10": ("load_dataset", "_read_verified", "read_batch", "split_indices"),
    "cifar.data.augment": ("augment_fused",),
    "cifar.data.loader": ("Loader.begin_epoch", "wait_for_prefetch"),
    "cifar.kernels.fuse": ("fuse_model",),
    "cifar.kernels.triton.verify": ("Verifier.verify",),
    "cifar.models.airbench": ("AirBench.init_from_data",),
    "cifar.sidecar": ("SidecarHandle.__init__", "SidecarHandle.shut_down"),
    "cifar.system.energy": ("announce_use",),
    "cifar.system.environment": ("describe_environment", "git_state", "installed_versions", "gpu_uuid"),
    "cifar.training.checkpoint": ("save_checkpoint",),
    "cifar.training.compile": ("compile_trainers", "compile_if_worthwhile"),
    "cifar.training.costs": ("share_energy",),
    "cifar.training.cudagraph": (
        "StepRunner._capture_graphs",
        "StepRunner._step_concurrently",
        "StepRunner.measure_step_seconds",
        "GraphedCallable.__call__",
    ),
    "cifar.training.gpu_libraries": ("wait_for_libraries",),
    "cifar.training.loop": ("train_epochs", "RunLoop.begin_epoch", "RunLoop.collect_metrics", "RunLoop.launch_evaluation"),
    "cifar.training.parts": ("build_model", "build_optimizer", "build_probe_runner"),
    "cifar.training.run": (
        "check_plugins",
        "create_run",
        "measure_cost",
        "_acquire_folders",
        "_write_description",
        "_record_end",
        "_write_results",
        "_write_predictions",
    ),
    "cifar.training.trainer": (
        "load_splits",
        "resolve_device",
        "apply_process_settings",
        "Trainer.__init__",
        "Trainer._build_model",
        "Trainer.compile_step",
        "Trainer.evaluate",
    ),
    "cifar.training.trainer_cache": ("get_step_runner", "prepare_step_runner"),
    "torch._dynamo.convert_frame": ("compile_frame",),
    "torch._inductor.compile_fx": ("compile_fx",),
    "torch.cuda": ("_lazy_init",),
}  # module -> functions and methods to time, as the module defines them; what a version lacks is left out


class Timeline:
    """What has happened in the main thread up to now."""

    def __init__(self) -> None:
        self.begun = float(os.environ.get(BEGUN) or _process_start())
        self.marks: dict[str, float] = {"python": self.now()}
        self.spans: list[tuple[str, float, float, int]] = []  # name, begin, seconds, depth; in the order of their ends
        self.steps = 0
        self._depth = 0

    def now(self) -> float:
        return time.time() - self.begun

    @contextlib.contextmanager
    def span(self, name: str, at_least: float = 0.001) -> Any:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        begin, self._depth = self.now(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if (seconds := self.now() - begin) >= at_least:
                self.spans.append((name, begin, seconds, self._depth))

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **more: Any) -> Any:
            with self.span(name):
                return function(*arguments, **more)

        return timed

    def wrap_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of `StepRunner.__call__`: when it began first, and when it returned first and last."""

        @functools.wraps(function)
        def timed(*arguments: Any, **more: Any) -> Any:
            if not self.steps:
                self.marks["first step"] = self.now()
            function(*arguments, **more)
            self.marks["last step taken"] = self.now()
            if not self.steps:
                self.marks["first step taken"] = self.now()
            self.steps += 1

        return timed

    def watch_module(self, module: ModuleType) -> None:
        """Time the functions of SPANS in a module that has just been imported."""
        for path in SPANS.get(module.__name__, ()):
            owner: Any = module
            *above, name = path.split(".")
            for part in above:
                owner = getattr(owner, part, None)
            if callable(function := getattr(owner, name, None)):
                setattr(owner, name, self.wrap(path, function))
        if module.__name__ == "cifar.training.cudagraph":
            runner: Any = module.StepRunner
            runner.__call__ = self.wrap_step(runner.__call__)


class ImportClock(importlib.abc.MetaPathFinder):
    """Times imports. Modules are found and loaded as without it."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        original = spec.loader.exec_module

        def run(module: ModuleType) -> None:
            with self.timeline.span(f"import {name}", MIN_IMPORT_SECONDS):
                original(module)
            self.timeline.watch_module(module)

        with contextlib.suppress(AttributeError):
            spec.loader.exec_module = run  # type: ignore[method-assign, union-attr]
        return spec


class Sampler(threading.Thread):
    """Looks at the main thread's stack again and again. A stack counts for the time since the last look."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: Counter[tuple[str, ...]] = Counter()
        self._known: dict[CodeType, str] = {}
        self._main = threading.main_thread().ident

    def run(self) -> None:
        last = time.perf_counter()
        while True:
            time.sleep(SAMPLE_SECONDS)
            frame, stack = sys._current_frames().get(self._main or 0), list[str]()
            while frame:
                stack.append(self._known.get(frame.f_code) or self._describe(frame.f_code))
                frame = frame.f_back
            now = time.perf_counter()
            self.seconds[tuple(reversed(stack))] += now - last
            last = now

    def _describe(self, code: CodeType) -> str:
        place = code.co_filename.partition("site-packages/")[2] or code.co_filename
        name = f"{'/'.join(place.split('/')[-4:])}:{code.co_firstlineno} {code.co_name}"
        return self._known.setdefault(code, name)

    def tree(self) -> list[tuple[int, float, str]]:
        """(depth, seconds, function), the longest first at each depth. Functions of the import system are left out."""
        root: dict[str, Any] = {"seconds": 0.0, "below": {}}
        for stack, seconds in list(self.seconds.items()):
            node = root
            for name in stack:
                if "importlib._bootstrap" in name or "benchmarks/timeline.py" in name:
                    continue
                node = node["below"].setdefault(name, {"seconds": 0.0, "below": {}})
                node["seconds"] += seconds
        found: list[tuple[int, float, str]] = []

        def walk(node: dict[str, Any], depth: int) -> None:
            for name, child in sorted(node["below"].items(), key=lambda item: -item[1]["seconds"]):
                if child["seconds"] >= MIN_STACK_SECONDS:
                    found.append((depth, round(child["seconds"], 3), name))
                    walk(child, depth + 1)

        walk(root, 0)
        return found


def _process_start() -> float:
    """time.time() of this process's start, to a hundredth of a second; where the system does not tell, of now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def run_command(out: Path, arguments: Sequence[str], *, with_samples: bool) -> None:
    """`python -m cifar ARGUMENTS` in this process, which then ends with its exit code."""
    timeline, sampler = Timeline(), Sampler() if with_samples else None
    place = next((i for i, finder in enumerate(sys.meta_path) if finder is importlib.machinery.PathFinder), 0)
    sys.meta_path.insert(place, ImportClock(timeline))
    if sampler:
        sampler.start()

    def save() -> None:
        timeline.marks["end"] = timeline.now()
        found = {
            "arguments": list(arguments),
            "marks": timeline.marks,
            "steps": timeline.steps,
            "spans": timeline.spans,
            "stacks": sampler.tree() if sampler else [],
            "dynamo": _read_compile_times(),
        }
        out.write_text(json.dumps(found))

    atexit.register(save)
    sys.argv = ["cifar", *arguments]
    runpy.run_module("cifar", run_name="__main__", alter_sys=True)


def _read_compile_times() -> dict[str, Any]:
    """torch.compile's own clocks (seconds, calls) and counters; nothing where it was not used."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return {}
    times = getattr(utils, "compilation_time_metrics", {})
    counters = {name: dict(values) for name, values in getattr(utils, "counters", {}).items() if values}
    return {
        "seconds": {name: (round(sum(each), 3), len(each)) for name, each in times.items() if sum(each) >= 0.005},
        "counters": {name: {str(key)[:120]: value for key, value in each.items()} for name, each in counters.items()},
    }


def show(found: dict[str, Any], at_least: float = 0.03) -> list[str]:
    """The lines of a table: spans in the order of their begins, indented by depth, then stacks."""
    marks = sorted(found["marks"].items(), key=lambda item: item[1])
    lines = ["  ".join(f"{name} {seconds:.2f} s" for name, seconds in marks)]
    for name, begin, seconds, depth in sorted(found["spans"], key=lambda span: (span[1], span[3])):
        if seconds >= at_least:
            lines.append(f"{begin:8.2f} {seconds:8.3f} s  {'  ' * depth}{name}")
    clocks = found["dynamo"].get("seconds", {})
    for name, (seconds, calls) in sorted(clocks.items(), key=lambda item: -item[1][0]):
        lines.append(f"torch.compile {seconds:8.3f} s in {calls:4}  {name}")
    for depth, seconds, name in found["stacks"]:
        if seconds >= at_least:
            lines.append(f"stack {seconds:8.3f} s  {'  ' * depth}{name}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="timeline", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--show", action="store_true", help="print what FILE.json holds")
    parser.add_argument("file", metavar="FILE.json", type=Path)
    about = "[--samples] and a command of cifar, as: train model=conv"
    parser.add_argument("command", nargs=argparse.REMAINDER, help=about)
    options = parser.parse_args(arguments)
    if options.show:
        print("\n".join(show(json.loads(options.file.read_text()))))
        return 0
    with_samples = options.command[:1] == ["--samples"]
    run_command(options.file.absolute(), options.command[with_samples:], with_samples=with_samples)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
