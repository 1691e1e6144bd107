"""The report: what is compared and what stands apart, the files it leaves, and what a page may never do."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cifar import registry
from cifar.cli.inspect import group_equal_networks
from cifar.errors import UserError
from cifar.report import draw_pictures, write_report
from cifar.report.aggregate import compare_runs, describe_settings
from cifar.report.facts import format_json, format_json_rows, mask_rows
from cifar.report.formatting import format_macs, parse_macs
from cifar.report.html import write_sentences
from cifar.report.load import STAND_IN_BANNER, collect_runs, load_run, training_caveats
from cifar.report.table import runs_table
from cifar.system.redact import mask_secrets
from helpers.fake_runs import NETWORKS, quickstart, sweep_folder, write

HOSTILE = "</title></script><script>alert(1)</script><img src=x onerror=alert(2)>-->&\"'"


class Tags(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def comparison_of(runs: Path, **options: object):
    found = collect_runs([], runs)
    return compare_runs(found.runs, damaged=found.damaged, title=found.title, **options)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# -- what is compared --


def test_seeds_fold_into_one_point_with_students_interval(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.70, 0.72, 0.74)):
        write(tmp_path, f"r{seed}", seed=seed, accuracy=accuracy)
    write(tmp_path, "other", lr=0.5, accuracy=0.6)
    points = {point.label: point for point in comparison_of(tmp_path).points}
    assert set(points) == {"lr=0.1", "lr=0.5"}
    assert points["lr=0.1"].num_seeds == 3 and points["lr=0.1"].mean == pytest.approx(0.72)
    assert points["lr=0.1"].ci_half_width == pytest.approx(4.30265 * 0.02 / 3**0.5, rel=1e-5)
    assert points["lr=0.5"].ci_half_width is None


def test_a_repeated_seed_is_no_second_sample(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write(tmp_path, name, accuracy=0.7)
        time.sleep(0.01)
    comparison = comparison_of(tmp_path)
    assert [[run.id for run in point.runs] for point in comparison.points] == [["new"]]
    assert [(run.id, run.kind) for run in comparison.excluded] == [("old", "repeated")]


def test_only_the_last_epoch_of_finished_runs_counts(tmp_path: Path) -> None:
    record = write(tmp_path, "ok", accuracy=0.6)
    record.write_json("summary", {**record.read_json("summary"), "best/val/acc": 0.99})
    for state in ("running", "interrupted", "diverged", "failed", "pruned", "stopped", "skipped"):
        write(tmp_path, state, seed=5, state=state, accuracy=0.95, reason="" if state == "running" else f"why {state}")
    comparison = comparison_of(tmp_path)
    assert comparison.best.mean == 0.6 and comparison.best.num_seeds == 1
    apart = {run.kind: run.reason for run in comparison.excluded}
    assert apart["diverged"] == "why diverged" and "epoch 2 of 5" in apart["running"] and len(apart) == 7


def test_other_data_and_unverified_macs_stand_apart_by_name(tmp_path: Path) -> None:
    write(tmp_path, "a", accuracy=0.5)
    write(tmp_path, "b", model="vgg11", accuracy=0.6)
    write(tmp_path, "stand", dataset="stand-in", accuracy=0.9)
    write(tmp_path, "unsure", seed=9, verified=False, accuracy=0.9)
    comparison = comparison_of(tmp_path)
    assert {run.id: run.kind for run in comparison.excluded} == {"stand": "other data", "unsure": "unverified MACs"}
    assert comparison.best.mean == 0.6 and comparison.banner == ""
    write(tmp_path, "stand2", model="vgg11", dataset="stand-in")
    assert comparison_of(tmp_path).banner == ""  # a draw: CIFAR-10
    for i, model in enumerate(("worksheet1", "worksheet2")):
        write(tmp_path, f"more{i}", model=model, dataset="stand-in")
    comparison = comparison_of(tmp_path)
    assert comparison.banner == STAND_IN_BANNER and {run.dataset for p in comparison.points for run in p.runs} == {"stand-in"}


def test_of_runs_without_validation_images_it_is_said_how_to_compare_them(tmp_path: Path) -> None:
    record = write(tmp_path, "a", test=0.8)
    write(tmp_path, "b", model="worksheet1", accuracy=0.6)
    rows = [{key: value for key, value in row.items() if "val/" not in key} for row in record.read_rows()]
    (record.path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    record.write_json("summary", {key: value for key, value in record.read_json("summary").items() if "val/" not in key})
    said = "Not compared here: 1 run without validation images, with a test accuracy; --split test compares these."
    assert said in write_sentences(comparison_of(tmp_path))
    assert not any("Not compared here" in sentence for sentence in write_sentences(comparison_of(tmp_path, split="test")))


def test_split_test_uses_only_runs_that_have_it_and_charges_views(tmp_path: Path) -> None:
    write(tmp_path, "a", test=0.81, accuracy=0.6)
    write(tmp_path, "b", model="worksheet1", test=0.9, views=6)
    write(tmp_path, "c", model="vgg11", accuracy=0.99)
    write(tmp_path, "d", model="worksheet2", test=0.95, views=2, one_view=0.94)
    comparison = comparison_of(tmp_path, split="test")
    points = {point.label: point for point in comparison.points}
    assert points["resnet20"].mean == 0.81 and points["resnet20"].on_front
    assert points["worksheet1 (6 views)"].macs == 6 * NETWORKS["worksheet1"][0]
    assert not points["worksheet1 (6 views)"].on_front and comparison.best.label == "worksheet2"
    assert points["worksheet2"].mean == 0.94 and points["worksheet2 (2 views)"].mean == 0.95 and len(points) == 4
    assert [(run.id, run.kind) for run in comparison.excluded] == [("c", "no test accuracy")]
    assert all(point.num_views == 1 for point in comparison_of(tmp_path).points)


def test_best_under_a_budget(tmp_path: Path) -> None:
    quickstart(tmp_path, seeds=1)
    assert comparison_of(tmp_path, budget=5e7).best.label == "resnet20"
    assert comparison_of(tmp_path, budget=1e9).best.label == "preact_resnet18"
    assert comparison_of(tmp_path, budget=1e6).best is None
    answer = write_sentences(comparison_of(tmp_path, budget=5e7))[0]
    assert re.fullmatch(r"Best under 50 MMACs: resnet20, val accuracy 7\d\.\d % \(n = 1\) at 40\.8 MMACs\.", answer)


def test_labels_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    swept = ("model", "lr", "optimizer")
    for i, (model, lr, optimizer) in enumerate([("vgg11", 0.1, "sgd"), ("resnet20", 0.1, "sgd"), ("resnet20", 0.2, "adam")]):
        write(tmp_path, f"r{i}", model=model, lr=lr, optimizer=optimizer, swept=swept)
    comparison = comparison_of(tmp_path)
    assert [p.label for p in comparison.points] == ["resnet20, lr=0.1", "resnet20, lr=0.2", "vgg11, lr=0.1"]
    assert comparison.distinguishing_keys == ("model", "lr", "optimizer")


def test_labels_of_several_sweeps_name_what_is_on_and_differs(tmp_path: Path) -> None:
    """Runs of several sweeps differ in many keys. A label has those in which its network's points differ, and what few have."""
    cells = [
        ("resnet20", {"lr": 0.4, "epochs": 6, "cutmix": 0.0, "teacher": "", "probes": "all"}),
        ("resnet20", {"lr": 0.4, "epochs": 6, "cutmix": 1.0, "teacher": "", "probes": "all"}),
        ("resnet20", {"lr": 0.4, "epochs": 6, "cutmix": 0.0, "teacher": "big", "probes": "none", "experiment": "x/y"}),
        ("resnet20", {"lr": 0.4, "epochs": 6, "cutmix": 0.0, "teacher": "big", "probes": "all"}),
        ("vgg11", {"lr": 0.1, "epochs": 7, "cutmix": 1.0, "teacher": "", "probes": "all"}),
        ("vgg11", {"lr": 0.2, "epochs": 7, "cutmix": 1.0, "teacher": "", "probes": "none"}),
        ("worksheet1", {"lr": 0.2, "epochs": 8, "cutmix": 0.0, "teacher": "", "probes": "none", "experiment": "x/z"}),
    ]
    for i, (model, settings) in enumerate(cells):
        write(tmp_path, f"r{i}", model=model, swept=(), seed=int(i == 3), **settings)
    comparison = comparison_of(tmp_path)
    assert {run.id: point.label for point in comparison.points for run in point.runs} == {
        "r0": "resnet20",
        "r1": "resnet20, cutmix=1",
        "r2": "resnet20, teacher=big",
        "r3": "resnet20, teacher=big",  # the same point: probes and the experiment's name change no weight
        "r4": "vgg11, lr=0.1",
        "r5": "vgg11, lr=0.2",
        "r6": "worksheet1",
    }
    assert "probes" not in {*comparison.distinguishing_keys, *comparison.setting_keys}
    assert [len(point.runs) for point in comparison.points if point.label == "resnet20, teacher=big"] == [2]
    assert "experiment" not in comparison.distinguishing_keys and {"lr", "cutmix", "teacher"} <= {*comparison.setting_keys}
    effects = next(entry for entry in registry.figures if entry.name == "effects").builder().select(comparison)
    assert [effect.key for effect in effects] == [*comparison.setting_keys]
    for path in tmp_path.glob("r?"):  # one sweep has varied it
        path.joinpath("run.json").write_text(
            path.joinpath("run.json").read_text().replace('"swept": []', '"swept": ["probes"]')
        )
    swept = comparison_of(tmp_path)
    assert "probes" in swept.setting_keys and {"resnet20, probes=all", "worksheet1, probes=none"} <= {
        p.label for p in swept.points
    }


