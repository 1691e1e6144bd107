"""Run folders: what is written is read back, nothing half-written is seen, nothing secret is kept."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar.errors import UserError
from cifar.system.redact import is_secret_name
from cifar.tracking import run_dir
from cifar.tracking.run_dir import RunDir

FLAT = st.dictionaries(
    st.from_regex(r"[a-z_/]{1,12}", fullmatch=True).filter(lambda name: not is_secret_name(name)),
    st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.booleans() | st.text('abcé✓ "\\\n', max_size=20),
    max_size=6,
)


def make(runs: Path, run_id: str = "abc", **run: object) -> RunDir:
    return RunDir.create(runs, run_id, {"name": run_id, **run}, {"lr": 0.1})


@given(FLAT)
def test_clean_keeps_what_json_can_say(values: dict[str, object]) -> None:
    assert json.loads(json.dumps(run_dir.mask_secrets(values))) == values


def test_rows_come_back_and_an_unfinished_line_does_not(tmp_path: Path) -> None:
    run = make(tmp_path)
    rows = [{"epoch": i, "train/loss": 1 / i} for i in (1, 2, 3)]
    for row in rows:
        run.append_row(row)
    length = run.metrics_bytes()
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "trai')
    assert list(run.read_rows()) == rows
    run.truncate_metrics(length)
    assert run.metrics_bytes() == length
    run.append_row({"epoch": 4})
    assert [row["epoch"] for row in run.read_rows(start=length)] == [4]


def test_a_nan_survives(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.append_row({"train/loss": float("nan"), "x": float("-inf")})
    row = next(run.read_rows())
    assert math.isnan(row["train/loss"]) and row["x"] == float("-inf")


def test_reading_what_is_not_there_yet(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "none")
    assert (
        run.read_json("summary") == {} and list(run.read_rows()) == [] and run.metrics_bytes() == 0 and run.state == "running"
    )


def _write_for_ever(path: str) -> None:
    run = RunDir(Path(path))
    for i in range(10**9):
        run.write_json("summary", {"i": i, "padding": "x" * 100_000})


@pytest.mark.parametrize("repeat", range(3))
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path, repeat: int) -> None:
    run = make(tmp_path)
    writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(str(run.path),))
    writer.start()
    time.sleep(0.05 + 0.03 * repeat)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    assert len(run.read_json("summary").get("padding", "x" * 100_000)) == 100_000


@pytest.mark.parametrize("text", ["https://u:hunter22@host/x", "postgresql://me:hunter22@db:5432/cifar"])
def test_passwords_in_urls_are_masked(tmp_path: Path, text: str) -> None:
    run = make(tmp_path, storage=text, deep={"list": [text]})
    run.set_status("failed", reason=f"cannot reach {text}")
    assert all("hunter22" not in file.read_text() for file in run.path.iterdir())


def test_secrets_of_the_environment_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    run = make(tmp_path, command="curl -H 0123456789abcdef0123", api_key="short")
    text = (run.path / "run.json").read_text()
    assert "0123456789abcdef0123" not in text and "short" not in text


@pytest.mark.parametrize("place", ["a file in the folder's place", "a file in the run's place"])
def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path, place: str) -> None:
    runs = tmp_path / "runs"
    if "run's" in place:
        runs.mkdir()
        (runs / "abc").write_text("in the way")
    else:
        runs.write_text("in the way")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="--runs-dir"):
        make(runs)
    assert sorted(tmp_path.rglob("*")) == before


def _full_disk(runs: str) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    try:
        RunDir.create(Path(runs), "abc", {"name": "x" * 500}, {})
    except UserError:
        os._exit(0 if not list(Path(runs).iterdir()) else 3)
    os._exit(4)


def test_no_space_leaves_nothing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_full_disk, args=(str(tmp_path),))
    process.start()
    process.join(20)
    assert process.exitcode == 0


def test_runs_are_found_by_path_id_start_and_name(tmp_path: Path) -> None:
    for run_id, name in [("aaa1", "one"), ("aaa2", "two"), ("bbb1", "three"), ("bbb2", "three")]:
        make(tmp_path, run_id).write_json("run", {"id": run_id, "name": name})
    assert run_dir.find_run_dir(str(tmp_path / "aaa1"), Path("/nowhere")).id == "aaa1"
    assert run_dir.find_run_dir("aaa2", tmp_path).id == "aaa2"
    assert run_dir.find_run_dir("two", tmp_path).id == "aaa2"
    for name, why in [
        ("aaa", "fits 2 runs"),
        ("three", "fits 2 runs"),
        ("zzz", "no run 'zzz'"),
        ("", "is empty"),
        (" ", "is empty"),
    ]:
        with pytest.raises(UserError, match=why):
            run_dir.find_run_dir(name, tmp_path)


def test_the_runs_folder_is_option_then_variable_then_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR_RUNS", raising=False)
    assert run_dir.resolve_runs_dir() == tmp_path / "runs"
    monkeypatch.setenv("CIFAR_RUNS", str(tmp_path / "there"))
    assert run_dir.resolve_runs_dir() == tmp_path / "there"
    assert run_dir.resolve_runs_dir(tmp_path / "here") == tmp_path / "here"


def test_ids_are_what_wandb_takes() -> None:
    ids = {run_dir.generate_id() for _ in range(200)}
    assert len(ids) == 200 and all(re.fullmatch("[a-z0-9]{8}", i) for i in ids)


def test_a_damaged_run_is_named_and_does_not_hide_the_others(tmp_path: Path) -> None:
    for name in ("aaa", "bbb"):
        RunDir.create(tmp_path, name, {"name": f"the {name}"}, {"token_mode": "cls"})
    (tmp_path / "aaa" / "run.json").write_text("{")
    assert run_dir.find_run_dir("the bbb", tmp_path).id == "bbb" and run_dir.find_run_dir("b", tmp_path).id == "bbb"
    with pytest.raises(UserError, match=r"run\.json is damaged .*restore it, or delete"):
        run_dir.find_run_dir("aaa", tmp_path).read_json("run")
    (tmp_path / "bbb" / "metrics.jsonl").write_text("{]\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        list(RunDir(tmp_path / "bbb").read_rows())


def test_a_configuration_comes_back_as_it_was_while_secrets_elsewhere_do_not(tmp_path: Path) -> None:
    made = RunDir.create(tmp_path, "a", {"api_key": "abc"}, {"token_mode": "cls", "url": "postgresql://me:pass@host/x"})
    assert made.read_json("config") == {"token_mode": "cls", "url": "postgresql://me:***@host/x"}
    assert made.read_json("run")["api_key"] == "***"
