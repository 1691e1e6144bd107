"""What W&B shows of a run beside its metrics (logs, system metrics, its own fields), compared with the run's folder.

Nothing here knows the mirror: the files of the folder on one side, what came to the server on the other.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from helpers.protocol.world import Run


def shown_lines(run: Run) -> list[str]:
    """The Logs tab without W&B's own times."""
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6} ", line) for line in run.log_lines), run.log_lines
    return [line[27:] for line in run.log_lines]


def shown_samples(run: Run) -> list[dict[str, Any]]:
    """The System section: W&B's names with the values, and when each sample was taken."""
    samples = [json.loads(line) for line in run.event_lines]
    return [{k: v for k, v in sample.items() if k.startswith("system.") or k == "_timestamp"} for sample in samples]


def shown_environment(run: Run) -> dict[str, Any]:
    """W&B's own fields, as `wandb-metadata.json` has them, and as the configuration has them for the overview."""
    inside, *others = run.raw_config["_wandb"]["value"]["e"].values()  # one for each time that the run was opened
    assert all(other == inside for other in others)
    assert json.loads(run.files["wandb-metadata.json"]) == inside
    return dict(inside)


def assert_shown_as_recorded(run: Run, folder: Path) -> None:
    """Every line and every sample once, in order; every field of the environment that W&B has a place for."""
    log = folder / "output.log"
    assert shown_lines(run) == (log.read_text().splitlines() if log.exists() else [])
    metrics = folder / "system_metrics.jsonl"
    samples = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    shown = shown_samples(run)
    assert len(shown) == len(samples)
    created = json.loads((folder / "run.json").read_text())["created"]
    for seen, sample, line in zip(shown, samples, run.event_lines, strict=True):
        assert abs(seen.pop("_timestamp") - sample.pop("_timestamp")) < 1e-5
        assert seen == sample
        assert abs(json.loads(line)["_runtime"] - (json.loads(line)["_timestamp"] - created)) < 1e-3  # seconds of the run
    environment = json.loads((folder / "environment.json").read_text()) if (folder / "environment.json").exists() else {}
    if not environment:
        return
    seen = shown_environment(run)
    assert (run.host, run.commit) == (environment.get("host", ""), environment["git"].get("commit", ""))
    assert seen["os"] == environment["platform"] and seen["python"] == f"CPython {environment['versions']['python']}"
    for theirs, ours in (("host", "host"), ("username", "user"), ("root", "cwd"), ("executable", "executable")):
        assert seen.get(theirs) == environment.get(ours), theirs
    if "program" in environment:
        assert (seen["program"], seen.get("args", [])) == (environment["program"], environment["args"])
    if (folder / "machine.json").exists():
        machine = json.loads((folder / "machine.json").read_text())
        assert seen["cpu_count_logical"] == machine["cpu_count_logical"]
        assert seen["memory"]["total"] == str(machine["memory_total"])
        assert [gpu["name"] for gpu in seen.get("gpu_nvidia", [])] == [gpu["name"] for gpu in machine.get("gpus", [])]
        packages = (folder / "requirements.txt").read_text()
        assert run.files["requirements.txt"].decode() == packages and "torch==" in packages
