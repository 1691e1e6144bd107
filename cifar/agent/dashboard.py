"""What is to be seen of a sweep while it runs, and the plain way to show it. The live table is cifar/live.py."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cifar.report.load import STAND_IN
from cifar.sweeps import spec as sweeps
from cifar.sweeps.backend import Backend
from cifar.sweeps.objectives import Metric, front, whole
from cifar.tracking.run_dir import OPEN_STATES

OPEN = ("waiting", *OPEN_STATES)


@dataclass
class Row:
    """A trial of this agent, as it is shown."""

    cell: int
    name: str
    state: str = "starting"
    epoch: int = 0
    epochs: int = 0
    fraction: float = 0.0
    value: float | None = None
    images_per_second: float = 0.0
    seconds: float = 0.0


@dataclass
class Board:
    """What is to be seen of a sweep while it runs."""

    title: str
    metric: str
    rows: dict[int, Row] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    best: str = ""
    begun: float = field(default_factory=time.monotonic)
    ended_before: int = 0  # cells that were done when we came

    def progress(self) -> float:
        """Cells done, with the running ones' shares."""
        done = sum(n for state, n in self.counts.items() if state not in OPEN)
        return done + sum(row.fraction for row in self.rows.values() if row.state == "running")

    def seconds_left(self) -> float | None:
        """At the pace up to now; None before there is one."""
        made = self.progress() - self.ended_before
        left = sum(self.counts.values()) - self.progress()
        return (time.monotonic() - self.begun) * left / made if made > 0.02 else None


@dataclass
class Best:
    """The best trial that has finished, and of several objectives how many are on the front."""

    metrics: Sequence[Metric]
    metric: Metric  # the one that is shown
    value: float | None = None
    text: str = ""
    points: list[list[float]] = field(default_factory=list)

    def of(self, value: float | None, objectives: Sequence[float | None], by: str) -> str:
        """What there is to say once `by` has finished with these."""
        if value is not None and (self.value is None or self.metric.worse(value) < self.metric.worse(self.value)):
            self.value, self.text = value, f"{self.metric.name} {shown(value, self.metric.name)} by {by}"
        if len(self.metrics) == 1:
            return self.text
        if point := whole(objectives):
            self.points.append(point)
        names = " and ".join(metric.name for metric in self.metrics)
        return f"{self.text}; {len(front(self.metrics, self.points))} of {len(self.points)} on the front of {names}"


class Display(Protocol):
    """Where the board goes: cifar/live.py draws it."""

    def say(self, text: str) -> None: ...
    def show(self, board: Board) -> None: ...
    def end(self) -> None: ...


class Lines:
    """A plain line for each piece of news."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(self, board: Board) -> None: ...
    def end(self) -> None: ...


def shown(value: float | None, metric: str) -> str:
    """An accuracy in percent, anything else as it is."""
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if metric.endswith("/acc") else f"{value:.4g}"


def greeting(backend: Backend, counts: Mapping[str, int], workers: int, threads: int) -> Iterator[str]:
    """What an agent says at its start."""
    info, waiting = backend.info, sum(counts.get(state, 0) for state in OPEN)
    yield (
        f"sweep {backend.id} ({backend.sweep.name}): {info['cells']} trials, {waiting} open; dataset {info['dataset']}; "
        f"{workers} worker{'s' * (workers > 1)}, {threads} CPU thread{'s' * (threads > 1)} a trial"
    )
    if backend.afar:
        yield (
            "a trial that another agent left goes on from its checkpoint where both share the runs folder "
            f"({backend.runs}), else from the start"
        )
    if info["dataset"] == "stand-in":
        yield STAND_IN
    if early := backend.sweep.early:
        # a search has no cells yet: what it may suggest first stands for all of them
        planned = [cell["values"] for cell in backend.cells()] or [sweeps.suggest(backend.sweep, 0, info["sweep_seed"])]
        rungs = early.rungs(max(sweeps.bind(values, info["fixed"]).epochs for values in planned))
        shown = ", ".join(map(str, rungs)) or "none: its runs are too short"
        yield f"early termination (hyperband, eta {early.eta:g}): after epochs {shown}"
