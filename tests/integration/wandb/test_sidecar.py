"""The companion process: what it leaves behind, on disk and in the process table, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar import sidecar
from cifar.integrations.wandb import mirror, mirror_process
from cifar.sidecar import SidecarHandle
from cifar.tracking.run_dir import RunDir
from helpers.leet import Inspected, draw_png, end_record, inspect_only, make_record, row, wandb_files
from helpers.paths import ROOT
from helpers.processes import is_alive, wait_until
from helpers.protocol import Fault, Server
from helpers.wandb_server import WandbServer

FAKE_KEY = "0123456789abcdef" * 3


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.chdir(ROOT)


@pytest.fixture(params=["never answers", pytest.param("answers only that it is there", marks=pytest.mark.slow)])
def silent_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A W&B that accepts connections and hangs, and a key for it."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        held = []

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])
                    if held[-1].recv(65536).startswith(b"GET /healthz"):
                        held[-1].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        if request.param != "never answers":
            threading.Thread(target=listen, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        yield request.param
        for each in held:
            each.close()


def exit_code(record: RunDir) -> int | None:
    """None too while the file is being written: half of a record, or not even the run's."""
    with contextlib.suppress(IndexError, subprocess.CalledProcessError):
        return Inspected(wandb_files(record)[0]).exit_code
    return None


