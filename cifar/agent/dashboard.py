"""What an agent shows of its sweep, and a display of plain lines. The live table is in rich_dashboard.py."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cifar.errors import name_program
from cifar.report.load import STAND_IN_BANNER
from cifar.states import OPEN_TRIAL_STATES
from cifar.sweeps import spec
from cifar.sweeps.backend import Backend
from cifar.sweeps.objectives import Metric, finite_or_none, pareto_front
from cifar.sweeps.spec import Sweep
from cifar.system.names import escape_controls
from cifar.system.redact import redact


@dataclass
class Row:
    """A trial of this agent, as it is displayed."""

    cell: int
    name: str
    state: str = "starting"
    epoch: int = 0
    epochs: int = 0
    fraction: float = 0.0
    value: float | None = None
    images_per_second: float = 0.0
    seconds: float = 0.0  # that it took; 0 while it runs
    values: Mapping[str, str] = field(default_factory=dict)  # of the swept keys


@dataclass
class Board:
    """What is displayed of a sweep while it runs."""

    title: str
    metric: str
    rows: dict[int, Row] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    best: str = ""
    best_run: str = ""  # its id
    start_time: float = field(default_factory=time.monotonic)
    num_done_before: int = 0  # cells that had ended when this agent started

    def num_cells_done(self) -> float:
        """Cells that have ended, plus the fractions of those that this agent is training."""
        done = sum(n for state, n in self.counts.items() if state not in OPEN_TRIAL_STATES)
        return done + sum(row.fraction for row in self.rows.values() if row.state == "running")

    def seconds_left(self) -> float | None:
        """An estimate from the pace up to now; None while too little is done."""
        num_done = self.num_cells_done() - self.num_done_before
        num_left = sum(self.counts.values()) - self.num_cells_done()
        return (time.monotonic() - self.start_time) * num_left / num_done if num_done > 0.02 else None


@dataclass
class BestTrial:
    """The best finished trial, and with several objectives the number of trials on the Pareto front."""

    metrics: Sequence[Metric]
    metric: Metric  # the one that is displayed
    value: float | None = None
    text: str = ""
    points: list[list[float]] = field(default_factory=list)

    def add_trial(self, value: float | None, objectives: Sequence[float | None], trial_name: str) -> str:
        """Take a finished trial into account -> the text to display."""
        if value is not None and (self.value is None or self.metric.as_cost(value) < self.metric.as_cost(self.value)):
            self.value, self.text = value, f"{self.metric.name} {format_metric(value, self.metric.name)} by {trial_name}"
        if len(self.metrics) == 1:
            return self.text
        if point := finite_or_none(objectives):
            self.points.append(point)
        names = " and ".join(metric.name for metric in self.metrics)
        return f"{self.text}; {len(pareto_front(self.metrics, self.points))} of {len(self.points)} on the front of {names}"


class Dashboard(Protocol):
    """Where lines and the board are displayed."""

    def print_line(self, text: str) -> None: ...
    def print_epoch_line(self, text: str) -> None: ...  # what the board shows, too
    def show_board(self, board: Board) -> None: ...
    def close(self) -> None: ...


def clean_line(text: str) -> str:
    """A line as it may be displayed: it names this program, has no secrets, and nothing that a terminal would obey."""
    return escape_controls(redact(name_program(text)), keeps_lines=True)


class LineDashboard:
    """Prints lines; has no board."""

    def print_line(self, text: str) -> None:
        print(clean_line(text), flush=True)

    print_epoch_line = print_line

    def show_board(self, board: Board) -> None: ...
    def close(self) -> None: ...


def format_metric(value: float | None, metric: str) -> str:
    """An accuracy in percent, any other metric as it is."""
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if metric.endswith("/acc") else f"{value:.4g}"


def greeting_lines(backend: Backend, counts: Mapping[str, int], num_workers: int, threads: int) -> Iterator[str]:
    """What an agent prints at its start."""
    info, num_open = backend.info, sum(counts.get(state, 0) for state in OPEN_TRIAL_STATES)
    yield (
        f"sweep {backend.id} ({backend.sweep.name}): {info['cells']} trials, {num_open} open; dataset {info['dataset']}; "
        f"{num_workers} worker{'s' * (num_workers > 1)}, {threads} CPU thread{'s' * (threads > 1)} a trial"
    )
    if backend.shared_storage:
        yield (
            "a trial that another agent left goes on from its checkpoint where both share the runs folder "
            f"({backend.runs_dir}), else from the start"
        )
    if info["dataset"] == "stand-in":
        yield STAND_IN_BANNER
    if early_stopping := backend.sweep.early_stopping:
        planned = [cell["values"] for cell in backend.list_cells()]
        if not planned:  # a search has no cells yet: a sampled trial stands for all of them
            planned = [spec.sample_trial(backend.sweep, 0, info["sweep_seed"])]
        epochs = max(spec.resolve_trial(values, info["fixed"]).epochs for values in planned)
        rungs = ", ".join(map(str, early_stopping.rung_epochs(epochs))) or "none: its runs are too short"
        yield f"early termination (hyperband, eta {early_stopping.eta:g}): after epochs {rungs}"


def name_trial(values: Mapping[str, Any], sweep: Sweep) -> str:
    """A trial by its swept values, or by its model where the sweep sweeps nothing."""
    return spec.format_trial_name(values, sweep.swept_keys) or str(values.get("model", "default model"))