def test_a_record_made_from_tables_has_its_own_command(tmp_path: Path) -> None:
    """Its folder is gone when somebody reads the page. A record may come from anywhere, so that only a training is taken."""
    own = "python -m cifar train model=resnet20 width=4 'experiment=a b' seed=1"
    hostile = [
        "python -m cifar train; rm -rf x",
        "curl x | sh",
        "python -m cifar train $(rm x)",
        "python -m cifar train --from x",
        "'",
    ]
    for i, command in enumerate([own, *hostile, ""]):
        record = write(tmp_path, f"r{i}", lr=0.1 * (i + 1))
        record.write_json("run", {**record.read_json("run"), "command": command})
    runs = {run.id: run for run in collect_runs([], tmp_path).runs}
    assert {name: run.own_command for name, run in runs.items() if run.own_command} == {"r0": own}
    page = write_report([], runs=tmp_path).page.read_text()
    table = json.loads(gzip.decompress(base64.b64decode(re.search(r'id="explorer-table">([^<]*)<', page)[1])))["runs"]
    for name, command, folder in zip(table["id"], table["command"], table["folder"], strict=True):
        if name == "r6":  # the record says that there is none
            assert (command, folder) == ("", "")
            continue
        assert (command, folder) == (own, "") if name == "r0" else f" --from {name}" in command and folder.endswith(f"/{name}")


