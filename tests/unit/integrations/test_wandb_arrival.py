"""What W&B has against what the record has: rows by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifar.integrations.wandb.arrival import (
    ArrivedRun,
    are_equal_rows,
    compare_history,
    describe_difference,
    describe_missing_rows,
)
from cifar.integrations.wandb.document import build_document, describe_metrics
from cifar.integrations.wandb.workspace import build_summary
from cifar.tracking.run_dir import RunDir
from helpers.leet import end_record, make_record, row


def line(epoch: int, step: int = 0, **changed: Any) -> dict[str, Any]:
    """As W&B answers: its own keys, a picture, whole numbers as floats."""
    changed = {key.replace("__", "/"): value for key, value in changed.items()}
    return {
        **row(epoch),
        "epoch": float(epoch),
        "_step": step or epoch,
        "_runtime": 1.5,
        "pictures/a": {"_type": "x"},
        **changed,
    }


def test_rows_are_equal_by_value() -> None:
    assert are_equal_rows({"a": 1, "b": math.nan}, {"a": 1.0, "b": "NaN"})
    assert not are_equal_rows({"a": 1, "b": 2}, {"a": 1}) and not are_equal_rows({"a": 0.1}, {"a": 0.1 + 1e-17 * 2})
    assert are_equal_rows({"a": 1, "system/seconds": 1}, {"a": 1, "system/seconds": 2})
    assert not are_equal_rows({"a": 1, "system/seconds": 1}, {"a": 1, "system/seconds": 2}, with_times=True)


def test_histories() -> None:
    rows = [row(epoch) for epoch in (1, 2, 3, 4)]
    same = compare_history([line(epoch) for epoch in (1, 2, 3)], rows)
    assert same.is_prefix and (same.num_equal, same.last_step, same.wrong_epochs) == (3, 3, ())
    hole = compare_history([line(1), line(3), line(4)], rows)
    assert not hole.is_prefix and (hole.num_equal, hole.wrong_epochs, hole.unknown_epochs) == (1, (2,), ())
    times = compare_history([line(1), line(2, system__seconds=9.0), line(3)], rows)
    assert not times.is_prefix and (times.num_equal, times.wrong_epochs) == (1, ())
    other = compare_history([line(1), line(2, val__acc=0.9), line(3), line(7)], rows)
    assert (other.num_equal, other.wrong_epochs, other.unknown_epochs) == (1, (2, 4), (7,))
    again = compare_history([line(1), line(2, val__acc=0.9), line(3), line(4), line(2, 5), line(4, 6)], rows)
    assert (again.num_lines, again.last_step, again.wrong_epochs, again.unknown_epochs) == (6, 6, (), ())
    assert compare_history([], rows).is_prefix and compare_history([line(1)], []).unknown_epochs == (1,)


def test_what_is_missing_in_words(tmp_path: Path) -> None:
    record = make_record(tmp_path, "words001", epochs=2)
    for epoch in (1, 2):
        record.append_row(row(epoch))
    end_record(record)
    assert describe_missing_rows(None, 2, row(2)) == "W&B does not have the run"
    assert describe_missing_rows(ArrivedRun("running", 1, row(1), {}), 2, row(2)) == "W&B has 1 of 2 rows"
    assert "not that of epoch 2" in describe_missing_rows(ArrivedRun("running", 2, row(1), {}), 2, row(2))
    assert describe_missing_rows(ArrivedRun("running", 0, {}, {}), 0, {}) == ""

    def said(wandb_state: str, md5: str | None = "right", **summary: Any) -> str:
        md5 = base64.b64encode(hashlib.md5(build_document(record)).digest()).decode() if md5 == "right" else md5
        arrived = ArrivedRun(wandb_state, 2, row(2), {**build_summary(record), **summary}, document_md5=md5)
        return describe_difference(arrived, record, lambda: [])

    assert said("finished") == "" and "calls the run running, and it is finished" in said("running")
    assert said("finished", state="incomplete").endswith("other values of state")
    record.set_status("stopped", reason="asked to end")
    assert said("failed") == "" and "calls the run finished, and it is stopped" in said("finished")
    assert said("failed", reason="").endswith("other values of reason")
    assert said("failed", md5="") == "", "a server that gives no digests"
    assert said("failed", md5="other") == "W&B does not have cifar.json as it is here"
    assert said("failed", md5=None) == "W&B does not have cifar.json"
    old = base64.b64encode(hashlib.md5(build_document(record, with_metrics=False)).digest()).decode()
    assert old != digest_of(record) and said("failed", md5=old) == "", "an earlier version sent it, without the rows"


def digest_of(record: RunDir) -> str:
    return base64.b64encode(hashlib.md5(build_document(record)).digest()).decode()


def test_the_file_of_the_rows_is_looked_for_too(tmp_path: Path) -> None:
    record = make_record(tmp_path, "words002", epochs=1)
    record.append_row(row(1))
    end_record(record)
    arrived = ArrivedRun("finished", 1, row(1), build_summary(record), document_md5=digest_of(record))
    right = base64.b64encode(hashlib.md5((record.path / "metrics.jsonl").read_bytes()).digest()).decode()
    for md5, said in ((right, ""), ("", ""), (None, "W&B does not have metrics.jsonl"), ("x", "as it is here")):
        difference = describe_difference(replace(arrived, metrics_md5=md5), record, lambda: [])
        assert said in difference and bool(said) == bool(difference)


@pytest.mark.parametrize(
    "line", ['{"epoch":2', "[]", '{"epoch":2,"note":"x"}', '{"epoch":2,"a":null}', '{"epoch":2,"x/correct-horse-battery":1}']
)
def test_rows_that_are_not_plain_numbers_are_no_file(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "correct-horse-battery")
    record = make_record(tmp_path, "plain001", epochs=2)
    record.append_row({**row(1), "train/loss": math.nan})
    end_record(record)
    content = (record.path / "metrics.jsonl").read_bytes()
    assert describe_metrics(record)["bytes"] == len(content)
    with (record.path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n" * (line != '{"epoch":2'))
    assert describe_metrics(record) == {} and b'"metrics"' not in build_document(record)


def test_a_run_that_an_earlier_version_sent_is_whole(tmp_path: Path) -> None:
    record = make_record(tmp_path, "older001", epochs=1)
    record.append_row(row(1))
    end_record(record, "failed")
    summary, status = record.read_json("summary"), record.read_json("status")
    del status["pid"]
    sent = {**summary, "state": "failed", "reason": "", "cifar": json.dumps({"status": status, "summary": summary})}
    assert "flops" not in sent
    assert describe_difference(ArrivedRun("failed", 1, row(1), sent), record, lambda: []) == ""
    wrong = {**sent, "cifar": "{}"}  # it was opened again
    assert "other values of cifar" in describe_difference(ArrivedRun("failed", 1, row(1), wrong), record, lambda: [])


def test_pictures_whose_files_are_missing(tmp_path: Path) -> None:
    record = make_record(tmp_path, "files001", epochs=1)
    record.append_row(row(1))
    end_record(record)
    names = {"pictures/a": "media/images/pictures/a_1_f00.png", "pictures/b": "media/images/pictures/b_1_f00.png"}
    elsewhere = {
        "x": "media/images/pictures/../../x.png",
        "y": "media/table/y.json",
        "z": "media/images/pictures/..",
        "v": None,
    }
    media = {key: {"_type": "image-file", "path": name} for key, name in {**names, **elsewhere}.items()}
    arrived = ArrivedRun("finished", 1, row(1), build_summary(record), media=media, document_md5="")
    assert arrived.find_lost_pictures({names["pictures/b"]}) == {"pictures/a": names["pictures/a"]}
    assert arrived.find_lost_pictures(names.values()) == {}
    for pictures, said in (
        (None, ""),
        (frozenset(names.values()), ""),
        (frozenset(), "W&B lacks the files of pictures/a, pictures/b"),
    ):
        assert describe_difference(replace(arrived, pictures=pictures), record, lambda: []) == said
