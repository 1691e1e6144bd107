"""What the host adds to a step: wall time of training steps against back-to-back replay of the step's own CUDA graph.

    python -m benchmarks.replay worksheet1 [--n 1000]   # seconds on one H200; resnet20 as well

Three things of one training on one device: the wall time of an epoch's steps on record (instruments and mirror on); the
idle time between two replays while it trains, by CUDA events around each; and the same graph replayed back to back.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common import Missing, Result, command, parser_of

NETWORKS: dict[str, dict[str, Any]] = {
    "worksheet1": {"experiment": "worksheet1", "batch_size": 128},
    "resnet20": {"experiment": "resnet20", "batch_size": 512, "lr": 0.2},
}
BLOCKS = 10  # that the back-to-back replays are timed in
PLAIN_EPOCHS = 4  # the first one left out


@contextlib.contextmanager
def held() -> Iterator[list[Any]]:
    """The trainer's step runners, as `cifar.training.run` takes them while it lasts.

    Each has `graphs` ((with_probes, skip_frozen) -> a captured step with `replay()`) and `trials`. A trial's `step_index` is
    the epoch's next step, on the device, and `steps_per_epoch` the steps of an epoch. Raises Missing where nothing is captured.
    """
    try:
        from cifar.training import run
    except ImportError:
        raise Missing("no step is captured as a CUDA graph here") from None
    found: list[Any] = []
    original = run.get_step_runner

    def keep_step_runner(*arguments: Any, **more: Any) -> Any:
        found.append(original(*arguments, **more))
        return found[-1]

    run.get_step_runner = keep_step_runner
    try:
        yield found
    finally:
        run.get_step_runner = original


class Recorded:
    """A captured step with CUDA events before and after each replay."""

    def __init__(self, graph: Any, events: list[tuple[Any, Any]]) -> None:
        self.graph, self.events = graph, events

    def replay(self) -> None:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        self.events.append((begin, end))


def busy_and_idle(events: list[tuple[Any, Any]], per_epoch: int) -> tuple[list[float], list[float]]:
    """Microseconds in each replay, and between each two of one epoch."""
    busy = [1e3 * begin.elapsed_time(end) for begin, end in events]
    idle = [1e3 * a[1].elapsed_time(b[0]) for i, (a, b) in enumerate(itertools.pairwise(events), 1) if i % per_epoch]
    return busy, idle


def back_to_back(steps: Any, count: int) -> list[float]:
    """Microseconds a replay of the bare step, in blocks, nothing between two replays."""
    import torch

    training = steps.trials[0]
    block = min(training.steps_per_epoch, -(-count // BLOCKS))  # an epoch has batches for so many
    micros = []
    for _ in range(-(-count // block)):
        training.step_index.zero_()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(block):
            steps.graphs[False, False].replay()
        end.record()
        torch.cuda.synchronize()
        micros.append(1e3 * begin.elapsed_time(end) / block)
    return micros


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    if result.about["device_type"] != "cuda":
        raise Missing("a step is captured on CUDA devices only")
    events: list[tuple[Any, Any]] = []
    wall: list[float] = []
    per_epoch = 50_000 // NETWORKS[options.kind]["batch_size"]
    with Ours(options, result) as ours, held() as found:

        def after(row: dict[str, Any]) -> None:
            steps = found[-1]
            if not steps.graphs:
                raise Missing(f"no step was captured: {steps.capture_error}")
            if 1 < row["epoch"] <= PLAIN_EPOCHS:
                wall.append(1e6 * row["system/seconds"] / per_epoch)
            if row["epoch"] == PLAIN_EPOCHS:
                steps.graphs = {kind: Recorded(graph, events) for kind, graph in steps.graphs.items()}

        epochs = PLAIN_EPOCHS + -(-options.n // per_epoch)
        ours.train({**NETWORKS[options.kind], "epochs": epochs, "test": "never"}, on_epoch=after)
        steps = found[-1]
        steps.graphs = {kind: recorded.graph for kind, recorded in steps.graphs.items()}
        busy, idle = busy_and_idle(events, per_epoch)
        replayed = back_to_back(steps, options.n)
    name = f"{options.kind}, batch {NETWORKS[options.kind]['batch_size']}"
    step = result.add("ours", "a training step, wall clock", "µs", wall, steps=len(wall) * per_epoch)
    alone = result.add("its graph back to back", "a replay", "µs", replayed, replays=options.n)
    result.add("ours", "busy in a replay while training", "µs", busy)
    share = 100 * sum(idle) / (sum(idle) + sum(busy))
    quiet = result.add("ours", "idle between replays", "%", [share], replays=len(busy))
    result.claim(f"{name}: a training step / back-to-back replay of its graph", step, alone, inverse=True, at_most=1.1)
    result.claim(f"{name}: idle between replays", quiet, at_most=5.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("replay", __doc__, n=1000, what_n="replays")
    parser.add_argument("kind", choices=list(NETWORKS))
    return command(parser, "worksheet1=10,resnet20=10", measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
