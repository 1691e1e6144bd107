"""Runs -> points: averages over seeds, marks the Pareto front, and lists what cannot be compared with the reason."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from cifar.config.schema import Settings
from cifar.errors import UserError
from cifar.report import stats
from cifar.report.config_columns import (
    OBSERVING_KEYS,
    count_labels,
    describe_config,
    drop_needless,
    format_label,
    format_part,
    has_several,
    join_parts,
    list_columns,
    shorten_labels,
)
from cifar.report.formatting import format_percent, format_value, pluralize
from cifar.report.load import SPLIT_NAMES, ExcludedRun, Run, find_banner, training_caveats
from cifar.states import ENDED_STATES
from cifar.system.amounts import format_joules, format_latency

# The report always lists these settings. Of the others it lists those that are not the default, and of the keys of networks,
# optimizers and schedules those that are on (not 0, False or empty).
_ALWAYS_LISTED = ("epochs", "optimizer", "lr", "schedule", "batch_size")
# These settings say how a run is carried out or observed, or the report says them elsewhere.
_NEVER_LISTED = OBSERVING_KEYS | {"dataset", "device", "threads", "seed"}

# With two seeds Student's t is 12.7: an interval of 40 points says less than the two accuracies, which are shown instead.
MIN_SEEDS_OF_INTERVAL = 3


@dataclass(frozen=True)
class MeasuredCost:
    """A column of a report: its name in summary.json, its heading, and how a value is written."""

    name: str
    heading: str
    format_value: Callable[[float | None], str]


_MEASURED_COSTS = (
    MeasuredCost("joules", "energy a run", format_joules),
    MeasuredCost("latency_seconds", "latency", format_latency),
)


@dataclass(frozen=True)
class Point:
    """Runs that differ in their seed only. `macs` counts all views of an image; accuracies are fractions."""

    label: str
    values: dict[str, Any]
    runs: tuple[Run, ...]
    macs: float
    params: int
    num_views: int
    accuracies: tuple[float, ...]
    mean: float
    ci_half_width: float | None  # of the 95 % Student-t interval of the mean over seeds; None for fewer than three seeds
    on_front: bool = False
    num_lost: int = 0  # seeds that ended without a result: diverged, pruned, failed, ...

    @property
    def num_seeds(self) -> int:
        return len(self.runs)

    @property
    def num_seeds_text(self) -> str:
        return f"{self.num_seeds} of {self.num_seeds + self.num_lost}" if self.num_lost else str(self.num_seeds)

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.accuracies) if self.num_seeds > 1 else None

    @property
    def model(self) -> str:
        return self.runs[0].model

    @property
    def network_name(self) -> str:
        return self.model + (f" ({self.num_views} views)" if self.num_views > 1 else "")

    @property
    def seconds(self) -> float | None:
        """Mean training time of the runs that recorded one."""
        known = [run.seconds for run in self.runs if run.seconds is not None]
        return statistics.fmean(known) if known else None

    def mean_cost(self, name: str) -> float | None:
        """The mean of a cost (`Run.cost`) over the runs that have it."""
        known = [cost for run in self.runs if (cost := run.cost(name)) is not None]
        return statistics.fmean(known) if known else None

    @property
    def pack_size(self) -> int:
        """The most runs that were trained side by side with one of these, itself included."""
        return max(run.pack_size for run in self.runs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean, cut at 0 and 1, which no accuracy passes. None for fewer than three seeds."""
        if self.ci_half_width is None:
            return None
        return max(0.0, self.mean - self.ci_half_width), min(1.0, self.mean + self.ci_half_width)

    @property
    def seed_accuracies(self) -> tuple[float, ...]:
        """The accuracies that are shown in place of an interval: both, with two seeds."""
        return self.accuracies if self.num_seeds == 2 else ()

    @property
    def interval_text(self) -> str:
        """For a column headed "± 95 %": half the interval's width, both sides of one that is cut, or both accuracies."""
        if self.seed_accuracies:
            return ", ".join(map(format_percent, self.seed_accuracies))
        if self.interval is None or self.ci_half_width is None:
            return format_percent(None)
        below, above = self.mean - self.interval[0], self.interval[1] - self.mean
        if self.ci_half_width - min(below, above) < 0.0005:  # not to be seen
            return format_percent(self.ci_half_width)
        return f"-{format_percent(below)} +{format_percent(above)}"

    @property
    def accuracy_text(self) -> str:
        both = f": {self.interval_text}" if self.seed_accuracies else ""
        sign = "" if self.interval_text.startswith("-") else "± "
        interval = f" {sign}{self.interval_text}" if self.interval else ""
        return f"{100 * self.mean:.1f}{interval} % (n = {self.num_seeds_text}{both})"

    # Old names, for plug-ins.
    n, n_text = num_seeds, num_seeds_text

    half, lost = property(attrgetter("ci_half_width")), property(attrgetter("num_lost"))
    views = property(attrgetter("num_views"))


