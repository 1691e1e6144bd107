"""The fields of a run's files: what is written passes, and each wrong kind is named with its field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cifar.errors import UserError
from cifar.report.load import collect_runs, load_run
from cifar.tracking.cleanup import find_leftovers
from cifar.tracking.records import UnknownSchemaError
from cifar.tracking.run_dir import RunDir, list_run_dirs
from helpers import hostile
from helpers.fake_runs import write


def change(folder: Path, name: str, /, **fields: Any) -> None:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("status", {"epoch": math.inf}),
        ("status", {"epoch": 1.5}),
        ("status", {"epoch": True}),
        ("status", {"epochs": "3"}),
        ("status", {"pid": "x"}),
        ("status", {"pid": 2**40}),
        ("status", {"state": "well"}),
        ("status", {"time": 1e300}),
        ("status", {"reason": ["x"]}),
        ("run", {"created": 1e300}),
        ("run", {"created": math.nan}),
        ("run", {"name": {"x": 1}}),
        ("run", {"name": "x" * 5000}),
        ("run", {"swept": "lr"}),
        ("run", {"swept": [1]}),
        ("run", {"cell": -1}),
        ("run", {"official": 1}),
        ("run", {"cost": {"params": math.inf}}),
        ("run", {"cost": {"macs": -1}}),
        ("run", {"cost": {"macs": True}}),
        ("run", {"cost": [1]}),
        ("run", {"cost": {"verified": "yes"}}),
        ("summary", {"seconds": "x"}),
        ("summary", {"seconds": -1}),
        ("summary", {"val/acc": "1"}),
        ("summary", {"test/acc": True}),
        ("summary", {"test/views": 0.5}),
        ("labels", {"layers": [None]}),
        ("labels", {"layers": {}}),
        ("config", {"epochs": math.inf}),
        ("config", {"epochs": -1}),
        ("config", {"seed": "0"}),
        ("config", {"keep": math.nan}),
        ("config", {"model": 5}),
        ("config", {"train_size": True}),
        ("config", {"note": "x" * 5000}),
    ],
)
def test_a_wrong_kind_is_named_and_the_other_runs_are_read(tmp_path: Path, file: str, fields: dict[str, Any]) -> None:
    for name in ("good", "bad"):
        write(tmp_path, name)
    change(tmp_path / "bad", file, **fields)
    collection = collect_runs([str(tmp_path)], tmp_path)
    assert [run.id for run in collection.runs] == ["good"]
    (damaged,) = collection.damaged
    field = next(iter(fields))
    assert damaged.id == "bad" and field in damaged.reason and f"{file}.json" in damaged.reason, damaged.reason


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("run", {"entity": None, "cell": 7.0, "cost": {"macs": 5e6, "params": 10.0, "verified": True, "more": [1]}}),
        ("run", {"schema": 1, "something": {"new": [1]}}),
        ("run", {"schema": 1.0, "swept": None}),
        ("summary", {"val/loss": math.nan, "best/val/acc": None, "mine": "text"}),
        ("status", {"epoch": 3.0, "pid": None}),
        ("labels", {"layers": None}),
        ("config", {"epochs": 3.0, "lr": "schedule", "compile": False, "own": [1, 2]}),
    ],
)
def test_what_an_earlier_version_or_wandb_wrote_is_read(tmp_path: Path, file: str, fields: dict[str, Any]) -> None:
    write(tmp_path, "one")
    change(tmp_path / "one", file, **fields)
    assert load_run(tmp_path / "one").id == "one"


@pytest.mark.parametrize("schema", [2, "1", -1, None, [1]])
def test_an_unknown_schema_is_said(tmp_path: Path, schema: Any) -> None:
    write(tmp_path, "one")
    change(tmp_path / "one", "run", schema=schema)
    with pytest.raises(UnknownSchemaError, match="reads schema 1"):
        RunDir(tmp_path / "one").read_json("run")
    with pytest.raises(UserError, match=r"left out: .*has schema") as caught:
        load_run(tmp_path / "one")
    assert "delete" not in str(caught.value), "nobody has to delete the run of a newer version"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"epoch":Infinity}', "epoch"),
        ('{"epoch":1.5}', "epoch"),
        ('{"epoch":-1}', "epoch"),
        ('{"epoch":true}', "epoch"),
        ("[]", "no row"),
        ('{"epoch":1,"val/acc":true}', "val/acc"),
        ('{"epoch":1,"train/loss":"1"}', "train/loss"),
        ('{"epoch":1,"x":' + "9" * 400 + "}", "digits"),
        ('{"epoch":1,"x":' + "9" * 5000 + "}", "digits"),
        ("{", "line 2"),
        ('{"epoch":1,"x":' + "[" * 2000 + "]" * 2000 + "}", "deeply"),
        ('{"a\\ud800":1}', "Unicode"),
    ],
)
def test_a_row_that_is_none_names_its_line(tmp_path: Path, line: str, said: str) -> None:
    run = write(tmp_path, "one")
    (run.path / "metrics.jsonl").write_text(f'{{"epoch":1}}\n{line}\n')
    with pytest.raises(UserError, match="line 2") as caught:
        list(run.read_rows())
    assert said in str(caught.value)


def test_metrics_that_would_fill_the_memory_as_a_table_are_refused(tmp_path: Path) -> None:
    run = write(tmp_path, "one")
    (run.path / "metrics.jsonl").write_text("".join(f'{{"epoch":{i},"a/{i}":1}}\n' for i in range(3000)))
    with pytest.raises(UserError, match="other metrics in nearly every row"):
        load_run(run.path)


@pytest.mark.parametrize("kind", hostile.KINDS)
@pytest.mark.parametrize(
    "name", ["run.json", "config.json", "status.json", "metrics.jsonl", "checkpoint.pt", ".status.json.x1"]
)
def test_gc_goes_on_past_a_damaged_run(tmp_path: Path, name: str, kind: str) -> None:
    for run_id in ("good", "bad"):
        (write(tmp_path, run_id).path / "checkpoint.pt").write_bytes(bytes(10))
    hostile.place_input(hostile.Input(kind=kind), tmp_path / "bad" / name)
    damaged: list[str] = []
    found = find_leftovers(tmp_path, days=30, damaged=damaged)
    assert tmp_path / "good" / "checkpoint.pt" in [leftover.path for leftover in found]
    assert "good" in [run.id for run in list_run_dirs(tmp_path)]
    assert all("bad" in sentence for sentence in damaged)
