"""The cache of a runs folder: a report with it is the same as without, whatever the runs are and whatever is in its place."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar.report.load import Run, RunCollection, RunLoader, collect_runs, load_run
from cifar.report.metric_rows import MetricRows, RowPacker
from cifar.report.run_cache import RunCache
from cifar.report.run_files import RunReader, stat_files
from cifar.tracking.cleanup import find_leftovers, remove_leftover
from cifar.tracking.records import parse_rows
from cifar.tracking.run_dir import CACHE_FILE, CACHE_FOLDER, list_folders
from helpers.fake_runs import write


def append(folder: Path, *lines: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def make_odd_runs(runs: Path) -> None:
    """Runs of every kind that a report meets."""
    write(runs, "plain", test=0.7, views=6, one_view=0.69, tags=("a", "b"))
    write(runs, "pictures", predictions=True, layers=2)
    write(runs, "resumed", state="interrupted", done=3)
    append(runs / "resumed", '{"epoch":4,"val/acc":0.5,"best/val/acc":0.5}')  # other names than the rows before
    write(runs, "diverged", state="diverged", reason="the loss\nis nan")
    append(runs / "diverged", '{"epoch":3,"step":9,"train/loss":NaN,"val/acc":-0.0,"x":Infinity,"y":1e-320}')
    with (runs / "diverged" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch":4')  # still being written
    write(runs, "failed", state="failed", reason="\x1b[31mout of memory")
    write(runs, "packed", pack=4, packed_with=["a", "b"])
    write(runs, "running", state="running", done=0)
    old = write(runs, "old", seed=3).path  # of a version without labels, environments and statuses
    for name in ("labels", "environment", "status"):
        (old / f"{name}.json").unlink()
    write(runs, "text")
    append(runs / "text", '{"epoch":6,"note":"a text","val/acc":0.25}')
    write(runs, "null")
    append(runs / "null", '{"epoch":6,"extra":null,"list":[1,2],"val/acc":0.25}')
    write(runs, "large")
    append(runs / "large", '{"epoch":6,"count":9007199254740993,"val/acc":0.25}')
    write(runs, "no_rows")
    (runs / "no_rows" / "metrics.jsonl").unlink()
    secret = write(runs, "secret").path
    document = json.loads((secret / "environment.json").read_text())
    (secret / "environment.json").write_text(json.dumps({**document, "api_key": "swordfish-swordfish"}))
    write(runs, "damaged")
    (runs / "damaged" / "summary.json").write_text("{")


def open_loader() -> RunLoader:
    return RunLoader(min_cached=1, settle_seconds=-1.0)


def collect(runs: Path) -> RunCollection:
    """What a report reads, by way of the cache."""
    return collect_runs([str(runs)], runs, loader=open_loader())


def describe(collection: RunCollection) -> str:
    """Everything that is known of all runs, to the last bit and in its order."""
    listed = [[(field.name, getattr(run, field.name)) for field in fields(Run)] for run in collection.runs]
    return repr([listed, collection.damaged])


def find_kept(runs: Path) -> set[str]:
    cache = RunCache(runs)
    cache.read()
    return {folder.name for folder in list_folders(runs) if cache.find_run(folder, stat_files(folder))}


def test_the_same_runs_with_and_without_a_cache(tmp_path: Path) -> None:
    make_odd_runs(tmp_path)
    without = describe(collect_runs([str(tmp_path)], tmp_path))
    assert not (tmp_path / CACHE_FOLDER).exists()  # few runs are read from their folders
    names = {folder.name for folder in list_folders(tmp_path)}
    assert describe(collect(tmp_path)) == without
    assert find_kept(tmp_path) == names - {"text", "null", "large", "secret", "damaged"}
    assert describe(collect(tmp_path)) == without
    assert b"swordfish" not in (tmp_path / CACHE_FOLDER / CACHE_FILE).read_bytes()
    run = {run.id: run for run in collect(tmp_path).runs}["diverged"]
    assert repr(run.rows[-1]) == "{'epoch': 3, 'step': 9, 'train/loss': nan, 'val/acc': -0.0, 'x': inf, 'y': 1e-320}"
    assert type(run.rows[0]["step"]) is int and type(run.rows[0]["val/acc"]) is float


def test_a_run_that_changes_is_read_again(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path, f"r{number}", accuracy=0.5)
    collect(tmp_path)
    file = tmp_path / "r1" / "summary.json"
    about, text = file.stat(), file.read_text()
    file.write_text(text.replace("0.5", "0.7"))  # the same size, and then the same time
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    (tmp_path / "r2" / "metrics.jsonl").write_text('{"epoch":1,"val/acc":0.25}\n')
    shutil.rmtree(tmp_path / "r3")
    write(tmp_path, "r4", accuracy=0.25)
    for _ in range(2):
        runs = {run.id: run for run in collect(tmp_path).runs}
        assert [*runs] == ["r0", "r1", "r2", "r4"]
        assert runs["r1"].summary["val/acc"] == 0.7 and len(runs["r2"].rows) == 1 and runs["r4"].accuracy("val") == 0.25
    assert find_kept(tmp_path) == {"r0", "r1", "r2", "r4"}


def test_a_file_that_has_just_changed_is_not_kept(tmp_path: Path) -> None:
    """It could change once more within a tick of the clock, and would look the same."""
    write(tmp_path, "r0")
    collect_runs([str(tmp_path)], tmp_path, loader=RunLoader(min_cached=1))
    assert not find_kept(tmp_path)


def test_runs_of_another_report_stay(tmp_path: Path) -> None:
    for sweep in ("aaaaaaaa", "bbbbbbbb"):
        (tmp_path / "sweeps" / sweep).mkdir(parents=True)
        for cell in range(3):
            write(tmp_path, f"{sweep}-{cell:03d}", sweep=sweep, cell=cell, seed=cell)
    for sweep in ("aaaaaaaa", "bbbbbbbb", "aaaaaaaa"):
        found = collect_runs([sweep], tmp_path, loader=open_loader())
        assert found.sweep == sweep and [run.id for run in found.runs] == [f"{sweep}-{cell:03d}" for cell in range(3)]
    assert len(find_kept(tmp_path)) == 6


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change what is in a cache: its document, its arrays."""
    with np.load(file) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    about = json.loads(arrays["about"].tobytes())
    change(about, arrays)
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(file.with_name("new.npz"), **arrays)
    file.with_name("new.npz").replace(file)


