"""States: every one is in exactly the groups it should be, and the groups cover all."""

from __future__ import annotations

from typing import get_args

import pytest

from cifar import states
from cifar.states import RunState, TrialState

GROUPS = {name: set(value) for name, value in vars(states).items() if name.endswith("_STATES") and "WANDB" not in name}
ALL = {"TRIAL_STATES"}
RUN = {*ALL, "RUN_STATES"}
OPEN, ENDED = {*RUN, "OPEN_RUN_STATES", "OPEN_TRIAL_STATES"}, {*RUN, "ENDED_STATES"}
GIVEN_BACK = {*OPEN, "GIVEN_BACK_STATES", "CLAIMABLE_STATES"}
FAILURE = {*ENDED, "FAILURE_STATES", "RETRIABLE_STATES"}
WORST = {*ENDED, "CONCLUSIVE_STATES", "WORST_RESULT_STATES"}
EXPECTED = {
    "waiting": {*ALL, "OPEN_TRIAL_STATES", "CLAIMABLE_STATES"},
    "running": OPEN,
    "interrupted": GIVEN_BACK,
    "preempted": GIVEN_BACK,
    "finished": {*ENDED, "CONCLUSIVE_STATES"},
    "failed": FAILURE,
    "killed": FAILURE,
    "diverged": {*WORST, "RETRIABLE_STATES"},
    "stopped": ENDED,
    "pruned": WORST,
    "skipped": WORST,
}


@pytest.mark.parametrize("state", EXPECTED)
def test_a_state_is_in_its_groups_only(state: str) -> None:
    assert {name for name, group in GROUPS.items() if state in group} == EXPECTED[state]


def test_the_groups_hold_every_state_once() -> None:
    run_states = list(get_args(RunState))
    trial_states = [each for part in get_args(TrialState) for each in get_args(part) or [part]]
    assert list(states.RUN_STATES) == run_states and list(states.TRIAL_STATES) == ["waiting", *run_states]
    assert set(trial_states) == set(EXPECTED) == set(states.TRIAL_STATES)
    for name in GROUPS:
        assert len(vars(states)[name]) == len(GROUPS[name]), name


def test_the_words_of_wandb_become_ours() -> None:
    assert set(states.FROM_WANDB.values()) <= set(states.RUN_STATES)
    assert set(states.WANDB_FINISHED_STATES) < set(states.ENDED_STATES)
