"""Names and notes of runs that the plain `wandb agent` started, as runs under our agents have them.

A name is made of the keys that differ between the trials, and the notes are the sweep's description. That agent gives a trial
all parameters of the sweep in one file, and says neither. The sweep's configuration is on the server. Training does not wait
for a network, so the mirror asks, and writes what it is told into run.json.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cifar.errors import UserError
from cifar.system.names import escape_controls
from cifar.tracking.records import MAX_NAME
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

    config, swept = run_dir.read_json("config"), list(about["swept"])
    is_named_after_all = about.get("name") == format_run_name(config, swept)
    if not is_named_after_all and "description" in about:
        return
    with contextlib.suppress(UserError):
        text = client.fetch_sweep(entity, project, about["sweep"]).get("config")
        if not text:
            return
        sweep = spec.parse_sweep(parse_yaml(text, "the sweep on W&B"), text, "the sweep on W&B")
        question = escape_controls(sweep.description[:MAX_NAME], keeps_lines=True)
        settled = {**about, **({"description": question} if question else {})}
        swept = [key for key in sweep.swept_keys if key in about["swept"]]
        if is_named_after_all:
            settled |= {"swept": swept, "name": format_run_name(config, swept)}
        if settled != about:
            run_dir.write_json("run", settled)