def set_item(place: list[Any], value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(about: dict[str, Any], _: dict[str, Any]) -> None:
        target: Any = about
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value

    return change


def set_array(name: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda _, arrays: arrays.update({name: value(arrays[name])})


LIES = {
    "format": set_item(["format"], 0),
    "names": set_item(["names"], 5),
    "fewer names": lambda about, _: about["names"].pop(),
    "documents": set_item(["documents"], {}),
    "a list": set_item(["documents", 0, "config"], [1]),
    "no config": set_item(["documents", 0, "config"], {}),
    "state": set_item(["documents", 0, "status", "state"], "\x1b[31m"),
    "cost": set_item(["documents", 0, "run", "cost"], {"macs": "many"}),
    "schema": set_item(["documents", 0, "run", "schema"], 99),
    "setting": set_item(["documents", 0, "config", "epochs"], -1),
    "depth": set_item(["documents", 0, "run", "deep"], json.loads("[" * 99 + "]" * 99)),
    "labels": set_item(["documents", 0, "labels"], 1000),
    "labels of another kind": set_item(["shared", "labels", 0], {"layers": 5}),
    "environment": set_item(["documents", 0, "environment"], -1),
    "environment of another kind": set_item(["shared", "environment", 0], 5),
    "no shared documents": set_item(["shared"], {}),
    "metric": set_item(["documents", 0, "summary", "val/acc"], "0.5"),
    "time": set_item(["documents", 0, "run", "created"], -1.0),
    "long text": set_item(["documents", 0, "config", "model"], "x" * 5000),
    "a document that is missing": lambda about, _: about["documents"][0].pop("status"),
    "no run": set_item(["documents", 0, "run"], {}),
    "a whole number with many digits": set_item(["documents", 0, "status", "x"], 10**301),
    "layouts": set_item(["layouts", 0, 0], ["a"]),
    "name of a metric": set_item(["layouts", 0, 0, 0], 5),
    "whole number": set_array("values", lambda values: np.where(values == 1, 1.5, values)),
    "no number": set_array("values", lambda values: np.full_like(values, np.nan)),
    "values": set_array("values", lambda values: values[:-1]),
    "ids": set_array("ids", lambda ids: ids + 1000),
    "num_rows": set_array("num_rows", lambda numbers: numbers - 1),
    "kind": set_array("values", lambda values: values.astype(np.float32)),
    "shape": set_array("signatures", lambda signatures: signatures[:, :8]),
    "lost": lambda _, arrays: arrays.pop("num_rows"),
}


def test_a_cache_that_lies_is_no_cache(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, f"r{number}", seed=number, layers=2)
    expected = describe(collect_runs([str(tmp_path)], tmp_path))
    collect(tmp_path)
    file = tmp_path / CACHE_FOLDER / CACHE_FILE
    whole = file.read_bytes()
    for name, change in LIES.items():
        file.write_bytes(whole)
        rewrite(file, change)
        assert describe(collect(tmp_path)) == expected, name


def test_what_is_no_cache_at_all_counts_as_none(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path, f"r{number}", seed=number, layers=2)
    expected = describe(collect_runs([str(tmp_path)], tmp_path))
    collect(tmp_path)
    folder = tmp_path / CACHE_FOLDER
    whole = (folder / CACHE_FILE).read_bytes()
    fired = tmp_path / "fired"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(fired),))

    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", b"garbage", whole[: len(whole) // 2], bytes(flipped), pickle.dumps(Trap())):
        (folder / CACHE_FILE).write_bytes(content)
        assert describe(collect(tmp_path)) == expected
    np.savez(folder / CACHE_FILE, about=np.array([Trap()], object), allow_pickle=True)
    assert describe(collect(tmp_path)) == expected
    assert not fired.exists()
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("gone", path)):
        (folder / CACHE_FILE).unlink()
        make(folder / CACHE_FILE)
        assert describe(collect(tmp_path)) == expected
        (folder / CACHE_FILE).rmdir() if (folder / CACHE_FILE).is_dir() else (folder / CACHE_FILE).unlink(missing_ok=True)
        (folder / CACHE_FILE).write_bytes(b"")
    shutil.rmtree(folder)
    folder.write_text("no folder")  # as good as a folder that cannot be written
    assert describe(collect(tmp_path)) == expected and folder.read_text() == "no folder"


