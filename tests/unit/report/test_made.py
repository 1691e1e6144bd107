"""What was made before is used again only where the same would be made: all files are those of a report that makes all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from cifar import registry
from cifar.report import digest, made, write_report
from cifar.report.aggregate import compare_runs
from cifar.report.digest import compute_digest
from cifar.report.drawing import FigureWriter
from cifar.report.load import collect_runs
from cifar.report.made import Made
from cifar.tracking.cleanup import find_leftovers, remove_leftover
from cifar.tracking.run_dir import CACHE_FOLDER, MADE_FILE
from helpers.fake_runs import write

FIGURES = ("accuracy_vs_macs", "effects", "gradient_flow_by_network", "learning_curves")
FILES = {"accuracy_vs_macs.png", "accuracy_vs_macs.svg"}  # most tests draw one figure, as drawing takes the time
NUM_RUNS = 20  # so many points that the page says something of importance


def make_runs(folder: Path) -> None:
    for number in range(NUM_RUNS):
        model = ("resnet20", "worksheet1")[number % 2]
        lr = 0.01 * (number // 2 + 1)
        write(folder, f"r{number:02d}", model=model, lr=lr, swept=("lr",), epochs=2, layers=2, test=0.5 + lr)


@dataclass
class Reports:
    """Reports of one folder, each into the same place."""

    runs: Path
    out: Path
    patch: pytest.MonkeyPatch

    def write(self, **options: Any) -> dict[str, bytes]:
        """What is in the files of a report."""
        return self._write(self.out, options)

    def write_anew(self, **options: Any) -> dict[str, bytes]:
        """What is in the files of a report that knows nothing of others."""
        place = self.out.with_name("anew")
        shutil.rmtree(place, ignore_errors=True)
        with self.patch.context() as patch:
            patch.setattr(made, "MIN_RUNS", 10**9)
            return self._write(place, options)

    def _write(self, place: Path, options: dict[str, Any]) -> dict[str, bytes]:
        write_report([str(self.runs)], runs=self.runs, out=place, command="a command", **options)
        found = {path.name: path.read_bytes() for path in place.iterdir()}
        found["report.html"] = re.sub(rb"<dt>drawn</dt><dd>[^<]*</dd>", b"", found["report.html"])
        return found

    def list_inodes(self) -> dict[str, tuple[int, int]]:
        """What changes when a file is written again: its figures' inodes and times."""
        stats = {path.name: path.stat() for path in self.out.iterdir() if path.stem in FIGURES}
        return {name: (about.st_ino, about.st_mtime_ns) for name, about in stats.items()}

    def list_drawn(self, **options: Any) -> set[str]:
        """The files of figures that the next report writes. It has to be the one that knows nothing."""
        before = self.list_inodes()
        assert self.write(**options) == self.write_anew(**options)
        return {name for name, about in self.list_inodes().items() if before.get(name) != about}


class OneFigure(list[registry.Entry]):
    problems = ()


@pytest.fixture
def all_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reports:
    """Reports of some runs with all figures, after the first one."""
    monkeypatch.setattr(made, "MIN_RUNS", 1)
    make_runs(tmp_path / "runs")
    found = Reports(tmp_path / "runs", tmp_path / "out", monkeypatch)
    found.write()
    return found


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Reports:
    """The same with one figure."""
    monkeypatch.setattr(registry, "figures", OneFigure([registry.figures["accuracy_vs_macs"]]))
    found: Reports = request.getfixturevalue("all_reports")
    return found


def test_figures_are_drawn_where_something_has_changed(all_reports: Reports) -> None:
    known = json.loads((all_reports.runs / CACHE_FOLDER / MADE_FILE).read_text())["made"]
    assert len(known) == len(FIGURES) + 1  # each figure of a sweep has a digest, and the importance of settings has one
    before = all_reports.list_inodes()
    all_reports.write()
    assert all_reports.list_inodes() == before
    change_a_run(all_reports)
    assert all_reports.list_drawn() == {*before}  # the order of the points, too


def change_a_run(reports: Reports) -> None:
    file = reports.runs / "r03" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[-1] = re.sub(r'"val/acc": [\d.]+', '"val/acc": 0.765', lines[-1])
    file.write_text("".join(f"{line}\n" for line in lines))


def add_a_run(reports: Reports) -> None:
    write(reports.runs, "new", lr=0.7, swept=("lr",), epochs=2, layers=2, test=0.4)


def delete_a_run(reports: Reports) -> None:
    shutil.rmtree(reports.runs / "r03")


@pytest.mark.slow
@pytest.mark.parametrize("change", [add_a_run, delete_a_run])
def test_runs_that_come_and_go_are_drawn(change: Callable[[Reports], None], reports: Reports) -> None:
    change(reports)
    assert reports.list_drawn() == FILES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "drawn"),
    [({"split": "test"}, FILES), ({"cost_unit": "flops"}, FILES), ({"budget": 2e7}, FILES), ({"kept": ["r03"]}, set())],
)
def test_options_draw_what_they_change(options: dict[str, Any], drawn: set[str], reports: Reports) -> None:
    assert reports.list_drawn(**options) == drawn
    before = reports.list_inodes()
    reports.write(**options)
    assert reports.list_inodes() == before
    assert reports.list_drawn() == drawn  # the files were those of the other options


@pytest.mark.slow
def test_other_libraries_settings_and_programs_draw_again(reports: Reports) -> None:
    with reports.patch.context() as patch:
        patch.setattr(matplotlib, "__version__", "99.0")
        assert reports.list_drawn() == FILES
    with matplotlib.rc_context({"lines.markeredgewidth": 3.0, "lines.linestyle": ":"}):  # as in a matplotlibrc
        assert reports.list_drawn() == FILES
    reports.patch.setattr("cifar.report.drawing.digest_program", lambda: "another")
    assert reports.list_drawn() == FILES


