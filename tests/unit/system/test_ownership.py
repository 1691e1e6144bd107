"""The ownership of a run's folder: one process at a time, free at once after a death, and a late owner that writes nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cifar.errors import UserError
from cifar.system import ownership
from cifar.system.ownership import LEASE_FILE, LOCK_FILE, OwnershipLostError, RunLock, RunOwnedError, find_owner
from cifar.tracking.run_dir import RunDir
from helpers.owners import ask_for_row, read_line, start_owner, start_python, startup_environment
from helpers.processes import wait_until


@pytest.fixture
def record(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs", "abc", {"name": "a run"}, {"lr": 0.1})


def list_files(record: RunDir) -> list[str]:
    return sorted(path.name for path in record.path.iterdir())


def list_writers(record: RunDir) -> list[str]:
    return [row["by"] for row in record.read_rows()]


def change_lease(record: RunDir, **changes: Any) -> None:
    path = record.path / LEASE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_owner_refuses_others_in_one_sentence_and_leaves_nothing_behind(record: RunDir) -> None:
    before = list_files(record)
    lock = RunLock(record.path)
    with lock:
        assert list_files(record) == sorted([*before, LEASE_FILE, LOCK_FILE])
        for doing in ("trained", "removed"):
            with pytest.raises(RunOwnedError, match=rf"^run abc is being trained by process {os.getpid()} on \S+ since 20"):
                RunLock(record.path, doing).acquire()
        owner = find_owner(record.path)
        assert owner and owner.pid == os.getpid() and owner.has_flock
    assert list_files(record) == before and not lock.is_held and find_owner(record.path) is None
    with RunLock(record.path):
        pass
    assert list_files(record) == before


@pytest.mark.parametrize("refused", ["", "ENOLCK", "ENOTSUP"])
def test_a_killed_owner_of_this_machine_is_replaced_at_once(
    record: RunDir, tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_LEASE", "1000")
    environment = startup_environment(tmp_path, **({"TEST_NO_FLOCK": refused} if refused else {}))
    first = start_owner(record.path, environment)
    assert read_line(first) == "owns" and ask_for_row(first, "first") == "wrote"
    second = start_owner(record.path, environment)
    assert read_line(second).startswith(f"refused run abc is being trained by process {first.pid} on ")
    assert second.wait(20) == 2
    os.kill(first.pid, signal.SIGKILL)  # and not waited for: a zombie owns nothing
    wait_until(lambda: find_owner(record.path) is None)
    assert (record.path / LEASE_FILE).exists() and find_owner(record.path) is None
    third = start_owner(record.path, environment)
    assert read_line(third) == "owns" and ask_for_row(third, "third") == "wrote"
    third.communicate(timeout=20)
    first.communicate(timeout=20)
    assert list_writers(record) == ["first", "third"] and LEASE_FILE not in list_files(record)


def test_a_stopped_owner_keeps_its_run_where_locks_work(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_LEASE", "0.5")
    owner = start_owner(record.path)
    assert read_line(owner) == "owns"
    os.kill(owner.pid, signal.SIGSTOP)
    time.sleep(1.0)
    with pytest.raises(RunOwnedError, match=f"by process {owner.pid} on"):
        record.acquire()
    os.kill(owner.pid, signal.SIGCONT)
    assert ask_for_row(owner, "still") == "wrote"
    owner.communicate(timeout=20)
    assert list_writers(record) == ["still"]


@pytest.mark.slow
def test_an_owner_elsewhere_keeps_its_run_while_it_lives_and_loses_it_after_the_lease(
    record: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines, no locks. The one that was stopped for longer than the lease finds out before it writes."""
    monkeypatch.setenv("CIFAR_LEASE", "1")
    there = startup_environment(tmp_path, TEST_NO_FLOCK="ENOLCK", TEST_HOST="elsewhere")
    here = startup_environment(tmp_path, TEST_NO_FLOCK="ENOLCK")
    old = start_owner(record.path, there)
    assert read_line(old) == "owns" and ask_for_row(old, "old") == "wrote"
    refused = start_owner(record.path, here)  # watches for the whole lease, and sees it beat
    assert read_line(refused).startswith(f"refused run abc is being trained by process {old.pid} on elsewhere since")
    assert ask_for_row(old, "old again") == "wrote"
    os.kill(old.pid, signal.SIGSTOP)
    new = start_owner(record.path, here)
    assert read_line(new) == "owns" and ask_for_row(new, "new") == "wrote"
    before = {path.name: path.read_bytes() for path in record.path.iterdir()}
    os.kill(old.pid, signal.SIGCONT)
    said = ask_for_row(old, "late")
    assert said.startswith(f"stopped run abc was taken over while this process ({old.pid}) gave no sign of life")
    assert f"by process {new.pid} on" in said and old.wait(20) == 2
    assert {path.name: path.read_bytes() for path in record.path.iterdir()} == before
    assert ask_for_row(new, "new again") == "wrote"
    for process in (old, refused, new):
        process.communicate(timeout=20)
    assert list_writers(record) == ["old", "old again", "new", "new again"]


