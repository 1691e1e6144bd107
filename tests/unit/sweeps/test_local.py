"""The local backend: each cell once whoever asks, leases, retries, ends, early termination, and what is written down."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cifar.cli.sweep import list_sweeps, show_status
from cifar.errors import UserError
from cifar.integrations.wandb.upload import push_sweep
from cifar.states import TRIAL_STATES
from cifar.sweeps import local, spec, storage
from cifar.sweeps.local import LocalBackend, Trial
from cifar.sweeps.storage_errors import redact_url
from cifar.tracking.run_dir import RunDir
from helpers.local_sweeps import GRID, METRIC, claim_trial, create_local_sweep

FORK = multiprocessing.get_context("fork")  # no second import of everything
BAYES = f"""
method: bayes
{METRIC}
parameters:
  model: {{value: conv}}
  optimizer: {{values: [adam, {{optimizer: sgd, momentum: 0.5}}]}}
  lr: {{distribution: log_uniform_values, min: 1.0e-4, max: 1.0}}
  label_smoothing: {{min: 0.0, max: 0.5}}
"""


def _work(runs: Path, sweep_id: str, ready: Any, log: Path, seconds: float, dies: bool) -> None:
    backend = LocalBackend(sweep_id, runs)
    ready.wait()
    while trial := backend.claim_trial(str(os.getpid())):
        if trial == "wait":
            time.sleep(0.02)
            continue
        with open(log, "a") as file:
            file.write(f"{trial.cell} {trial.attempt}\n")
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        backend.finish_trial(trial, "finished", trial.values["lr"] / 10)


def _together(backend: LocalBackend, log: Path, workers: int, dying: int = 0, seconds: float = 0.02) -> list[tuple[int, int]]:
    """Workers released together, run to their end -> (cell, attempt) of every execution, as logged by them."""
    ready = FORK.Barrier(workers)
    for i in range(workers):
        FORK.Process(target=_work, args=(backend.runs_dir, backend.id, ready, log, seconds, i < dying)).start()
    for child in multiprocessing.active_children():
        child.join()
    return [(int(line.split()[0]), int(line.split()[1])) for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_eight_processes_run_each_of_24_cells_once(runs: Path, tmp_path: Path) -> None:
    backend = create_local_sweep(runs)
    executions = _together(backend, tmp_path / "log", workers=8)
    assert sorted(executions) == [(cell, 1) for cell in range(24)]
    assert backend.count_states() == {"finished": 24} and len(backend.list_cells()) == 24
    assert [cell["value"] for cell in backend.list_cells()] == [cell["values"]["lr"] / 10 for cell in backend.list_cells()]


@pytest.mark.slow
def test_cells_of_killed_processes_are_run_again_by_exactly_one(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_LEASE", "5")  # on a busy machine two hundredths of a second of work can take long
    backend = create_local_sweep(runs)
    begun = time.monotonic()
    executions = _together(backend, tmp_path / "log", workers=5, dying=2)
    assert time.monotonic() - begun > 5.0
    counted = Counter(executions)
    assert set(counted.values()) == {1} and sum(attempt == 2 for _, attempt in executions) == 2
    assert {cell for cell, _ in executions} == set(range(24)) and backend.count_states() == {"finished": 24}


def test_a_lease_ends_only_without_beats_and_the_late_one_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_LEASE", "0.6")
    mine, theirs = create_local_sweep(runs, GRID + "\nrun_cap: 1"), None
    theirs = LocalBackend(mine.id, runs)
    trial = claim_trial(mine)
    for _ in range(6):
        assert theirs.claim_trial("they") == "wait"
        assert mine.heartbeat(trial) == "go"
        time.sleep(0.2)
    assert theirs.claim_trial("they") == "wait"
    assert mine.claim_trial("another of mine") == "wait"
    time.sleep(0.7)
    assert mine.claim_trial("another of mine") == "wait"  # an agent that was stopped for a while does not rob itself
    again = claim_trial(theirs, "they")
    assert (again.cell, again.run_id, again.attempt) == (trial.cell, trial.run_id, 2)
    assert trial.run_id == f"{mine.id}-000"
    assert mine.heartbeat(trial) == "lost" and mine.finish_trial(trial, "finished", 0.1) == "lost"
    assert theirs.finish_trial(again, "finished", 0.2) == "finished" and theirs.finish_trial(again, "failed") == "lost"
    assert [cell["value"] for cell in mine.list_cells()] == [0.2]


def test_claims_and_heartbeats_of_many_are_those_of_one_after_the_other(runs: Path) -> None:
    one, many = create_local_sweep(runs), create_local_sweep(runs)
    for backend in (one, many):  # cells 0 and 2 were given back, the second one after a failure
        first = [claim_trial(backend) for _ in range(3)]
        backend.finish_trial(first[0], "interrupted")
        backend.finish_trial(first[2], "killed")

    def wanted(values: dict[str, Any]) -> bool:
        return values["lr"] in (1, 3)

    alone = [one.claim_trial("me", trial_filter=wanted) for _ in range(12)]
    together = [trial for count in (0, 5, 1, 9) for trial in many.claim_more("me", count, wanted)]
    assert all(isinstance(trial, Trial) for trial in alone) and len(together) == 12
    assert [(t.cell, t.values, t.attempt) for t in together] == [(t.cell, t.values, t.attempt) for t in alone]
    keys = ("cell", "state", "attempt", "worker", "reason", "value")
    described = [[{key: cell[key] for key in keys} for cell in backend.list_cells()] for backend in (one, many)]
    assert described[0] == described[1] and many.count_states() == one.count_states()
    assert many.claim_more("me", 3, wanted) == [] and many.run_id(together[0].cell) == together[0].run_id

    many.finish_trial(together[1], "finished", 0.5)
    elsewhere = LocalBackend(many.id, runs)  # which has claimed none of them
    for backend in (many, elsewhere):
        assert backend.heartbeats([]) == []
        assert backend.heartbeats(together[:4]) == ["go", "lost", "go", "go"]
    many.stop_sweep(cancel=True)
    assert many.heartbeats(together[2:4]) == ["stop", "stop"] and many.claim_more("me", 3, lambda values: True) == []


def test_ends_and_retries(runs: Path) -> None:
    backend = create_local_sweep(runs, GRID + "\nrun_cap: 8")
    for state in ("finished", "failed", "diverged", "pruned", "skipped", "stopped"):
        assert (
            backend.finish_trial(claim_trial(backend), state, float("nan") if state == "diverged" else 0.5, f"because {state}")
            == state
        )
    given_back = claim_trial(backend)
    assert backend.finish_trial(given_back, "interrupted", reason="Ctrl-C") == "interrupted"
    assert backend.count_states()["interrupted"] == 1 and backend.count_states()["waiting"] == 1
    assert claim_trial(backend).run_id == given_back.run_id
    for result in ("interrupted", "interrupted", "killed"):  # two retries
        trial = claim_trial(backend)
        assert (trial.cell, backend.finish_trial(trial, "killed", reason="SIGKILL")) == (7, result)
    cells = {cell["cell"]: cell for cell in backend.list_cells()}
    assert cells[1]["reason"] == "because failed" and cells[2]["value"] is None
    states = Counter(cell["state"] for cell in cells.values())
    assert states == backend.count_states() and set(states) <= set(TRIAL_STATES)


def test_what_failed_comes_last_and_is_retried_only_where_that_can_help(runs: Path) -> None:
    backend = create_local_sweep(runs, GRID + "\nrun_cap: 4")
    assert backend.finish_trial(claim_trial(backend), "killed") == "interrupted"
    assert backend.finish_trial(claim_trial(backend), "killed", retry=False) == "killed"
    assert backend.finish_trial(claim_trial(backend), "failed", retry=True) == "interrupted"
    assert backend.finish_trial(claim_trial(backend), "preempted") == "preempted" and backend.count_states()["preempted"] == 1
    assert [claim_trial(backend).cell for _ in range(3)] == [3, 0, 2]


def test_retry_offers_what_failed_once_more_with_the_same_run_id(runs: Path) -> None:
    backend = create_local_sweep(runs, GRID + "\nrun_cap: 5")
    ends = ("finished", "failed", "killed", "diverged", "stopped")
    before = [claim_trial(backend) for _ in ends]
    for trial, state in zip(before, ends, strict=True):
        backend.finish_trial(trial, state, 0.5 if state == "finished" else None, retry=False)
    diverged = RunDir.create(runs, before[3].run_id, {}, {})
    diverged.append_row({"epoch": 1})
    diverged.set_status("diverged")
    backend.stop_sweep()
    assert LocalBackend(backend.id, runs).retry_cells() == 3
    assert backend.count_states() == {"waiting": 3, "finished": 1, "stopped": 1} and len(backend.list_cells()) == 5
    assert diverged.state == "interrupted" and not list(diverged.read_rows())
    again = [claim_trial(backend) for _ in range(3)]
    assert [(t.cell, t.run_id, t.attempt) for t in again] == [(t.cell, t.run_id, 2) for t in before[1:4]]
    assert backend.heartbeat(before[1]) == "lost" and backend.heartbeat(again[0]) == "go"
    assert backend.finish_trial(again[0], "finished", 0.7) == "finished" and backend.list_cells()[1]["value"] == 0.7
    assert backend.retry_cells() == 0


def test_extend_adds_the_new_cells_and_keeps_what_is_done(runs: Path, tmp_path: Path) -> None:
    small = GRID.replace("[0, 1, 2, 3, 4, 5]", "[0, 1]").replace("[1, 2, 3, 4]", "[1, 2]")
    backend = create_local_sweep(runs, small)
    backend.finish_trial(claim_trial(backend), "finished", 0.5)
    running = claim_trial(backend)
    larger = tmp_path / "larger.yaml"
    larger.write_text(small.replace("[1, 2]", "[2, 1, 3]") + "  label_smoothing: {values: [0.0, 0.1]}\n")
    assert LocalBackend(backend.id, runs).extend_sweep(larger) == 8 and LocalBackend(backend.id, runs).extend_sweep(larger) == 0
    assert backend.count_states() == {"waiting": 10, "running": 1, "finished": 1}  # an agent that has it open already
    assert backend.heartbeat(running) == "go" and backend.finish_trial(running, "finished", 0.1) == "finished"
    opened = LocalBackend(backend.id, runs)
    assert opened.info["cells"] == 12 and opened.sweep.swept_keys == ["seed", "lr", "label_smoothing"]
    assert (opened.folder / "sweep-1.yaml").read_text() == small
    while isinstance(trial := opened.claim_trial("me"), Trial):
        opened.finish_trial(trial, "finished", 0.1)
    configs = {str(spec.resolve_trial(cell["values"], opened.info["fixed"]).to_dict()) for cell in opened.list_cells()}
    assert len(configs) == 12 == opened.count_states()["finished"]
    for text, said in ((BAYES, "method: grid"), (small.replace("val/acc", "val/loss"), "metric is val/loss")):
        larger.write_text(text)
        with pytest.raises(UserError, match=said):
            opened.extend_sweep(larger)


def test_what_scores_the_test_set_is_extended_by_experiments_and_seeds_only(runs: Path, tmp_path: Path) -> None:
    values = "experiment: {value: worksheet1}, seed: {values: [0, 1]}, lr: {value: 0.1}"
    text = f"method: grid\n{METRIC}\nparameters: {{{values}}}"
    backend, file = create_local_sweep(runs, text, fixed={"test": "final"}), tmp_path / "more.yaml"
    for old, new in (("lr: {value: 0.1}", "lr: {value: 0.2}"), (", lr: {value: 0.1}", ""), ("}}", "}, epochs: {value: 2}}")):
        file.write_text(text.replace(old, new).replace("[0, 1]", "[0, 1, 2]"))
        with pytest.raises(UserError, match=r"(lr|epochs) is not as in the sweep.*experiments and seeds only"):
            backend.extend_sweep(file)
    file.write_text(text.replace("{value: worksheet1}", "{values: [worksheet1, resnet20]}").replace("[0, 1]", "[0, 1, 2]"))
    assert backend.extend_sweep(file) == 4 and backend.count_states() == {"waiting": 6}
    with pytest.raises(UserError, match="scores the test set"):
        push_sweep(backend.folder, [])


def test_a_stopped_sweep_hands_out_nothing_and_a_cancelled_one_ends_what_runs(runs: Path) -> None:
    for cancel in (False, True):
        backend = create_local_sweep(runs, GRID + "\nrun_cap: 3")
        trial = claim_trial(backend)
        LocalBackend(backend.id, runs).stop_sweep(cancel=cancel)
        assert backend.claim_trial("me") is None and backend.heartbeat(trial) == ("stop" if cancel else "go")
        assert backend.finish_trial(trial, "interrupted") == "stopped"
        assert backend.count_states() == {"stopped": 3}


def test_a_reached_target_ends_the_sweep(runs: Path) -> None:
    backend = create_local_sweep(runs, GRID.replace("goal: maximize", "goal: maximize, target: 0.6"))
    assert backend.finish_trial(claim_trial(backend), "finished", 0.5) == "finished" and backend.claim_trial("me") is not None
    assert backend.finish_trial(claim_trial(backend), "finished", 0.7) == "finished" and backend.claim_trial("me") is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "bayes"])
def test_the_same_seed_makes_the_same_suggestions(runs: Path, method: str) -> None:
    text = BAYES.replace("bayes", method)

    def history(sweep_seed: int) -> list[dict[str, Any]]:
        backend = create_local_sweep(runs, text, sweep_seed=sweep_seed, count=12)
        for k in range(12):
            backend = LocalBackend(backend.id, runs) if k == 11 else backend  # as a new process would
            trial = claim_trial(backend)
            values = trial.values
            backend.finish_trial(
                trial, "finished", values["label_smoothing"] - (values["optimizer"] == "sgd") * values.get("momentum", 0)
            )
        assert backend.claim_trial("me") is None
        return [cell["values"] for cell in backend.list_cells()]

    first = history(3)
    assert len(first) == 12 and first == history(3) != history(4)
    assert all(
        1e-4 <= v["lr"] <= 1 and 0 <= v["label_smoothing"] <= 0.5 and ("momentum" in v) == (v["optimizer"] == "sgd")
        for v in first
    )


def test_bayes_finds_a_narrow_peak_better_than_chance(runs: Path) -> None:
    backend = create_local_sweep(runs, BAYES, count=25)
    while isinstance(trial := backend.claim_trial("me"), Trial):
        backend.finish_trial(trial, "finished", -abs(trial.values["label_smoothing"] - 0.37))
    tried = [cell["values"]["label_smoothing"] for cell in backend.list_cells()]
    near = [abs(value - 0.37) < 0.05 for value in tried]  # a fifth of the range
    assert sum(near[12:]) > 5 > sum(near[:10])


def test_early_termination_compares_with_all_that_reached_the_rung(runs: Path) -> None:
    early = "\nearly_terminate: {type: hyperband, min_iter: 1, eta: 3}"
    backend = create_local_sweep(runs, GRID + early)
    assert backend.sweep.early_stopping and backend.sweep.early_stopping.rung_epochs(5) == [1, 3]
    a, b, c = (claim_trial(backend) for _ in range(3))
    assert backend.report_metric(a, {1: 0.5}, 0.5, 5)
    assert not backend.report_metric(b, {1: 0.4}, 0.4, 5)
    assert backend.finish_trial(b, "pruned", 0.4) == "pruned"
    assert backend.report_metric(c, {1: 0.6}, 0.6, 5)
    assert backend.report_metric(a, {1: 0.5, 3: 0.7}, 0.7, 5) and not backend.report_metric(c, {1: 0.6, 3: 0.5}, 0.6, 5)
    assert backend.report_metric(c, {1: 0.6, 3: 0.9}, 0.9, 5)  # said again after a resumption: the later word counts


def test_no_password_is_written_down_or_said(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2hunter2"
    for url in (f"postgresql://me:{secret}@127.0.0.1:1/db", f"postgresql://me@127.0.0.1:1/db?password={secret}"):
        assert secret not in redact_url(url) and "127.0.0.1" in redact_url(url)
        with pytest.raises(UserError, match="cannot be opened") as error:
            create_local_sweep(runs, url=url)
        assert secret not in str(error.value) and error.value.__suppress_context__
    assert not list((runs / "sweeps").glob("*"))  # nothing half-made
    for url, said in (("mysql://a@b/c", "cannot lock"), ("nonsense", "no database URL")):
        with pytest.raises(UserError, match=said):
            create_local_sweep(runs, url=url)


def test_a_storage_elsewhere_is_found_again_also_without_the_folder(runs: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    backend = create_local_sweep(runs, url=url)
    assert (
        not (backend.folder / "study.db").exists() and json.loads((backend.folder / "sweep.json").read_text())["storage"] == url
    )
    assert claim_trial(LocalBackend(backend.id, runs)).cell == 0
    joined = LocalBackend(backend.id, tmp_path / "another machine", url)
    assert claim_trial(joined).cell == 1 and joined.sweep.text == backend.sweep.text


def test_what_is_not_there_is_said(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no sweep 'nonsense'"):
        LocalBackend("nonsense", runs)
    backend = create_local_sweep(runs)
    (backend.folder / "study.db").unlink()
    with pytest.raises(UserError, match="does not hold sweep"):
        LocalBackend(backend.id, runs)


def test_a_sweep_is_found_by_its_name_and_by_the_start_of_its_id(runs: Path) -> None:
    backend = create_local_sweep(runs)
    assert (
        local.find_sweep_id("a sweep", runs)
        == local.find_sweep_id(backend.id[:5], runs)
        == local.find_sweep_id(backend.id, runs)
        == backend.id
    )
    create_local_sweep(runs)
    with pytest.raises(UserError, match="fits 2 sweeps"):
        local.find_sweep_id("a sweep", runs)
    assert len(local.list_sweeps(runs)) == 2


def test_the_first_agent_settles_the_threads_of_all(runs: Path) -> None:
    backend = create_local_sweep(runs)
    assert backend.agree_on_threads(2) == 2 == LocalBackend(backend.id, runs).agree_on_threads(8)
    assert json.loads((backend.folder / "sweep.json").read_text())["threads"] == 2
    assert create_local_sweep(runs, threads=3).agree_on_threads(2) == 3


@pytest.mark.skipif(not shutil.which("findmnt"), reason="util-linux tells what a file system is")
def test_a_file_that_only_this_machine_sees_has_a_log_and_loses_it_elsewhere(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write-ahead log lives in memory that processes share: where machines may share the file, SQLite's own journal."""

    def journal(sweep: LocalBackend) -> str:
        return str(sqlite3.connect(sweep.folder / "study.db").execute("pragma journal_mode").fetchone()[0])

    sweep = create_local_sweep(runs, GRID)
    trial = claim_trial(sweep)
    kind = subprocess.run(["findmnt", "-no", "FSTYPE", "--target", runs], capture_output=True, text=True, check=True).stdout
    assert journal(sweep) == ("wal" if kind.strip() in storage.LOCAL_FILESYSTEMS else "delete")
    shutil.copytree(runs, tmp_path / "elsewhere")
    monkeypatch.setattr(storage, "LOCAL_FILESYSTEMS", ())  # as on NFS
    there = LocalBackend(sweep.id, tmp_path / "elsewhere")
    assert there.finish_trial(trial, "finished", 0.5) == "finished" and journal(there) == "delete"


