"""record -> W&B's own file -> wandb's own reader: nothing lost, nothing twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar.errors import UserError
from cifar.integrations.wandb import mirror as mirror_module
from cifar.integrations.wandb.api import is_server_reachable
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.mirror_process import stop_core
from cifar.integrations.wandb.settings import find_credentials, mode_from_environment
from cifar.tracking.run_dir import RunDir
from helpers.leet import draw_png, end_record, inspect_only, make_record, row, wandb_files, write_checkpoint
from helpers.paths import ROOT
from helpers.processes import wait_until
from helpers.protocol import Fault, Server

KEY = "0123456789abcdef" * 3


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def no_core_left() -> object:
    yield
    stop_core()


def test_a_whole_run_arrives(tmp_path: Path) -> None:
    record = make_record(tmp_path, "whole001", sweep="abc123")
    mirror = Mirror(record, "offline")
    sent = []
    for epoch in range(1, 7):
        record.append_row(row(epoch))
        sent.append(mirror.sync())
    assert sent == [1] * 6 and mirror.sync() == 0
    end_record(record)
    picture = draw_png(record.path / "pictures" / "gradient_flow.png")
    assert mirror.finish([picture])

    seen = inspect_only(record)
    assert seen.run["run_id"] == "whole001" and seen.run["project"] == "cifar" and seen.run["display_name"] == "lr=1e-05 <b>"
    assert seen.run["run_group"] == "abc123" and seen.run["job_type"] == "sweep" and seen.run["tags"] == ["stand-in", "t" * 64]
    assert seen.config == {**record.read_json("config"), "cifar_schema": 2}
    assert seen.rows == list(record.read_rows()) and seen.steps == [1, 2, 3, 4, 5, 6]
    assert seen.summary.items() >= {**record.read_json("summary"), "state": "finished", "train/loss": 2.3 / 6}.items()
    (path,) = (path for path in seen.files if path.startswith("media/images/"))
    assert path.startswith("media/images/pictures/gradient_flow")
    assert (wandb_files(record)[0].parent / "files" / path).read_bytes() == picture.read_bytes()
    assert seen.history[-1]["pictures/gradient_flow._type"] == "image-file"  # in the last epoch's row, not in one of its own
    assert seen.exit_code == 0


def test_secrets_and_controls_of_an_old_record_do_not_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an earlier version wrote it, word for word."""
    secret, hostile = "correct-horse-battery", "a\x1b[31mred\u202eb"
    record = make_record(tmp_path, "older001", epochs=1)
    record.append_row(row(1))
    end_record(record, "failed")
    for name, changes in {
        "run": {"name": f"{hostile} {secret}", "tags": [hostile, secret], "command": f"python {secret}"},
        "config": {"note": f"https://me:{secret}@host"},
        "status": {"reason": f"401 for {secret}"},
        "environment": {"git": {"remote": secret}},
    }.items():
        (record.path / f"{name}.json").write_text(json.dumps({**record.read_json(name), **changes}))
    monkeypatch.setenv("DB_PASSWORD", secret)
    assert Mirror(record, "offline").finish()
    for path in record.path.glob("wandb/**/*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path
    seen = inspect_only(record)
    assert seen.run["display_name"] == "a\\x1b[31mred\\u202eb ***" and seen.run["tags"] == ["a\\x1b[31mred\\u202eb", "***"]
    assert seen.config["note"] == "https://me:***@host" and "401 for ***" in seen.summary["reason"]
    (document,) = record.path.glob("wandb/*run-*/files/cifar.json")
    assert "401 for ***" in document.read_text()


def test_repeating_it_does_nothing(tmp_path: Path) -> None:
    record = make_record(tmp_path, "again001", epochs=2)
    for epoch in (1, 2):
        record.append_row(row(epoch))
    end_record(record)
    assert Mirror(record, "offline").finish()
    (before,) = wandb_files(record)
    content = before.read_bytes()
    for _ in range(2):
        mirror = Mirror(record, "offline")
        assert mirror.sync() == 0 and mirror.finish()
    assert wandb_files(record) == [before] and before.read_bytes() == content
    assert inspect_only(record).run.get("job_type") == "train"


@pytest.mark.parametrize(("state", "code"), [("pruned", 0), ("failed", 1), ("diverged", 1)])
def test_an_early_end(tmp_path: Path, state: str, code: int) -> None:
    record = make_record(tmp_path, "early001", epochs=9)
    record.append_row(row(1))
    record.append_row({**row(2), "train/loss": float("nan")})
    end_record(record, state)
    assert Mirror(record, "offline").finish([draw_png(record.path / "pictures" / "curves.png")])
    seen = inspect_only(record)
    assert seen.steps == [1, 2] and seen.rows[0] == row(1) and seen.rows[1] == {**row(2), "train/loss": "NaN"}
    assert seen.exit_code == code and seen.summary["state"] == state
    assert seen.summary["pictures/curves"]["_type"] == "image-file" and len(seen.files) == 4


def test_a_failed_run_that_is_resumed_is_written_whole(tmp_path: Path) -> None:
    record = make_record(tmp_path, "retry001", epochs=3)
    record.append_row(row(1))
    end_record(record, "failed")
    assert Mirror(record, "offline").finish()
    record.set_status("running")
    mirror = Mirror(record, "offline")
    mirror.sync()
    for epoch in (2, 3):
        record.append_row(row(epoch))
    end_record(record)
    assert mirror.finish()
    seen = inspect_only(record)
    assert seen.rows == list(record.read_rows()) and seen.exit_code == 0


def test_rows_made_again_after_a_resume_are_the_ones_that_count(tmp_path: Path) -> None:
    record = make_record(tmp_path, "cut00001", epochs=4)
    mirror = Mirror(record, "offline")
    record.append_row(row(1))
    checkpoint = record.metrics_bytes()
    record.append_row(row(2))
    record.append_row(row(3))
    assert mirror.sync() == 3
    record.truncate_metrics(checkpoint)
    record.append_row({**row(2), "system/seconds": 123456.789})  # longer than before: the old end is inside a line now
    assert mirror.sync() == 0
    for epoch in (3, 4):
        record.append_row({**row(epoch), "system/seconds": 0.5})
    end_record(record)
    assert mirror.finish()
    assert inspect_only(record).rows == list(record.read_rows())


def test_half_a_line_waits(tmp_path: Path) -> None:
    record = make_record(tmp_path, "half0001", epochs=2)
    record.append_row(row(1))
    whole = (record.path / "metrics.jsonl").read_bytes()
    (record.path / "metrics.jsonl").write_bytes(whole + b'{"epoch": 2, "tra')
    mirror = Mirror(record, "offline")
    assert mirror.sync() == 1
    (record.path / "metrics.jsonl").write_bytes(whole)
    record.append_row(row(2))
    assert mirror.sync() == 1
    mirror.suspend()


@pytest.mark.slow
def test_killed_in_the_middle_then_run_again(tmp_path: Path) -> None:
    record = make_record(tmp_path, "kill0001")
    for epoch in (1, 2, 3):
        record.append_row(row(epoch))
    code = f"""
import time
from pathlib import Path
from cifar.tracking.run_dir import RunDir
from cifar.integrations.wandb.mirror import Mirror
mirror = Mirror(RunDir(Path({str(record.path)!r})), "offline")
print(mirror.sync(), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout and process.stdout.readline() == b"3\n"
    rival = Mirror(record, "offline")
    assert rival.sync() == 0 and len(wandb_files(record)) <= 1  # one process at a time
    process.send_signal(signal.SIGKILL)
    process.wait()
    for epoch in (4, 5, 6):
        record.append_row(row(epoch))
    end_record(record)
    assert rival.finish()
    seen = inspect_only(record)
    assert seen.rows == list(record.read_rows()) and seen.exit_code == 0 and len(list(record.path.glob("wandb/*run-*"))) == 1


@pytest.mark.slow
def test_two_records_side_by_side_and_a_core_that_dies(tmp_path: Path) -> None:
    records = [make_record(tmp_path, f"side000{n}", epochs=2) for n in (1, 2)]
    mirrors = [Mirror(record, "offline") for record in records]
    for record, mirror in zip(records, mirrors, strict=True):
        record.append_row(row(1))
        assert mirror.sync() == 1
    stop_core()
    for record, mirror in zip(records, mirrors, strict=True):
        record.append_row(row(2))
        end_record(record)
        assert mirror.finish()
        assert inspect_only(record).rows == [row(1), row(2)]


@pytest.mark.parametrize("server_has", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_a_server_is_sent_what_it_lacks(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, server_has: int
) -> None:
    monkeypatch.setattr(mirror_module, "TRANSMIT_SECONDS", 1.0 if server_has else 60.0)
    record = make_record(tmp_path, "online01")
    for epoch in (1, 2, 3):
        record.append_row(row(epoch))
    write_checkpoint(record)
    record.append_row(row(4))  # it may be made again, so it waits
    mirror = Mirror(record, "online")
    assert mirror.sync() == 3 and mirror.mode == "online"
    run = server.runs[record.id]
    wait_until(lambda: len(run.rows) >= server_has, 10)
    stop_core()
    mirror.suspend()
    assert len(run.rows) == server_has
    monkeypatch.setattr(mirror_module, "TRANSMIT_SECONDS", 1.0)
    for epoch in (5, 6):
        record.append_row(row(epoch))
    end_record(record)
    for _ in range(2):
        assert Mirror(record, "online").finish([draw_png(record.path / "pictures" / "curves.png")])
    assert run.rows == list(record.read_rows()) and run.exits == [0]


def test_a_server_answers_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"{server.url}/")
        assert is_server_reachable(20.0)
        for status, said in ((401, True), (404, True), (429, False), (500, False), (503, False)):
            server.fault = Fault("status", status)
            assert is_server_reachable(20.0) == said, status
        for kind in ("hang", "drop"):
            server.fault = Fault(kind)
            assert not is_server_reachable(0.2), kind
        server.heal()
        server.die()
        assert not is_server_reachable(20.0)
        server.assert_understood()
    monkeypatch.setenv("WANDB_BASE_URL", "no address")
    assert not is_server_reachable(20.0)


def test_the_file_is_read_while_the_run_goes_on(tmp_path: Path) -> None:
    record = make_record(tmp_path, "live0001")
    record.append_row(row(1))
    record.append_row(row(2))
    mirror = Mirror(record, "offline")
    mirror.sync()
    deadline = time.monotonic() + 10
    while sum(line.count(b"gradient_norm/layers.0") for line in [wandb_files(record)[0].read_bytes()]) < 3:
        assert time.monotonic() < deadline, "the rows of a running run did not reach its file"
        time.sleep(0.2)
    assert inspect_only(record).rows == [row(1), row(2)]
    mirror.suspend()
    assert inspect_only(record).exit_code == 1


def _ended(record: RunDir, then: str, state: str) -> str:
    """A process that mirrors the record and leaves; wandb-core is held up by `then` after its answer -> what it says."""
    code = f"""
import os, signal, threading
from pathlib import Path
from wandb.sdk.lib.service.service_connection import ServiceConnection
from cifar.tracking.run_dir import RunDir
from cifar.integrations.wandb import mirror, mirror_process
tell = ServiceConnection.inform_finish
def slowly(self, run_id):
    (core,) = mirror_process.list_core_pids()
    {then}
    tell(self, run_id)
ServiceConnection.inform_finish = slowly
made = mirror.Mirror(RunDir(Path({str(record.path)!r})), "offline")
made.sync()
try:
    print(made.finish() if {state == "finished"} else made.suspend(), flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
mirror_process.kill_core()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, timeout=60)
    return done.stdout.decode()


SLOWLY = "os.kill(core, signal.SIGSTOP); threading.Timer(0.5, os.kill, (core, signal.SIGCONT)).start()"


@pytest.mark.parametrize("state", [pytest.param("finished", marks=pytest.mark.slow), "interrupted"])
def test_a_run_is_in_its_file_before_its_core_may_be_killed(tmp_path: Path, state: str) -> None:
    """wandb-core says that a run has ended before it has written it. Here it is held up in between, as on a busy machine."""
    record = make_record(tmp_path, "slow0001", epochs=1)
    record.append_row(row(1))
    if state == "finished":
        end_record(record)
    assert _ended(record, SLOWLY, state).split() == ["True" if state == "finished" else "None"]
    seen = inspect_only(record)
    assert seen.rows == [row(1)] and seen.exit_code == (0 if state == "finished" else 1)


@pytest.mark.slow
def test_a_core_that_dies_before_it_has_written_is_no_success(tmp_path: Path) -> None:
    record = make_record(tmp_path, "dead0001", epochs=1)
    record.append_row(row(1))
    end_record(record)
    killed = "os.kill(core, signal.SIGSTOP); threading.Timer(0.3, os.kill, (core, signal.SIGKILL)).start()"
    for_ever = "mirror._write_timeout = 1e6; "  # nobody waits for the dead: else the process is cut off
    assert _ended(record, for_ever + killed, "finished").startswith("TimeoutError wandb-core has not written")
    with contextlib.suppress(IndexError):  # nothing is in the file, or not all
        assert inspect_only(record).exit_code is None
    mirror = Mirror(record, "offline")
    assert mirror.finish() and inspect_only(record).rows == [row(1)]  # so it is written again
    stop_core()


@pytest.mark.slow
def test_environment_of_another_run_is_not_taken(tmp_path: Path) -> None:
    record = make_record(tmp_path, "env00001", epochs=1)
    record.append_row(row(1))
    end_record(record)
    code = f"""
from pathlib import Path
from cifar.tracking.run_dir import RunDir
from cifar.integrations.wandb.mirror import Mirror
from cifar.integrations.wandb.mirror_process import kill_core
Mirror(RunDir(Path({str(record.path)!r})), "offline").finish(); kill_core()
"""
    alien = {
        "RUN_ID": "alien",
        "NAME": "alien",
        "RUN_GROUP": "alien",
        "SWEEP_ID": "alien",
        "MODE": "disabled",
        "DIR": "/nowhere",
    }
    environment = {**os.environ, **{f"WANDB_{name}": value for name, value in alien.items()}, "WANDB_API_KEY": KEY}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, timeout=60)
    seen = inspect_only(record)
    assert seen.run["run_id"] == "env00001" and seen.rows == [row(1)] and "alien" not in str(seen.run)
    for file in record.path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".config" / "wandb").mkdir(parents=True)
    assert find_credentials() == "" and mode_from_environment() == "offline"
    with pytest.raises(UserError, match="wandb login"):
        mode_from_environment("online")
    with pytest.raises(UserError, match="did you mean 'offline'"):
        mode_from_environment("ofline")

    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert mode_from_environment() == mode_from_environment("online") == "online" and find_credentials() == str(home / ".netrc")
    assert mode_from_environment("offline") == "offline" and mode_from_environment("disabled") == "disabled"
    (home / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert mode_from_environment() == "offline"  # the key is another server's
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    assert mode_from_environment() == "online"
    (home / ".config" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert mode_from_environment() == "offline" and mode_from_environment("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert mode_from_environment() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode_from_environment() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "online")
    (home / ".netrc").write_text("machine api.wandb.ai password")  # damaged: no key, and no exception
    assert mode_from_environment() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert mode_from_environment() == "online" and find_credentials() == "WANDB_API_KEY"


@pytest.mark.slow
def test_the_mode_agrees_with_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb's own look-up, in a process of its own, finds a key where ours does."""
    (tmp_path / "home").mkdir()
    code = (
        "from wandb.sdk.lib.wbauth import wbnetrc; from wandb.sdk import wandb_setup;"
        "print(bool(wbnetrc.read_netrc_auth(host=wandb_setup.singleton().settings.base_url)))"
    )
    for machine, expected in (("api.wandb.ai", True), ("api.forge.coreweave.com", True), ("wandb.example.org", False)):
        (tmp_path / "home" / ".netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
        assert (answer.strip() == "True") == expected == bool(find_credentials()), machine


def test_nothing_there_yet(tmp_path: Path) -> None:
    mirror = Mirror(RunDir(tmp_path / "nothing1"), "offline")
    assert mirror.sync() == 0 and not (tmp_path / "nothing1").exists()
