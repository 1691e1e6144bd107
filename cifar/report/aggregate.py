"""Runs -> points: seeds folded, the front marked, and what cannot be compared set apart by name and with the reason."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cifar.config.resolve import Settings
from cifar.errors import UserError
from cifar.report import stats
from cifar.report.load import SPLITS, STAND_IN, UNOFFICIAL, Apart, Run, count, cuts, show
from cifar.tracking.run_dir import END_STATES

# said of every report, whatever their values; of the other settings those that are not the default,
# of the keys of networks, optimizers and schedules those that are on
_ALWAYS = ("epochs", "optimizer", "lr", "schedule", "batch_size")
# how a run is carried out and looked at, or said elsewhere
_PLUMBING = (
    "experiment", "dataset", "test", "probes", "probe_every", "checkpoint_every", "device", "threads", "max_macs", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Runs that differ in nothing but their seed. `macs` counts all views of an image."""

    label: str
    values: dict[str, Any]
    runs: tuple[Run, ...]
    macs: float
    params: int
    views: int
    accuracies: tuple[float, ...]
    mean: float
    half: float | None  # of the 95 % Student-t interval of the mean over seeds; None for one seed
    on_front: bool = False
    lost: int = 0  # seeds that came to an end without a result: diverged, pruned, failed, ...

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def n_text(self) -> str:
        return f"{self.n} of {self.n + self.lost}" if self.lost else str(self.n)

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.accuracies) if self.n > 1 else None

    @property
    def model(self) -> str:
        return self.runs[0].model

    @property
    def seconds(self) -> float | None:
        known = [run.seconds for run in self.runs if run.seconds is not None]
        return statistics.fmean(known) if known else None

    @property
    def accuracy_text(self) -> str:
        spread = f" ± {100 * self.half:.1f}" if self.half is not None else ""
        return f"{100 * self.mean:.1f}{spread} % (n = {self.n_text})"


