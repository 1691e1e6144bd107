"""Tells W&B of runs that have ended here and whose mirror could not say so.

On W&B, a run of a sweep is `running` from its claim on. Usually its mirror sends the end, once W&B has all rows. If the mirror
could not start, or was stopped, W&B would show the run as running and some minutes later as crashed. W&B lacks something of
such a run, so it may not be `finished` there: the agent ends it as failed, and its summary says `incomplete` until `push`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cifar.states import ENDED_STATES, WANDB_OPEN_STATES

UPSERT_RUN = """mutation UpsertBucket(
  $name: String, $project: String, $entity: String, $sweep: String, $state: String, $summaryMetrics: JSONString
) {
  upsertBucket(input: {
    name: $name, modelName: $project, entityName: $entity, sweep: $sweep, state: $state, summaryMetrics: $summaryMetrics
  }) {
    bucket { id }
    inserted
  }
}"""  # the same as wandb-core's
_GET_RUN_STATES = """query RunStates($project: String!, $entity: String!, $filters: JSONString, $first: Int) {
  project(name: $project, entityName: $entity) {
    runs(filters: $filters, first: $first) { edges { node { name state summaryMetrics } } }
  }
}"""
RUNS_PER_PAGE = 500
WAIT_SECONDS = 2.0  # how long to wait for W&B


def send_final_states(
    execute_graphql: Callable[..., dict[str, Any]], target: Mapping[str, str], sweep_id: str, states: Mapping[str, str]
) -> None:
    """End the runs that have ended here and are open on W&B, as incomplete ones. `states`: run id -> state here."""
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
                    reason = f"{states[run['name']]} where it ran; `python -m cifar push {sweep_id}` there sends the rest"
                    summary = {**json.loads(run["summaryMetrics"] or "{}"), "state": "incomplete", "reason": reason}
                    ended_run = {"name": run["name"], "sweep": sweep_id, "summaryMetrics": json.dumps(summary)}
                    execute_graphql(UPSERT_RUN, **project, **ended_run, state="failed")
