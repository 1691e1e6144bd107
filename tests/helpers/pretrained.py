"""A small pretrained network on generated images, as a packed row leaves it. It has random weights."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from cifar import data
from cifar.config.resolve import resolve_config
from cifar.training.parts import build_model
from helpers.run_configs import TINY

NAME = "frontier-tiny"
CONFIG: dict[str, Any] = {**TINY, "val_size": 0, "train_size": 0, "test": "final", "normalize": "dataset", "seed": 3}


@functools.cache
def find_fingerprint() -> str:
    return data.load_dataset("stand-in").fingerprint


def write_pretrained(parent: Path, name: str = NAME, *, content: bytes | None = None, **more: Any) -> Path:
    """The folder of a network. content: of weights.pt, instead of the network's weights in half precision.

    more: fields of the card.
    """
    config, folder = resolve_config(CONFIG), parent / name
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    state = build_model(config).state_dict()
    if content is None:
        buffer = io.BytesIO()
        torch.save({key: value.half() if value.ndim > 1 else value for key, value in state.items()}, buffer)
        content = buffer.getvalue()
    (folder / "weights.pt").write_bytes(content)
    cost = {"macs": 1e6, "params": 1234, "verified": True}
    files: dict[str, Any] = {
        "run": {"schema": 1, "id": name, "name": name, "dataset": "stand-in", "cost": cost, "created": 1.7e9},
        "config": config.to_dict(),
        "environment": {"data_fingerprint": find_fingerprint()},
        "summary": {"epochs": 2, "test/acc": 0.3, "train_flops": 1e9},
        "status": {"state": "finished", "epoch": 2, "epochs": 2},
        "card": {
            "schema": 1,
            "name": name,
            "model": config.model,
            "macs": cost["macs"],
            "params": cost["params"],
            "accuracy": 0.3,
            "per_class": {"cat": 0.25},
            "row": {"mean": 0.31, "std": 0.01, "n": 3},
            "weights": {"format": "float16", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
            **more,
        },
    }
    for file, values in files.items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    return folder