@pytest.mark.parametrize("state", ["diverged", "pruned", "failed", "killed"])
def test_seeds_that_came_to_nothing_are_counted_at_their_point(state: str, tmp_path: Path) -> None:
    write(tmp_path, "good", seed=0)
    write(tmp_path, "gone1", seed=1, state=state)
    write(tmp_path, "gone2", seed=2, state=state)
    write(tmp_path, "again", seed=2, state=state)
    write(tmp_path, "tried", seed=0, state=state)  # the same seed has a result
    write(tmp_path, "goes", seed=3, state="running")
    write(tmp_path, "other", model="vgg11")
    comparison = comparison_of(tmp_path)
    points = {point.label: point for point in comparison.points}
    assert points["resnet20"].num_seeds == 1 and points["resnet20"].num_lost == 2 and points["vgg11"].num_lost == 0
    note = "2 of 3 seeds of resnet20 did not finish: its mean is over the rest and may be biased."
    result = write_report([], runs=tmp_path)
    assert note in result.notes and {row["network"]: row["n"] for row in result.rows} == {"resnet20": "1 of 3", "vgg11": "1"}
    assert ">1 of 3</td>" in result.page.read_text() and note in result.page.read_text()
    facts = json.loads(result.page.with_suffix(".json").read_text())["points"]
    assert [(point["n"], point["seeds_not_finished"]) for point in facts] == [(1, 2), (1, 0)]


