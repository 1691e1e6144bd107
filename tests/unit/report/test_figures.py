"""Every registered figure: it selects from a synthetic table, draws on an empty one, and announces stand-in data."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from cifar import registry
from cifar.report import labels, style
from cifar.report.aggregate import Comparison, compare_runs
from cifar.report.load import STAND_IN_BANNER, Run, collect_runs, load_run
from cifar.report.style import Nothing
from cifar.tracking.histograms import append_histograms
from helpers.fake_runs import NETWORKS, quickstart, write

ENTRIES = sorted(registry.figures, key=style.sort_key)
BY_NAME = {entry.name: entry for entry in ENTRIES}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    runs = tmp_path_factory.mktemp("runs")
    quickstart(runs, layers=5)
    found = collect_runs([], runs)
    return compare_runs(found.runs, title=found.title, budget=5e7)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write(tmp_path_factory.mktemp("run"), "one", predictions=True, epochs=4).path)


def empty_run(tmp_path: Path) -> Run:
    return load_run(write(tmp_path, "empty", state="running", done=0).path)


def test_what_is_promised_is_there() -> None:
    scopes = {entry.name: style.get_scope(entry) for entry in ENTRIES}
    assert scopes.items() >= {"accuracy_vs_macs": "sweep", "learning_curves": "sweep", "effects": "sweep"}.items()
    assert scopes.items() >= {"gradient_flow": "run", "weight_updates": "run", "curves": "run", "confusion": "run"}.items()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_draws_on_a_full_and_on_an_empty_table(entry: registry.Entry, sweep: Comparison, run: Run, tmp_path: Path) -> None:
    of_run = style.get_scope(entry) == "run"
    full = style.render_figure(entry, run if of_run else sweep)
    assert full.problem == "" or "only the network was swept" in full.problem
    assert style.encode_png(full.figure, dpi=40).startswith(b"\x89PNG")
    empty = style.render_figure(entry, empty_run(tmp_path) if of_run else compare_runs([]))
    assert empty.problem and not empty.has_failed
    assert "nothing to show" in texts(empty)
    ElementTree.fromstring(style.encode_svg(empty.figure, "salt"))


@pytest.fixture(scope="module")
def widths(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Configurations of one family, with names as long as names are."""
    runs, cells = tmp_path_factory.mktemp("widths"), list(itertools.product((4, 16, 32), (1, 2)))
    for cell, (width, depth) in enumerate(cells):
        more = {"width": width, "depth": depth, "swept": ("width", "depth"), "layers": 3 + depth, "accuracy": 0.5 + cell / 20}
        write(runs, f"run-{cell}", model="shufflenet_v2", epochs=2, **more)
    return compare_runs(collect_runs([], runs).runs)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_no_text_is_cut_off_by_the_figures_edge(entry: registry.Entry, widths: Comparison, run: Run) -> None:
    drawn = style.render_figure(entry, run if style.get_scope(entry) == "run" else widths)
    drawn.figure.dpi = style.DPI  # as it is saved
    drawn.figure.draw_without_rendering()  # legends are put in their places
    renderer = drawn.figure.canvas.get_renderer()
    width, height = (style.DPI * side for side in drawn.figure.get_size_inches())
    for text in shown(drawn):
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text.get_text()


def test_panels_and_lines_of_one_family_can_be_told_apart(widths: Comparison) -> None:
    entry = BY_NAME["gradient_flow_by_network"]
    panels = {panel.title: [label for label, _ in panel.lines] for panel in entry.build().select(widths)}
    assert panels.keys() == {"shufflenet_v2, 4 layers", "shufflenet_v2, 5 layers"}
    assert all(sorted(labels) == ["width=16", "width=32", "width=4"] for labels in panels.values())
    assert texts(style.render_figure(entry, widths)).count("width=16") == 2, "each panel has its legend"