@pytest.mark.parametrize("has_others", [False, True])
def test_gc_removes_it_and_nothing_else(tmp_path: Path, has_others: bool) -> None:
    write(tmp_path, "r0")
    collect(tmp_path)
    other = tmp_path / CACHE_FOLDER / "models" / "weights.bin"  # a home folder may be a runs folder
    if has_others:
        other.parent.mkdir()
        other.write_bytes(b"dear")
    (leftover,) = find_leftovers(tmp_path, days=30)
    assert leftover.path == tmp_path / CACHE_FOLDER / CACHE_FILE and leftover.size > 0
    assert remove_leftover(leftover) == "" and not leftover.path.exists()
    assert (tmp_path / CACHE_FOLDER).exists() is has_others and other.exists() is has_others
    assert load_run(tmp_path / "r0").id == "r0"


@pytest.mark.parametrize("kind", ["uniform", "mixed", "empty"])
def test_packed_rows_are_like_a_tuple(kind: str) -> None:
    rows: list[dict[str, Any]] = [{"epoch": i, "b": i / 3, "a": float(i)} for i in range(1, 6)]
    rows = {"uniform": rows, "mixed": [*rows, {"b": 1, "new": -0.0}, {"epoch": 7, "b": 2}], "empty": []}[kind]
    packed = RowPacker().pack(rows)
    assert isinstance(packed, MetricRows) and repr(packed) == repr(tuple(rows)) and packed == tuple(rows)
    assert len(packed) == len(rows) and repr(list(packed)) == repr(rows) and bool(packed) == bool(rows)
    for place in (slice(None), slice(1, 3), slice(None, None, -1), slice(-2, None)):
        assert packed[place] == tuple(rows[place])
    for place in range(-len(rows), len(rows)):
        assert repr(packed[place]) == repr(rows[place])
    for name in ("epoch", "b", "new", "none"):
        assert packed.read_column(name) == pytest.approx([row.get(name, np.nan) for row in rows], nan_ok=True, abs=0)
    with pytest.raises(IndexError):
        packed[len(rows)]