def test_the_digest_of_the_program_has_all_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cifar"
    shutil.copytree(digest.PACKAGE, place, ignore=shutil.ignore_patterns("web", "__pycache__", "pretrained"))
    monkeypatch.setattr(digest, "PACKAGE", place)
    found = []
    for name in ("report/style.py", "report/figures/effects.py", "report/figures/effects.py", "system/durations.py"):
        digest.digest_program.cache_clear()
        found.append(digest.digest_program())
        file = place / name
        file.write_text(f"{file.read_text()}\n# another program")
    (place / "report" / "figures" / "effects.py").rename(place / "report" / "figures" / "other.py")
    digest.digest_program.cache_clear()
    assert len({*found, digest.digest_program()}) == 5
    digest.digest_program.cache_clear()


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"iDAT").replace(b"<path", b"<gath"))


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "name"), [(spoil, "svg"), (spoil, "png"), (os.remove, "svg"), (replace_by_a_pipe, "png")])
def test_a_figure_that_somebody_has_changed_is_drawn_again(change: Callable[[Path], None], name: str, reports: Reports) -> None:
    change(reports.out / f"accuracy_vs_macs.{name}")
    assert reports.list_drawn() == FILES


@pytest.mark.slow
def test_the_importance_of_settings_is_kept(reports: Reports) -> None:
    file = reports.runs / CACHE_FOLDER / MADE_FILE
    content = json.loads(file.read_text())
    (key,) = [key for key, value in content["made"].items() if "reason" in value]
    content["made"][key]["reason"] = "this was kept."
    file.write_text(json.dumps(content))
    assert b"this was kept." in reports.write()["report.html"]
    change_a_run(reports)
    assert reports.write() == reports.write_anew()
    reports.patch.setattr(registry, "figures", OneFigure())
    shutil.rmtree(reports.out)
    for wrong in ("text", {"reason": 5}, {"shares": []}, {"note": "", "shares": [{"key": "lr", "mean": "1"}]}, {}, [], 5):
        reports.write()
        content = json.loads(file.read_text())
        content["made"] = dict.fromkeys(content["made"], wrong)
        file.write_text(json.dumps(content))
        assert reports.write() == reports.write_anew(), wrong


BROKEN = ["", "garbage", "[]", "{}", '{"format":0,"made":{}}', '{"format":1,"made":[]}', '{"format":1,"made":5}', "[" * 999]


def test_a_broken_file_counts_as_none(tmp_path: Path) -> None:
    file = tmp_path / CACHE_FOLDER / MADE_FILE
    for text in BROKEN:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        found = Made(tmp_path)
        assert found.find("a") is None, text
        found.keep("a", 1)
        found.write()
        assert Made(tmp_path).find("a") == 1
    file.unlink()
    os.mkfifo(file)
    assert Made(tmp_path).find("a") is None


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_no_error(reports: Reports) -> None:
    shutil.rmtree(reports.runs / CACHE_FOLDER)
    (reports.runs / CACHE_FOLDER).write_text("no folder")
    assert reports.list_drawn() == FILES


@pytest.mark.slow
def test_a_plugin_figure_is_always_drawn(reports: Reports) -> None:
    """Nobody knows what it is made from."""

    class Mine:
        scope, title = "sweep", "Mine"

        def select(self, comparison: Any) -> list[float]:
            return [1.0, 2.0]

        def draw(self, data: list[float], figure: Any) -> None:
            figure.subplots().plot(data)

    collection = collect_runs([str(reports.runs)], reports.runs)
    writer = FigureWriter(collection, compare_runs(collection.runs), reports.out, Made(reports.runs))
    mine = registry.Entry("figure", "mine", Mine, {}, {}, __file__)
    assert [writer.write(mine).key, len(writer.write(mine).sections)] == ["", 1]
    assert writer.write(registry.figures[0]).key != ""


def test_gc_removes_the_file(reports: Reports) -> None:
    found = [leftover for leftover in find_leftovers(reports.runs, days=30) if leftover.path.name == MADE_FILE]
    assert len(found) == 1 and remove_leftover(found[0]) == "" and not found[0].path.exists()


@dataclass(frozen=True)
class Thing:
    name: str
    values: list[Any]


DIFFERENT = [
    0, 0.0, -0.0, False, None, "", "0", [], (), {}, [[]], [0], [0.0], [-0.0], [False], (0,), [[0]], [[0], []], [[], [0]], ["0"],
    ["a", "b"], ["a', 'b"], ["ab", ""], {"a": 1}, {"a": "1"}, {"b": 1}, [1, 2], [[1], [2]], [[1, 2]], [[1.0], [2.0]],
    np.zeros(2), np.zeros((2, 1)), np.zeros(2, np.float32), np.zeros(2, np.int64), [np.zeros(2)], float("nan"), float("inf"),
    [Thing("a", []), Thing("b", [])], [Thing("a", [])], Thing("a", []), Thing("a", [1]), Thing("a", [1.0]), [1, "1"], ["1", 1],
]  # fmt: skip


def test_digests_of_different_things_are_different() -> None:
    found = [compute_digest(value) for value in DIFFERENT] + [compute_digest(1, 2), compute_digest()]
    assert "" not in found and len(set(found)) == len(found)
    assert compute_digest(Thing("a", [1, {"b": (2.5,)}])) == compute_digest(Thing("a", [1, {"b": (2.5,)}]))
    for unknown in (object(), [object()], {"a": {1}}, np.float64(1), [Thing("a", [b"bytes"])], np.array([None])):
        assert compute_digest(unknown) == ""
