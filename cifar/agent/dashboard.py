"""What an agent shows of its sweep, and a display of plain lines. The live table is in rich_dashboard.py."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cifar.errors import name_program
from cifar.states import OPEN_TRIAL_STATES
from cifar.sweeps import spec
from cifar.sweeps.backend import Backend
from cifar.sweeps.early_stopping import Hyperband
from cifar.sweeps.objectives import TEST_ACCURACY, Metric, finite_or_none, pareto_front
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
    run_id: str = ""
    trial_name: str = ""
    points: list[list[float]] = field(default_factory=list)

    def add_trial(self, value: float | None, objectives: Sequence[float | None], trial_name: str) -> str:
        """Take a finished trial into account -> the text to display."""
        if self._take_values(value, objectives):
            self.trial_name = trial_name
        return self.describe()

    def add_cell(self, cell: Mapping[str, Any], swept_keys: Sequence[str]) -> None:
        """Take a finished cell into account."""
        if self._take_values(cell["value"], cell["objectives"]):
            self.run_id = str(cell["run_id"])
            self.trial_name = f"{self.run_id} ({name_trial(cell['values'], swept_keys)})"

    def _take_values(self, value: float | None, objectives: Sequence[float | None]) -> bool:
        """Whether they are the best so far."""
        if len(self.metrics) > 1 and (point := finite_or_none(objectives)):
            self.points.append(point)
        if value is None or not math.isfinite(value) or self.metric.name == TEST_ACCURACY:  # nothing is chosen by the test set
            return False
        if self.value is not None and self.metric.as_cost(value) >= self.metric.as_cost(self.value):
            return False
        self.value = value
        return True

    def describe(self) -> str:
        """The text to display; "" if no trial has finished."""
        best = f"{self.metric.name} {format_metric(self.value, self.metric.name)} by {self.trial_name}"
        text = "" if self.value is None else best
        if len(self.metrics) == 1 or not self.points:
            return text
        names = " and ".join(metric.name for metric in self.metrics)
        return f"{text}; {len(pareto_front(self.metrics, self.points))} of {len(self.points)} on the front of {names}"


def find_best_trial(sweep: Sweep, cells: Iterable[Mapping[str, Any]], swept_keys: Sequence[str]) -> BestTrial:
    """The best of a sweep's cells that have finished, whichever agent has trained them."""
    best = BestTrial(sweep.metrics, sweep.metric)
    for cell in cells:
        if cell["state"] == "finished":
            best.add_cell(cell, swept_keys)
    return best


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
        from cifar.report.load import STAND_IN_BANNER  # the page's modules take a quarter of a second

        yield STAND_IN_BANNER
    if gone := backend.list_cells_without_folder():
        yield f"{describe_lost_folders(gone, 'the trials that have ended')}; {advise_on_lost_folders(gone, backend.id)}"
    if backend.sweep.early_stopping:
        planned = [cell["values"] for cell in backend.list_cells()]
        if not planned:  # a search has no cells yet: a sampled trial stands for all of them
            planned = [spec.sample_trial(backend.sweep, 0, info["sweep_seed"])]
        yield describe_early_stopping(backend.sweep.early_stopping, spec.list_epochs(planned, info["fixed"]))


def describe_early_stopping(early_stopping: Hyperband, epochs: Collection[int]) -> str:
    """After which epochs trials are judged. `epochs`: how long they are."""
    by_length = {length: early_stopping.rung_epochs(length) for length in sorted(epochs)}
    rungs = ", ".join(map(str, by_length[max(by_length)])) or "none: its runs are too short"
    too_short = [str(length) for length, found in by_length.items() if not found]
    some = f"; trials of {' or '.join(too_short)} epochs are too short" if 0 < len(too_short) < len(by_length) else ""
    return f"early termination (hyperband, eta {early_stopping.eta:g}): after epochs {rungs}{some}"


def describe_lost_folders(cells: Sequence[Mapping[str, Any]], whole: str = "them") -> str:
    """Which trials have ended and have no run folder any more: "1 of them has no folder: 3k9x2m1p-001"."""
    listed = ", ".join(cell["run_id"] for cell in cells[:6]) + (f" and {len(cells) - 6} more" if len(cells) > 6 else "")
    return f"{len(cells)} of {whole} {'has' if len(cells) == 1 else 'have'} no folder: {listed}"


def advise_on_lost_folders(cells: Sequence[Mapping[str, Any]], sweep_id: str) -> str:
    """What to do about trials without a run folder."""
    it = "it" if len(cells) == 1 else "them"
    return f"if moved away, move {it} back, else have {it} trained again: python -m cifar sweeps retry {sweep_id}"


def describe_counts(counts: Mapping[str, int]) -> str:
    """A sweep's trials by state, as an agent says them at its end, when it runs none any more."""
    words = {"running": "running elsewhere", "pruned": "pruned by early termination"}
    return ", ".join(f"{n} {words.get(state, state)}" for state, n in counts.items())


def name_trial(values: Mapping[str, Any], swept_keys: Sequence[str]) -> str:
    """A trial by its swept values, or by its model where nothing is swept."""
    return spec.format_trial_name(values, swept_keys) or str(values.get("model", "default model"))
