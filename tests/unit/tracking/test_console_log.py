"""output.log: lines are added and bounded, without secrets, and only by the run's owner."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cifar.system.redact import forget_secrets
from cifar.tracking import console_log
from cifar.tracking.console_log import FILE, FULL, ConsoleLog, ConsoleReader, count_lines
from cifar.tracking.run_dir import RunDir


@pytest.fixture
def record(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "run00001", {"name": "one"}, {"epochs": 1})


def read(record: RunDir) -> list[str]:
    return (record.path / FILE).read_text().splitlines()


def test_lines_are_added_also_by_a_later_process(record: RunDir) -> None:
    first = ConsoleLog(record)
    assert not first.has_lines
    first.write_lines("one\ntwo")
    first.write_output(["three"])
    first.close()
    first.write_lines("after the end")
    with (record.path / FILE).open("ab") as file:
        file.write(b"cut o")  # killed while it wrote
    second = ConsoleLog(record)
    assert second.has_lines
    second.write_output(["four"])
    assert read(record) == ["one", "two", "three", "cut o", "four"]


def test_secrets_are_masked_and_controls_written_out(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "correct-horse-battery")
    forget_secrets()
    log = ConsoleLog(record)
    log.write_output(["it is correct-horse-battery", "https://me:hunter22@host/x"])
    log.write_lines("own \x1b[31m correct-horse-battery")
    assert read(record) == ["it is ***", "https://me:***@host/x", "own \\x1b[31m ***"]
    forget_secrets()


def test_what_code_prints_is_bounded_and_our_lines_come_after_it(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_log, "MAX_LINES", 5)
    log = ConsoleLog(record)
    for number in range(20):
        log.write_output([f"line {number}"])
    log.write_lines("failed: for a reason")
    assert read(record) == [*(f"line {number}" for number in range(5)), FULL, "failed: for a reason"]
    again = ConsoleLog(record)  # a resumed run says it once only
    again.write_output(["more"])
    again.write_lines("finished")
    assert read(record)[-2:] == ["failed: for a reason", "finished"]
    assert count_lines(record.path) == 8


def test_bytes_are_bounded_too(record: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_log, "MAX_BYTES", 1000)
    monkeypatch.setattr(console_log, "OWN_BYTES", 500)
    log = ConsoleLog(record)
    for _ in range(100):
        log.write_output(["ß" * 100])
        log.write_lines("epoch")
    assert (record.path / FILE).stat().st_size <= 1500


def test_another_process_or_a_damaged_place_changes_nothing(record: RunDir, tmp_path: Path) -> None:
    log = ConsoleLog(record)
    if (child := os.fork()) == 0:  # a worker of somebody's DataLoader
        log.write_output(["from a child"])
        os._exit(0)
    os.waitpid(child, 0)
    assert not (record.path / FILE).exists()
    os.mkfifo(record.path / FILE)
    log.write_output(["nobody reads this"])  # and nobody waits
    lost = ConsoleLog(RunDir(tmp_path / "gone"))
    lost.write_lines("no folder")
    assert not (tmp_path / "gone").exists()


def test_a_reader_gets_each_line_once(record: RunDir) -> None:
    reader = ConsoleReader(record.path)
    assert reader.read_lines() == []
    path = record.path / FILE
    path.write_bytes(b"one\ntwo\nthr")
    assert reader.read_lines(1) == ["one"] and reader.read_lines() == ["two"] and reader.read_lines() == []
    with path.open("ab") as file:
        file.write("ee\n\xff\n".encode("latin-1"))
    assert reader.read_lines() == ["three", "�"]
    assert ConsoleReader(record.path / "none").read_lines() == []
