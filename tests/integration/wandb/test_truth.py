"""What the server says of a run is true: lost rows, rows made again, early ends, pictures once, names, damaged notes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cifar.cli.app import main
from cifar.errors import UserError
from cifar.integrations.wandb import mirror as mirror_module
from cifar.integrations.wandb.backend import read_sweep_notes
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.mirror_process import kill_core, list_core_pids, stop_core
from cifar.integrations.wandb.notes import read_notes, read_or_set_aside
from cifar.tracking.run_dir import RunDir
from helpers.leet import draw_png, end_record, make_record, row, write_checkpoint
from helpers.processes import wait_until
from helpers.protocol import Fault, Run, Server


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "LOST_SECONDS", 4.0)  # wandb-core writes every 2 s, and then sends


def grow(record: RunDir, *epochs: int, seconds: float = 0.0, acc: float = 0.0) -> None:
    for epoch in epochs:
        record.append_row(
            {**row(epoch), **({"system/seconds": seconds} if seconds else {}), **({"val/acc": acc} if acc else {})}
        )


def is_as_recorded(run: Run, record: RunDir) -> bool:
    steps = [line["_step"] for line in run.history]
    return run.rows == list(record.read_rows()) and steps == [line["epoch"] for line in run.rows]


def assert_complete(run: Run, record: RunDir) -> None:
    assert is_as_recorded(run, record)
    assert (run.state, run.summary["state"], run.summary["val/acc"]) == ("finished", "finished", 0.6)
    assert len([name for name in run.files if "pictures/" in name]) == len(list(record.path.glob("pictures/*.png")))
    assert run.files["metrics.jsonl"] == (record.path / "metrics.jsonl").read_bytes()


SLOW_LOSSES = [pytest.param(name, marks=pytest.mark.slow) for name in ("what came after a backup", "all rows")]


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["the first rows", *SLOW_LOSSES])
def test_rows_that_the_server_loses_are_sent_again(tmp_path: Path, server: Server, lost: str) -> None:
    record = make_record(tmp_path, "lost0001", epochs=5)
    picture = draw_png(record.path / "pictures" / "curves.png")
    mirror = Mirror(record, "online")
    grow(record, 1)
    write_checkpoint(record)
    mirror.sync()
    run = server.runs[record.id]
    wait_until(lambda: run.rows, 10)
    memory = server.world.remember()
    grow(record, 2, 3)
    write_checkpoint(record)
    fault = Fault("lose", where="file_stream", times=1)
    server.fault = fault if lost == "the first rows" else None
    mirror.sync()
    wait_until(lambda: fault.met if server.fault else len(run.rows) == 3, 10)
    server.heal()
    if lost != "the first rows":
        server.world.restore(memory if lost == "what came after a backup" else {})
    grow(record, 4, 5)
    end_record(record)
    assert not mirror.finish([picture], 0.0) and run.state != "finished"
    assert mirror.finish([picture], 20.0)
    assert_complete(server.runs[record.id], record)


@pytest.mark.slow
def test_a_run_stays_open_until_the_server_has_its_rows(tmp_path: Path, server: Server) -> None:
    record = make_record(tmp_path, "waits001", epochs=3)
    mirror = Mirror(record, "online")
    grow(record, 1, 2, 3)
    end_record(record)
    server.fault = Fault("status", 500, where="file_stream")
    assert not mirror.finish((), 0.5) and mirror.is_open
    run = server.runs[record.id]
    assert run.state == "running" and not run.exits
    server.heal()
    assert mirror.finish((), 20.0)
    assert_complete(run, record)


@pytest.mark.slow
def test_a_core_that_is_killed_before_the_end(tmp_path: Path, server: Server) -> None:
    record = make_record(tmp_path, "killed01", epochs=3)
    mirror = Mirror(record, "online")
    grow(record, 1, 2)
    write_checkpoint(record)
    assert mirror.sync() == 2
    run = server.runs[record.id]
    wait_until(lambda: len(run.rows) == 2, 10)
    kill_core()
    wait_until(lambda: not list_core_pids(), 10)
    grow(record, 3)
    end_record(record)
    with pytest.raises(Exception, match=r".*"):  # wandb's; the sidecar starts another core then
        mirror.finish()
    assert run.state == "running" and not run.exits
    stop_core()
    mirror.suspend()
    assert mirror.finish()
    assert_complete(run, record)


@pytest.mark.slow
def test_sending_again_is_no_progress(tmp_path: Path, server: Server) -> None:
    """Else whoever waits for progress would wait for ever behind a server that loses all."""
    record, said = make_record(tmp_path, "noprog01", epochs=2), list[str]()
    grow(record, 1, 2)
    end_record(record)
    mirror = Mirror(record, "online", said.append)
    assert mirror.progress == (False, -1)
    server.fault = Fault("lose", where="file_stream")
    assert not mirror.finish(patience=0.1) and mirror.progress == (True, 0)
    wait_until(lambda: mirror.finish(patience=0.1) or said, 30)
    assert "sending the rest again" in said[0] and mirror.progress == (True, 0)
    server.heal()
    wait_until(lambda: mirror.finish(patience=0.1), 30)
    assert_complete(server.runs[record.id], record)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["wandb-core is killed", "the server loses them"])
def test_pictures_whose_files_have_not_arrived_are_sent_again(tmp_path: Path, server: Server, end: str) -> None:
    """The row that names them is there."""
    record = make_record(tmp_path, "files001", epochs=2)
    picture = draw_png(record.path / "pictures" / "curves.png")
    mirror = Mirror(record, "online")
    grow(record, 1, 2)
    end_record(record)
    if end == "wandb-core is killed":
        server.fault = Fault("hang", where="storage")
        killer = threading.Thread(target=lambda: [wait_until(lambda: is_named(server, record), 20), kill_core()])
        killer.start()
        with pytest.raises(Exception, match=r".*"):  # wandb's; the sidecar starts another core then
            mirror.finish([picture])
        killer.join()
        stop_core()
        mirror.suspend()
        server.heal()
        assert not server.runs[record.id].files
    else:
        assert mirror.finish([picture])
        server.runs[record.id].files.clear()
        server.runs[record.id].base_state = "running"
        mirror.forget()
    assert Mirror(record, "online").finish([picture])
    run = server.runs[record.id]
    assert_complete(run, record)
    (name,) = (name for name in run.files if "pictures/" in name)
    assert run.files[name] == picture.read_bytes()
    assert run.history[-1]["pictures/curves"]["path"] == name


def is_named(server: Server, record: RunDir) -> bool:
    """Whether the last row names the picture."""
    run = server.runs.get(record.id)
    return bool(run and any("pictures/curves" in line for line in run.history))


@pytest.mark.parametrize("rewinds", [True, False])
@pytest.mark.slow
def test_rows_that_were_made_again(tmp_path: Path, server: Server, rewinds: bool) -> None:
    server.world.rewinds = rewinds
    record = make_record(tmp_path, "again001", epochs=4)
    picture = draw_png(record.path / "pictures" / "curves.png")
    grow(record, 1)
    write_checkpoint(record)
    grow(record, 2, 3)
    record.set_status("failed", reason="RuntimeError: a bug")
    assert Mirror(record, "online").finish([picture])
    run = server.runs[record.id]
    assert (run.state, run.summary["state"], run.summary["reason"]) == ("failed", "failed", "RuntimeError: a bug")
    record.truncate_metrics(len((record.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]))
    record.set_status("running")
    grow(record, 2, acc=0.77)
    grow(record, 3, seconds=77.0)
    write_checkpoint(record)
    mirror = Mirror(record, "online")
    mirror.sync()
    assert run.summary["state"] != "failed" or wait_until(lambda: run.summary["state"] == "running", 10)
    grow(record, 4)
    end_record(record)
    assert mirror.finish([picture])
    if rewinds:
        return assert_complete(run, record)
    # nothing can be taken back: epoch 2 stands there twice, and its later row is the record's; epoch 3 has its first time
    there = {line["epoch"]: line for line in run.rows}
    here = list(record.read_rows())
    assert [line["epoch"] for line in run.rows] == [1, 2, 3, 4, 2, 4]
    assert there[2] == here[1] and there[3] == row(3) and there[4] == here[3] and run.state == "finished"
    assert main(["push", record.id]) == 0 and len(run.rows) == 6
    return None


@pytest.mark.slow
def test_rows_that_nobody_can_take_back_keep_a_run_incomplete(tmp_path: Path, server: Server) -> None:
    server.world.rewinds = False
    record = make_record(tmp_path, "extra001", epochs=9)
    grow(record, 1, 2, 3)
    record.set_status("failed", reason="x")
    assert Mirror(record, "online").finish()
    run = server.runs[record.id]
    record.truncate_metrics(0)
    grow(record, 1, 2)
    record.set_status("pruned", reason="stopped early")
    said: list[str] = []
    mirror = Mirror(record, "online", said.append)
    assert not mirror.finish()
    wait_until(lambda: run.summary["state"] == "incomplete", 10)
    assert run.state != "finished" and "epochs that the record does not have (3)" in run.summary["reason"]
    assert "incomplete on W&B" in said[-1]
    mirror.release()


@pytest.mark.slow
@pytest.mark.parametrize("state", ["interrupted", "preempted", "diverged", "stopped"])
def test_each_end_says_what_it_is(tmp_path: Path, server: Server, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "LOST_SECONDS", 60.0)  # nothing is lost here; a busy machine needs its time
    record = make_record(tmp_path, "ends0001", epochs=9)
    grow(record, 1)
    write_checkpoint(record)
    monkeypatch.setenv("MY_SECRET", "correct-horse")
    mirror = Mirror(record, "online")
    mirror.sync()
    record.set_status(state, reason="asked to end by correct-horse")
    if state in ("interrupted", "preempted"):
        mirror.suspend()
    else:
        assert mirror.finish((), 60.0)
    run = server.runs[record.id]
    assert run.state == "failed" and run.exits == [255 if state == "stopped" else 1]
    assert (run.summary["state"], run.summary["reason"]) == (state, "asked to end by ***")


DAMAGES = {
    "has 2 of 3 rows": lambda run: run.history_lines.pop(),
    "last row": lambda run: run.history_lines.append(run.history_lines.pop().replace("0.3", "0.4")),
    "calls the run running": lambda run: setattr(run, "base_state", "running"),
    "lacks the files of pictures/curves": lambda run: run.files.pop(next(name for name in run.files if "curves" in name)),
    "does not have cifar.json": lambda run: run.files.clear(),
    "does not have cifar.json as it is here": lambda run: run.files.update({"cifar.json": b"{}"}),
    "does not have metrics.jsonl as it is here": lambda run: run.files.update({"metrics.jsonl": b"{"}),
    "summary has other values of val/acc": lambda run: run.summary.update({"val/acc": 0.1}),
    "does not have the run": lambda run: setattr(run, "project", "elsewhere"),
}


@pytest.mark.slow
def test_push_reads_back_what_arrived(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record(runs, "check001", epochs=3)
    picture = draw_png(record.path / "pictures" / "curves.png")
    grow(record, 1, 2, 3)
    end_record(record)
    assert Mirror(record, "online").finish([picture])
    for said, damage in DAMAGES.items():
        damage(server.runs[record.id])
        if said == "does not have the run":
            del server.runs[record.id]
        assert main(["push", record.id]) == 0
        output = capsys.readouterr().out
        assert f"is not on W&B as it is here: W&B {said}" in output.replace("W&B's", "W&B") and "(1 sent now)" in output
        assert_complete(server.runs[record.id], record)
    server.requests.clear()
    (record.path / "wandb" / "mirror.json").unlink()  # what it knew; W&B is asked
    assert main(["push", record.id]) == 0 and "(0 sent now)" in capsys.readouterr().out
    assert not server.asked("UpsertBucket") and not server.asked("file_stream")


@pytest.mark.slow
def test_wandb_sync_and_then_push(runs: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record(runs, "sync0001", epochs=3)
    grow(record, 1, 2, 3)
    end_record(record)
    assert Mirror(record, "offline").finish([draw_png(record.path / "pictures" / "curves.png")])
    stop_core()
    (folder,) = record.path.glob("wandb/offline-run-*")
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)], check=True, capture_output=True, timeout=100)
    assert_complete(server.runs[record.id], record)
    assert main(["push", record.id]) == 0 and "(0 sent now)" in capsys.readouterr().out
    (record.path / "summary.json").write_text(json.dumps({**record.read_json("summary"), "late": 1}))
    assert main(["push", record.id]) == 0 and "(1 sent now)" in capsys.readouterr().out
    assert_complete(server.runs[record.id], record)


@pytest.mark.slow
def test_a_run_of_the_plain_agent_is_named_after_what_differs(tmp_path: Path, server: Server) -> None:
    text = "description: Which rate?\nmethod: grid\nmetric: {name: val/acc, goal: maximize}\n"
    text += "parameters:\n  lr: {values: [1.0e-5, 2.0]}\n"
    text += "  epochs: {value: 1}\n  nesterov: {values: [true]}\n"
    sweep = server.world.add_sweep("me", "cifar", text)
    for number, (given, expected) in enumerate(
        (("worksheet1 lr=1e-05 nesterov=True", "worksheet1 lr=1e-05"), ("my own", "my own"))
    ):
        record = make_record(tmp_path, f"plain00{number}", epochs=1, sweep=sweep.id)
        about: dict[str, Any] = {**record.read_json("run"), "engine": "wandb", "cell": None, "name": given}
        record.write_json("run", {**about, "swept": ["lr", "nesterov"]})
        grow(record, 1)
        end_record(record)
        assert Mirror(record, "online").finish()
        assert server.runs[record.id].display_name == record.read_json("run")["name"] == expected
        assert record.read_json("run")["swept"] == (["lr"] if number == 0 else ["lr", "nesterov"])
        assert server.runs[record.id].notes == "Which rate?"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_damaged_notes_are_a_sentence_or_kept_aside(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "sweeps" / "abc" / "wandb.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"wandb.json is damaged .*restore it, or delete it"):
        read_sweep_notes("abc", tmp_path)
    assert file.read_bytes() == content
    assert read_or_set_aside(file) == {} and not file.exists()
    assert file.with_name("wandb.json.damaged").read_bytes() == content
    file.mkdir()
    with pytest.raises(UserError, match="is damaged"):
        read_notes(file)