@dataclass(frozen=True)
class Comparison:
    """What the figures and tables of a report are made from. Points are sorted by MACs."""

    points: tuple[Point, ...]
    excluded: tuple[ExcludedRun, ...] = ()
    distinguishing_keys: tuple[str, ...] = ()  # the configuration keys by which the points differ
    split: str = "val"
    budget: float | None = None
    title: str = ""
    banner: str = ""
    has_scores: bool = True  # False if the split is test and no run has scored it
    num_test_only: int = 0  # runs that the validation split lacks, and the test split has
    cost_unit: str = "macs"  # of the axis: "macs", or "flops", which are twice as many

    @property
    def cost_factor(self) -> int:
        """What MACs are multiplied by on the axis."""
        return 2 if self.cost_unit == "flops" else 1

    @property
    def cost_column(self) -> str:
        """The heading of a column of costs in millions."""
        return "MFLOPs" if self.cost_unit == "flops" else "MMACs"

    @property
    def accuracy_label(self) -> str:
        return f"{SPLIT_NAMES[self.split]} accuracy, last epoch"

    @property
    def subtitle(self) -> str:
        size = f"{pluralize(len(self.points), 'point')} from {pluralize(len(self.runs), 'run')}"
        return " · ".join([self.title, *training_caveats(run.config for run in self.runs), self.accuracy_label, size])

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs that the points are made of, each once."""
        return tuple({run.id: run for point in self.points for run in point.runs}.values())

    @cached_property
    def shared_config(self) -> dict[str, Any]:
        """The configuration keys other than the seed that have the same value in all of these runs."""
        columns = list_columns([run.config for run in self.runs])
        first = self.runs[0].config if self.runs else {}
        return {
            key: value
            for key, value in first.items()
            if key != "seed"
            and all(other == value for other in columns[key])
            and (value is not None or all(key in run.config for run in self.runs))
        }

    @cached_property
    def setting_keys(self) -> tuple[str, ...]:
        """The distinguishing keys without those that say how a run was carried out or observed, where no sweep varies them."""
        swept = {key for run in self.runs for key in run.swept_keys}
        return tuple(key for key in self.distinguishing_keys if key in swept or key not in _NEVER_LISTED)

    @property
    def differing_keys(self) -> list[str]:
        """The settings in which the points differ, other than `distinguishing_keys`. Keys of a network do not count."""
        keys = dict.fromkeys((*_ALWAYS_LISTED, *Settings.model_fields))
        named = (*self.shared_config, *self.distinguishing_keys, *_NEVER_LISTED)
        return [key for key in keys if key not in named and any(key in run.config for run in self.runs)]

    @cached_property
    def measured_costs(self) -> list[MeasuredCost]:
        """The costs that only some runs have been measured for, if one of these has been."""
        return [each for each in _MEASURED_COSTS if any(run.cost(each.name) is not None for run in self.runs)]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for run in self.runs if isinstance(seed := run.config.get("seed"), int)})

    @cached_property
    def front(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.on_front)

    @cached_property
    def configurations(self) -> tuple[Point, ...]:
        """Each configuration once, even if it was scored with one view and with several views."""
        return tuple({point.runs[0].id: point for point in reversed(self.points)}.values())[::-1]

    @property
    def best(self) -> Point | None:
        """The most accurate single-view point within the budget."""
        fitting = [point for point in self.front if self.budget is None or point.macs <= self.budget]
        return fitting[-1] if fitting else None

    @property
    def macs_rank_correlation(self) -> float | None:
        single_view = [point for point in self.points if point.num_views == 1]
        return stats.rank_correlation([point.macs for point in single_view], [point.mean for point in single_view])

    # Old names, for plug-ins.
    axis, differing, correlation = accuracy_label, differing_keys, macs_rank_correlation
    shared, apart = property(attrgetter("shared_config")), property(attrgetter("excluded"))
    keys, tested = property(attrgetter("distinguishing_keys")), property(attrgetter("has_scores"))


def compare_runs(
    runs: Iterable[Run],
    *,
    split: str = "val",
    budget: float | None = None,
    title: str = "",
    damaged: Sequence[ExcludedRun] = (),
    cost_unit: str = "macs",
) -> Comparison:
    """Combine runs that differ in their seed into points, and exclude runs that cannot be compared with the others."""
    if cost_unit not in ("macs", "flops"):
        raise UserError(f"--x {cost_unit}: choose macs or flops")
    if split not in SPLIT_NAMES:
        raise UserError(f"--split {split}: choose val or test")
    runs = sorted(runs, key=lambda run: (run.created, _seed_order(run), run.id))
    finished = [run for run in runs if run.state == "finished"]
    kinds = Counter((run.dataset, run.official) for run in finished or runs)
    # The dataset of most runs is the one that is reported; the official CIFAR-10 wins a draw.
    majority = max(kinds, key=lambda kind: (kinds[kind], kind == ("cifar10", True)), default=("cifar10", True))
    excluded = list(damaged)
    groups: dict[Any, dict[Any, Run]] = {}
    lost_seeds: dict[Any, set[Any]] = {}  # group -> seeds that ended without a result
    for run in runs:
        why = _exclusion_reason(run, split, majority)
        name = describe_config(run.config, run.swept_keys)
        seed = run.config.get("seed")
        if why:
            excluded.append(ExcludedRun(run.id, run.name, *why))
            if why[0] == run.state and run.state in ENDED_STATES:
                lost_seeds.setdefault(name, set()).add(seed)
            continue
        group = groups.setdefault(name, {})
        if seed in group:  # a repeated seed is no further sample; the newest run counts
            old = group[seed]
            excluded.append(ExcludedRun(old.id, old.name, "repeated", f"same configuration and seed as the newer {run.id}"))
        group[seed] = run
    points = [
        replace(point, num_lost=len(lost_seeds[name] - set(group))) if name in lost_seeds else point
        for name, group in groups.items()
        for point in _make_points(group.values(), split)
    ]
    points = _label_points(points)
    points.sort(key=lambda point: (point.macs, -point.mean, point.label))
    single_view = [point for point in points if point.num_views == 1]
    front = stats.pareto_front([point.macs for point in single_view], [point.mean for point in single_view])
    front_ids = {id(single_view[i]) for i in front}
    return Comparison(
        points=tuple(replace(point, on_front=True) if id(point) in front_ids else point for point in points),
        excluded=tuple(excluded),
        distinguishing_keys=tuple(points[0].values) if points else (),
        split=split,
        budget=budget,
        title=title,
        banner=find_banner(*majority) if runs else "",
        has_scores=split == "val" or any(run.accuracies_by_views(split) for run in runs),
        cost_unit=cost_unit,
        num_test_only=sum(
            split == "val" and run.accuracy("val") is None and bool(run.accuracies_by_views("test")) for run in runs
        ),
    )


def _seed_order(run: Run) -> float:
    seed = run.config.get("seed")
    return float(seed) if isinstance(seed, int | float) else 0.0


def describe_settings(comparison: Comparison) -> str:
    """The settings that all points share and that matter: "epochs 5, optimizer sgd, lr 0.1, ..., seeds 0, 1, 2"."""
    shared = {key: value for key, value in comparison.shared_config.items() if key not in _NEVER_LISTED}
    default = {name: field.default for name, field in Settings.model_fields.items()}
    listed_keys = [key for key in _ALWAYS_LISTED if key in shared]
    listed_keys += [
        key for key, value in shared.items() if key not in listed_keys and (value != default[key] if key in default else value)
    ]
    texts = [f"{key} {format_value(shared[key])}" for key in listed_keys]
    seeds = comparison.seeds
    if seeds:
        is_range = len(seeds) > 2 and seeds == [*range(seeds[0], seeds[-1] + 1)]
        listed = f"{seeds[0]} to {seeds[-1]}" if is_range else ", ".join(map(str, seeds))
        texts.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {listed}")
    return ", ".join(texts)


def _exclusion_reason(run: Run, split: str, majority: tuple[str, bool]) -> tuple[str, str] | None:
    """(kind, reason), or None if the run can be compared. `majority`: (dataset, official) of most runs."""
    if (run.dataset, run.official) != majority:
        return "other data", f"on {run.banner or 'the official CIFAR-10'}, unlike most of these runs"
    if run.state != "finished":
        seen = run.accuracy("val")
        so_far = f"epoch {run.epoch} of {run.epochs}" + (
            f", validation accuracy {100 * seen:.1f} %" if seen is not None else ""
        )
        return run.state, run.reason or so_far
    if not run.verified:
        return "unverified MACs", run.cost_note or "two counters disagree on its MACs"
    if run.accuracy(split) is None:
        return (
            f"no {SPLIT_NAMES[split]} accuracy",
            "trained without a validation cut" if split == "val" else "its test set was not scored",
        )
    return None


def _make_points(runs: Iterable[Run], split: str) -> list[Point]:
    """Runs of one configuration -> a point for each number of views that they were scored with."""
    by_views: dict[int, list[tuple[Run, float]]] = {}
    for run in runs:
        for views, accuracy in run.accuracies_by_views(split).items():
            by_views.setdefault(views, []).append((run, accuracy))
    points = []
    for views, scored in by_views.items():
        members, accuracies = zip(*scored, strict=True)
        first = members[0]
        mean, half = stats.mean_interval(accuracies)
        half = half if len(accuracies) >= MIN_SEEDS_OF_INTERVAL else None
        points.append(Point("", {}, members, first.macs * views, first.params, views, accuracies, mean, half))
    return points


def _label_points(points: list[Point]) -> list[Point]:
    """Label each point by the fewest keys that make all labels different. Swept keys are preferred."""
    swept = list(dict.fromkeys(key for point in points for run in point.runs for key in run.swept_keys))
    configs = [point.runs[0].config for point in points]
    columns_of_all = list_columns(configs)
    every = dict.fromkeys(["model", *swept, *columns_of_all])
    differing = [key for key in every if key != "seed" and has_several(columns_of_all.get(key, ()))]
    parts = {key: [format_part(key, value) for value in columns_of_all[key]] for key in differing}
    settings = [key for key in differing if key in swept or key not in _NEVER_LISTED]
    others = [key for key in differing if key not in settings]
    needed = drop_needless(settings, ["model"], parts)  # whatever the others tell apart
    needed = drop_needless([*needed, *others], needed, parts)
    num_different = count_labels(parts, differing)
    columns = ["model", *(key for key in (*settings, *others) if key != "model" and (key in needed or key in swept))]
    # In a sweep of several networks a key may be swept for some of them only. For the others it has its default value, which
    # need not be in the label. But a sweep that was extended may vary a key that earlier runs had fixed.
    is_noted = any(run.sweep_keys for point in points for run in point.runs)
    swept_keys = set(swept) - {"model"}

    def leave_out_others(point: Point, config: dict[str, Any]) -> dict[str, Any]:
        others = swept_keys.difference(*(run.swept_keys for run in point.runs))
        if is_noted:
            others &= {key for run in point.runs for key in run.sweep_keys}
        return {key: value for key, value in config.items() if key not in others} if others else config

    own_configs = list(map(leave_out_others, points, configs))
    whole = join_parts(parts, needed) or [""] * len(points)
    labels = [
        label if own is config else format_label(own, needed)
        for own, config, label in zip(own_configs, configs, whole, strict=True)
    ]
    if len(set(labels)) < num_different:
        own_configs, labels = configs, whole
    own_swept = [frozenset(key for run in point.runs for key in run.swept_keys) for point in points]
    labels = shorten_labels(labels, own_configs, needed, own_swept, observed=_NEVER_LISTED)
    labelled = []
    for point, config, label in zip(points, own_configs, labels, strict=True):
        label = label or point.model
        label += f" ({point.num_views} views)" if point.num_views > 1 else ""
        labelled.append(replace(point, label=label, values={key: config.get(key) for key in columns}))
    return labelled