@pytest.mark.parametrize("name", ["accuracy_vs_macs", "gradient_flow"])
def test_stand_in_data_is_announced_on_the_figure(name: str, tmp_path: Path) -> None:
    run = load_run(write(tmp_path, "one", dataset="stand-in").path)
    subject = run if style.get_scope(BY_NAME[name]) == "run" else compare_runs([run])
    drawn = style.render_figure(BY_NAME[name], subject)
    width, height = drawn.figure.get_size_inches()
    assert STAND_IN_BANNER in texts(drawn) and subject.subtitle in texts(drawn)
    whole = style.encode_svg(drawn.figure, name)
    inline = style.inline_svg(whole, drawn.header_inches)
    ElementTree.fromstring(inline)
    box = [float(side) for side in re.findall(r'viewBox="0 ([\d.]+) ([\d.]+) ([\d.]+)"', inline)[0]]
    assert box == pytest.approx([72 * 0.45, 72 * width, 72 * (height - 0.45)])  # the inches of title and subtitle
    assert whole.count('id="head:') == 4 and 'id="head:' not in inline
    assert inline.count('display="none"') == 3 and 'transform="translate(0 32.4)"' in inline


def test_svg_is_the_same_every_time_and_points_have_tips(sweep: Comparison) -> None:
    first, second = (style.encode_svg(style.render_figure(BY_NAME["accuracy_vs_macs"], sweep).figure, "salt") for _ in range(2))
    assert first == second
    ElementTree.fromstring(first)
    tips = re.findall(r'<g class="tip"><title>([^<]*)</title>', first)
    assert len(tips) == len(NETWORKS)
    assert any("resnet20" in tip and "40.8 MMACs" in tip and "seeds 0, 1, 2" in tip for tip in tips)


def test_names_cannot_break_out_of_an_svg(tmp_path: Path) -> None:
    name = "</title><script>alert(1)</script>--> &\"' $x_1$"
    write(tmp_path, "a", name=name, recipe=name)
    write(tmp_path, "b", name=name, recipe="plain")
    comparison = compare_runs(collect_runs([], tmp_path).runs, title=name)
    drawn = style.render_figure(BY_NAME["accuracy_vs_macs"], comparison)
    assert not drawn.problem
    for text in (
        style.encode_svg(drawn.figure, "salt"),
        style.inline_svg(style.encode_svg(drawn.figure, "salt"), drawn.header_inches),
    ):
        root = ElementTree.fromstring(text)
        assert not [node for node in root.iter() if node.tag.rpartition("}")[2] == "script"]
        assert any(name in (node.text or "") for node in root.iter())


def test_accuracy_vs_macs_selects_percent_intervals_and_the_front(sweep: Comparison) -> None:
    data = BY_NAME["accuracy_vs_macs"].build().select(sweep)
    dots = {dot.label: dot for dot in data.dots}
    assert dots["vgg11"].error is None and dots["vgg11"].num_seeds == 1
    assert dots["resnet20"].error > 0 and 70 < dots["resnet20"].y < 80
    assert {label for label, dot in dots.items() if not dot.is_on_front} == {"vgg11", "worksheet2", "mobilenet_v2"}
    xs, ys = zip(*data.steps, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys)


def test_several_views_alone_have_no_front_and_are_drawn(tmp_path: Path) -> None:
    comparison = compare_runs([load_run(write(tmp_path, "a", test=0.8, views=6).path)], split="test")
    drawn = style.render_figure(BY_NAME["accuracy_vs_macs"], comparison)
    assert not drawn.problem and comparison.best is None and "resnet20 (6 views)" in texts(drawn)


def test_gradient_flow_marks_layers_that_get_none(tmp_path: Path) -> None:
    record = write(tmp_path, "one", epochs=2, layers=3)
    record.append_row(
        {"epoch": 3, **{f"gradient_{m}/layer{i}.conv": 0.0 if i == 1 else 0.5 for i in range(3) for m in ("mean", "max")}}
    )
    flow = BY_NAME["gradient_flow"].build().select(load_run(record.path))
    assert flow.zero == [1] and math.isnan(flow.mean[1]) and flow.mean[0] == 0.5 and flow.epochs == (1, 3)
    assert flow.layers == ["layer0.conv", "layer1.conv", "layer2.conv"]


def test_weight_updates_are_layers_by_epochs_in_the_networks_order(run: Run) -> None:
    data = BY_NAME["weight_updates"].build().select(run)
    assert data.layers == run.labels["layers"] and data.epochs == [1, 2, 3, 4]
    assert data.values[2][1] == run.rows[1]["update_ratio/layer2.conv"]