def test_only_the_observers_own_clock_counts(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the files say about the time may jump by years in both directions."""
    monkeypatch.setenv("CIFAR_LEASE", "0.6")
    with RunLock(record.path):
        change_lease(record, host="elsewhere", boot="another", machine="another")
        lease, observer = record.path / LEASE_FILE, ownership.LeaseObserver(record.path)
        for jump in (-3e8, 3e9, -4e9, 1.0, 2.0, -5.0):  # each is a sign of life
            os.utime(lease, (time.time() + jump,) * 2)
            assert observer.find_owner()
            time.sleep(0.25)
        monkeypatch.setattr(ownership.RunLock, "beat", lambda lock: None)
        wait_until(lambda: observer.find_owner() is None, 10)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "alive"),
        ({"start": "1"}, "dead"),  # a recycled process id
        ({"pid": 2**22 + 1}, "dead"),  # more than Linux gives
        ({"boot": "an earlier one"}, "dead"),  # this machine was started again
        ({"boot": "another", "host": "elsewhere"}, "unknown"),
        ({"boot": "another", "machine": ""}, "unknown"),  # machines of one name, as containers of one image
        ({"namespace": "pid:[1]"}, "unknown"),  # another container of this machine
        ({"namespace": "pid:[1]", "has_flock": True}, "dead"),  # the same, but here its lock is known to be gone
        ({"start": "", "has_flock": False}, "unknown"),
        ({"token": ""}, "unknown"),
    ],
)  # fmt: skip
def test_what_is_known_of_an_owner(record: RunDir, changes: dict[str, Any], verdict: str) -> None:
    if not ownership._boot_id():
        pytest.skip("THIS SYSTEM TELLS NO BOOT ID: judging leases was not shown")
    lease = ownership.Lease.of_this_process(record.path, "trained", has_flock=False)
    lease = ownership.Lease(**{**lease.__dict__, "machine": "", **{"machine": ownership._machine_id()}, **changes})
    assert ownership._judge(lease, record.path, have_flock=lease.has_flock) == verdict


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"pid": "x"}', b'{"since": "1e999", "pid": 1e400}', b"\xff" * 9000, b"[" * 4000, b"null"]
)
def test_a_damaged_lease_is_one_of_nobody_and_free_after_its_time(
    record: RunDir, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_LEASE", "0.05")
    monkeypatch.setattr(ownership, "SETTLE_SECONDS", 0.01)
    (record.path / LEASE_FILE).write_bytes(content)
    with pytest.raises(RunOwnedError, match="run abc is being used by another process"):
        record.acquire(wait=False)
    record.acquire()
    record.append_row({"epoch": 1})
    record.release()
    assert LEASE_FILE not in list_files(record)


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_file_is_named(record: RunDir, kind: str) -> None:
    path = record.path / LEASE_FILE
    {"fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    with pytest.raises(UserError, match=r"owner\.json is no file of a run's owner; delete it"):
        record.acquire()
    assert LOCK_FILE not in list_files(record)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_lock_that_is_no_file_is_named_and_a_link_is_not_followed(record: RunDir, kind: str, tmp_path: Path) -> None:
    path, other = record.path / LOCK_FILE, tmp_path / "other"
    other.write_text("mine")
    path.mkdir() if kind == "folder" else path.symlink_to(other)
    with pytest.raises(UserError, match=r"owner\.lock is no file of a run's owner; delete it"):
        record.acquire()
    assert other.read_text() == "mine" and LEASE_FILE not in list_files(record)


def test_a_hostile_lease_reaches_no_terminal(record: RunDir) -> None:
    with RunLock(record.path):
        change_lease(record, host="\x1b]0;title\x07" + "x" * 500, doing="\x1b[2Jtrained", since=1e300)
        with pytest.raises(RunOwnedError) as error:
            record.acquire()
    assert str(error.value).isprintable() and len(str(error.value)) < 250


def test_a_copied_run_is_not_owned_by_the_owner_of_the_original(record: RunDir) -> None:
    copy = RunDir(record.path.parent / "copy")
    with RunLock(record.path):
        shutil.copytree(record.path, copy.path)
        with RunLock(copy.path):
            assert find_owner(record.path)
    assert LEASE_FILE not in list_files(copy)


def sleep_long() -> None:
    time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_children_of_an_owner_own_nothing(record: RunDir, method: str) -> None:
    """They outlive it, and the run is free."""
    owner = start_python(
        """
        import multiprocessing, os, subprocess, sys, time
        from pathlib import Path
        from cifar.system.ownership import RunLock

        def wait():
            time.sleep(60)

        if __name__ == "__main__":
            lock = RunLock(Path(sys.argv[1]))
            lock.acquire()
            context = multiprocessing.get_context(sys.argv[2])
            children = [context.Process(target=time.sleep, args=(60,)) for _ in range(2)]
            for child in children:
                child.start()
            other = subprocess.Popen(["sleep", "60"], close_fds=False)
            print(*[child.pid for child in children], other.pid, flush=True)
            time.sleep(60)
        """,
        str(record.path), method,
    )  # fmt: skip
    children = [int(pid) for pid in read_line(owner).split()]
    assert len(children) == 3 and find_owner(record.path)
    try:
        owner.kill()
        owner.wait()
        assert all(Path(f"/proc/{pid}").exists() for pid in children) or not Path("/proc/self").exists()
        record.acquire()
        record.release()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        owner.communicate(timeout=20)


def test_a_forked_child_neither_gives_the_run_back_nor_writes_to_it(record: RunDir) -> None:
    record.acquire()

    def write() -> None:
        record.release()
        lock = RunLock(record.path)
        try:
            lock.acquire()
        except RunOwnedError:
            os._exit(7)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=write)
    child.start()
    child.join(20)
    assert child.exitcode == 7 and record.is_owned
    record.append_row({"epoch": 1})
    record.release()


def test_every_write_is_fenced(record: RunDir) -> None:
    """Another has taken the run: whatever this one was about to write, nothing changes."""
    record.set_status("running", epoch=1, epochs=2)
    record.append_row({"epoch": 1})
    (record.path / "checkpoint.pt").write_bytes(b"theirs")
    record.acquire()
    change_lease(record, token="theirs", pid=1, host="elsewhere")
    before = {path.name: path.read_bytes() for path in record.path.iterdir()}
    for write in (
        lambda: record.append_row({"epoch": 2}),
        lambda: record.set_status("finished"),
        lambda: record.write_json("summary", {}),
        lambda: record.write_file("checkpoint.pt", b"ours"),
        lambda: record.remove_file("checkpoint.pt"),
        lambda: record.truncate_metrics(0),
    ):
        with pytest.raises(OwnershipLostError, match=r"run abc was taken over .* by process 1 on elsewhere") as error:
            write()
        assert not error.value.is_removed
    assert {path.name: path.read_bytes() for path in record.path.iterdir()} == before
    record.release()
    assert json.loads((record.path / LEASE_FILE).read_text())["token"] == "theirs"


def test_a_run_that_was_removed_is_not_made_again(record: RunDir) -> None:
    record.acquire()
    shutil.rmtree(record.path)
    with pytest.raises(OwnershipLostError, match="folder of run abc was removed while it was being trained") as error:
        record.set_status("running")
    assert error.value.is_removed and not record.path.exists()
    record.release()
    assert not record.path.exists()
    with pytest.raises(OwnershipLostError, match="folder of run abc is gone"):
        record.acquire()


def test_an_error_can_be_sent_to_other_ranks(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(OwnershipLostError("gone", tmp_path, is_removed=True)))
    assert (str(error), error.folder, error.is_removed) == ("gone", tmp_path, True)


def test_a_copy_of_the_object_owns_nothing(record: RunDir) -> None:
    record.acquire()
    assert not pickle.loads(pickle.dumps(record)).is_owned
    record.release()


@pytest.mark.parametrize("value", ["abc", "-5", "nan", "0", "inf", "1e9"])
def test_a_lease_that_is_no_time_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_LEASE", value)
    with pytest.raises(UserError, match=r"CIFAR_LEASE is .* seconds above 0"):
        ownership.lease_seconds()