@dataclass(frozen=True)
class Comparison:
    """What the figures and tables of a report are made from; points are sorted by MACs."""

    points: tuple[Point, ...]
    apart: tuple[Apart, ...] = ()
    keys: tuple[str, ...] = ()  # the configuration keys that tell the points apart
    split: str = "val"
    budget: float | None = None
    title: str = ""
    banner: str = ""
    tested: bool = True  # False: the split is test, and no run has scored it

    @property
    def axis(self) -> str:
        return f"{SPLITS[self.split]} accuracy, last epoch"

    @property
    def subtitle(self) -> str:
        size = f"{count(len(self.points), 'point')} from {count(len(self.runs), 'run')}"
        return " · ".join([self.title, *cuts(run.config for run in self.runs), self.axis, size])

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs that the points are made of, each once."""
        return tuple({run.id: run for point in self.points for run in point.runs}.values())

    @cached_property
    def shared(self) -> dict[str, Any]:
        """The configuration keys, other than the seed, that have one value in all of these runs."""
        first = self.runs[0].config if self.runs else {}
        return {k: v for k, v in first.items() if k != "seed" and all(k in r.config and r.config[k] == v for r in self.runs)}

    @property
    def differing(self) -> list[str]:
        """The settings that the points differ in beside those that tell them apart; keys of one network are its own."""
        keys = dict.fromkeys((*_ALWAYS, *Settings.model_fields))
        told = (*self.shared, *self.keys, *_PLUMBING)
        return [key for key in keys if key not in told and any(key in run.config for run in self.runs)]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for run in self.runs if isinstance(seed := run.config.get("seed"), int)})

    @cached_property
    def front(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.on_front)

    @cached_property
    def configurations(self) -> tuple[Point, ...]:
        """Each configuration once, though its test may be scored with one view and with several."""
        return tuple({point.runs[0].id: point for point in reversed(self.points)}.values())[::-1]

    @property
    def best(self) -> Point | None:
        """The most accurate single-view point within the budget."""
        fitting = [point for point in self.front if self.budget is None or point.macs <= self.budget]
        return fitting[-1] if fitting else None

    @property
    def correlation(self) -> float | None:
        single = [point for point in self.points if point.views == 1]
        return stats.rank_correlation([point.macs for point in single], [point.mean for point in single])


def compare(
    runs: Iterable[Run], *, split: str = "val", budget: float | None = None, title: str = "", damaged: Sequence[Apart] = ()
) -> Comparison:
    """Fold seeds into points; set apart what cannot stand in one table with the others."""
    if split not in SPLITS:
        raise UserError(f"--split {split}: choose val or test")
    runs = sorted(runs, key=lambda run: (run.created, run.id))
    finished = [run for run in runs if run.state == "finished"]
    kinds = Counter((run.dataset, run.official) for run in finished or runs)
    # most runs decide; the official CIFAR-10 wins a draw
    majority = max(kinds, key=lambda kind: (kinds[kind], kind == ("cifar10", True)), default=("cifar10", True))
    apart = list(damaged)
    groups: dict[str, dict[Any, Run]] = {}
    ended: dict[str, set[Any]] = {}  # group -> seeds that came to nothing
    for run in runs:
        why = _why_apart(run, split, majority)
        name = json.dumps({**run.config, "seed": None}, sort_keys=True, default=str)
        seed = run.config.get("seed")
        if why:
            apart.append(Apart(run.id, run.name, *why))
            if why[0] == run.state and run.state in END_STATES:
                ended.setdefault(name, set()).add(seed)
            continue
        group = groups.setdefault(name, {})
        if seed in group:  # a repeat of one seed tells nothing about seeds; the newest counts
            old = group[seed]
            apart.append(Apart(old.id, old.name, "repeated", f"same configuration and seed as the newer {run.id}"))
        group[seed] = run
    points = [
        replace(point, lost=len(ended.get(name, set()) - set(group)))
        for name, group in groups.items()
        for point in _points(group.values(), split)
    ]
    points = _label(points)
    points.sort(key=lambda point: (point.macs, -point.mean, point.label))
    single = [point for point in points if point.views == 1]
    best = {id(single[i]) for i in stats.front([p.macs for p in single], [p.mean for p in single])}
    banner = "" if majority == ("cifar10", True) else UNOFFICIAL if majority[0] == "cifar10" else STAND_IN
    return Comparison(
        points=tuple(replace(point, on_front=id(point) in best) for point in points),
        apart=tuple(apart),
        keys=tuple(points[0].values) if points else (),
        split=split,
        budget=budget,
        title=title,
        banner=banner if runs else "",
        tested=split == "val" or any(run.accuracies(split) for run in runs),
    )


def settings(comparison: Comparison) -> str:
    """What all points share, as far as it matters: "epochs 5, optimizer sgd, lr 0.1, ..., seeds 0, 1, 2"."""
    shared = {key: value for key, value in comparison.shared.items() if key not in _PLUMBING}
    default = {name: field.default for name, field in Settings.model_fields.items()}
    told = [key for key in _ALWAYS if key in shared]
    told += [key for key, value in shared.items() if key not in told and (value != default[key] if key in default else value)]
    texts = [f"{key} {show(shared[key])}" for key in told]
    seeds = comparison.seeds
    if seeds:
        run = len(seeds) > 2 and seeds == [*range(seeds[0], seeds[-1] + 1)]
        listed = f"{seeds[0]} to {seeds[-1]}" if run else ", ".join(map(str, seeds))
        texts.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {listed}")
    return ", ".join(texts)


def _why_apart(run: Run, split: str, majority: tuple[str, bool]) -> tuple[str, str] | None:
    """(kind, reason), or None for a run that is compared."""
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
            f"no {SPLITS[split]} accuracy",
            "trained without a validation cut" if split == "val" else "its test set was not scored",
        )
    return None


def _points(runs: Iterable[Run], split: str) -> list[Point]:
    """One point for each number of views that the seeds were scored with."""
    by_views: dict[int, list[tuple[Run, float]]] = {}
    for run in runs:
        for views, accuracy in run.accuracies(split).items():
            by_views.setdefault(views, []).append((run, accuracy))
    points = []
    for views, scored in by_views.items():
        members, accuracies = zip(*scored, strict=True)
        first = members[0]
        points.append(Point("", {}, members, first.macs * views, first.params, views, accuracies, *stats.interval(accuracies)))
    return points


def _label(points: list[Point]) -> list[Point]:
    """Name each point by the fewest keys that tell all of them apart; swept keys are kept before others."""
    swept = list(dict.fromkeys(key for point in points for run in point.runs for key in run.swept))
    every = dict.fromkeys(["model", *swept, *(key for point in points for key in point.runs[0].config)])
    configs = [point.runs[0].config for point in points]
    differing = [key for key in every if key != "seed" and len({json.dumps(c.get(key), default=str) for c in configs}) > 1]
    needed, different = list(differing), len({_text(config, differing) for config in configs})
    for key in reversed(differing):
        fewer = [other for other in needed if other != key]
        if key != "model" and len({_text(config, fewer) for config in configs}) == different:
            needed = fewer
    columns = ["model", *(key for key in differing if key != "model" and (key in needed or key in swept))]
    # In a sweep of several networks a key may be swept for some of them only; the others have it by default: no news.
    owned = [
        {k: v for k, v in config.items() if k not in swept or any(k in run.swept for run in point.runs) or k == "model"}
        for point, config in zip(points, configs, strict=True)
    ]
    if len({_text(config, needed) for config in owned}) < different:
        owned = configs
    named = []
    for point, config in zip(points, owned, strict=True):
        label = _text(config, needed) or point.model
        label += f" ({point.views} views)" if point.views > 1 else ""
        named.append(replace(point, label=label, values={key: config.get(key) for key in columns}))
    return named


def _text(config: dict[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(show(config[k]) if k == "model" else f"{k}={show(config[k])}" for k in keys if config.get(k) is not None)
