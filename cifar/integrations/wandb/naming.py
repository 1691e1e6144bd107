"""Names of runs that the plain `wandb agent` started: made of the keys that differ between the trials, as under our agents.

The agent gives a trial all parameters of the sweep in one file, and does not say which of them vary. The sweep's configuration
is on the server. Training does not wait for a network, so the mirror asks, and writes name and swept keys into run.json.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cifar.errors import UserError
from cifar.tracking.run_dir import RunDir

if TYPE_CHECKING:
    from cifar.integrations.wandb.api import GraphqlClient


def settle_name(run_dir: RunDir, client: GraphqlClient, entity: str, project: str) -> None:
    """Rename a run of the plain agent after what is swept. A name that a user gave (`--name`) stays.

    If W&B does not tell, or its sweep is none that we can read, the name stays as well.
    """
    about = run_dir.read_json("run")
    is_plain = about.get("engine") == "wandb" and about.get("cell") is None and about.get("sweep") and about.get("swept")
    if not is_plain:
        return
    from cifar.config.resolve import format_run_name
    from cifar.config.yaml_loader import parse_yaml
    from cifar.sweeps import spec

    config = run_dir.read_json("config")
    if about.get("name") != format_run_name(config, about["swept"]):
        return
    with contextlib.suppress(UserError):
        text = client.fetch_sweep(entity, project, about["sweep"]).get("config")
        if not text:
            return
        sweep = spec.parse_sweep(parse_yaml(text, "the sweep on W&B"), text, "the sweep on W&B")
        swept = [key for key in sweep.swept_keys if key in about["swept"]]
        if swept != about["swept"]:
            run_dir.write_json("run", {**about, "swept": swept, "name": format_run_name(config, swept)})
