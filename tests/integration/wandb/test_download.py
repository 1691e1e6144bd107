"""Runs read back from W&B are the runs that were sent there, to the last digit, and are asked for once."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cifar import registry
from cifar.errors import UserError
from cifar.integrations.wandb.download import download_runs
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.paths import WandbPath, parse_wandb_path
from cifar.report import style, write_report
from cifar.report.aggregate import compare_runs
from cifar.report.load import Run, collect_runs, load_run
from cifar.tracking.run_dir import RunDir
from helpers.fake_runs import NETWORKS, quickstart, rows, sweep_folder, write
from helpers.leet import write_checkpoint
from helpers.on_server import put, send
from helpers.paths import ROOT
from helpers.processes import wait_until
from helpers.protocol import Fault, Server

TEXT = "name: which\ndescription: Which network?\nmethod: grid\nparameters:\n  model: {values: [a, b]}\n"
SELVES = ("report.csv", "report.json")


def of(runs: tuple[Run, ...]) -> dict[str, Run]:
    """Without what has to differ: where the folder is, and the id of the process that wrote it."""
    return {run.id: replace(run, path=Path()) for run in runs}


def asked_of_runs(server: Server) -> Counter[str]:
    quiet = ("Viewer", "GetDefaultEntity", "GetSweep", "Runs", "ServerFeatures")
    return Counter(request.name for request in server.requests if request.name not in quiet)


@pytest.mark.parametrize("exported", [None, 0, 3])
@pytest.mark.slow
def test_what_comes_back_is_what_was_sent(tmp_path: Path, server: Server, exported: int | None) -> None:
    runs = tmp_path / "runs"
    write(runs, "abcd1234-000", layers=12, seed=1, sweep="abcd1234", cell=0, test=0.71, views=6, one_view=0.7)
    write(
        runs,
        "abcd1234-001",
        model="vgg11",
        sweep="abcd1234",
        cell=1,
        name="<b> 50 %",
        experiment=None,
        recipe={"b": [1, 2.0], "a": 1.0},
        wd=1.0,
    )
    write(runs, "odd", state="diverged", reason="loss is nan", dataset="stand-in")
    with (runs / "odd" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch":3,"step":1053,"train/loss":NaN,"train/acc":Infinity}\n')
    write(runs, "pruned", state="pruned")
    write(runs, "skipped", state="skipped", done=0)
    records = [RunDir(path.parent) for path in sorted(runs.glob("*/run.json"))]
    send(records)
    if exported is not None:
        for record in records:
            server.export(record.id, exported or None)
            server.runs[record.id].files.pop("metrics.jsonl", None)  # so that the history is read
    server.requests.clear()
    back, here = of(collect_runs(["me/cifar"], tmp_path).runs), of(collect_runs([str(runs)], tmp_path).runs)
    assert set(back) == set(here) == {record.id for record in records}
    assert bool(server.asked("HistoryPage") or server.asked("parquet")) == (exported is not None)
    for run_id, run in here.items():
        for name, value in vars(run).items():
            if name != "rows":
                assert json.dumps(vars(back[run_id])[name], default=str) == json.dumps(value, default=str), (run_id, name)
        assert [list(row.values()) for row in map(sorted_row, run.rows)] == [
            pytest.approx(list(row.values()), nan_ok=True, rel=0, abs=0) for row in map(sorted_row, back[run_id].rows)
        ]
    assert math.isnan(back["odd"].rows[-1]["train/loss"]) and back["odd"].rows[-1]["train/acc"] == math.inf
    assert back["abcd1234-000"].layers_with("gradient_norm") == here["abcd1234-000"].layers_with("gradient_norm")


def sorted_row(row: dict[str, float]) -> dict[str, float]:
    return dict(sorted(row.items()))


@pytest.mark.slow
def test_put_is_what_a_client_sends(tmp_path: Path, server: Server) -> None:
    record = write(tmp_path / "runs", "abcd1234-000", layers=3, sweep="abcd1234")
    send([record])
    sent = server.runs.pop(record.id)
    put(server, record)
    placed = server.runs[record.id]
    assert sent.files.items() >= placed.files.items()
    assert sent.config == placed.config and sent.rows == placed.rows and sent.state == placed.state
    numbers = {k: v for k, v in sent.summary.items() if k[0] != "_" and not isinstance(v, dict)}
    assert numbers == placed.summary


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_read_back_shows_what_it_got_wrong(mode: str, tmp_path: Path, server: Server) -> None:
    record = write(tmp_path / "runs", "one", predictions=True, layers=2)
    content = (record.path / "predictions.npz").read_bytes()
    if mode == "online":
        send([record])
    else:
        assert Mirror(record, "offline").finish()
    (place,) = ["me/cifar/one"] if mode == "online" else map(str, record.path.glob("wandb/offline-run-*"))
    (run,) = collect_runs([place], tmp_path).runs
    assert run.path.parent != record.path.parent and (run.path / "predictions.npz").read_bytes() == content
    if mode == "online":
        assert (run.path / "wandb" / "url.txt").read_text().endswith("/me/cifar/runs/one")  # the page links to it
    server.requests.clear()
    result = write_report([place], runs=tmp_path, out=tmp_path / "out")
    assert not asked_of_runs(server) and {"confusion.png", "mistakes.png"} <= {path.name for path in result.paths}


@pytest.mark.slow
def test_predictions_that_are_too_large_stay_here(tmp_path: Path, server: Server) -> None:
    record = write(tmp_path / "runs", "one", layers=2)
    (record.path / "predictions.npz").write_bytes(bytes(1_000_001))
    send([record])
    assert "predictions.npz" not in server.runs["one"].files
    (run,) = collect_runs(["me/cifar/one"], tmp_path).runs
    assert not (run.path / "predictions.npz").exists()


def write_quickstart(runs: Path, server: Server) -> str:
    """The same sweep here and on the server -> its id there."""
    quickstart(runs, layers=4, epochs=4)
    shutil.rmtree(runs / "abcd1234-000")
    write(runs, "abcd1234-000", model="worksheet1", seed=0, sweep="abcd1234", cell=0, layers=4, epochs=4)
    sweep = server.world.add_sweep("me", "cifar", TEXT)
    for path in runs.glob("*/run.json"):
        put(server, RunDir(path.parent), sweep.id)
    return sweep.id


@pytest.mark.slow
def test_figures_are_equal_to_the_last_digit(tmp_path: Path, server: Server) -> None:
    runs = tmp_path / "runs"
    names = str(runs), f"me/cifar/sweeps/{write_quickstart(runs, server)}"
    here, there = (compare_runs(collect_runs([name], runs).runs, title="the same") for name in names)
    for entry in registry.figures:
        if style.get_scope(entry) != "run":
            drawn = [style.encode_svg(style.render_figure(entry, each).figure, entry.name) for each in (here, there)]
            assert drawn[0] == drawn[1], entry.name


@pytest.mark.slow
def test_reports_are_equal_to_the_last_digit(tmp_path: Path, server: Server) -> None:
    runs = tmp_path / "runs"
    sweep_id = write_quickstart(runs, server)
    here = write_report([str(runs)], runs=runs, out=tmp_path / "here", budget=5e7)
    there = write_report([f"me/cifar/{sweep_id}"], runs=tmp_path / "none", out=tmp_path / "there", budget=5e7)
    assert (tmp_path / "here" / "report.csv").read_bytes() == (tmp_path / "there" / "report.csv").read_bytes()
    facts = [json.loads((result.page.parent / "report.json").read_text()) for result in (here, there)]
    assert facts[0]["points"] == facts[1]["points"] and facts[0]["apart"] == facts[1]["apart"]
    assert facts[1]["title"] == f"which ({sweep_id})" and "Which network?" in there.page.read_text()
    assert {path.name for path in here.paths} == {path.name for path in there.paths}


def test_finished_runs_are_asked_for_once(tmp_path: Path, server: Server) -> None:
    runs = tmp_path / "runs"
    records = [write(runs, f"r{n}", seed=n, layers=2) for n in range(5)]
    for record in records:
        put(server, record, with_metrics=False)
    seen: list[tuple[int, int]] = []
    first = collect_runs(["me/cifar"], runs, lambda done, total: seen.append((done, total))).runs
    assert seen[0] == (0, 5) and seen[-1] == (5, 5)
    assert asked_of_runs(server)["HistoryPage"] == 5
    server.requests.clear()
    assert collect_runs(["me/cifar"], runs).runs == first
    assert not asked_of_runs(server) and len(server.asked("Runs")) == 1
    assert "config" not in server.asked("Runs")[0].body["query"]
    write(runs, "r5", seed=5, layers=2)
    put(server, RunDir(runs / "r5"), with_metrics=False)
    server.requests.clear()
    assert len(collect_runs(["me/cifar"], runs).runs) == 6 and asked_of_runs(server)["HistoryPage"] == 1


def test_a_run_that_goes_on_is_read_from_its_last_step(tmp_path: Path, server: Server) -> None:
    record = write(tmp_path / "runs", "live", epochs=9, state="running", done=4, layers=2)
    put(server, record)
    (run,) = collect_runs(["me/cifar"], tmp_path).runs
    assert run.state == "running" and len(run.rows) == 4 and run.epoch == 4 and run.epochs == 9
    whole = write(tmp_path / "whole", "live", epochs=9, layers=2)
    created = server.runs.pop("live").created
    put(server, whole, with_metrics=False)
    server.runs["live"].created = created
    server.requests.clear()
    (run,) = collect_runs(["me/cifar"], tmp_path).runs
    assert run.state == "finished" and list(run.rows)[4:] == list(load_run(whole.path).rows)[4:] and len(run.rows) == 9
    (request,) = server.asked("HistoryPage")
    assert request.body["variables"]["minStep"] == 5


WAYS = ("file", "none", "cut-short", "empty", "changed", "earlier-end", "rows-after")


def test_the_file_of_the_rows_and_the_history_show_the_same(tmp_path: Path, server: Server) -> None:
    """The history is asked for where the file is not the one that cifar.json names, or W&B has other rows."""
    here = {}
    for way in WAYS:
        record = write(tmp_path / "runs", way, layers=3, epochs=4, wd=1.0, name="both")
        with (record.path / "metrics.jsonl").open("a") as file:
            file.write('{"epoch":5,"step":1755,"train/loss":NaN,"train/acc":Infinity,"val/acc":1}\n')
        here[way] = load_run(record.path)
        put(server, record, with_metrics=way != "none")
        files = server.runs[way].files
        content = files.get("metrics.jsonl", b"")
        first_rows = b"".join(content.splitlines(keepends=True)[:3])
        other = {
            "cut-short": content[:-30],
            "empty": b"",
            "changed": content.replace(b"0.", b"1.", 1),
            "earlier-end": first_rows,
            "rows-after": first_rows,
        }
        files |= {"metrics.jsonl": other[way]} if way in other else {}
        if way == "rows-after":  # the run went on, and what says so was lost
            named = {"md5": base64.b64encode(hashlib.md5(first_rows).digest()).decode(), "bytes": len(first_rows)}
            files["cifar.json"] = json.dumps({**json.loads(files["cifar.json"]), "metrics": named}).encode()
    back = {run.id: run for run in collect_runs(["me/cifar"], tmp_path).runs}
    assert back.keys() == set(WAYS)
    for way, run in back.items():
        assert repr(replace(run, path=Path(), rows=())) == repr(replace(here[way], path=Path(), rows=()))
        assert list(map(repr, map(sorted_row, run.rows))) == list(map(repr, map(sorted_row, here[way].rows))), way
    assert {request.body["variables"]["run"] for request in server.asked("HistoryPage")} == set(WAYS) - {"file"}
    folder = back["file"].path.parent
    assert {path.name for path in folder.iterdir()} == {*WAYS, "pull.lock"}, "nothing is left behind"


@pytest.mark.slow
def test_a_run_that_goes_on_after_its_end_is_not_read_from_its_file(tmp_path: Path, server: Server) -> None:
    record = write(tmp_path / "runs", "again", layers=2, epochs=6, state="failed", done=3)
    send([record])
    assert len(collect_runs(["me/cifar"], tmp_path).runs[0].rows) == 3 and not server.asked("HistoryPage")
    record.set_status("running", epoch=3, epochs=6)
    for row in rows("resnet20", 6, 0, 0.7, 2)[3:5]:
        record.append_row(row)
    write_checkpoint(record)
    mirror = Mirror(record, "online")
    mirror.sync()
    wait_until(lambda: len(server.runs["again"].rows) == 5, 20)
    assert "metrics.jsonl" in server.runs["again"].files  # of the earlier end
    server.requests.clear()
    (run,) = collect_runs(["me/cifar"], tmp_path).runs
    assert list(run.rows) == list(record.read_rows()) and len(server.asked("HistoryPage")) == 1
    record.set_status("stopped", reason="asked to end", epoch=5, epochs=6)
    assert mirror.finish()
    shutil.rmtree(run.path)
    server.requests.clear()
    (run,) = collect_runs(["me/cifar"], tmp_path).runs
    assert run.state == "stopped" and list(run.rows) == list(record.read_rows()) and not server.asked("HistoryPage")


def test_a_bad_run_is_named_and_the_others_are_reported(tmp_path: Path, server: Server) -> None:
    runs = tmp_path / "runs"
    for n in range(3):
        put(server, write(runs, f"r{n}", seed=n, layers=2), old_form=n == 1)
    put(server, write(runs, "alien", seed=7, layers=2))
    del server.runs["alien"].files["cifar.json"], server.runs["alien"].raw_config["cifar_schema"]
    put(server, write(runs, "r3", seed=11, layers=2))
    del server.runs["r3"].files["cifar.json"]  # it was lost; W&B's own fields say enough
    put(server, write(runs, "broken", seed=8, layers=2))
    server.runs["broken"].files["cifar.json"] = b'{"run": {"cost": {"macs": "many"}}, "config": {"lr": 1}}'
    put(server, write(runs, "cut-off", seed=9, layers=2))
    server.runs["cut-off"].files["cifar.json"] = server.runs["cut-off"].files["cifar.json"][:99]
    put(server, write(runs, "older", seed=10, layers=2), old_form=True)
    server.runs["older"].raw_config["cifar"] = {"value": "{"}
    found = collect_runs(["me/cifar"], runs)
    assert {run.id for run in found.runs} == {"r0", "r1", "r2", "r3"}
    assert {run.id for run in found.damaged} == {"alien", "broken", "cut-off", "older"}
    assert "its cifar.json is damaged" in next(run.reason for run in found.damaged if run.id == "cut-off")
    assert "not logged by this suite" in next(run.reason for run in found.damaged if run.id == "alien")
    result = write_report(["me/cifar"], runs=runs)
    assert any(note.startswith("Apart, damaged:") and "alien" in note for note in result.notes)
    assert result.page.parent == runs / "report" / "me_cifar"


def test_places_mix_and_no_run_counts_twice(tmp_path: Path, server: Server) -> None:
    runs = tmp_path / "runs"
    here = write(runs, "here", seed=0, layers=2)
    both = write(runs, "both", seed=1, layers=2)
    away = write(tmp_path / "other", "away", seed=2, layers=2)
    offline = write(tmp_path / "third", "offline", seed=3, layers=2)
    for record in (both, away, offline):
        put(server, record)
    for record in (offline, both):
        assert Mirror(record, "offline").finish()
    (folder,) = offline.path.glob("wandb/offline-run-*")
    del server.runs["offline"]
    wandb = tmp_path / "wandb"
    shutil.copytree(offline.path / "wandb", wandb)
    shutil.copytree(next(both.path.glob("wandb/offline-run-*")), wandb / "offline-run-2")
    (wandb / "offline-run-3").mkdir()
    (wandb / "offline-run-3" / "run-torn.wandb").write_bytes(b"rubbish")
    (wandb / "offline-run-4").mkdir()
    content = b"\xff\xff"  # not a record, but with the right checksum
    piece = struct.pack("<IHB", zlib.crc32(content, zlib.crc32(b"\x01")), len(content), 1) + content
    (wandb / "offline-run-4" / "run-odd.wandb").write_bytes(b":W&B\xe1\xbe\x00" + piece)
    found = collect_runs(["me/cifar", str(wandb), str(runs)], runs)
    assert sorted(run.id for run in found.runs) == ["away", "both", "here", "offline"]
    assert {run.id: run.path.parent for run in found.runs}["both"] == runs  # the record is the truth
    damaged = {run.id: run.reason for run in found.damaged}
    assert damaged.keys() == {"torn", "odd"} and "no .wandb file" in damaged["torn"] and "is damaged" in damaged["odd"]
    for name in (str(folder), str(next(folder.glob("*.wandb")))):
        (run,) = collect_runs([name], runs).runs
        assert of((run,)) == of((load_run(offline.path),))
    (both.path / "config.json").write_text("{")
    assert {run.id for run in collect_runs([str(runs), "me/cifar"], runs).runs} == {"here", "both", "away"}
    assert here.id == "here"


def test_a_cut_offline_file_gives_its_whole_rows(tmp_path: Path) -> None:
    record = write(tmp_path / "runs", "torn", layers=22, epochs=40)
    assert Mirror(record, "offline").finish()
    (file,) = record.path.glob("wandb/*/*.wandb")
    content = file.read_bytes()
    assert len(content) > 3 * 32768  # rows in pieces, over several blocks
    lone = tmp_path / "lone" / "run-torn.wandb"
    lone.parent.mkdir()
    lone.write_bytes(content[: len(content) // 2])
    (run,) = collect_runs([str(lone)], tmp_path).runs
    assert run.state == "running" and 5 < len(run.rows) < 40
    here = load_run(record.path)
    assert list(run.rows) == list(here.rows)[: len(run.rows)]
    lone.write_bytes(content)  # without cifar.json, which is another file: what W&B's own fields say
    (run,) = collect_runs([str(lone)], tmp_path).runs
    for name in ("name", "macs", "params", "verified", "official", "sweep", "config", "state", "rows"):
        assert getattr(run, name) == getattr(here, name), name
    assert run.summary.items() >= here.summary.items()


def test_a_server_in_trouble_costs_its_run_only(tmp_path: Path, server: Server) -> None:
    for n in range(3):
        put(server, write(tmp_path / "runs", f"r{n}", seed=n, layers=2))
        server.runs[f"r{n}"].files.pop("metrics.jsonl")
    server.fault = Fault("status", 500, where="HistoryPage", times=2)
    found = collect_runs(["me/cifar"], tmp_path)
    assert len(found.runs) + len(found.damaged) == 3 and len(found.runs) >= 1
    server.heal()
    assert len(collect_runs(["me/cifar"], tmp_path).runs) == 3


@pytest.mark.parametrize("where", ["HistoryPage", pytest.param("storage", marks=pytest.mark.slow)])
def test_a_server_that_hangs_is_given_up(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from cifar.integrations.wandb import download

    monkeypatch.setattr(download, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(download, "RUNS_PER_FULL_PAGE", 2)
    for n in range(5):
        put(server, write(tmp_path / "runs", f"r{n}", seed=n, layers=2), with_metrics=False)
    server.fault = Fault("hang", where=where)
    began = time.monotonic()
    assert {run.id for run in collect_runs(["me/cifar"], tmp_path).damaged} == {f"r{n}" for n in range(5)}
    assert time.monotonic() - began < 20


def test_names_of_places() -> None:
    assert parse_wandb_path("me/cifar") == WandbPath("me", "cifar")
    assert parse_wandb_path("me/cifar/abc") == WandbPath("me", "cifar", "abc")
    assert parse_wandb_path("me/cifar/sweeps/abc") == WandbPath("me", "cifar", "abc", "sweep")
    for address in (
        "https://wandb.ai/me/cifar/sweeps/abc?nw=x",
        "https://forge.coreweave.com/wandb/me/cifar/sweeps/abc",
        "http://localhost:8080/me/cifar/sweeps/abc/workspace",
    ):
        assert parse_wandb_path(address) == WandbPath("me", "cifar", "abc", "sweep"), address
    assert parse_wandb_path("https://wandb.ai/me/cifar/workspace?user=x") == WandbPath("me", "cifar")
    assert parse_wandb_path("https://wandb.ai/wandb/cifar/runs/abc") == WandbPath("wandb", "cifar", "abc", "run")
    for name in ("abc", "./runs/abc", "/runs/abc", "../a/b", "a/b/c/d", "runs/", "a//", ""):
        assert parse_wandb_path(name) is None, name


def test_what_is_not_there_is_one_sentence(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(server, write(tmp_path / "runs", "r0", layers=2))
    assert [run.id for run in collect_runs(["me/cifar/r0"], tmp_path).runs] == ["r0"]
    with pytest.raises(UserError, match=r"me/nothing cannot be read from W&B .*no such folder here"):
        collect_runs(["me/nothing"], tmp_path)
    with pytest.raises(UserError, match="no sweep and no run 'nope'"):
        collect_runs(["me/cifar/nope"], tmp_path)
    server.key = "x"
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="wandb login"):
        download_runs(WandbPath("me", "cifar"))
    assert capsys.readouterr().out == ""


def test_the_command(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    from cifar.cli.app import main

    sweep_folder(tmp_path / "runs", "abcd1234")
    for n in range(2):
        put(server, write(tmp_path / "runs", f"r{n}", seed=n, layers=2))
    assert main(["report", f"{server.url}/me/cifar", "--out", str(tmp_path / "out"), "--runs-dir", str(tmp_path / "no")]) == 0
    assert "resnet20" in capsys.readouterr().out and (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_a_thousand_runs(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 runs x 100 epochs, read by the command in a process of its own: cold, warm, and from the folders themselves."""
    runs = tmp_path / "runs"
    for n in range(1000):
        model = list(NETWORKS)[n % 8]
        put(server, write(runs, f"r{n:04d}", model=model, seed=n // 40, lr=0.1 + n // 8 % 5, layers=4, epochs=100))
    reports, lines = [], []
    for place in ("me/cifar", "me/cifar", str(runs)):
        server.requests.clear()
        command = [sys.executable, "-m", "cifar", "report", place, "--out", str(tmp_path / f"out{len(reports)}")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        began, used = time.monotonic(), os.times()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=600)
        seconds, after = time.monotonic() - began, os.times()
        busy = after.children_user + after.children_system - used.children_user - used.children_system
        lines.append(f"{place[:8]:<9}{seconds:6.1f} s, {busy:6.1f} s of CPU, {len(server.requests)} requests")
        reports.append((tmp_path / f"out{len(reports)}" / "report.csv").read_bytes())
        if len(reports) == 2:
            assert not asked_of_runs(server)
    assert reports[0] == reports[1] == reports[2] and reports[0].count(b"\n") == 41
    with capsys.disabled():
        print("\n" + "\n".join(lines))