def test_gradient_norms_are_layers_by_epochs_and_zeros_are_blank(tmp_path: Path) -> None:
    record = write(tmp_path, "one", epochs=2, layers=3)
    record.append_row({"epoch": 3, "gradient_norm/layer0.conv": 0.0, "gradient_norm/layer2.conv": 0.25})
    data = BY_NAME["gradient_norms"].build().select(load_run(record.path))
    assert data.layers == ["layer0.conv", "layer1.conv", "layer2.conv"] and data.epochs == [1, 2, 3]
    assert data.values[2][2] == 0.25 and math.isnan(data.values[0][2]) and math.isnan(data.values[1][2])
    zeros = write(tmp_path, "two", epochs=1, layers=0)
    zeros.append_row({"epoch": 2, "gradient_norm/layer0.conv": 0.0})
    assert BY_NAME["gradient_norms"].build().select(load_run(zeros.path)).why == "every gradient is zero"


def test_a_ratio_to_weights_of_zero_in_an_older_run_does_not_spoil_the_colours(tmp_path: Path) -> None:
    """Runs recorded before had 1e8 and more there; runs of today have no key."""
    record = write(tmp_path, "one", epochs=3, layers=3)
    rows = [dict(row) for row in record.read_rows()]
    rows[0]["update_ratio/layer2.conv"] = 2.5e9
    del rows[1]["update_ratio/layer1.conv"]
    (record.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(record.path)
    data = BY_NAME["weight_updates"].build().select(run)
    assert math.isnan(data.values[2][0]) and math.isnan(data.values[1][1])
    assert data.values[2][1:] == [row["update_ratio/layer2.conv"] for row in rows[1:]]
    assert data.limits[1] < 1
    assert not style.render_figure(BY_NAME["weight_updates"], run).problem


def test_histograms_are_shares_by_size_of_the_last_epoch_that_was_looked_at(tmp_path: Path) -> None:
    record = write(tmp_path, "one", epochs=3, layers=3)

    def histogram(top: float, **bins: int) -> dict[str, Any]:
        """bins: of the right side, r31 being the last; l31 is its neighbour on the left side, r0 has the zeros."""
        counts = [0] * 64
        for name, count in bins.items():
            counts[32 + int(name[1:]) if name[0] == "r" else 31 - int(name[1:])] = count
        return {"top": top, "counts": counts}

    gradients = {"layer1.conv": histogram(1.0, r31=3, l31=1, r30=4, r0=8), "layer0.conv": histogram(1.5, r31=1, r29=3)}
    updates = {"layer0.conv": histogram(1.0, r0=9), "layer1.conv": histogram(1.0, l0=9)}
    for epoch, kind in ((1, {}), (2, gradients), (4, {})):  # the row of epoch 4 is not written
        append_histograms(record, {"epoch": epoch, "steps": 1, "gradients": kind, "updates": updates})
    data = BY_NAME["histograms"].build().select(load_run(record.path))
    assert data.epoch == 2 and data.layers == ["layer0.conv", "layer1.conv"]  # in the network's order, without the third
    (kind,) = data.kinds  # all updates are about zero
    first, second = kind.shares  # from 0.5 (two bins below 1) to 1.5
    assert kind.span == (-2, 1) and math.isnan(first[1]) and math.isnan(second[2])
    assert (first[0], first[2]) == (0.75, 0.25) and second[:2] == [4 / 16, 4 / 16]
    assert kind.ticks == [(0.0, 1.0)]
    (record.path / "histograms.jsonl").write_text("[]\n")
    damaged = BY_NAME["histograms"].build().select(load_run(record.path))
    assert isinstance(damaged, Nothing) and "is damaged" in damaged.why


@pytest.mark.parametrize("name", ["curves", "learning_curves", "weight_updates", "gradient_norms"])
@pytest.mark.parametrize("epochs", [1, 2, 9])
def test_epochs_are_whole_and_values_written_out(name: str, epochs: int, tmp_path: Path) -> None:
    runs = [load_run(write(tmp_path, f"r{i}", epochs=epochs, seed=i, accuracy=0.15038, layers=3).path) for i in range(2)]
    drawn = style.render_figure(BY_NAME[name], runs[0] if style.get_scope(BY_NAME[name]) == "run" else compare_runs(runs))
    assert not drawn.problem
    panels = [axes for axes in drawn.figure.axes if axes.get_xlabel() == "epoch"]
    for axes in panels:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) and 1 <= tick <= epochs for tick in ticks)
        assert ticks == [1] or epochs > 1
        assert axes.yaxis.get_offset_text().get_text() == "" == axes.xaxis.get_offset_text().get_text()
    assert panels


