"""What a run leaves in its output.log, however it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cifar.config.resolve import resolve_config
from cifar.system.redacted_streams import redact_output
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.callbacks import LineCallback, RunCallback
from cifar.training.loop import RunHooks, RunLoop
from helpers.run_configs import TINY


class Chatty(RunCallback):
    """Prints as a user's code would."""

    def on_epoch_end(self, row: Any) -> None:
        print("from the code: epoch", row["epoch"])
        print("a bar 1/2", end="\r", file=sys.stderr)
        print("a bar 2/2", file=sys.stderr)
        print(f"my key is https://me:hunter22@host/{row['epoch']}", end="")


def lines(record: RunDir) -> list[str]:
    return (record.path / "output.log").read_text().splitlines()


def make(runs: Path, run_id: str, **values: Any) -> tuple[Any, RunDir]:
    config = resolve_config({**TINY, **values})
    return config, run.create_run(config, runs, run.RunMetadata(run_id=run_id))


def test_a_finished_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, record = make(runs, "finished")
    with redact_output():
        run.train_run(config, record, hooks=RunHooks(callbacks=[Chatty(), LineCallback()]))
        print("after the run")
    seen = lines(record)
    assert seen[0].startswith("run finished: ") and seen[0].endswith("parameters")
    assert [line[:11] for line in seen if line.startswith("epoch")] == ["epoch   1/2", "epoch   2/2"], "once each"
    assert seen.count("a bar 2/2") == 2 and "a bar 1/2" not in seen
    assert "from the code: epoch 1" in seen and "my key is https://me:***@host/1from the code: epoch 2" in seen
    assert seen[-2] == "my key is https://me:***@host/2", "a line without end is not lost"
    assert seen[-1].startswith("finished: train ") and "after the run" not in seen
    assert capsys.readouterr().out.count("epoch   1/2") == 1, "the terminal has it too"


def test_the_end_is_there_before_the_status_says_so(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {}
    set_status = RunDir.set_status

    def watch(record: RunDir, state: str, **about: Any) -> None:
        seen[state] = lines(record) if (record.path / "output.log").exists() else []
        set_status(record, state, **about)

    monkeypatch.setattr(RunDir, "set_status", watch)
    config, record = make(runs, "in-order")
    run.train_run(config, record)
    assert seen["finished"] == lines(record)


@pytest.mark.parametrize("state", ["interrupted", "preempted", "stopped"])
def test_a_run_that_was_asked_to_end_and_goes_on(runs: Path, state: str) -> None:
    config, record = make(runs, f"asked-{state}")
    run.train_run(config, record, hooks=RunHooks(poll_stop=lambda: state))
    assert lines(record)[-1] == f"{state}: asked to end at step 1 of epoch 1"
    before = lines(record)
    run.train_run(config, record)
    after = lines(record)
    assert after[: len(before)] == before and after[len(before)].startswith(f"-- run asked-{state}: ")
    assert "goes on after epoch 0" in after[len(before)] and after[-1].startswith("finished: ")


def test_a_run_that_diverges_and_one_that_is_skipped(runs: Path) -> None:
    config, record = make(runs, "diverges", optimizer="sgd", lr=1e30)
    run.train_run(config, record)
    assert lines(record)[-1].startswith("diverged: the loss became ") and record.state == "diverged"
    config, record = make(runs, "too-big", max_macs=1000)
    run.train_run(config, record)
    assert lines(record) == [f"skipped: {record.read_json('status')['reason']}"]


def test_a_failed_run_has_its_traceback(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(RunCallback):
        def on_epoch_end(self, row: Any) -> None:
            raise RuntimeError("password=abcdefgh12345 was wrong")

    config, record = make(runs, "fails")
    with pytest.raises(RuntimeError):
        run.train_run(config, record, hooks=RunHooks(callbacks=[Broken()]))
    seen = lines(record)
    assert "Traceback (most recent call last):" in seen and any("on_epoch_end" in line for line in seen)
    assert "RuntimeError: password=*** was wrong" in seen and seen[-1].startswith("failed: ") and "abcdefgh" not in str(seen)


def test_runs_side_by_side_say_so(runs: Path) -> None:
    loops = [RunLoop(*make(runs, f"pack-{n}", lr=0.01 * n), RunHooks(callbacks=[Chatty()] if n == 1 else [])) for n in (1, 2)]
    with redact_output():
        run.train_runs(loops)
    for loop in loops:
        seen = lines(loop.run_dir)
        assert seen[1].startswith("-- 1 other run(s) trained side by side") and "from the code: epoch 1" in seen
        assert sum(line.startswith("epoch ") for line in seen) == 2 and seen[-1].startswith("finished: ")