@pytest.mark.parametrize(
    "text",
    [
        '{"epoch":1,"b":0.5}\n{"epoch":2,"b":NaN}\n{"epoch":3,"b":-0.0}\n{"epoch":4,"b":1e999}\n{"epoch":5',
        '{"epoch":1,"b":0.5}\n{"epoch":2,"b":1}\n',  # a whole number where the row before has a float
        '{"epoch":1,"b":0.5}\n{"b":0.5,"epoch":2}\n',
        '{"epoch":1,"b":0.5}\n{"epoch":2,"b":0.5,"c":1.0}\n',
        '{"epoch":1,"\u00e4":0.5}\n',
        '{"epoch":1,"a\\n":0.5}\n',
        '{"epoch":1,"count":9007199254740993}\n',
        '{"a":1,"a":2}\n',
        "{}\n",
        "",
        '{"epoch":1}',
        '{"epoch":1,"note":"text"}\n',
        '{"epoch":1,"nothing":null}\n',
    ],
)
def test_rows_that_are_read_as_a_whole_are_those_that_are_read_one_by_one(text: str) -> None:
    content = text.encode()
    parsed = RowPacker().parse(content)
    assert parsed is None or repr(parsed) == repr(tuple(parse_rows(content)))


@pytest.mark.parametrize(
    "text",
    [
        '{"epoch":-1,"b":0.5}\n',
        '{"epoch":1.5,"b":0.5}\n',
        '{"epoch":10000000000}\n',
        '{"epoch":true}\n',
        "[1]\n",
        '{"b":0.5}\n\n{"b":1.5}\n',
        '{"b":0.5},{"b":1.5}\n',
        '{"b":1' + "0" * 400 + "}\n",
    ],
)
def test_rows_that_are_damaged_are_not_read_as_a_whole(text: str) -> None:
    with pytest.raises(ValueError):
        parse_rows(text.encode())
    assert RowPacker().parse(text.encode()) is None


def test_what_another_process_has_read_is_the_same(tmp_path: Path) -> None:
    """Layouts and labels that runs have in common are kept once, also of runs that two processes have read."""
    make_odd_runs(tmp_path)
    reader, names = RunReader(), ("plain", "resumed", "null", "no_rows")
    own = [reader.read(tmp_path / name) for name in names]
    sent = [reader.share(files) for files in pickle.loads(pickle.dumps([RunReader().read(tmp_path / name) for name in names]))]
    assert repr(sent) == repr(own)
    for a, b in zip(sent, own, strict=True):
        assert a.documents["labels"] is b.documents["labels"]
        if isinstance(a.rows, MetricRows) and isinstance(b.rows, MetricRows):
            assert all(first is second for first, second in zip(a.rows.layouts, b.rows.layouts, strict=True))


def test_runs_are_the_same_however_many_cores_read_them(tmp_path: Path) -> None:
    make_odd_runs(tmp_path / "runs")
    program = (
        "import os, sys; from pathlib import Path; from cifar.report import beside; from cifar.report.load import RunLoader\n"
        "beside.MIN_PART = 3\n"
        "if sys.argv[2] == 'one': os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "paths = sorted(Path(sys.argv[1]).glob('[a-z]*'))\n"
        "for path, run in RunLoader(min_cached=1).load_all(paths): print(path.name, type(run), str(run))"
    )
    one, all_cores = (
        subprocess.run([sys.executable, "-c", program, tmp_path / "runs", cores], capture_output=True, text=True, check=True)
        for cores in ("one", "all")
    )
    assert one.stdout == all_cores.stdout and one.stdout.count("\n") == 14 and "damaged and left out" in one.stdout
