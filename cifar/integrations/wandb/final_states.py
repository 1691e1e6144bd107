"""Sends W&B the final states of runs whose mirror could not do so.

On W&B, a run of a sweep is `running` from its claim on. Usually its mirror sends the end, with all metrics. If the mirror could
not start, or was stopped, W&B would show the run as running and some minutes later as crashed. So the agent sends the state.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cifar.states import ENDED_STATES, WANDB_FINISHED_STATES, WANDB_OPEN_STATES

UPSERT_RUN = """mutation UpsertBucket($name: String, $project: String, $entity: String, $sweep: String, $state: String) {
  upsertBucket(input: {name: $name, modelName: $project, entityName: $entity, sweep: $sweep, state: $state}) {
    bucket { id }
    inserted
  }
}"""  # the same as wandb-core's
_GET_RUN_STATES = """query RunStates($project: String!, $entity: String!, $filters: JSONString, $first: Int) {
  project(name: $project, entityName: $entity) { runs(filters: $filters, first: $first) { edges { node { name state } } } }
}"""
RUNS_PER_PAGE = 500
WAIT_SECONDS = 2.0  # how long to wait for W&B


def send_final_states(
    execute_graphql: Callable[..., dict[str, Any]], target: Mapping[str, str], sweep_id: str, states: Mapping[str, str]
) -> None:
    """End the runs that have ended here and that are open on W&B. `states`: run id -> state here. Open ones stay open."""
    sender = threading.Thread(target=_send_in_thread, args=(execute_graphql, target, sweep_id, states), daemon=True)
    sender.start()
    sender.join(WAIT_SECONDS)


def _send_in_thread(
    execute_graphql: Callable[..., dict[str, Any]], target: Mapping[str, str], sweep_id: str, states: Mapping[str, str]
) -> None:
    ended = [run_id for run_id, state in states.items() if state in ENDED_STATES]
    project = {name: target[name] for name in ("project", "entity")}
    with contextlib.suppress(Exception):  # errors of a failing server; it will show these runs as crashed
        for start in range(0, len(ended), RUNS_PER_PAGE):
            filters = json.dumps({"name": {"$in": ended[start : start + RUNS_PER_PAGE]}})
            found = execute_graphql(_GET_RUN_STATES, **project, filters=filters, first=RUNS_PER_PAGE)["project"]["runs"][
                "edges"
            ]
            for run in (edge["node"] for edge in found):
                if run["state"] in WANDB_OPEN_STATES:
                    final_state = "finished" if states[run["name"]] in WANDB_FINISHED_STATES else "failed"
                    execute_graphql(UPSERT_RUN, **project, name=run["name"], sweep=sweep_id, state=final_state)
