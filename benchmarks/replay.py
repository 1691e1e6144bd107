"""What the host adds to a step: wall time of training steps against back-to-back replay of the step's own CUDA graph.

    python -m benchmarks.replay worksheet1 [--n 1000]   # seconds on one H200; resnet20 as well

Three things of one training on one device: the wall time of an epoch's steps on record (instruments and mirror on); the
idle time between two replays while it trains, by CUDA events around each; and the same graph replayed back to back.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common import Missing, Result, command, parser_of

NETWORKS: dict[str, dict[str, Any]] = {
    "worksheet1": {"experiment": "worksheet1", "batch_size": 128},
    "resnet20": {"experiment": "resnet20", "batch_size": 512, "lr": 0.4},
}
BLOCKS = 10  # that the back-to-back replays are timed in
PLAIN_EPOCHS = 4  # the first one left out


def graphs(training: Any) -> list[Any]:
    """The one place that knows where the trainer keeps its captured steps: the bare one first, then the watched one.

    Each has `replay()`, which enqueues one step. Raises Missing where nothing is captured.
    """
    stepper = getattr(training, "stepper", None)
    found = [getattr(stepper, name, None) for name in ("bare", "watched")]
    if not hasattr(found[0], "replay"):
        raise Missing("no step is captured as a CUDA graph here")
    return [graph for graph in found if hasattr(graph, "replay")]


@contextlib.contextmanager
def held() -> Iterator[list[Any]]:
    """The `Training` objects that runs make while it lasts."""
    from cifar import run

    made: list[Any] = []
    original = run.Training

    class Held(original):  # type: ignore[misc,valid-type]
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            made.append(self)

    run.Training = Held  # type: ignore[misc]
    try:
        yield made
    finally:
        run.Training = original  # type: ignore[misc]


class Recorder:
    """CUDA events around every replay, the device's own clock."""

    def __init__(self, captured: list[Any]) -> None:
        self.captured, self.events = captured, list[tuple[Any, Any]]()

    def __enter__(self) -> Recorder:
        for graph in self.captured:
            graph.replay = self._recorded(graph.replay)
        return self

    def __exit__(self, *_: object) -> None:
        for graph in self.captured:
            del graph.replay  # the class's own is back

    def _recorded(self, replay: Any) -> Any:
        import torch

        def recorded() -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            self.events.append((begin, end))

        return recorded

    def read(self) -> tuple[list[float], list[float]]:
        """Microseconds busy in each replay, and idle between each two."""
        busy = [1e3 * begin.elapsed_time(end) for begin, end in self.events]
        idle = [1e3 * a[1].elapsed_time(b[0]) for a, b in zip(self.events, self.events[1:], strict=False)]
        return busy, idle


def back_to_back(graph: Any, count: int) -> list[float]:
    """Microseconds a replay, in blocks, nothing between two replays."""
    import torch

    per_block = -(-count // BLOCKS)
    micros = []
    for _ in range(BLOCKS):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(per_block):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        micros.append(1e3 * begin.elapsed_time(end) / per_block)
    return micros


def measure(result: Result, options: argparse.Namespace) -> None:
    from benchmarks.ours import Ours

    recorder: Recorder | None = None
    wall: list[float] = []
    with Ours(options, result) as ours, held() as made, contextlib.ExitStack() as stack:

        def after(row: dict[str, Any]) -> None:
            nonlocal recorder
            if 1 < row["epoch"] <= PLAIN_EPOCHS:
                wall.append(1e6 * row["system/seconds"] / (row["step"] / row["epoch"]))
            if row["epoch"] == PLAIN_EPOCHS:
                recorder = stack.enter_context(Recorder(graphs(made[-1])))

        steps = 50_000 // NETWORKS[options.kind]["batch_size"]
        epochs = PLAIN_EPOCHS + -(-options.n // steps)
        values = {**NETWORKS[options.kind], "epochs": epochs, "test": "never"}
        ours.train(values, on_epoch=after)
        if recorder is None:
            raise Missing("no step is captured as a CUDA graph here")
        busy, idle = recorder.read()
        stack.close()
        replayed = back_to_back(graphs(made[-1])[0], options.n)
    name = f"{options.kind}, batch {NETWORKS[options.kind]['batch_size']}"
    step = result.add("ours", "a training step, wall clock", "µs", wall, steps=len(wall) * steps)
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
