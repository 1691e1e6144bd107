"""W&B's GraphQL about sweeps and their agents. All that is private of wandb is `Api()._service_api`, here."""

from __future__ import annotations

import os
import sys
from typing import Any

from cifar.errors import UserError
from cifar.tracking.run_dir import redact

CALL_SECONDS = 60.0  # for one call, wandb-core's own retries included
# The names are those of wandb 0.31's apis/public/sweeps.py and of wandb-core; tests/test_hosted.py holds them against both.
CREATE = """mutation UpsertSweep($config: String, $entityName: String, $projectName: String) {
  upsertSweep(input: {config: $config, entityName: $entityName, projectName: $projectName}) {
    sweep { name project { name entity { name } } }
    configValidationWarnings
  }
}"""
SWEEP = """query GetSweep($name: String!, $project: String, $entity: String) {
  project(name: $project, entityName: $entity) { sweep(sweepName: $name) { name config state runCount runCountExpected } }
}"""
REGISTER = """mutation CreateAgent($host: String!, $projectName: String, $entityName: String, $sweep: String!) {
  createAgent(input: {host: $host, projectName: $projectName, entityName: $entityName, sweep: $sweep}) { agent { id } }
}"""
BEAT = """mutation Heartbeat($id: ID!, $metrics: JSONString, $runState: JSONString) {
  agentHeartbeat(input: {id: $id, metrics: $metrics, runState: $runState}) { agent { id } commands }
}"""


class Service:
    """W&B's GraphQL, through wandb-core. Calls may come from many threads."""

    def __init__(self) -> None:
        if "wandb" not in sys.modules:
            for name in ("SWEEP_ID", "RUN_ID", "SWEEP_PARAM_PATH", "SERVICE", "MODE"):
                os.environ.pop(f"WANDB_{name}", None)
            os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
        import wandb

        try:
            api = wandb.Api(timeout=int(CALL_SECONDS))
            self.settings: dict[str, Any] = api.settings
            self.app_url = api._service_api.app_url
            self._ask = api._service_api.execute_graphql
            self.entity = str(api.settings["entity"] or api.default_entity or "")
        except Exception as error:
            raise refused(error) from error

    def ask(self, text: str, **variables: Any) -> dict[str, Any]:
        """The `data` of the answer. Raises what wandb raises."""
        found: dict[str, Any] = self._ask(text, variables, timeout=CALL_SECONDS)
        return found

    def sweep(self, entity: str, project: str, name: str) -> dict[str, Any]:
        """The sweep's config (a YAML text), state and counts; {} where there is none."""
        found = self.ask(SWEEP, name=name, project=project, entity=entity)["project"]
        return dict((found or {}).get("sweep") or {})


def refused(error: Exception) -> UserError:
    reason = redact(f"{type(error).__name__}: {error}".replace("\n", " "))[:300]
    return UserError(f"W&B does not take it ({reason}); check the key, WANDB_BASE_URL and the network, or use --wandb offline")