def cores_of(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    return [
        int(p)
        for p, parent, name in (line.split(None, 2) for line in listing.splitlines())
        if int(parent) == pid and "wandb" in name
    ]


def grow(record: RunDir, epochs: range, seconds: float = 0.0) -> None:
    for epoch in epochs:
        record.append_row(row(epoch))
        time.sleep(seconds)


def test_follows_two_runs_to_their_ends(tmp_path: Path) -> None:
    log = tmp_path / "follow.log"
    follower = SidecarHandle("auto", log=log)
    records = [make_record(tmp_path, f"two0000{n}", epochs=4, sweep="s1") for n in (1, 2)]
    for record in records:  # one after the other, as a worker's trials
        follower.follow_run(record.path)
        grow(record, range(1, 5), 0.1)
        draw_png(record.path / "pictures" / "curves.png")
        end_record(record)
    assert follower.shut_down() is True, log.read_text()
    for record in records:
        seen = inspect_only(record)
        assert seen.rows == list(record.read_rows()) and seen.exit_code == 0
        assert seen.config == {**record.read_json("config"), "cifar_schema": 2}
        assert seen.run["run_id"] == record.id and any("curves" in file for file in seen.files)
    assert not is_alive(follower.pid)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_the_same_companion(tmp_path: Path) -> None:
    follower = SidecarHandle("offline")
    record = make_record(tmp_path, "inter001", epochs=4)
    follower.follow_run(record.path)
    grow(record, range(1, 3))
    wait_until(lambda: wandb_files(record))
    record.set_status("interrupted")
    follower.mark_writer_gone(record.path)
    wait_until(lambda: exit_code(record) == 1)
    record.set_status("running")
    follower.follow_run(record.path)
    grow(record, range(3, 5))
    end_record(record)
    assert follower.shut_down()
    assert inspect_only(record).rows == [row(epoch) for epoch in range(1, 5)]


@pytest.mark.slow
def test_a_run_that_goes_on_while_its_mirror_is_being_closed_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, left = make_record(tmp_path, "goeson01", epochs=2), list[bool]()
    companion = sidecar.Sidecar("offline", print)
    leave = mirror.Mirror.suspend

    def slow(self: mirror.Mirror) -> None:
        leave(self)
        if not left:
            companion.receive_message({"run": str(record.path)})
            left.append(True)

    monkeypatch.setattr(mirror.Mirror, "suspend", slow)
    companion.receive_message({"run": str(record.path)})
    grow(record, range(1, 2))
    wait_until(lambda: wandb_files(record))
    companion.receive_message({"close": str(record.path)})
    wait_until(lambda: left)
    grow(record, range(2, 3))
    end_record(record)
    assert companion.finish_runs(60.0, lambda: False)
    mirror_process.stop_core()
    assert inspect_only(record).rows == [row(1), row(2)]


def test_a_killed_companion_loses_nothing(tmp_path: Path) -> None:
    record = make_record(tmp_path, "killed01")
    first = SidecarHandle("offline")
    first.follow_run(record.path)
    grow(record, range(1, 4))
    wait_until(lambda: wandb_files(record))
    os.kill(first.pid, signal.SIGKILL)
    grow(record, range(4, 6))
    first.follow_run(record.path)  # into a broken pipe: training goes on
    assert first.shut_down() is False
    second = SidecarHandle("offline")
    second.follow_run(record.path)
    grow(record, range(6, 7))
    end_record(record)
    assert second.shut_down()
    assert inspect_only(record).rows == list(record.read_rows())


@pytest.mark.parametrize("held_open", [False, True])
def test_a_killed_parent_leaves_no_process(tmp_path: Path, held_open: bool) -> None:
    record = make_record(tmp_path, "orphan01")
    grow(record, range(1, 4))
    code = f"""
import os, time
from pathlib import Path
from cifar.sidecar import SidecarHandle
follower = SidecarHandle("offline")
follower.follow_run(Path({str(record.path)!r}))
if {held_open} and os.fork() == 0:  # as a data loader's worker would: it inherits the pipe
    time.sleep(20); os._exit(0)
print(follower.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    wait_until(lambda: cores_of(pid) and wandb_files(record))
    (core,) = cores_of(pid)
    parent.kill()
    killed = time.monotonic()
    wait_until(lambda: not is_alive(pid) and not is_alive(core), 5.0)
    assert time.monotonic() - killed < 5
    with contextlib.suppress(OSError):
        os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here: cannot take the network away")
def test_without_network_input_or_account(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("unshare -rn is not allowed here: cannot take the network away")
    record = make_record(tmp_path, "nonet001", epochs=3)
    grow(record, range(1, 4))
    end_record(record)
    code = f"""
from pathlib import Path
from cifar.sidecar import SidecarHandle
follower = SidecarHandle("auto")
follower.follow_run(Path({str(record.path)!r}))
assert follower.shut_down()
"""
    subprocess.run(["unshare", "-rn", sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=True, timeout=60, cwd=ROOT)
    assert inspect_only(record).rows == list(record.read_rows())


@pytest.mark.slow
def test_a_server_that_hangs_costs_its_grace_at_most(tmp_path: Path, silent_server: str) -> None:
    record = make_record(tmp_path, "hangs001", epochs=3)
    log = tmp_path / "follow.log"
    follower = SidecarHandle("auto", log=log, grace=60.0 if silent_server == "never answers" else 2.0)
    started = time.monotonic()
    follower.follow_run(record.path)
    grow(record, range(1, 4))
    end_record(record)
    assert time.monotonic() - started < 3.0  # of the 10 s and more that a silent server would hold it
    wait_until(lambda: cores_of(follower.pid))
    (core,) = cores_of(follower.pid)
    started = time.monotonic()
    assert follower.shut_down() is False
    assert time.monotonic() - started < 10.0  # wandb itself would wait for two minutes
    assert not is_alive(follower.pid) and not is_alive(core)
    assert ("does not answer" if silent_server == "never answers" else "took too long") in log.read_text()
    for file in [log, *record.path.rglob("*")]:
        assert not file.is_file() or FAKE_KEY.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_server_that_dies_while_a_run_is_finished_is_waited_for_no_longer(tmp_path: Path, wandb_server: Server) -> None:
    record = make_record(tmp_path, "diesend1", epochs=3)
    wandb_server.fault = Fault("hang", where="file_stream")
    follower = SidecarHandle("auto", log=tmp_path / "follow.log", grace=600.0)
    follower.follow_run(record.path)
    grow(record, range(1, 4))
    end_record(record)
    wait_until(lambda: record.id in wandb_server.runs)
    death = threading.Timer(3.0, wandb_server.die)  # it has answered that it is there
    death.start()
    assert follower.shut_down(timeout=100.0) is False
    death.join()
    assert "does not answer" in (tmp_path / "follow.log").read_text()  # and it was not ended after 100 seconds


@pytest.mark.slow
def test_a_queue_of_runs_is_waited_for_as_long_as_it_gets_shorter(tmp_path: Path, wandb_server: Server) -> None:
    wandb_server.fault = Fault("slow", 5.0, where="UpsertBucket")
    follower = SidecarHandle("auto", log=tmp_path / "follow.log", grace=20.0)
    records = [make_record(tmp_path, f"queue00{n}", epochs=1) for n in range(6)]
    for record in records:
        grow(record, range(1, 2))
        end_record(record)
        follower.follow_run(record.path)
    assert follower.shut_down() is True, (tmp_path / "follow.log").read_text()
    for record in records:
        assert (
            wandb_server.runs[record.id].rows == list(record.read_rows()) and wandb_server.runs[record.id].state == "finished"
        )


@pytest.mark.slow
def test_a_server_that_refuses_makes_it_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WandbServer(refusing=True)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    record = make_record(tmp_path, "dead0001", epochs=3)
    log = tmp_path / "follow.log"
    follower = SidecarHandle("auto", log=log, grace=30.0)
    follower.follow_run(record.path)
    grow(record, range(1, 4))
    end_record(record)
    assert follower.shut_down() is False  # W&B has not got it, a file has
    server.close()
    assert "offline run" in log.read_text() and FAKE_KEY not in log.read_text()
    assert inspect_only(record).rows == list(record.read_rows())


def test_disabled_does_not_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap" / "wandb"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(trap.parent))
    record = make_record(tmp_path, "none0001", epochs=2)
    follower = SidecarHandle("disabled", log=tmp_path / "follow.log")
    follower.follow_run(record.path)
    grow(record, range(1, 3))
    end_record(record)
    assert follower.shut_down()
    assert not (tmp_path / "imported").exists() and not (record.path / "wandb").exists()


def test_pictures_are_drawn_without_wandb(tmp_path: Path) -> None:
    report = pytest.importorskip("cifar.report")
    if not hasattr(report, "pictures"):
        pytest.skip("cifar.report.pictures is not there")
    record = make_record(tmp_path, "draw0001", epochs=2)
    follower = SidecarHandle("disabled", log=tmp_path / "follow.log")
    follower.follow_run(record.path)
    grow(record, range(1, 3))
    end_record(record)
    assert follower.shut_down()
    assert list((record.path / "pictures").glob("*.png")), (tmp_path / "follow.log").read_text()


@pytest.mark.slow
def test_many_ends_at_once_are_drawn_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "num_cores", lambda: 8)
    started, said, begin = [], [], subprocess.Popen

    def start(command: list[str], **more: object) -> object:
        started.append(begin(command, **more))
        return started[-1]

    monkeypatch.setattr(sidecar.subprocess, "Popen", start)
    records = [make_record(tmp_path, f"many000{n}", epochs=2) for n in range(7)]
    for record in records:
        grow(record, range(1, 3))
        end_record(record)
    (records[3].path / "config.json").write_text("{")  # its pictures cannot be drawn
    companion = sidecar.Sidecar("disabled", said.append)
    for record in records:  # before the first look, which comes every half second
        companion.receive_message({"run": str(record.path)})
    wait_until(lambda: all(each.drawn_end for each in companion._followed.values()), 60)
    assert companion.finish_runs(20, lambda: False)
    drawn = [record.id for record in records if list((record.path / "pictures").glob("*.png"))]
    assert drawn == [record.id for record in records if record is not records[3]]
    assert len(started) >= 2 and not any(is_alive(process.pid) for process in started)
    assert len(said) == 1 and records[3].id in said[0] and "no pictures" in said[0]


@pytest.mark.slow
def test_where_no_more_processes_can_be_started_it_draws_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "num_cores", lambda: 8)
    begin, started = subprocess.Popen, []

    def start(*given: object, **more: object) -> object:
        if started:
            raise BlockingIOError("no more processes")
        started.append(begin(*given, **more))
        return started[-1]

    monkeypatch.setattr(sidecar.subprocess, "Popen", start)
    records = [make_record(tmp_path, f"none000{n}", epochs=1) for n in range(4)]
    for record in records:
        grow(record, range(1, 2))
        end_record(record)
    companion = sidecar.Sidecar("disabled", print)
    for record in records:
        companion.receive_message({"run": str(record.path)})
    wait_until(lambda: all(each.drawn_end for each in companion._followed.values()), 60)
    assert companion.finish_runs(20, lambda: False) and not is_alive(started[0].pid)
    assert all(list((record.path / "pictures").glob("*.png")) for record in records)


@pytest.mark.slow
def test_no_room_for_the_wandb_files(tmp_path: Path) -> None:
    record = make_record(tmp_path, "full0001", epochs=2)
    (record.path / "wandb").write_text("a file in the folder's place")
    log = tmp_path / "follow.log"
    follower = SidecarHandle("offline", log=log)
    follower.follow_run(record.path)
    grow(record, range(1, 3))
    time.sleep(1.5)
    end_record(record)
    assert follower.shut_down() is False
    lines = [line for line in log.read_text().splitlines() if "not mirrored" in line]
    assert 1 <= len(lines) <= 2 and "full0001" in lines[0], log.read_text()


def test_ctrl_c_does_not_end_it(tmp_path: Path) -> None:
    follower = SidecarHandle("disabled")
    process = Path(f"/proc/{follower.pid}")
    wait_until(lambda: b"cifar.sidecar" in (process / "cmdline").read_bytes())
    assert os.getpgid(follower.pid) != os.getpgid(0)  # the terminal's Ctrl-C goes to the parent's group
    assert follower.shut_down()


@pytest.mark.slow
def test_garbage_is_survived(tmp_path: Path) -> None:
    follower = SidecarHandle("offline", log=tmp_path / "follow.log")
    broken = make_record(tmp_path, "broken01")
    (broken.path / "status.json").write_text("{")
    whole = make_record(tmp_path, "whole001", epochs=1)
    grow(whole, range(1, 2))
    end_record(whole)
    for folder in (tmp_path / "missing", broken.path, whole.path):
        follower.follow_run(folder)
    wait_until(
        lambda: json.loads((whole.path / "wandb" / "mirror.json").read_text())["offline"] if wandb_files(whole) else False
    )
    shutil.rmtree(broken.path)
    follower.shut_down()
    assert inspect_only(whole).rows == [row(1)]
