"""Ids and names from anywhere: none leaves the runs folder, moves the terminal's cursor or becomes a formula; none is empty."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cifar
from cifar.agent.dashboard import Board, LineDashboard, Row
from cifar.agent.rich_dashboard import draw_board
from cifar.cli import console
from cifar.cli.app import main
from cifar.cli.completion import complete_run
from cifar.errors import UserError
from cifar.integrations.wandb.paths import parse_sweep_path, parse_wandb_path
from cifar.report.facts import format_csv_cell
from cifar.sweeps.local import LocalBackend, find_sweep_id, list_sweeps
from cifar.tracking.run_dir import RunDir, find_run_dir
from cifar.training.callbacks import LineCallback
from helpers import fake_runs

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp.exe\rb"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # but newlines and tabs


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence; exit code 2 is checked here."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not OBEYED.search(said.out + said.err)
    return said.err


# -- empty ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweeps", "stop", ""],
        ["sweeps", "status", ""],
        ["sweeps", "retry", " "],
        ["sweeps", "extend", "", "x.yaml"],
        ["agent", ""],
        ["report", ""],
        ["report", "abcd1234-000", ""],
        ["push", ""],
        ["evaluate", ""],
        ["train", "--resume", ""],
        ["train", "--resume", "\t"],
        ["train", "--from", ""],
        ["train", "--experiment", ""],
        ["config", "--from", ""],
        ["sweeps", "status", "abcd1234", "--storage", ""],
    ],
)
def test_an_empty_id_is_an_error_also_where_there_is_one_only(
    arguments: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_runs.sweep_folder(runs)
    (runs / "sweeps" / "abcd1234" / "sweep.json").write_text('{"id": "abcd1234", "name": "only", "created": 1}')
    fake_runs.write(runs, "abcd1234-000", sweep="abcd1234")
    before = sorted(runs.rglob("*"))
    assert "is empty" in refuse(capsys, *arguments)
    assert sorted(runs.rglob("*")) == before


def test_an_empty_id_is_an_error_in_a_notebook(runs: Path) -> None:
    fake_runs.write(runs, "abcd1234-000")
    for ask in (
        lambda: cifar.load(""),
        lambda: cifar.runs(""),
        lambda: find_run_dir(" ", runs),
        lambda: find_sweep_id("", runs),
    ):
        with pytest.raises(UserError, match="is empty"):
            ask()


# -- ids stay in the runs folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RUN", "SWEEP"])
@pytest.mark.parametrize("given", ["../../x", "/tmp/x", "..", "a\nb", ".x", "sweeps", "a/b"])
def test_an_id_from_wandb_cannot_leave_the_runs_folder(
    kind: str, given: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trial.json").write_text('{"lr": 0.1}')
    for name, value in (("RUN", "abc"), ("SWEEP", "def"), (kind, given)):
        monkeypatch.setenv(f"WANDB_{name}_ID", value)
    said = refuse(capsys, "train", "--trial", str(tmp_path / "trial.json"), "dataset=stand-in", "--wandb", "disabled")
    assert f"WANDB_{kind}_ID" in said and sorted(tmp_path.iterdir()) == [tmp_path / "trial.json"]


@pytest.mark.parametrize("given", ["../x", "../../x", "/tmp/x", "sweeps", "", "a\0b"])
def test_no_run_folder_is_made_elsewhere(given: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no id|is empty"):
        RunDir.create(tmp_path / "runs", given, {}, {})
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("given", ["../../x", "a/../../x", "..", "x\x1b[31m"])
def test_no_sweep_is_opened_elsewhere(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no id"):
        LocalBackend(given, tmp_path / "runs")
    refuse(capsys, "sweeps", "stop", given)


def test_a_sweep_is_known_by_its_folder_whatever_its_file_says(runs: Path) -> None:
    fake_runs.sweep_folder(runs)
    (runs / "sweeps" / "abcd1234" / "sweep.json").write_text('{"id": "../../x", "name": "n", "created": 1}')
    assert [info["id"] for info in list_sweeps(runs)] == ["abcd1234"] and find_sweep_id("n", runs) == "abcd1234"


def test_names_on_wandb_are_no_folders() -> None:
    for name in ("https://wandb.ai/../..", "https://wandb.ai/%2e%2e/p", "https://wandb.ai/me/..", "me/.."):
        assert parse_wandb_path(name) is None, name
    for name in ("..", "me/../x", "me/p/..", "https://wandb.ai/me/%2e%2e/sweeps/x", "me/p/a\x1bb"):
        with pytest.raises(UserError):
            parse_sweep_path(name)


@pytest.mark.parametrize("run_id", ["../../escaped", "/tmp/escaped", "..", "a\x1bb"])
def test_an_offline_file_writes_nothing_elsewhere(run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto.wandb_internal_pb2 import Record, RunRecord

    from cifar.integrations.wandb import offline

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    victim = tmp_path / "cache" / "escaped"
    victim.mkdir(parents=True)
    run = RunRecord(run_id=run_id)
    run.config.update.add(key="cifar", value_json=json.dumps(json.dumps({"run": {"name": "n"}, "config": {"epochs": 1}})))
    payload = Record(run=run).SerializeToString()
    piece = struct.pack("<IHB", zlib.crc32(payload, zlib.crc32(b"\x01")), len(payload), 1) + payload
    file = tmp_path / "run-x.wandb"
    file.write_bytes(b":W&B" + struct.pack("<HB", 0xBEE1, 0) + piece)
    folders, damaged = offline.unpack_runs([file])
    assert folders == [] and "cannot be the name of a folder" in damaged[0][2]
    assert victim.is_dir() and sorted((tmp_path / "cache").rglob("*")) == [victim]


# -- terminals ---------------------------------------------------------------------------------------------------------


def test_nothing_printed_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(HOSTILE, [HOSTILE, console.Column("b", wraps=True, min_width=4)], [[HOSTILE, HOSTILE], ["x", "y"]])
    console.echo(HOSTILE)
    console.print_sentence(HOSTILE)
    console.print_json({HOSTILE: [HOSTILE, "\udc9b"]})
    LineDashboard().print_line(HOSTILE)
    LineCallback().on_message(HOSTILE)
    board = Board(HOSTILE, "val/acc", rows={n: Row(n, HOSTILE, values={"k": f"{HOSTILE}{n}"}) for n in range(2)}, best=HOSTILE)
    for width in (20, 80):
        for line in draw_board(board, width, 30):
            print(line.plain)
    for arguments in (
        ["train", f"{HOSTILE}=1"],
        ["train", f"model={HOSTILE}"],
        ["sweep", HOSTILE],
        ["sweeps", "status", HOSTILE],
    ):
        main(arguments)
    said = capsys.readouterr()
    assert not (found := OBEYED.search(said.out + said.err)), repr((said.out + said.err)[found.start() - 60 : found.end() + 20])
    assert "a\\x1b[31mred" in said.out


def test_json_keeps_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"name": HOSTILE, "plain": "Größe ✓"})
    text = capsys.readouterr().out
    assert json.loads(text) == {"name": HOSTILE, "plain": "Größe ✓"} and "Größe ✓" in text and not OBEYED.search(text)


def test_ids_that_are_none_are_not_completed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good", "bad\x1b[31m"):
        (runs / name).mkdir(parents=True)
        (runs / name / "run.json").write_text("{}")

    context: Any = SimpleNamespace(params={})
    assert complete_run(context) == ["good"]


def test_a_report_of_hostile_runs_is_plain(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names in records, as an earlier version or another program wrote them."""
    fake_runs.sweep_folder(runs, "abcd1234", f"name: {json.dumps(HOSTILE)}\nmethod: grid\n")
    (runs / "sweeps" / "abcd1234" / "sweep.json").write_text(
        json.dumps({"name": HOSTILE, "created": 1, "method": HOSTILE, "dataset": HOSTILE})
    )
    for cell in range(3):
        record = fake_runs.write(runs, f"abcd1234-{cell:03d}", sweep="abcd1234", cell=cell, swept=("note",), layers=2)
        about, values = (
            json.loads((record.path / "run.json").read_text()),
            json.loads((record.path / "config.json").read_text()),
        )
        (record.path / "run.json").write_text(json.dumps({**about, "name": HOSTILE, "command": HOSTILE}))
        (record.path / "config.json").write_text(json.dumps({**values, "note": f"=cmd|{cell}|{HOSTILE}"}))
    record.set_status("failed", reason=HOSTILE)
    for arguments in (["report", "abcd1234"], ["sweeps", "list"]):
        assert main(arguments) == 0
    said = capsys.readouterr()
    assert not OBEYED.search(said.out + said.err) and "a\\x1b[31mred" in said.out
    report = runs / "sweeps" / "abcd1234" / "report"
    written = [path for path in report.iterdir() if path.suffix != ".png"]
    assert {path.suffix for path in written} == {".html", ".csv", ".json", ".svg"}
    for path in written:
        assert not OBEYED.search(path.read_text()), path
    for row in csv.reader(io.StringIO((report / "report.csv").read_text())):
        for cell in row:
            assert not cell.startswith(("=", "+", "@", "-")) or re.fullmatch(r"[-+]?[\d.e-]+", cell), cell


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\tx", "'\tx"),
        ("\rx", "'\rx"),
        (" =1", "' =1"),
        ("\uff1d1", "'\uff1d1"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("adam", "adam"),
        ("a=b", "a=b"),
        ("", ""),
        (-0.5, -0.5),
        (None, None),
        (True, True),
    ],
)
def test_cells_are_no_formulas(value: object, cell: object) -> None:
    assert format_csv_cell(value) == cell
