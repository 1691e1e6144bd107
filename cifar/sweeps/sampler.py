"""What a local search tries next: Optuna's TPE, for one objective or several, from the results of all ended trials.

W&B's own scheduler makes its Optuna study with the same sampler. Each suggestion comes from a new sampler, so that it depends
on the sweep's seed, the trial's number and the results so far, and not on which agent asks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from cifar.config.resolve import flatten_values
from cifar.sweeps.spec import Sweep


def optuna_directions(sweep: Sweep) -> list[StudyDirection]:
    """The direction of each objective, in the file's order."""
    return [StudyDirection.MAXIMIZE if metric.goal == "maximize" else StudyDirection.MINIMIZE for metric in sweep.metrics]


def suggest_trial(
    sweep: Sweep, trials: Sequence[FrozenTrial], sweep_seed: int
) -> tuple[dict[str, Any], Mapping[str, Any], Mapping[str, BaseDistribution]]:
    """The next trial after these: its values, and the parameters and distributions by which Optuna knows them."""
    seed = zlib.crc32(f"{sweep_seed}:{len(trials)}".encode())
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), directions=optuna_directions(sweep))
    study.add_trials([_as_sampler_input(sweep, trial, trials) for trial in trials if trial.params])
    free = [p for p in sweep.parameters if p.values is None or len(p.values) > 1]
    listed = {p.name: p.values for p in free if p.values and p.distribution == "categorical"}
    space: dict[str, BaseDistribution] = {
        p.name: CategoricalDistribution(range(len(listed[p.name]))) if p.name in listed else FloatDistribution(0.0, 1.0)
        for p in free  # a range is sampled as the probability u that `Parameter.value_at` takes
    }
    chosen = study.ask(space).params
    values = {p.name: p.values[0] for p in sweep.parameters if p.values}
    for p in free:
        values[p.name] = listed[p.name][chosen[p.name]] if p.name in listed else p.value_at(chosen[p.name])
    return flatten_values(values), chosen, space


def _as_sampler_input(sweep: Sweep, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """A trial as the sampler gets it.

    TPE ranks pruned trials with one objective only. With several, a bad trial (pruned, diverged, or skipped because it needs
    too many MACs) counts as the worst of all finished ones in every objective.
    """
    finished = [each.values for each in trials if each.state == OptunaState.COMPLETE]
    if len(sweep.metrics) == 1 or trial.state != OptunaState.PRUNED:
        return trial
    state = OptunaState.COMPLETE if finished else OptunaState.FAIL
    worst = [
        max(column, key=metric.as_cost) for metric, column in zip(sweep.metrics, zip(*finished, strict=True), strict=False)
    ]
    return optuna.trial.create_trial(state=state, values=worst or None, params=trial.params, distributions=trial.distributions)
