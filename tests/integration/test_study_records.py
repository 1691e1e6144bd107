"""The script of the study makes compact records of runs: a line a run, a row, an epoch, and commands that repeat rows."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from cifar.config.resolve import parse_pairs, resolve_config
from cifar.report.aggregate import compare_runs
from cifar.report.load import collect_runs
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


def test_runs_made_from_the_records_are_what_the_tables_say(tmp_path: Path) -> None:
    """The study's records -> run folders -> the report's reader: the points of rows.csv and recipes.csv, and what was lost."""
    script = runpy.run_path(str(SCRIPT.with_name("make_page.py")))
    for part, split in (("rows", "test"), ("recipes", "val")):
        script["rebuild_runs"]([part], tmp_path / part)
        runs = collect_runs([script["PAGES"][split][0]], tmp_path / part).runs
        points = {frozenset(run.id for run in point.runs): point for point in compare_runs(runs, split=split).points}
        lines = read(SCRIPT.with_name(f"{part}_runs.csv"))
        table = read(SCRIPT.with_name(f"{part}.csv"))
        commands = (SCRIPT.with_name(f"{part}_commands.txt")).read_text().splitlines()[1::2]
        for row, about in zip(table, commands, strict=True):
            point = points.pop(frozenset(about.partition(", runs ")[2].split()))
            assert (str(point.num_seeds), point.macs, point.params) == (row["n"], float(row["macs"]), int(row["params"])), about
            assert 100 * point.mean == pytest.approx(float(row[f"{split}_acc_mean"]), abs=6e-4), about
            assert " ".join(f"{100 * accuracy:.2f}" for accuracy in point.accuracies) == row["values"], about
            for name, column in (("seconds", "seconds_training"), ("joules", "joules"), ("train_flops", "train_flops")):
                known = row[f"{column}_mean"]
                assert point.mean_cost(name) == (pytest.approx(float(known), rel=1e-5) if known else None), (about, name)
        assert not points, "a point that the table does not have"
        assert len(runs) == len(lines) and {run.id for run in runs if run.state != "finished"} == {
            line["run"] for line in lines if line["state"] != "finished"
        }
        num_epochs = {line["run"]: int(line["epochs_done"]) for line in lines}
        assert {run.id: len(run.rows) for run in runs} == num_epochs and all("step" not in run.rows[0] for run in runs)
        no_other = {"val": "test", "test": "val"}[split]
        assert not any(run.accuracies_by_views(no_other) for run in runs), "validation and test are never in one report"


def test_only_what_the_records_say(tmp_path: Path) -> None:
    """A value that a line lacks is in no file of the run, and no time, process or folder of this machine is."""
    script = runpy.run_path(str(SCRIPT.with_name("make_page.py")))
    record = {run.id: run for run in script["rebuild_runs"](["ablation"], tmp_path)}["poamolmk-003"]  # its row has no command
    config = record.read_json("config")
    assert (config["lr"], config["augment_policy"], config["seed"], config["dataset"]) == (0.4, "trivialaugment", 0, "cifar10")
    assert not {"normalize", "momentum", "threads", "probes"} & {*config} and record.read_json("summary") == {}
    assert record.read_json("status") == {
        "state": "interrupted", "reason": "ended at epoch 32 of 100, validation accuracy 80.54 %", "epoch": 32, "epochs": 100,
    }  # fmt: skip
    assert record.read_json("environment") == {
        "versions": {"torch": "2.11.0"}, "device": "NVIDIA H200", "git": {"commit": "2d6c6c2", "dirty": False},
        "step": {"together": 3, "compiled": True},
    }  # fmt: skip
    about = record.read_json("run")
    assert (about["name"], about["created"]) == ("ablation: wrn_16_4, trivialaugment, seed 0, 100 epochs", 1795824000)
    assert about["tags"] == ["ablation"] and about["command"] == ""
    lost = next(line for line in read(SCRIPT.with_name("pilot_runs.csv")) if line["run"] == "otgtmjki-030")
    files = script["describe_files"]("pilots", lost, [], [])
    assert (files["status"]["state"], files["run"]["name"]) == (
        "interrupted",
        "pilots: airbench width 10, head_lr 105, lr 0.03, seed 0, 150 epochs",
    )
    assert (
        files["status"]["reason"] == "lost at epoch 118 of 150, validation accuracy 80.48 %"
        and "git" not in files["environment"]
    )


@pytest.mark.slow
def test_the_picture_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="SCIPY IS NOT INSTALLED: the study's script is not tried")
    names = "model,width,depth,macs,n,test_acc_mean,test_acc_std,seconds_training_mean,joules_mean,together\n"
    lines = "wrn,24,28,4e6,3,90.0,0.3,20,,1\nresnet8,4,,1e6,3,80.0,0.1,10,5.5,3\nresnet8,8,,2e6,1,,,10,,1\n"
    (tmp_path / "rows.csv").write_text(names + lines)
    script = runpy.run_path(str(SCRIPT.with_name("draw.py")))
    cheap, dear = script["select_rows"](read(tmp_path / "rows.csv"))
    assert (cheap.mmacs, cheap.joules, cheap.is_packed) == (1.0, 5.5, True)
    assert (dear.joules, dear.is_packed) == (None, False)
    assert script["name_rows"]([cheap, dear]) == ["ResNet-8, width 4", "WRN-28, width 24"]
    near = dataclasses.replace(dear, size=", width 30", mmacs=7.0)  # within 1.8 times: one label for both
    assert script["name_rows"]([cheap, dear, near]) == ["ResNet-8, width 4", "", "WRN-28, width 24, width 30"]
    pooled = ((2 * 0.3**2 + 2 * 0.1**2) / 4) ** 0.5
    assert cheap.half_width == dear.half_width == pytest.approx(2.7764 * pooled / 3**0.5, rel=1e-4)
    assert script["find_front"]([(3, 90.0), (1, 80.0), (2, 79.0), (4, 90.0)]) == [(1, 80.0), (3, 90.0)]
    assert script["main"](["--rows", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made.png").stat().st_size > 10_000 and (tmp_path / "made.svg").read_text().count("</svg>") == 1
