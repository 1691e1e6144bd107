"""What an agent shows of its sweep while trials run: the same as a look at every cell, also of what others have done."""

from __future__ import annotations

import math
from pathlib import Path

from cifar.agent.dashboard import Board, LineDashboard
from cifar.agent.events import AgentState
from cifar.agent.packing import Packer
from cifar.sweeps.local import LocalBackend
from cifar.system.signals import TimeLimit
from helpers.local_sweeps import GRID, claim_trial, create_local_sweep


def make_state(backend: LocalBackend) -> AgentState:
    state = AgentState(
        backend, Packer(backend, "me", "off", math.inf), TimeLimit(math.inf), LineDashboard(), Board("a sweep", "val/acc")
    )
    state.update_progress(backend.list_cells())
    return state


def test_others_results_and_new_cells_are_shown_while_trials_run(runs: Path, tmp_path: Path) -> None:
    mine = create_local_sweep(runs, GRID.replace("[0, 1, 2, 3, 4, 5]", "[0, 1]"))
    theirs, state = LocalBackend(mine.id, runs), make_state(mine)
    assert state.board.counts == {"waiting": 8} and state.board.best == ""
    for value, best in ((0.5, "50.00 %"), (0.7, "70.00 %"), (0.6, "70.00 %")):
        theirs.finish_trial(claim_trial(theirs), "finished", value)
        state.next_best_time = 0.0
        state.refresh_progress()
        assert best in state.board.best
    assert state.board.counts == {"waiting": 5, "finished": 3} and state.board.best_run == f"{mine.id}-001"
    larger = tmp_path / "larger.yaml"
    larger.write_text(GRID.replace("[0, 1, 2, 3, 4, 5]", "[0, 1]") + "  label_smoothing: {values: [0.0, 0.1]}\n")
    theirs.extend_sweep(larger)
    state.refresh_progress()
    assert state.board.counts == {"waiting": 13, "finished": 3} and state.swept_keys == ["seed", "lr", "label_smoothing"]
    fresh = make_state(LocalBackend(mine.id, runs))
    assert (state.board.best, state.board.counts) == (fresh.board.best, fresh.board.counts)


def test_the_best_trial_is_looked_for_in_a_small_part_of_the_time(runs: Path) -> None:
    """Only counts are asked for at each event."""
    backend = create_local_sweep(runs)
    state = make_state(backend)
    state.next_best_time = math.inf
    backend.finish_trial(claim_trial(backend), "finished", 0.5)
    state.refresh_progress()
    assert state.board.best == "" and state.board.counts == {"waiting": 23, "finished": 1}
    state.next_best_time = 0.0
    state.refresh_progress()
    assert "50.00 %" in state.board.best and 0.0 < state.next_best_time < math.inf
