"""What a local search tries next: Optuna's TPE, for one objective or several, told of all that has ended.

W&B's own scheduler makes its Optuna study with the same sampler. Each suggestion is made by a sampler of its own, so that
it is a function of the sweep's seed, the trial's number and the results so far, whoever asks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cifar.sweeps import spec as sweeps
from cifar.sweeps.spec import Sweep


def directions(sweep: Sweep) -> list[StudyDirection]:
    """One an objective, in the file's order."""
    return [StudyDirection.MAXIMIZE if metric.goal == "maximize" else StudyDirection.MINIMIZE for metric in sweep.metrics]


def suggest(
    sweep: Sweep, trials: Sequence[FrozenTrial], sweep_seed: int
) -> tuple[dict[str, Any], Mapping[str, Any], Mapping[str, BaseDistribution]]:
    """The next trial after these: its values, and how Optuna calls them."""
    seed = zlib.crc32(f"{sweep_seed}:{len(trials)}".encode())
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), directions=directions(sweep))
    study.add_trials([_as_told(sweep, trial, trials) for trial in trials if trial.params])
    free = [p for p in sweep.parameters if p.values is None or len(p.values) > 1]
    listed = {p.name: p.values for p in free if p.values and p.distribution == "categorical"}
    space: dict[str, BaseDistribution] = {
        p.name: CategoricalDistribution(range(len(listed[p.name]))) if p.name in listed else FloatDistribution(0.0, 1.0)
        for p in free  # of a range: the share of its distribution that lies below the value
    }
    chosen = study.ask(space).params
    values = {p.name: p.values[0] for p in sweep.parameters if p.values}
    for p in free:
        values[p.name] = listed[p.name][chosen[p.name]] if p.name in listed else p.at(chosen[p.name])
    return sweeps.flat(values), chosen, space


def _as_told(sweep: Sweep, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """A trial as the sampler hears of it. TPE ranks pruned trials of one objective only: of several, one that was bad
    (pruned, diverged, or skipped as too dear) counts as the worst of all in everything."""
    finished = [each.values for each in trials if each.state == TrialState.COMPLETE]
    if len(sweep.metrics) == 1 or trial.state != TrialState.PRUNED:
        return trial
    state = TrialState.COMPLETE if finished else TrialState.FAIL
    worst = [max(column, key=metric.worse) for metric, column in zip(sweep.metrics, zip(*finished, strict=True), strict=False)]
    return optuna.trial.create_trial(state=state, values=worst or None, params=trial.params, distributions=trial.distributions)
