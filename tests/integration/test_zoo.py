"""Every network of the zoo is trained for two steps by `train`, or refused in one sentence before a folder is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cifar import registry
from cifar.cli.app import main
from cifar.tracking.run_dir import RunDir
from helpers.zoo import NETWORKS

pytestmark = pytest.mark.slow
OPTIONS = [
    "dataset=stand-in",
    "train_size=16",
    "batch_size=4",
    "val_size=100",
    "epochs=1",
    "max_steps=2",
    "device=cpu",
    "seed=3",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_each_trains_or_is_refused(
    name: str, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plugins" / "models").mkdir(parents=True)
    (tmp_path / "plugins" / "models" / "zoo.py").write_text("from helpers.zoo import register_all\n\nregister_all()\n")
    registry.models.load()
    monkeypatch.setattr(registry.models, "_entries", dict(registry.models._entries))  # the names are gone after the test
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "plugins"))
    network = NETWORKS[name]
    code = main(["train", f"model=zoo_{name}", *OPTIONS, "--wandb", "disabled"])
    out, err = capsys.readouterr()
    folders = [folder for folder in runs.glob("*") if (folder / "run.json").exists()]
    if network.refused:
        assert code == 2 and not folders and network.refused in err and "Traceback" not in err
        assert len(err.strip().splitlines()) == 1, err
        return
    assert code == 0, err
    record = RunDir(folders[0])
    cost = record.read_json("run")["cost"]
    assert record.state == "finished" and record.read_json("summary")["macs_verified"] is (not network.unverified)
    assert next(record.read_rows())["train/loss"] > 0
    if network.unverified:
        assert network.unverified in cost["note"] and "macs unverified" in record.read_json("run")["tags"]
        assert "MACs UNVERIFIED" in out and network.unverified in " ".join(out.split())
    else:
        assert cost["macs"] == network.macs
    assert json.loads((folders[0] / "config.json").read_text())["model"] == f"zoo_{name}"
