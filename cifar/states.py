"""The states of runs and trials, and the groups of them that decisions are made by. Each group is defined here only.

A run (a folder under runs/) has a RunState in its status.json. A trial (a cell of a sweep) has the state of its run, or
"waiting" before a worker has claimed it. The words are written to disk and to databases, so they never change.
"""

from __future__ import annotations

from typing import Literal

RunState = Literal[
    "running",
    "interrupted",  # stopped before its end (Ctrl-C, time limit, full disk, lost agent); goes on from its checkpoint
    "preempted",  # the same, after SIGTERM or SIGUSR1 of a batch system
    "finished",
    "failed",  # an exception
    "killed",  # by the operating system, or out of memory
    "diverged",  # the loss became NaN or infinite
    "stopped",  # by request, or because its sweep was stopped
    "pruned",  # by early termination
    "skipped",  # before its first step, because it needs more than max_macs
]
TrialState = Literal["waiting"] | RunState

# Every state is open (the run may go on) or ended.
OPEN_RUN_STATES = ("running", "interrupted", "preempted")
ENDED_STATES = ("finished", "failed", "killed", "diverged", "stopped", "pruned", "skipped")
RUN_STATES = (*OPEN_RUN_STATES, *ENDED_STATES)

OPEN_TRIAL_STATES = ("waiting", *OPEN_RUN_STATES)
TRIAL_STATES = (*OPEN_TRIAL_STATES, *ENDED_STATES)  # in the order in which counts are printed

GIVEN_BACK_STATES = ("interrupted", "preempted")  # the trial's agent gave it back: another one may claim it
CLAIMABLE_STATES = ("waiting", *GIVEN_BACK_STATES)  # open, and no worker has it

FAILURE_STATES = ("failed", "killed")  # something went wrong; an agent counts these, and may try again by itself
RETRIABLE_STATES = (*FAILURE_STATES, "diverged")  # `sweeps retry` offers these again
CONCLUSIVE_STATES = ("finished", "diverged", "pruned", "skipped")  # another try would end the same way: never resumed
WORST_RESULT_STATES = ("diverged", "pruned", "skipped")  # a search counts these as the worst result

# W&B's words for the state of a run.
WANDB_FINISHED_STATES = ("finished", "pruned", "skipped")  # ours that W&B calls finished; other ended ones: failed
WANDB_STOPPED_CODE = 255  # what wandb itself says of a process that a person has interrupted; W&B does not call it finished
WANDB_OPEN_STATES = ("pending", "running", "crashed")  # W&B's own; crashed: no heartbeat for some minutes
FROM_WANDB: dict[str, RunState] = {  # W&B's word -> ours, for a run whose mirror did not write how it ended
    "running": "running",
    "pending": "running",
    "preempting": "preempted",
    "preempted": "preempted",
    "failed": "failed",
    "finished": "stopped",  # our own status is missing on W&B, so it did not come to its own end
}


def pack_failure_reason(reason: str, pack_size: int) -> str:
    """The reason of a trial that was trained side by side with others when one of them failed."""
    return f"side by side with {pack_size - 1} others: {reason}"


def wandb_exit_code(state: str) -> int:
    """The exit code that W&B is told of a run that has ended: 0 makes it finished there."""
    return 0 if state in WANDB_FINISHED_STATES else WANDB_STOPPED_CODE if state == "stopped" else 1
