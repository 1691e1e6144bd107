"""Asks W&B for all runs of a sweep, for the last words of an agent: other agents' trials are known to W&B only."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cifar.config.resolve import flatten_values
from cifar.errors import UserError
from cifar.integrations.wandb.convert import parse_number
from cifar.states import FROM_WANDB, RUN_STATES

_GET_RUNS = """query SweepRuns($project: String!, $entity: String!, $filters: JSONString, $first: Int, $after: String) {
  project(name: $project, entityName: $entity) {
    runs(filters: $filters, first: $first, after: $after, order: "+created_at") {
      edges { node { name state config summaryMetrics } }
      pageInfo { endCursor hasNextPage }
    }
  }
}"""
RUNS_PER_PAGE = 500
WAIT_SECONDS = 10.0  # how long to wait for W&B


def fetch_sweep_cells(
    execute_graphql: Callable[..., dict[str, Any]], target: Mapping[str, str], sweep_id: str, metrics: Sequence[str]
) -> list[dict[str, Any]] | None:
    """The runs of a sweep on W&B, as `list_cells` describes cells; None if W&B does not answer in time.

    metrics: the names of the sweep's objectives, the displayed one first.
    """
    found: list[list[dict[str, Any]]] = []

    def ask() -> None:
        try:
            found.append(_fetch_runs(execute_graphql, target, sweep_id))
        except Exception:  # errors of a failing server; the caller says so
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    return [_describe_run(run, cell, metrics) for cell, run in enumerate(found[0])] if found else None


def _fetch_runs(
    execute_graphql: Callable[..., dict[str, Any]], target: Mapping[str, str], sweep_id: str
) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    place = {name: target[name] for name in ("project", "entity")}
    after = None
    while True:
        filters = json.dumps({"sweep": sweep_id})
        page = execute_graphql(_GET_RUNS, **place, filters=filters, first=RUNS_PER_PAGE, after=after)["project"]["runs"]
        runs += [edge["node"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            return runs


def _describe_run(run: Mapping[str, Any], cell: int, metrics: Sequence[str]) -> dict[str, Any]:
    summary, config = _parse_object(run["summaryMetrics"]), _parse_object(run["config"])
    # Our own word for how it ended is in the summary. While W&B says that the run goes on, it is of an earlier try.
    state = str(summary.get("state"))
    if state not in RUN_STATES or FROM_WANDB.get(run["state"]) == "running":
        state = FROM_WANDB.get(run["state"], "killed")
        if summary.get("state") == "incomplete" and state != "running":  # it has ended, and W&B has not got all of it
            state = "interrupted"
    values = {name: given.get("value") for name, given in config.items() if isinstance(given, Mapping) and name[:1] != "_"}
    for name in ("cifar", "cifar_schema", "macs", "params"):  # sent beside the configuration
        values.pop(name, None)
    with contextlib.suppress(UserError):  # two leaves of one name
        values = flatten_values(values)
    objectives = [_read_metric(summary, name) for name in metrics]
    return {
        "cell": cell,
        "run_id": run["name"],
        "state": state,
        "values": values,
        "value": objectives[0],
        "objectives": objectives[1:],
        "reason": "",
        "attempt": 1,
        "worker": "",
    }


def _parse_object(text: Any) -> dict[str, Any]:
    value = json.loads(text) if isinstance(text, str) else text
    return value if isinstance(value, dict) else {}


def _read_metric(summary: Mapping[str, Any], name: str) -> float | None:
    value = parse_number(summary.get(name))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