def test_confusion_rows_add_up_and_mistakes_are_mistakes(run: Run) -> None:
    counts = BY_NAME["confusion"].build().select(run)
    assert counts.percent.sum(1) == pytest.approx(100)
    assert counts.num_images == 5000 and 70 < counts.accuracy < 85
    mistakes = BY_NAME["mistakes"].build().select(run)
    assert len(mistakes) == 25 and all(m.true != m.predicted and m.image.shape == (32, 32, 3) for m in mistakes)


def test_damaged_predictions_are_nothing_to_show(tmp_path: Path) -> None:
    record = write(tmp_path, "one")
    (record.path / "predictions.npz").write_bytes(b"PK\x03\x04 broken")
    assert isinstance(BY_NAME["confusion"].build().select(load_run(record.path)), Nothing)


def test_effects_use_a_log_axis_where_values_span(tmp_path: Path) -> None:
    for i, (lr, size) in enumerate((lr, size) for lr in (0.001, 0.01, 0.1) for size in (64, 128)):
        write(tmp_path, f"r{i}", lr=lr, batch_size=size, swept=("lr", "batch_size"), accuracy=0.5 + lr)
    effects = {
        effect.key: effect for effect in BY_NAME["effects"].build().select(compare_runs(collect_runs([], tmp_path).runs))
    }
    assert effects["lr"].is_log and [x for x, _ in effects["lr"].means] == [0.001, 0.01, 0.1]
    assert effects["lr"].means[2][1] == pytest.approx(60)
    assert effects["batch_size"].ticks == ["64", "128"]


def test_names_beside_points_do_not_overlap() -> None:
    assert labels.separate_labels([0, 0.1, 0.2, 9], 1) == pytest.approx([-0.9, 0.1, 1.1, 9])
    places = labels.separate_labels(sorted((i * 37 % 11) / 3 for i in range(30)), 1)
    assert all(b - a >= 1 - 1e-9 for a, b in itertools.pairwise(places))


