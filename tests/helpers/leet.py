"""Reads a local W&B run back with wandb's own tool."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from cifar.tracking.run_dir import RunDir, write_atomic

COSTS = {"macs": 6654464, "params": 1070794}


def make_record(runs: Path, run_id: str, *, epochs: int = 6, sweep: str = "") -> RunDir:
    run = {"name": "lr=1e-05 <b>", "group": sweep, "tags": ["stand-in", "t" * 80], "sweep": sweep, "project": "cifar"}
    config = {"lr": 1e-5, "model": "worksheet1", "epochs": epochs, "nesterov": True, "experiment": ""}
    record = RunDir.create(runs, run_id, {**run, "command": f"python -m cifar train --from {run_id}"}, config)
    record.set_status("running", epochs=epochs)
    return record


def row(epoch: int) -> dict[str, Any]:
    seen = {"epoch": epoch, "step": epoch * 390, "train/loss": 2.3 / epoch, "val/acc": 0.1 * epoch, "train/lr": 1e-5}
    layers = {f"gradient_norm/layers.{n}.conv1": 1 / (n + epoch) for n in range(3)}
    return {**seen, **layers, "system/seconds": 1.25 + epoch}


def write_checkpoint(record: RunDir) -> None:
    """A checkpoint, as far as a mirror reads it: the rows up to here are final."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"metrics_bytes": record.metrics_bytes(), "model": {}}, 2))
    write_atomic(record.path / "checkpoint.pt", content.getvalue())


def end_record(record: RunDir, state: str = "finished") -> None:
    record.write_json("summary", {"val/acc": 0.6, "best/val/acc": 0.61, "test/acc": 0.59, **COSTS})
    record.set_status(state)


def draw_png(path: Path) -> Path:
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 6), (200, 30, 30)).save(path)
    return path


def wandb_files(record: RunDir) -> list[Path]:
    return sorted(record.path.glob("wandb/*run-*/*.wandb"))


class Inspected:
    """What one .wandb file holds: `run`, `rows` (the history without W&B's own keys, pictures, charts and histograms),
    `histogram_epochs`, `summary`, `files`, `exit_code`."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]

        def by_type(kind: str) -> list[Any]:
            return [record[kind] for record in records if record["type"] == kind]

        self.run = by_type("run")[0]
        self.config = {key: value for key, value in self.run["config"]["update"].items() if key != "_wandb"}
        self.steps = [item["step"]["num"] for item in by_type("history")]
        self.history = [{k: v for k, v in item["item"].items() if k[0] != "_"} for item in by_type("history")]
        apart = ("pictures/", "charts/", "gradients/", "updates/")
        self.rows = [{k: v for k, v in item.items() if not k.startswith(apart)} for item in self.history]
        self.histogram_epochs = [
            item["epoch"] for item in self.history if any(k.startswith(("gradients/", "updates/")) for k in item)
        ]
        self.summary: dict[str, Any] = {}
        for update in by_type("summary"):
            self.summary.update(update["update"])
        self.files = [file["path"] for files in by_type("files") for file in files["files"]]
        self.exit_code = by_type("exit")[-1].get("exit_code", 0) if by_type("exit") else None


def inspect_only(record: RunDir) -> Inspected:
    """The one W&B file of this record."""
    (path,) = wandb_files(record)
    return Inspected(path)