def test_what_all_points_share_is_said(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, f"a{seed}", seed=seed, train_size=512, cutout=8, crop=4, momentum=0.9, warmup=0.0, flip="none")
    write(tmp_path, "b", model="vgg11", train_size=512, cutout=8, crop=4, momentum=0.9, warmup=0.0, flip="random")
    comparison = comparison_of(tmp_path)
    text = "epochs 5, optimizer sgd, lr 0.1, batch_size 128, train_size 512, cutout 8, momentum 0.9, seeds 0 to 2"
    assert describe_settings(comparison) == text and comparison.differing_keys == ["flip"]
    assert "512 training images only" in comparison.subtitle and "512 training images only" in comparison.runs[0].subtitle
    result = write_report([], runs=tmp_path)
    page, facts = result.page.read_text(), json.loads(result.page.with_suffix(".json").read_text())
    assert f"<dt>held fixed</dt><dd>{text}</dd>" in page and "<dt>differs as well</dt><dd>flip</dd>" in page
    assert "512 training images only" in Tags(page).text and "512 training images only" in result.title
    assert facts["shared"]["train_size"] == 512 and "flip" not in facts["shared"] and facts["seeds"] == [0, 1, 2]


def test_a_cut_training_set_is_never_left_out() -> None:
    assert training_caveats([{"train_size": 0}, {}]) == [] == training_caveats([])
    assert training_caveats([{"train_size": 512, "max_steps": 1}]) == ["512 training images only", "at most 1 step an epoch"]
    assert training_caveats([{"train_size": 512}, {"max_steps": 4}]) == [
        "training sets of different size",
        "some epochs cut short",
    ]
    assert training_caveats([{"keep": 0.375}] * 2) == ["the hardest 37.5 % of the images an epoch"]
    assert training_caveats([{"keep": 0.5}, {"keep": 1.0}, {}]) == ["some epochs of hard images only"]


def test_a_run_of_an_earlier_version_is_of_the_same_point(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, f"run{seed}", model="vgg11", seed=seed)
    for path, keep in ((tmp_path / "run0" / "config.json", None), (tmp_path / "run1" / "config.json", 1.0)):
        config = json.loads(path.read_text())
        config.pop("keep", None)
        path.write_text(json.dumps(config | ({"keep": keep} if keep else {})))
    (point,) = compare_runs(collect_runs([], tmp_path).runs).points
    assert len(point.runs) == 2


# -- reading --