def test_a_sweep_that_is_wandbs_is_said_to_be(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "sweeps" / "abc").mkdir(parents=True)
    (runs / "sweeps" / "abc" / "wandb.json").write_text('{"id": "abc", "entity": "me", "project": "p"}')
    with pytest.raises(UserError, match=r"abc is W&B's.*report me/p/abc"):
        show_status("abc", runs_dir=runs)
    assert list_sweeps(runs) == 0
    assert "me/p/abc" in capsys.readouterr().out


def test_what_a_database_refuses_is_one_sentence(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy import event

    backend = create_local_sweep(runs)
    trial = claim_trial(backend)
    for pragma, said in (("busy_timeout = 50", "database is locked"), ("query_only = 1", "attempt to write a readonly")):
        backend._storage.engine.dispose()
        event.listen(backend._storage.engine, "connect", lambda connection, _, p=pragma: connection.execute(f"pragma {p}"))
        other = sqlite3.connect(backend.folder / "study.db")
        other.execute("begin exclusive" if "busy" in pragma else "begin")
        with pytest.raises(UserError, match=rf"the storage sqlite:.* does not answer \({said}"):
            backend.heartbeat(trial)
        other.close()
    monkeypatch.setattr(storage, "LOCK_TIMEOUT_SECONDS", 0.1)
    with storage.lock_storage(backend._storage, backend.id), pytest.raises(UserError, match=r"held the lock .*is stopped"):
        LocalBackend(backend.id, runs).heartbeat(trial)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.raises(UserError, match=r"has no locks \(No locks available\).*CIFAR_STORAGE"):
        LocalBackend(backend.id, runs).heartbeat(trial)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("update trials set state = 'BANANA'", "damaged or does not answer"),  # a LookupError of SQLAlchemy's
        ("update trials set datetime_start = 'x'", "damaged or does not answer"),
        ("update trial_user_attributes set value_json = '{\"a\": 5}'", "trial 0 of the sweep's database is damaged"),
        ("insert into study_user_attributes values (null, 1, 'threads', 'NaN')", "says threads: nan; restore the database"),
        ("insert into study_user_attributes values (null, 1, 'threads', '[1]')", r"says threads: \[1\]"),
        ("insert into study_user_attributes values (null, 1, 'threads', '-5')", "says threads: -5"),
    ],
)
def test_rows_that_optuna_never_wrote_are_one_sentence(runs: Path, statement: str, said: str) -> None:
    backend = create_local_sweep(runs, GRID)
    before = (backend.folder / "sweep.json").read_text()
    with sqlite3.connect(backend.folder / "study.db") as database:
        database.execute(statement)
    database.close()
    with pytest.raises(UserError, match=said):
        other = LocalBackend(backend.id, runs)
        other.list_cells()
        other.agree_on_threads(2)
    assert (backend.folder / "sweep.json").read_text() == before
