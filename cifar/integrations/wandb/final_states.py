"""The ends of hosted runs that no mirror could tell: W&B hears them from the agent that ran them.

A run that W&B handed out is `running` there from its claim on. Its mirror says how it ended, with all that it measured; where
the mirror could not start, or was given up, W&B would call the run running, and crashed some minutes later.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cifar.integrations.wandb.mirror import GOOD_STATES
from cifar.tracking.run_dir import END_STATES

UPSERT = """mutation UpsertBucket($name: String, $project: String, $entity: String, $sweep: String, $state: String) {
  upsertBucket(input: {name: $name, modelName: $project, entityName: $entity, sweep: $sweep, state: $state}) {
    bucket { id }
    inserted
  }
}"""  # as wandb-core says it
_STATES = """query RunStates($project: String!, $entity: String!, $filters: JSONString, $first: Int) {
  project(name: $project, entityName: $entity) { runs(filters: $filters, first: $first) { edges { node { name state } } } }
}"""
OPEN = ("pending", "running", "crashed")  # crashed: not heard of for some minutes
PAGE = 500
SECONDS = 2.0  # that are waited for W&B


def tell(ask: Callable[..., dict[str, Any]], place: Mapping[str, str], sweep: str, states: Mapping[str, str]) -> None:
    """`states`: run -> how it ended here. Those that W&B takes for open are ended there; what was given back stays open."""
    telling = threading.Thread(target=_tell, args=(ask, place, sweep, states), daemon=True)
    telling.start()
    telling.join(SECONDS)


def _tell(ask: Callable[..., dict[str, Any]], place: Mapping[str, str], sweep: str, states: Mapping[str, str]) -> None:
    ended = [run_id for run_id, state in states.items() if state in END_STATES]
    where = {name: place[name] for name in ("project", "entity")}
    with contextlib.suppress(Exception):  # of a server in trouble: it will call these runs crashed
        for start in range(0, len(ended), PAGE):
            chosen = json.dumps({"name": {"$in": ended[start : start + PAGE]}})
            found = ask(_STATES, **where, filters=chosen, first=PAGE)["project"]["runs"]["edges"]
            for run in (edge["node"] for edge in found):
                if run["state"] in OPEN:
                    end = "finished" if states[run["name"]] in GOOD_STATES else "failed"
                    ask(UPSERT, **where, name=run["name"], sweep=sweep, state=end)
