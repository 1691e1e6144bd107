"""The script of the study makes compact records of runs: a line a run, a row, an epoch, and commands that repeat rows."""

from __future__ import annotations

import csv
import gzip
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from cifar.config.resolve import parse_pairs, resolve_config
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from helpers.paths import ROOT
from helpers.run_configs import TINY

SCRIPT = ROOT / "experiments" / "studies" / "frontier" / "collect.py"
VALUES: dict[str, Any] = {**TINY, "width": 4, "epochs": 1, "max_steps": 2, "probes": "none", "optimizer": "sgd", "lr": 0.05}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_rows_costs_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy", reason="SCIPY IS NOT INSTALLED: the study's script is not tried")
    runs, out = tmp_path / "runs", tmp_path / "out"
    for name, seed, more in (
        ("a", 1, {}),
        ("b", 0, {}),
        ("d", 0, {"val_size": 0, "train_size": 256, "test": "final"}),
        ("c", 0, {"teacher": "a", "cutout": 4, "nesterov": False}),
    ):
        config = resolve_config({**VALUES, "seed": seed, **more})
        run.train_run(config, run.create_run(config, runs, run.RunMetadata(run_id=name)))
    summary = RunDir(runs / "a").read_json("summary")
    RunDir(runs / "a").write_json("summary", {**summary, "joules": 100.0})
    assert runpy.run_path(str(SCRIPT))["main"]([str(runs), "--name", "tiny", "--out", str(out)]) == 0
    assert "4 finished runs" in capsys.readouterr().out
    lines = {line["run"]: line for line in read(out / "tiny_runs.csv")}
    assert float(lines["a"]["train_flops"]) == summary["train_flops"] and lines["a"]["joules"] == "100"
    assert float(lines["c"]["teacher_flops"]) == 2 * summary["macs"] * 128 and lines["b"]["joules"] == ""
    final, plain, taught = sorted(read(out / "tiny.csv"), key=lambda row: (row["split"] == "val", row["teacher"]))
    test_acc = 100 * RunDir(runs / "d").read_json("summary")["test/acc"]
    assert (final["n"], final["split"], final["val_acc_mean"], lines["d"]["val_loss"]) == ("1", "test", "", "")
    assert float(final["test_acc_mean"]) == pytest.approx(test_acc, abs=0.01) and plain["test_acc_mean"] == ""
    assert (plain["n"], plain["seeds"], plain["joules_mean"], taught["n"]) == ("2", "0 1", "100", "1")
    mean = sum(100 * RunDir(runs / name).read_json("summary")["val/acc"] for name in "ab") / 2
    assert float(plain["val_acc_mean"]) == pytest.approx(mean, abs=0.01) and plain["weights_bytes"] == str(
        summary["weights_bytes"]
    )
    assert len(gzip.decompress((out / "tiny_curves.csv.gz").read_bytes()).splitlines()) == 1 + 4
    commands = [line for line in (out / "tiny_commands.txt").read_text().splitlines() if not line.startswith("#")]
    configs = [resolve_config(parse_pairs(shlex.split(command)[4:])).to_dict() for command in commands]
    recorded = [RunDir(runs / name).read_json("config") for name in "bcd"]
    assert len(configs) == 3
    for config in recorded:
        assert {**config, "threads": 0} in configs, "each command gives exactly the configuration of its row"


@pytest.mark.slow
def test_the_picture_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="SCIPY IS NOT INSTALLED: the study's script is not tried")
    names = "model,width,depth,macs,n,test_acc_mean,test_acc_std,seconds_training_mean,joules_mean,together\n"
    lines = "wrn,24,28,4e6,3,90.0,0.3,20,,1\nresnet8,4,,1e6,3,80.0,0.1,10,5.5,3\nresnet8,8,,2e6,1,,,10,,1\n"
    (tmp_path / "rows.csv").write_text(names + lines)
    script = runpy.run_path(str(SCRIPT.with_name("draw.py")))
    cheap, dear = script["select_rows"](read(tmp_path / "rows.csv"))
    assert (cheap.name, cheap.mmacs, cheap.joules, cheap.is_packed) == ("ResNet-8, width 4", 1.0, 5.5, True)
    assert (dear.name, dear.joules, dear.is_packed) == ("WRN-28, width 24", None, False)
    pooled = ((2 * 0.3**2 + 2 * 0.1**2) / 4) ** 0.5
    assert cheap.half_width == dear.half_width == pytest.approx(2.7764 * pooled / 3**0.5, rel=1e-4)
    assert script["find_front"]([(3, 90.0), (1, 80.0), (2, 79.0), (4, 90.0)]) == [(1, 80.0), (3, 90.0)]
    assert script["main"](["--rows", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made.png").stat().st_size > 10_000 and (tmp_path / "made.svg").read_text().count("</svg>") == 1
