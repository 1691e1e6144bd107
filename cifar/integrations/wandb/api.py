"""W&B's GraphQL calls for sweeps and their agents, and whether the server answers.

`Api()._service_api` is the only private name of wandb that this package uses.
"""

from __future__ import annotations

import http.client
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar.errors import UserError
from cifar.integrations.wandb.mirror_process import core_lock, num_core_stops, reset_dead_core
from cifar.integrations.wandb.settings import server_url
from cifar.system.redact import redact

CALL_TIMEOUT_SECONDS = 60.0  # for one call, including the retries of wandb-core
# The names are those of wandb 0.31's apis/public/sweeps.py and of wandb-core.
# tests/integration/wandb/test_hosted.py compares them with both.
CREATE_SWEEP = """mutation UpsertSweep($config: String, $entityName: String, $projectName: String) {
  upsertSweep(input: {config: $config, entityName: $entityName, projectName: $projectName}) {
    sweep { name project { name entity { name } } }
    configValidationWarnings
  }
}"""
GET_SWEEP = """query GetSweep($name: String!, $project: String, $entity: String) {
  project(name: $project, entityName: $entity) { sweep(sweepName: $name) { name config state runCount runCountExpected } }
}"""
REGISTER_AGENT = """mutation CreateAgent($host: String!, $projectName: String, $entityName: String, $sweep: String!) {
  createAgent(input: {host: $host, projectName: $projectName, entityName: $entityName, sweep: $sweep}) { agent { id } }
}"""
SEND_HEARTBEAT = """mutation Heartbeat($id: ID!, $metrics: JSONString, $runState: JSONString) {
  agentHeartbeat(input: {id: $id, metrics: $metrics, runState: $runState}) { agent { id } commands }
}"""


def execute_graphql(api: Any, query: str, **variables: Any) -> dict[str, Any]:
    """The `data` of the answer. `api`: wandb's public API. Raises what wandb raises."""
    data: dict[str, Any] = api._service_api.execute_graphql(query, variables, timeout=CALL_TIMEOUT_SECONDS)
    return data


def download_file(api: Any, file: Mapping[str, Any], folder: Path) -> None:
    """Download a run's file into a folder. `file`: name, url and sizeBytes, as GraphQL gives them. Raises what wandb raises.

    `run.files()` would ask for the address again, one request for each run.
    """
    from wandb.apis.public.files import File

    File(api._service_api, dict(file)).download(root=str(folder), replace=True).close()


class GraphqlClient:
    """Sends GraphQL to W&B through wandb-core. Several threads may call it. `api`: wandb's public API.

    `restarts_core`: if wandb-core was killed, start another one and ask again. Not where runs are open in this process.
    """

    def __init__(self, timeout_seconds: float = CALL_TIMEOUT_SECONDS, *, restarts_core: bool = False) -> None:
        self._timeout_seconds, self._restarts_core = timeout_seconds, restarts_core
        self._lock = threading.Lock()
        if "wandb" not in sys.modules:
            for name in ("SWEEP_ID", "RUN_ID", "SWEEP_PARAM_PATH", "SERVICE", "MODE"):
                os.environ.pop(f"WANDB_{name}", None)
            os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
        try:
            self._connect()
            self.settings: dict[str, Any] = self.api.settings
            self.app_url = self.api._service_api.app_url
            self.entity = str(self.api.settings["entity"] or self.api.default_entity or "")
        except Exception as error:
            raise to_user_error(error) from error

    def _connect(self) -> None:
        import wandb

        with core_lock:
            self._num_core_stops = num_core_stops()
            self.api = wandb.Api(timeout=int(self._timeout_seconds))
            self._execute = self.api._service_api.execute_graphql

    def execute_graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        """The `data` of the answer. Raises what wandb raises."""
        try:
            data: dict[str, Any] = self._execute(query, variables, timeout=self._timeout_seconds)
        except Exception:
            with self._lock:  # one thread finds wandb-core gone; the others ask again later
                is_other_core = self._num_core_stops != num_core_stops()  # another client stopped it, and may have started one
                if not (self._restarts_core and (is_other_core or reset_dead_core())):
                    raise
                self._connect()
            data = self._execute(query, variables, timeout=self._timeout_seconds)
        return data

    def fetch_sweep(self, entity: str, project: str, name: str) -> dict[str, Any]:
        """The sweep's config (a YAML text), state and numbers of runs; {} if there is no such sweep."""
        found = self.execute_graphql(GET_SWEEP, name=name, project=project, entity=entity)["project"]
        return dict((found or {}).get("sweep") or {})


def to_user_error(error: Exception) -> UserError:
    """wandb's error as one sentence that says what to check."""
    reason = redact(f"{type(error).__name__}: {error}".replace("\n", " "))[:300]
    return UserError(f"W&B does not take it ({reason}); check the key, WANDB_BASE_URL and the network, or use --wandb offline")


def is_server_reachable(seconds: float) -> bool:
    """Whether the configured server answers within `seconds`, and not that it is broken (5xx) or overloaded (429)."""
    try:
        with urllib.request.urlopen(f"{server_url().rstrip('/')}/healthz", timeout=seconds) as answer:
            answer.read()
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code != 429
    except (OSError, ValueError, http.client.HTTPException):
        return False