def test_a_new_figure_is_one_file_and_a_broken_one_costs_nothing(tmp_path: Path) -> None:
    write(tmp_path / "runs", "one")
    write(tmp_path / "runs", "two", model="vgg11")
    (tmp_path / "plugins" / "figures").mkdir(parents=True)
    (tmp_path / "plugins" / "figures" / "absent.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "plugins" / "figures" / "bare.py").write_text(
        "from cifar.registry import figures\n"
        "@figures.register('scopeless')\nclass A:\n    title = 'A'\n"
        "@figures.register('untitled')\nclass B:\n    scope = 'sweep'\n"
    )
    bodies = {
        "mine": "figure.subplots().plot(data)",
        "broken": "raise ValueError('no')",
        "leaving": "raise SystemExit(3)",
        "wrong": "return data['mean']",
    }
    for name, body in bodies.items():
        (tmp_path / "plugins" / "figures" / f"{name}.py").write_text(
            "from cifar.registry import figures\n"
            f"@figures.register('{name}')\n"
            "class Figure:\n"
            "    scope, title = 'sweep', 'A figure of mine'\n"
            "    def __init__(self, *, scale: float = 2.0) -> None:\n        self.scale = scale\n"
            "    def select(self, comparison):\n        return [self.scale * p.mean for p in comparison.points]\n"
            f"    def draw(self, data, figure):\n        {body}\n"
        )
    program = (
        "import sys; from pathlib import Path; from cifar.report import report\n"
        "result = report([], runs=Path(sys.argv[1]))\n"
        "print(sorted(path.name for path in result.paths)); print(result.notes)\n"
        "assert 'A figure of mine' in result.page.read_text()"
    )
    environment = {"CIFAR_PLUGINS": str(tmp_path / "plugins"), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "mine.png" in done.stdout and "broken.png" not in done.stdout
    folder = tmp_path / "plugins" / "figures"
    for said in (
        f"figure 'broken' failed (ValueError: no ({folder / 'broken.py'}:10, in draw)); correct {folder / 'broken.py'}",
        f"figure 'leaving' failed (SystemExit: 3 ({folder / 'leaving.py'}:10, in draw))",
        "figure 'wrong' failed (TypeError: list indices must be integers",
        f"the plug-in {folder / 'absent.py'} cannot be imported: ModuleNotFoundError",
        "figure 'scopeless' has no scope, and is left out",
        "figure 'untitled' has no title, and is left out",
    ):
        assert said in done.stdout.replace('\\"', '"').replace("\\'", "'"), said


def shown(drawn: style.DrawnFigure) -> list[Any]:
    """The texts that are drawn: of an axis, only the labels of ticks within its limits."""
    from matplotlib.text import Text

    outside = set()
    for axes in drawn.figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    outside |= {tick.label1, tick.label2}
    found = [text for text in drawn.figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in found if text not in outside]


def texts(drawn: style.DrawnFigure) -> str:
    from matplotlib.text import Text

    return " ".join(text.get_text() for text in drawn.figure.findobj(Text)).replace("\n", "")


def test_old_names_stay_importable_for_figure_plugins() -> None:
    from cifar.report import aggregate, load, points, runs
    from cifar.report.figures import curves

    assert points.Comparison is aggregate.Comparison and points.Point is aggregate.Point and runs.Run is load.Run
    assert curves.series is curves.read_series
    assert [runs.seconds_text(s) for s in (None, 9.94, 1234.5)] == ["–", "9.9", "1,234"]
    assert runs.count(2, "run") == "2 runs" and runs.show(0.5) == "0.5"


def test_bands_of_many_lines_are_those_of_the_lines_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of runs that have an epoch twice, values that are no numbers, fewer epochs, or two seeds."""
    from cifar.report.figures import curves, gradient_flow

    for number in range(9):
        record = write(tmp_path, f"r{number}", lr=0.1 + number // 2, seed=number % 2, swept=("lr",), layers=2)
        lines = (record.path / "metrics.jsonl").read_text().splitlines()
        lines[number % 5] = lines[number % 5].replace('"val/acc": 0.', '"val/acc": NaN, "x": 0.') if number > 6 else lines[2]
        (record.path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[: 3 + number]))
    comparison = compare_runs(collect_runs([str(tmp_path)], tmp_path).runs)
    plain = BY_NAME["learning_curves"].build().select(comparison).accuracy.drawn
    flows = [norms for _, norms in BY_NAME["gradient_flow_by_network"].build().select(comparison)[0].lines]
    monkeypatch.setattr(curves, "MAX_LINES", 2)
    monkeypatch.setattr(gradient_flow, "MAX_LINES", 2)
    many = BY_NAME["learning_curves"].build().select(comparison).accuracy
    assert many.num_lines == len(plain) == 5 and many.drawn == [line for line in plain if line.is_on_front]
    assert [plain[place].label for place in many.places] == [line.label for line in many.drawn]
    values: dict[int, list[float]] = {}
    for line in plain:
        for epoch, value in zip(line.epochs, line.mean, strict=True):
            values.setdefault(epoch, []).append(value)
    for band, (low, high) in zip(many.bands, ((0.05, 0.95), (0.25, 0.75)), strict=True):
        assert band.epochs == sorted(values)
        for share, edge in ((low, band.low), (high, band.high)):
            assert edge == [sorted(values[epoch])[round(share * (len(values[epoch]) - 1))] for epoch in band.epochs]
    (panel,) = BY_NAME["gradient_flow_by_network"].build().select(comparison)
    assert panel.num_lines == 5 and not panel.lines
    assert panel.quantiles[0.5] == [sorted(norms)[2] for norms in zip(*flows, strict=True)]