def test_names_are_sweeps_runs_and_folders(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    quickstart(runs, seeds=1)
    write(runs, "alone", model="vgg11")
    n = len(NETWORKS) + 2
    assert len(collect_runs([], runs).runs) == len(collect_runs(["abcd1234"], runs).runs) == n
    assert len(collect_runs([str(runs / "sweeps" / "abcd1234")], tmp_path).runs) == n
    assert len(collect_runs([str(runs)], tmp_path / "elsewhere").runs) == n + 1
    assert [run.id for run in collect_runs(["alone", "abcd1234-000"], runs).runs] == ["alone", "abcd1234-000"]
    assert len(collect_runs(["alone", "abcd1234", "alone"], runs).runs) == n + 1
    assert collect_runs([], runs).title == "quickstart (abcd1234)"
    assert collect_runs([], runs).question.startswith("Which network is worth")
    sweep_folder(runs, "newer000")
    os.utime(runs / "sweeps" / "newer000" / "sweep.yaml", (time.time() + 9, time.time() + 9))
    assert collect_runs([], runs).sweep == "newer000"
    with pytest.raises(UserError, match="no run 'nonsense'"):
        collect_runs(["nonsense"], runs)
    with pytest.raises(UserError, match="no runs in"):
        collect_runs([], tmp_path / "empty")


def test_a_sweep_is_found_by_name_and_by_the_start_of_its_id(tmp_path: Path) -> None:
    quickstart(tmp_path, seeds=1)
    sweep_folder(tmp_path, "efgh5678", "method: grid\n")
    (tmp_path / "sweeps" / "efgh5678" / "sweep.json").write_text('{"name": "from-the-file"}')
    write(tmp_path, "efgh5678-000", sweep="efgh5678")
    write(tmp_path, "alone")
    for name in ("quickstart", "abcd", "abcd1234"):
        assert collect_runs([name], tmp_path).sweep == "abcd1234"
    for name in ("from-the-file", "e"):
        assert collect_runs([name], tmp_path).title == "from-the-file (efgh5678)"
    assert [run.id for run in collect_runs(["abcd1234-000"], tmp_path).runs] == ["abcd1234-000"]
    assert [run.id for run in collect_runs(["al", "efgh"], tmp_path).runs] == ["alone", "efgh5678-000"]
    sweep_folder(tmp_path, "abxx0000")
    for name in ("quickstart", "ab"):
        with pytest.raises(UserError, match="fits 2 sweeps"):
            collect_runs([name], tmp_path)
    write(tmp_path, "efghrun")
    with pytest.raises(UserError, match="fits the sweep efgh5678 and the run efghrun"):
        collect_runs(["efgh"], tmp_path)


DAMAGE = {
    "run.json": b"{",
    "config.json": b"[1]",
    "metrics.jsonl": b'{"epoch": 1}\n\x00\xff\n',
    "status.json": b"\xff\xfe",
    "summary.json": b"null",
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_run_is_named_and_the_others_are_reported(file: str, tmp_path: Path) -> None:
    sweep_folder(tmp_path, "abcd1234")
    write(tmp_path, "abcd1234-000", sweep="abcd1234")
    record = write(tmp_path, "abcd1234-001", sweep="abcd1234", model="vgg11")
    (record.path / file).write_bytes(DAMAGE[file])
    comparison = comparison_of(tmp_path)
    assert [point.label for point in comparison.points] == ["resnet20"]
    assert [(run.id, run.kind) for run in comparison.excluded] == [("abcd1234-001", "damaged")]
    if file == "run.json":
        result = write_report([], runs=tmp_path)
        assert "Apart, damaged: abcd1234-001." in result.notes
        assert "abcd1234-001 is damaged and left out" in result.page.read_text()


def test_wrong_types_are_damage_too(tmp_path: Path) -> None:
    write(tmp_path, "ok")
    record = write(tmp_path, "bad")
    record.write_json("run", {**record.read_json("run"), "cost": {"macs": "many"}})
    found = collect_runs([], tmp_path)
    assert [run.id for run in found.runs] == ["ok"] and [run.id for run in found.damaged] == ["bad"]


def test_a_thousand_seeds_are_one_point(tmp_path: Path) -> None:
    record = write(tmp_path, "r0000", epochs=10)
    files = {path.name: path.read_bytes() for path in record.path.iterdir()}
    for i in range(1, 1000):
        folder = tmp_path / f"r{i:04d}"
        folder.mkdir()
        for name, content in files.items():
            folder.joinpath(name).write_bytes(content.replace(b'"seed": 0', b'"seed": %d' % i))
    comparison = comparison_of(tmp_path)
    assert [point.num_seeds for point in comparison.points] == [1000]


# -- what it leaves --


def test_the_files_of_a_sweeps_report(tmp_path: Path) -> None:
    quickstart(tmp_path, layers=4)
    result = write_report([], runs=tmp_path, budget=5e7)
    folder = tmp_path / "sweeps" / "abcd1234" / "report"
    assert {path.parent for path in result.paths} == {folder} and all(path.stat().st_size for path in result.paths)
    assert {"accuracy_vs_macs.png", "accuracy_vs_macs.svg", "learning_curves.png", "report.csv"} <= {
        p.name for p in result.paths
    }
    rows = rows_of(folder / "report.csv")
    assert [row["label"] for row in rows] == sorted(NETWORKS, key=lambda name: NETWORKS[name][0])
    assert all(0 < float(row["val/acc"]) < 1 and float(row["flops"]) == 2 * float(row["macs"]) for row in rows)
    facts = json.loads((folder / "report.json").read_text())
    assert facts["best"] == "resnet20" and len(facts["points"]) == len(NETWORKS) == len(result.rows)
    assert facts["rank_correlation"] > 0.7 and {run["kind"] for run in facts["apart"]} == {"running", "diverged"}
    assert result.banner == "" and "STAND-IN" not in "".join(map(repr, (result, facts, rows)))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_each_scope_and_split_has_its_own_place_and_no_figure_of_another(tmp_path: Path) -> None:
    quickstart(tmp_path, seeds=1, layers=4)
    write(tmp_path, "one", test=0.8)
    sweep = tmp_path / "sweeps" / "abcd1234"
    kept = names_in(write_report(["abcd1234"], runs=tmp_path).page.parent)
    page = (sweep / "report" / "report.html").read_bytes()
    assert write_report(["abcd1234"], runs=tmp_path, split="test").page.parent == sweep / "report-test"
    assert names_in(sweep / "report") == kept and (sweep / "report" / "report.html").read_bytes() == page
    assert write_report(["one"], runs=tmp_path).page.parent == tmp_path / "one" / "report"
    assert write_report(["one"], runs=tmp_path, split="test").page.parent == tmp_path / "one" / "report-test"
    assert write_report(["one", "abcd1234"], runs=tmp_path).page.parent == tmp_path / "report"
    assert write_report(["one", "abcd1234"], runs=tmp_path, split="test").page.parent == tmp_path / "report-test"
    for names in (["abcd1234"], ["one"]):  # into one place: the last one's files, and no others
        result = write_report(names, runs=tmp_path, out=tmp_path / "out")
        assert names_in(tmp_path / "out") == {path.name for path in result.paths}


def test_without_a_test_score_it_says_how_to_get_one(tmp_path: Path) -> None:
    quickstart(tmp_path, seeds=1)
    out = tmp_path / "out"
    write_report([], runs=tmp_path, out=out)
    for names in ([], ["abcd1234-000"]):
        result = write_report(names, runs=tmp_path, split="test", out=out)
        answer = "No run has a test accuracy; `python -m cifar train ... test=final` makes one."
        assert result.notes[0] == answer and answer in result.page.read_text()
        figures, *_ = result.page.read_text().split("What is left out")
        assert result.rows == [] and result.columns == () and "<table" not in figures
        assert not {"accuracy_vs_macs.png", "report.csv"} & names_in(out)
    assert "No finished run" in write_sentences(compare_runs([]))[0]


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    quickstart(tmp_path, seeds=1, layers=4)
    page = write_report([], runs=tmp_path).page.read_text()
    for tag, attributes in Tags(page).tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page and not re.findall(r"url\((?!#)[^)]*\)", page)
    assert "default-src 'none'" in page and page.count("<script>") == 2  # ours and the explorer's
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_nothing_of_a_record_is_taken_for_markup(tmp_path: Path) -> None:
    sweep_folder(tmp_path, "abcd1234", f"name: {json.dumps(HOSTILE)}\ndescription: {json.dumps(HOSTILE)}\n")
    for i in range(3):
        state = "failed" if i == 2 else "finished"
        record = write(
            tmp_path, f"abcd1234-00{i}", sweep="abcd1234", name=HOSTILE, recipe=f"{HOSTILE}{i}", state=state, reason=HOSTILE
        )
        record.write_json("environment", {"device": HOSTILE, "versions": {"torch": HOSTILE}})
    page = write_report([], runs=tmp_path).page.read_text()
    read = Tags(page)
    kinds = [attributes.get("type") for tag, attributes in read.tags if tag == "script"]
    assert kinds == ["text/plain"] * 3 + [None] * 2  # data, which the browser does not run, and two programs of ours
    assert "onerror" not in {key for _, a in read.tags for key in a}
    assert "img" not in [tag for tag, _ in read.tags]
    assert read.text.count(HOSTILE) >= 5
    shown = runs_table(collect_runs([], tmp_path).runs)._repr_html_()
    assert HOSTILE in Tags(shown).text and "img" not in [tag for tag, _ in Tags(shown).tags]


def test_stand_in_data_is_said_on_every_output(tmp_path: Path) -> None:
    quickstart(tmp_path, seeds=1, layers=4, dataset="stand-in")
    result = write_report([], runs=tmp_path)
    folder = result.page.parent
    assert result.banner == STAND_IN_BANNER and result.title.startswith(STAND_IN_BANNER)
    assert all(row["dataset"] == STAND_IN_BANNER for row in rows_of(folder / "report.csv"))
    assert json.loads((folder / "report.json").read_text())["dataset"] == STAND_IN_BANNER
    page = result.page.read_text()
    assert (
        f"<title>{STAND_IN_BANNER}" in page
        and f'role="alert">{STAND_IN_BANNER}' in page
        and f"<h2>{STAND_IN_BANNER} – All points" in page
    )
    assert STAND_IN_BANNER in runs_table(collect_runs([], tmp_path).runs)._repr_html_()
    for path in folder.glob("*.svg"):
        assert STAND_IN_BANNER in path.read_text(), path


def test_a_sweep_in_progress_and_one_without_a_finished_run(tmp_path: Path) -> None:
    sweep_folder(tmp_path, "abcd1234")
    (tmp_path / "sweeps" / "abcd1234" / "sweep.json").write_text('{"cells": 4}')
    assert write_report([], runs=tmp_path).notes[0] == "No finished run to compare yet."  # not even a run
    write(tmp_path, "abcd1234-000", sweep="abcd1234", state="running")
    result = write_report([], runs=tmp_path)
    assert result.rows == [] and "0 of 4 trials finished, 1 running." in result.notes
    assert "No finished run" in result.page.read_text() and (result.page.parent / "accuracy_vs_macs.png").exists()
    write(tmp_path, "abcd1234-001", sweep="abcd1234", cell=1, model="vgg11")
    assert "1 of 4 trials finished, 1 running." in write_report([], runs=tmp_path).notes


@pytest.mark.slow
def test_a_run_has_pictures_and_a_page_of_its_own(tmp_path: Path) -> None:
    record = write(tmp_path, "one", predictions=True, layers=20, epochs=10)
    drawn = draw_pictures(record.path)
    names = {"curves", "gradient_flow", "gradient_norms", "weight_updates", "histograms", "confusion", "mistakes"}
    assert {path.stem for path in drawn} == names and {path.parent for path in drawn} == {record.path / "pictures"}
    result = write_report(["one"], runs=tmp_path, out=tmp_path / "out")
    assert {path.stem for path in result.paths if path.suffix == ".svg"} == names
    assert "Worst mistakes" in result.page.read_text()
    unfinished = write(tmp_path, "two", state="running", done=0)
    assert draw_pictures(unfinished.path) == []


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, "one")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another place with --out"):
        write_report([], runs=tmp_path, out=tmp_path / "file")
    with pytest.raises(UserError, match="choose val or test"):
        write_report([], runs=tmp_path, split="train")


# -- small things --


def test_amounts_of_multiply_adds() -> None:
    assert [parse_macs(text) for text in ("50M", "1.2G", "5e7", " 300k ")] == pytest.approx([5e7, 1.2e9, 5e7, 3e5])
    assert [format_macs(n) for n in (4.08e7, 1.23e9, 5e5)] == ["40.8 MMACs", "1.23 GMACs", "500 kMACs"]
    for text in ("", "M", "fifty", "-1M", "nan", "0"):
        with pytest.raises(UserError, match="write 50M"):
            parse_macs(text)


def test_networks_of_two_names_are_one_row() -> None:
    found = {entry.name: (aliases, keys) for entry, aliases, keys in group_equal_networks(registry.models)}
    for name, family in (
        ("conv16", "conv"), ("resnet20", "resnet"), ("airbench94", "airbench"), ("vgg11", "vgg"), ("wrn_16_4", "wrn"),
        ("preact_resnet18", "preact_resnet"), ("efficientnet", "efficientnet_b0"), ("darts_v2", "darts"),
        ("mobilenet_v3_small", "mobilenet_v3"),
    ):  # fmt: skip
        assert found[name] == ([family], list(registry.models[family].keys)) and family not in found
    assert found["resnet56"] == ([], ["width", "shortcut", "drop_path", "se"]) and found["convmixer"][0] == []
    assert len(found) == len(registry.models.names()) - 9


def test_a_table_for_notebooks(tmp_path: Path) -> None:
    quickstart(tmp_path, seeds=1)
    rows = runs_table(collect_runs([], tmp_path).runs)
    assert len(rows) == len(NETWORKS) + 2 and rows[0]["model"] == "worksheet1" and rows[0]["macs"] == 6_654_464
    pytest.importorskip("pandas")
    assert list(rows.to_pandas()["model"][:2]) == [rows[0]["model"], rows[1]["model"]]


def test_importing_the_report_is_light() -> None:
    program = (
        "import sys, cifar.report; print([m for m in ('torch', 'matplotlib', 'pandas', 'scipy', 'wandb') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_run_read_back_is_what_was_written(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, "one", name="a name", test=0.8, views=2, cell=3, sweep="s").path)
    assert (run.name, run.id, run.sweep, run.cell, run.state) == ("a name", "one", "s", 3, "finished")
    assert run.accuracy("val") == run.rows[-1]["val/acc"] and run.accuracies_by_views("test") == {2: 0.8}
    assert run.layers_with("gradient_norm") == [f"layer{i}.conv" for i in range(22)]


ODD = (  # what Python's json reads, and any faster reader has to read alike
    '{"epoch":1,"a":-0.0,"b":5e-324,"c":0.1,"d":1.7976931348623157e308,"e":NaN,"f":-Infinity,"g":1e400}',
    '{"epoch":2,"a":36893488147419103232,"b":1.0,"c":1E5,"d":"\\u00e9\\n\\"","e":null,"f":true,"g":[1,{"x":2}],"a/b":""}',
    '{"epoch":3,"twice":1,"twice":2, "blank" : 0.30000000000000004 }',
    '{"epoch":4,"half a pair":"\\ud800"}',
)


@pytest.mark.parametrize("lines", [ODD, ODD[:3], *((line,) for line in ODD)])
def test_rows_are_read_as_json_reads_them(lines: tuple[str, ...], tmp_path: Path) -> None:
    record = write(tmp_path, "one")
    (record.path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"epoch":5,')
    assert repr(load_run(record.path).rows) == repr(tuple(map(json.loads, lines)))


@pytest.mark.parametrize(
    "value",
    [
        {}, [], "a", None, 1.5, {"a": []}, [[]], [1, [2], 3, {"b": {}}],
        {"a": 1, "b": [1, 2.5, {"c": None}], "d": True, "e": "é, \n: {", "f": {"g": [[], [float("nan")]]}, "h": float("inf")},
    ],
)  # fmt: skip
def test_indented_json_is_that_of_the_library(value: object) -> None:
    assert format_json(value) == json.dumps(value, indent=1)


def test_rows_are_written_and_masked_by_columns_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "swordfish-swordfish")
    rows = [
        {"label": "a, b: \n é", "n": 1, "x": -0.0, "runs": ["r0", "swordfish-swordfish"], "swordfish-swordfish": None, "l": []},
        {"label": "swordfish-swordfish!", "n": None, "x": math.nan, "runs": [], "swordfish-swordfish": True, "l": [{"a": [1]}]},
    ]
    masked = mask_rows(rows)
    assert repr(masked) == repr(mask_secrets(rows, mask_keys=False)) and "swordfish" not in repr(masked)
    assert format_json_rows(masked, 1) == format_json(masked, 1) and format_json_rows([], 1) == "[]" and mask_rows([]) == []
    assert json.dumps({"a": masked}, indent=1) == f'{{\n "a": {format_json_rows(masked, 1)}\n}}'
