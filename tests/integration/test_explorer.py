"""The report page in a real browser: every interaction, against values computed in Python from the same runs."""

from __future__ import annotations

import base64
import contextlib
import csv
import itertools
import json
import math
import os
import threading
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar.report import write_report
from cifar.report.stats import pareto_front
from cifar.tracking.predictions import CLASSES
from helpers.browser import READY, OpenPage, open_browser, page_url
from helpers.fake_runs import NETWORKS, write

pytestmark = pytest.mark.slow
HOSTILE = '</script><img src=x onerror="window.pwned=1">=HYPERLINK("http://x")&\u202e{{7*7}}'
PICTURES = {"accuracy": "multiply-adds", "curves": "validation accuracy", "parallel": "MACs"}  # with a text of each
SHOTS = 'const canvas = document.querySelector(".scatter canvas.marks"); return canvas.toDataURL().length'


def write_runs(runs: Path) -> None:
    """Eight networks at three learning rates with one to four seeds, two runs that diverged, one that failed."""
    for n, model in enumerate(NETWORKS):
        for k, lr in enumerate((0.01, 0.1, 0.5)):
            for seed in range(1 + (n + k) % 4):
                write(
                    runs,
                    f"run{n}{k}{seed}",
                    model=model,
                    seed=seed,
                    lr=lr,
                    epochs=40 + 20 * k,
                    swept=("model", "lr", "seed"),
                    layers=5,
                    accuracy=0.5 + 0.04 * n - 0.03 * abs(k - 1) + 0.003 * math.sin(7 * seed + n),
                    test=0.49 + 0.04 * n if seed == 0 else None,
                    predictions=seed == 0 and k == 1,
                )
    for seed in range(2):
        write(runs, f"bad{seed}", model="vgg11", seed=seed, lr=9.0, state="diverged", reason="the loss is nan at step 301")
    write(runs, "broken", model="vgg13", seed=0, state="failed", reason="out of memory")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    runs = tmp_path_factory.mktemp("explorer")
    write_runs(runs)
    return write_report([], runs=runs)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A grid of networks, weight decay and seeds, in which weight decay helps ResNet-20 by two points, and one run diverged."""
    runs = tmp_path_factory.mktemp("questions")
    models = ("worksheet1", "shufflenet_v2_x0.5", "resnet20", "vgg11", "preact_resnet18")
    for n, k, lr, seed in itertools.product(range(5), range(3), (0.05, 0.1), range(3)):
        gain = 0.01 * k if models[n] == "resnet20" else 0.0
        noise = 0.002 * math.sin(9 * seed + 3 * k + n + 40 * lr)
        write(
            runs,
            f"q{n}{k}{round(100 * lr):02}{seed}",
            model=models[n],
            weight_decay=(0.0, 1e-4, 5e-4)[k],
            lr=lr,
            seed=seed,
            epochs=3,
            layers=1,
            accuracy=0.5 + 0.06 * n + gain + 0.1 * (lr - 0.05) + noise,
            swept=("model", "weight_decay", "lr", "seed"),
        )
    write(runs, "gone", model="vgg11", lr=9.0, seed=0, state="diverged", reason="the loss is nan at step 301")
    return write_report([], runs=runs)


@pytest.fixture
def opened(browser: Any, report: Any) -> Iterator[OpenPage]:
    page = OpenPage(browser, page_url(report.page))
    yield page
    assert [message for message in page.messages if not message.startswith("log")] == []
    page.close()


def shown_labels(opened: OpenPage) -> set[str]:
    return set(opened.run("return view.shown.map((i) => view.table.points.label[i])"))


def front_labels(opened: OpenPage) -> list[str]:
    return list(opened.run("return view.front.map((i) => view.table.points.label[i])"))


def test_the_page_asks_for_nothing_and_shows_the_reports_numbers(opened: OpenPage, report: Any) -> None:
    assert [url for url in opened.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    comparison = report.comparison
    found = opened.run(
        "const m = view.measured;"
        "return view.table.points.label.map((label, i) => [label, m.x[i], m.y[i], m.half[i], m.values[i].length])"
    )
    assert len(found) == len(comparison.points)
    for (label, x, y, half, n), point in zip(found, comparison.points, strict=True):
        assert (label, x, n) == (point.label, point.macs, point.num_seeds)
        assert y == pytest.approx(point.mean, abs=1e-6)
        if point.ci_half_width is not None:
            assert half == pytest.approx(point.ci_half_width, abs=5e-6)
    assert front_labels(opened) == [point.label for point in comparison.front]


def test_axes(opened: OpenPage, report: Any) -> None:
    points = report.comparison.points
    for x, expected in (
        ("macs", [p.macs for p in points]),
        ("flops", [2 * p.macs for p in points]),
        ("params", [p.params for p in points]),
        ("seconds", [p.seconds for p in points]),
        ("train_flops", [6 * p.macs * 128 * p.runs[0].rows[-1]["step"] for p in points]),
    ):
        before = opened.run(SHOTS)
        opened.page.select_option("#explorer-x", x)
        opened.settle()
        found = opened.run("return Array.from(view.measured.x)")
        assert found == pytest.approx(expected, rel=1e-4)
        front = pareto_front(expected, [p.mean for p in points])
        assert front_labels(opened) == [points[i].label for i in front]
        if x != "macs":
            assert opened.run(SHOTS) != before or x == "flops"
    opened.page.select_option("#explorer-y", "test")
    opened.settle()
    assert opened.run("return Array.from(view.measured.y)") == pytest.approx(
        [np.mean([run.accuracy("test") for run in p.runs if run.accuracy("test") is not None]) for p in points], abs=1e-5
    )
    opened.page.uncheck("#explorer-log")
    opened.settle()
    assert opened.run("return explorer.parts.scatter.current.x.base") is None  # a linear scale has no base


def test_hover_focus_and_tap(opened: OpenPage, browser: Any, report: Any) -> None:
    best = report.comparison.best
    place = opened.run(
        "const s = explorer.parts.scatter, i = view.front.at(-1), box = s.plot.getBoundingClientRect();"
        "return [box.left + s.current.x(view.measured.x[i]), box.top + s.current.y(view.measured.y[i])]"
    )
    opened.page.mouse.move(place[0] - 3, place[1] + 2)
    tip = opened.page.inner_text("#explorer-tip")
    assert best.label in tip and f"{100 * best.mean:.2f}" in tip and f"(n = {best.num_seeds})" in tip
    assert f"seed {best.runs[0].config['seed']}" in tip and "12.5 min a run" in tip and "on the front" in tip
    opened.page.mouse.move(5, 5)
    assert opened.page.is_hidden("#explorer-tip")
    opened.page.focus(".scatter .plot")
    opened.page.keyboard.press("Home")
    assert report.comparison.points[0].label.split(",")[0] in opened.page.inner_text("#explorer-spoken")
    phone = OpenPage(browser, page_url(report.page), width=420, has_touch=True, is_mobile=True)
    place = phone.run(
        "const s = explorer.parts.scatter, i = view.front.at(-1);"
        "s.plot.scrollIntoView({block: 'center'}); await new Promise(requestAnimationFrame);"
        "const box = s.plot.getBoundingClientRect(), { x, y } = s.current;"
        "return [box.left + x(view.measured.x[i]), box.top + y(view.measured.y[i])]"
    )
    phone.page.touchscreen.tap(*place)
    phone.settle()
    assert best.label in phone.page.inner_text(".detail") and best.label in phone.page.inner_text("#explorer-tip")
    phone.close()


def drag(opened: OpenPage, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    opened.page.locator(selector).scroll_into_view_if_needed()
    box = opened.page.locator(selector).bounding_box()
    opened.page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    opened.page.mouse.down()
    opened.page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=5)
    opened.page.mouse.up()
    opened.settle()


def test_zoom_and_brush(opened: OpenPage, report: Any) -> None:
    drag(opened, ".scatter .plot", (0.3, 0.2), (0.7, 0.6))
    zoom = opened.run("return view.state.values.zoom")
    assert zoom and zoom[0] < zoom[1] and zoom[2] < zoom[3]
    assert len(shown_labels(opened)) == len(report.comparison.points)  # a zoom hides nothing from the other parts
    opened.page.dblclick(".scatter .plot", position={"x": 400, "y": 60})
    opened.settle()
    assert opened.run("return view.state.values.zoom") is None
    drag(opened, ".scatter .plot", (0.3, 0.2), (0.7, 0.6))
    opened.page.click("text=show all")  # for a finger, which has no double-click
    opened.settle()
    assert opened.run("return view.state.values.zoom") is None and opened.page.is_hidden("text=show all")
    opened.page.check("input[name=drag][value=filter]")
    drag(opened, ".scatter .plot", (0.3, 0.05), (0.7, 0.9))
    low, high = opened.run("return view.state.values.ranges['x:macs']")
    bottom, top = opened.run("return view.state.values.ranges['y:val']")
    inside = {p.label for p in report.comparison.points if low <= p.macs <= high and bottom <= p.mean <= top}
    assert 0 < len(inside) < len(report.comparison.points) and shown_labels(opened) == inside


def test_filters_are_linked(opened: OpenPage, report: Any) -> None:
    points = report.comparison.points
    opened.page.fill("#explorer-text", "resnet lr=0.1")
    opened.settle()
    expected = [p for p in points if "resnet" in p.label and "lr=0.1" in p.label]
    assert shown_labels(opened) == {p.label for p in expected} and expected
    front = pareto_front([p.macs for p in expected], [p.mean for p in expected])
    assert front_labels(opened) == [expected[i].label for i in front]
    assert opened.page.inner_text(".table .count") == f"{len(expected)} of {len(points)} points"
    opened.page.fill("#explorer-text", "")
    opened.page.click(".chips button:has-text('resnet') >> nth=0")
    opened.settle()
    families = {p.model for p in points if p.label in shown_labels(opened)}
    assert families == {"resnet20", "resnet56"}
    opened.page.click(".controls button:has-text('reset')")
    opened.settle()
    assert len(shown_labels(opened)) == len(points)
    opened.page.click(".filters summary")
    field = opened.page.locator(".keys fieldset:has(legend:text-is('lr')) input")
    field.nth(0).fill("0.05")
    field.nth(0).dispatch_event("change")
    opened.settle()
    assert shown_labels(opened) == {p.label for p in points if p.values["lr"] >= 0.05}
    box = opened.page.locator(".keys fieldset:has(legend:text-is('model')) label:has-text('vgg11') input")
    box.uncheck()
    opened.settle()
    assert shown_labels(opened) == {p.label for p in points if p.values["lr"] >= 0.05 and p.model != "vgg11"}
    for legend, text in (("accuracy %", "60"), ("MACs", "20M")):
        field = opened.page.locator(f".keys fieldset:has(legend:text-is('{legend}')) input").nth(0)
        field.fill(text)
        field.dispatch_event("change")
    opened.settle()
    large = {p.label for p in points if p.macs >= 20e6 and p.mean >= 0.6}
    kept = {p.label for p in points if p.label in large and p.values["lr"] >= 0.05 and p.model != "vgg11"}
    assert shown_labels(opened) == kept != set()


def test_budget(opened: OpenPage, report: Any) -> None:
    for step in (0, 120, 260, 400):
        opened.page.locator("#explorer-budget").fill(str(step))
        opened.settle()
        budget = opened.run("return view.state.values.budget")
        fitting = [p for p in report.comparison.front if budget is None or p.macs <= budget]
        text = opened.page.inner_text(".budget output")
        assert (fitting[-1].label in text) if fitting else ("nothing fits" in text)
    assert budget is None


def test_a_chosen_point(opened: OpenPage, report: Any) -> None:
    point = next(p for p in report.comparison.front if p.num_seeds > 1 and p.values["lr"] == 0.1)
    opened.run("view.select(view.byRun.get(argument))", point.runs[0].id)
    text = opened.page.inner_text(".detail")
    for run in point.runs:
        assert run.id in text
    assert f"train --from {point.runs[0].id}" in text and f"{100 * point.runs[1].accuracy('val'):.2f}" in text
    assert opened.page.locator(".detail .chart path.line").count() == 1
    assert opened.page.locator(".detail .chart path.band").count() == 1  # the band of the seeds
    assert opened.page.locator(".detail .heat canvas").count() == 2
    confusion = opened.run(
        "const read = (row) => [...row.querySelectorAll('td')].map((cell) => cell.textContent);"
        "return [...document.querySelectorAll('.confusion tbody tr')].map(read)"
    )
    arrays = np.load(point.runs[0].path / "predictions.npz")
    counts = np.zeros((10, 10))
    np.add.at(counts, (arrays["label"].astype(int), arrays["predicted"].astype(int)), 1)
    shares = 100 * counts / counts.sum(1, keepdims=True)
    assert np.allclose(np.array(confusion, float), shares, atol=0.51)
    rows = [row.split() for row in opened.page.locator(".classes .bars li").all_inner_texts()]
    assert [(float(row[1]), int(row[-1])) for row in rows] == [
        (pytest.approx(shares[c, c], abs=0.051), counts[c].sum()) for c in range(10)
    ]
    worst = int(np.flatnonzero(arrays["index"] == arrays["worst_index"][0])[0])
    said = opened.page.locator(".mistakes li").first.inner_text()
    assert said.startswith(CLASSES[arrays["label"][worst]]) and f"taken for {CLASSES[arrays['predicted'][worst]]}" in said
    assert f"{100 * arrays['confidence'][worst]:.0f}\xa0%" in said
    pixels = opened.run(
        "const context = document.querySelector('.mistakes canvas').getContext('2d');"
        "return [...context.getImageData(0, 0, 32, 32).data]"
    )
    picture = np.array(pixels).reshape(32, 32, 4)[:, :, :3].transpose(2, 0, 1)
    assert np.abs(picture - arrays["worst_images"][0].astype(int)).mean() < 12  # the picture of this mistake, as WebP
    opened.page.select_option("#explorer-curve", "train/loss")
    opened.settle()
    opened.page.click(".curves summary")
    cells = opened.page.locator(".curves tbody tr").last.inner_text().split()
    last = np.mean([run.rows[-1]["train/loss"] for run in point.runs])
    assert float(cells[1]) == pytest.approx(last, abs=2e-3)


def test_curves_and_heat_maps_are_the_records(opened: OpenPage, report: Any) -> None:
    """Every curve that travels, decoded by the page, against the rows of the run."""
    curves = opened.run(
        "const curves = await explorer.load.curves(view.table);"
        "return view.table.runs.id.map((id, n) => [id, curves[n].epochs, curves[n]['val/acc'], curves[n]['train/loss']])"
    )
    runs = {run.id: run for point in report.comparison.points for run in point.runs}
    for run_id, epochs, accuracies, losses in curves:
        if run_id not in runs:
            continue
        rows = {row["epoch"]: row for row in runs[run_id].rows}
        assert len(epochs) == min(32, len(rows)) and epochs[0] == 1 and epochs[-1] == len(rows)
        assert accuracies == pytest.approx([rows[epoch]["val/acc"] for epoch in epochs], abs=1.01e-4)
        assert losses == pytest.approx([rows[epoch]["train/loss"] for epoch in epochs], abs=5.1e-4)
    best = report.comparison.best.runs[0]
    heat = opened.run("const d = await explorer.load.details([argument]); return d[argument].heat.gradient_norm", best.id)
    cells = np.frombuffer(base64.b64decode(heat["cells"]), np.uint8).reshape(len(heat["layers"]), len(heat["epochs"]))
    rows = {row["epoch"]: row for row in best.rows}
    for r, layer in enumerate(heat["layers"]):
        for c, epoch in enumerate(heat["epochs"]):
            value = heat["low"] + (cells[r, c] - 1) / 254 * (heat["high"] - heat["low"])
            assert value == pytest.approx(math.log10(rows[epoch][f"gradient_norm/{layer}"]), abs=0.01)


def test_tags_and_measured_costs(browser: Any, tmp_path: Path, opened: OpenPage) -> None:
    """Both are on the page where runs have them, and not otherwise."""
    assert opened.page.is_hidden(".tags") and opened.page.locator("#explorer-x option[value=joules]").count() == 0
    tags = {"resnet20": ("baseline", "paper"), "vgg11": ("baseline",), "mobilenet_v2": ()}
    for n, (model, names) in enumerate(tags.items()):
        joules = {"joules": 1200.0 * (n + 1), "latency_seconds": 3e-4 * (n + 1)} if n < 2 else {}
        write(tmp_path, f"run{n}", model=model, epochs=2, layers=1, tags=("all", *names), measured=joules)
    write(tmp_path, "bad", model="vgg11", lr=9.0, tags=("all", "paper"), state="diverged", reason="nan")
    page = OpenPage(browser, page_url(write_report([], runs=tmp_path).page))
    assert page.page.locator(".tags button").all_inner_texts() == ["baseline", "paper"]  # what all have tells nothing
    for clicks, shown in (
        (["baseline"], {"resnet20", "vgg11"}),
        (["paper"], {"resnet20", "vgg11"}),
        (["baseline"], {"resnet20"}),
    ):
        for tag in clicks:
            page.page.click(f".tags button:has-text('{tag}')")
        page.settle()
        assert shown_labels(page) == shown
    assert page.run("return view.apart.length") == 1 and "filtered: tag" in page.page.inner_text(".shown")
    other = OpenPage(browser, page.page.url)
    assert shown_labels(other) == {"resnet20"} and "baseline, paper" in other.page.inner_text(".rows")
    other.close()
    page.page.click(".tags button:has-text('paper')")
    page.page.select_option("#explorer-x", "joules")
    page.settle()
    assert page.run("return [view.shown.length, Array.from(view.measured.x).slice(0, 3)]")[0] == 2
    assert "energy" in page.page.inner_text(".rows thead") and "2.4 kJ" in page.page.inner_text(".rows")
    page.page.select_option("#explorer-x", "latency_seconds")
    page.settle()
    assert "600 µs" in page.page.inner_text(".budget output") + page.page.inner_text(".rows")
    page.close()


def test_the_effect_of_a_setting_is_scipys(opened: OpenPage, browser: Any, questions: Any) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    opened.page.select_option("#explorer-x", "setting:lr")
    opened.settle()  # epochs differ with lr here, so that nothing else is equal
    assert [row["step"]["n"] for row in opened.run("return explorer.measureEffect('lr').rows")] == [0, 0, 0]
    assert opened.page.inner_text(".effect").count("no two points with all else equal") == 2
    page = OpenPage(browser, page_url(questions.page))
    page.page.select_option("#explorer-x", "setting:weight_decay")
    page.settle()
    points = questions.comparison.points
    means = {d: {(p.model, p.values["lr"]): p.mean for p in points if p.values["weight_decay"] == d} for d in (0.0, 1e-4, 5e-4)}
    rows = page.run("return explorer.measureEffect('weight_decay').rows")
    assert [row["value"] for row in rows] == [*means] and [row["count"] for row in rows] == [10, 10, 10]
    for before, row in itertools.pairwise(rows):
        new, old = means[row["value"]], means[before["value"]]
        found = scipy_stats.ttest_rel([*new.values()], [old[others] for others in new])
        interval = found.confidence_interval()
        step = row["step"]
        assert row["mean"] == pytest.approx(np.mean([*new.values()]), abs=1e-6) and step["n"] == 10
        assert step["difference"] - step["half"] == pytest.approx(interval.low, abs=1e-6)
        assert step["p"] == pytest.approx(found.pvalue, rel=1e-2)  # of accuracies that travel with six digits
        assert f"{100 * step['difference']:+.2f} points".replace("-", "−") in page.page.inner_text(".effect")
    page.close()
    noise = np.random.default_rng(3)
    for size in (5, 30):
        x, y = noise.integers(0, 12, size).tolist(), noise.normal(size=size).round(1).tolist()
        rho, p = scipy_stats.spearmanr(x, y)
        found = opened.run("return explorer.stats.spearman(...argument)", [x, y])
        assert (found["rho"], found["p"]) == (pytest.approx(rho, abs=1e-12), pytest.approx(p, rel=1e-8))
        centre, error = math.atanh(rho), 1.959964 * math.sqrt((1 + rho**2 / 2) / (size - 3))
        assert [found["low"], found["high"]] == pytest.approx([math.tanh(centre - error), math.tanh(centre + error)])


def test_pinned_points_are_compared(opened: OpenPage, report: Any) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    first, second = [p for p in report.comparison.points if p.num_seeds >= 3][:2]
    for point in (first, second):
        opened.run("view.togglePin(view.byRun.get(argument))", point.runs[0].id)
    text = opened.page.inner_text(".detail .compare")
    welch = scipy_stats.ttest_ind(second.accuracies, first.accuracies, equal_var=False)
    interval = welch.confidence_interval()
    assert f"{100 * (second.mean - first.mean):+.2f} points".replace("-", "−") in text
    assert f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}".replace("-", "−") in text
    seeds = [{r.config["seed"]: a for r, a in zip(p.runs, p.accuracies, strict=True)} for p in (first, second)]
    common = sorted(set(seeds[0]) & set(seeds[1]))
    paired = scipy_stats.ttest_rel([seeds[1][s] for s in common], [seeds[0][s] for s in common])
    exact = opened.run(
        "return explorer.stats.paired(...argument)",
        [common, [seeds[1][s] for s in common], common, [seeds[0][s] for s in common]],
    )
    assert exact["p"] == pytest.approx(paired.pvalue, rel=1e-9)
    assert f"over the {len(common)} seeds that both have" in text
    assert "model" in text  # the setting that differs
    apart = next(p for p in report.comparison.points if p not in (first, second) and p.values["lr"] != second.values["lr"])
    opened.run("view.togglePin(view.byRun.get(argument))", apart.runs[0].id)
    assert "epochs" in opened.page.inner_text(".detail .compare")  # differs as well, though no label needs it
    opened.page.click(".compare [data-unpin] >> nth=2")
    opened.settle()
    opened.page.click(".compare [data-unpin] >> nth=0")
    opened.settle()
    assert opened.page.locator(".detail .compare").count() == 0


@pytest.mark.parametrize("df", [1, 2, 3.7, 12, 250])
def test_the_pages_student_is_scipys(opened: OpenPage, df: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    found = opened.run(
        "return [explorer.stats.tQuantile(0.95, argument), ...[0.1, 1.3, 4, 20].map((t) => explorer.stats.tTail(t, argument))]",
        df,
    )
    assert found[0] == pytest.approx(scipy_stats.t.ppf(0.975, df), rel=1e-9)
    assert found[1:] == pytest.approx([2 * scipy_stats.t.sf(t, df) for t in (0.1, 1.3, 4, 20)], rel=1e-8)


def test_a_view_can_be_sent(opened: OpenPage, browser: Any, report: Any) -> None:
    """Everything that can be chosen lives in the address: another page that opens it is in the same state."""
    chosen: dict[str, Any] = {"text": "lr", "x": "params", "y": "test", "log": False, "colour": "lr", "tags": ["none"]}
    chosen |= {"families": ["resnet", "vgg"], "ranges": {"lr": [0.05, None]}, "choices": {"model": ["resnet20", "vgg11"]}}
    chosen |= {"budget": 1e7, "zoom": [1e5, 2e7, 0.4, 0.9], "sort": "params", "descending": False, "differing": False}
    chosen |= {"list": "apart", "curve": "val/loss"}
    opened.run("view.state.set(argument)", chosen)
    opened.run("view.select(view.shown[0]); view.togglePin(view.shown[0]); view.togglePin(view.shown.at(-1))")
    state = opened.run("return view.state.values")
    assert {key: value for key, value in state.items() if key in chosen} == chosen
    assert {*state} == {*chosen, "selected", "pins"} and state["selected"] and len(state["pins"]) == 2
    other = OpenPage(browser, opened.page.url)
    assert other.run("return view.state.values") == state
    assert shown_labels(other) == shown_labels(opened) != set() and other.page.locator(".compare").count() == 1
    other.close()
    for broken in (
        "#%7B",
        "#null",
        "#" + json.dumps({"x": 7, "pins": "no", "zoom": [1, 2], "ranges": {"lr": "x"}, "y": "nothing", "colour": "gone"}),
        "#" + json.dumps({"x": "constructor", "colour": "toString", "curve": "valueOf", "list": "x", "sort": "constructor"}),
        "#" + json.dumps({"ranges": {"constructor": [0, 1]}, "choices": {"toString": ["a"]}, "selected": "toString"}),
    ):
        odd = OpenPage(browser, page_url(report.page) + broken)
        odd.run("view.select(view.front[0])")
        assert odd.page.locator(".detail .chart path.line").count() == 1
        assert len(shown_labels(odd)) == len(report.comparison.points) and odd.messages == []
        odd.run(
            "location.hash = encodeURIComponent(JSON.stringify({x: 'constructor', text: 'resnet'}))"
        )  # in a page that is open
        assert odd.run("return [view.state.values.x, view.state.values.text]") == ["macs", "resnet"] and odd.messages == []
        odd.close()


def test_what_is_not_shown_is_said(opened: OpenPage, browser: Any, tmp_path: Path) -> None:
    """Points without a place on the axes are counted, and a range goes on when another axis is chosen."""
    for n, momentum in enumerate((0.0, 0.5, 0.9)):
        write(
            tmp_path, f"m{n}", model="resnet20", seed=0, momentum=momentum, batch_size=(128, 512, 1024)[n], swept=("momentum",)
        )
    page = OpenPage(browser, page_url(write_report([], runs=tmp_path).page))
    page.run("view.state.set({ x: 'setting:momentum', log: true, colour: 'batch_size' })")
    assert page.page.inner_text(".filtering .shown") == "1 point has no place on these axes"
    assert page.page.inner_text(".table .count") == "2 of 3 points"
    if "batch_size" in page.run("return view.table.keys.map(({ name }) => name)"):
        assert page.run("return view.legend().map(({ name }) => name)") == [f"batch_size {n}" for n in (128, 512, 1024)]
    page.run("view.state.set({ log: false })")
    assert page.page.inner_text(".filtering .shown") == "" and len(shown_labels(page)) == 3
    assert page.messages == []
    page.close()
    low, high = opened.run("const m = [...view.measured.x].sort((a, b) => a - b); return [m[2], m[8]]")
    opened.run("view.state.set({ ranges: { 'x:macs': argument } })", [low, high])
    inside = shown_labels(opened)
    opened.run("view.state.set({ x: 'params', y: 'test' })")
    has_test = set(opened.run("return view.table.points.label.filter((_, i) => Number.isFinite(view.measured.y[i]))"))
    assert shown_labels(opened) == inside & has_test != set()


def test_small_troubles(opened: OpenPage, browser: Any, report: Any) -> None:
    """Equal seeds, a missing accuracy, a straight drag, an address of another hand, the focus in a table that scrolls."""
    say = (
        "const [a, b] = argument, { welch, paired } = explorer.stats;"
        "return explorer.describeTests(welch(a, b), paired([0, 1], a, [0, 1], b))"
    )
    assert (
        opened.run(say, [[0.9, 0.9], [0.8, 0.8]]) == "+10.00 points; the seeds of each do not differ, so there is no interval."
    )
    assert opened.run(say, [[], [0.8, 0.8]]) == "one of them has no such accuracy."
    drag(opened, ".scatter .plot", (0.3, 0.5), (0.7, 0.5))
    zoom = opened.run("return view.state.values.zoom")
    assert zoom[3] - zoom[2] > 0.1
    opened.run("location.hash = encodeURIComponent(JSON.stringify({ text: 'vgg' }))")
    assert opened.run("view.state.writeAddress(); return decodeURIComponent(location.hash)") == '#{"text":"vgg"}'
    odd = OpenPage(browser, page_url(report.page) + "#" + json.dumps({"choices": {"z": [{"toString": 1}]}}))
    assert odd.messages == [] and len(shown_labels(odd)) == len(report.comparison.points)
    odd.page.focus(".rows [data-pin]")
    for _ in range(40):
        odd.page.keyboard.press("Tab")
        odd.settle()
        assert odd.run("return document.activeElement !== document.body")
    assert odd.run("return document.activeElement.closest('.rows') !== null")
    odd.close()


def test_table(opened: OpenPage, report: Any) -> None:
    points = report.comparison.points
    for _ in range(2):
        opened.page.click(".rows th button:has-text('MMACs')")
        opened.settle()
    column = opened.run("return [...document.querySelectorAll('.rows thead th')].findIndex((h) => h.textContent === 'MMACs')")
    first = opened.run(
        "return [...document.querySelectorAll('.rows tbody tr[data-row]')].map((r) => Number(r.cells[argument].textContent))",
        column,
    )
    assert first == sorted(first)
    assert opened.page.get_attribute(".rows th[aria-sort]", "aria-sort") == "ascending"
    opened.page.click("[data-list=apart]")
    opened.settle()
    text = opened.page.inner_text(".rows")
    assert "the loss is nan at step 301" in text and "out of memory" in text
    opened.page.click(".rows button:has-text('vgg11-0')")
    opened.settle()
    assert "diverged" in opened.page.inner_text(".detail") and opened.page.locator(".detail .chart path.line").count() == 1
    opened.page.click("[data-list=points]")
    opened.page.fill("#explorer-text", "lr=0.1")
    opened.settle()
    heads = opened.page.inner_text(".rows thead")
    assert "lr" not in heads.split()  # it does not differ among what is shown
    opened.page.uncheck(".differing")
    opened.settle()
    assert "lr" in opened.page.inner_text(".rows thead").split()
    assert len(points) > 0


def test_downloads(opened: OpenPage, report: Any, tmp_path: Path) -> None:
    opened.page.fill("#explorer-text", "resnet")
    opened.settle()
    files = {}
    opened.run("view.select(view.front[0])")
    for name, button in {
        "csv": "[data-save=csv]",
        **{f"{figure}.{kind}": f"[data-figure={figure}][data-save={kind}]" for figure in PICTURES for kind in ("svg", "png")},
    }.items():
        with opened.page.expect_download() as download:
            opened.page.click(button)
        files[name] = tmp_path / name
        download.value.save_as(files[name])
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert {row["network"] for row in rows} == {"resnet20", "resnet56", "preact_resnet18"}
    assert len(rows) == opened.run("return view.shown.length") and {row["dataset"] for row in rows} == {"CIFAR-10"}
    facts = {row["runs"]: row for row in csv.DictReader((report.page.parent / "report.csv").read_text().splitlines())}
    for row in rows:  # the same names and units as in report.csv
        fact = facts[row["runs"]]
        for name in ("macs", "params", "n", "val/acc", "interval95_half", "seconds"):
            assert (float(row[name] or -1)) == pytest.approx(float(fact[name] or -1), abs=5e-6, rel=1e-5), name
        assert row["lr"] == fact["lr"] and len(row["accuracies"].split()) == int(row["n"])
        assert row["front"] in ("true", "false")
    for figure, text in PICTURES.items():
        drawing = xml.etree.ElementTree.parse(files[f"{figure}.svg"]).getroot()
        texts = ["".join(element.itertext()) for element in drawing.iter() if element.tag.endswith("text")]
        assert drawing.tag.endswith("svg") and any(text in found for found in texts)
        with Image.open(files[f"{figure}.png"]) as picture:
            assert picture.size == (2 * int(drawing.attrib["width"]), 2 * int(drawing.attrib["height"]))
            assert picture.convert("L").getextrema()[0] < 100  # there is ink


def test_parallel_coordinates(opened: OpenPage, report: Any) -> None:
    opened.page.locator(".parallel svg").scroll_into_view_if_needed()
    x, high, low = opened.run(
        "const axis = explorer.parts.parallel.current.find((a) => a.id === 'lr');"
        "const group = [...document.querySelectorAll('.parallel g.axis')].find((element) => element.__data__.id === 'lr');"
        "const top = document.querySelector('.parallel svg').getBoundingClientRect().top;"
        "return [group.querySelector('.spine').getBoundingClientRect().left, top + axis.scale(0.5), top + axis.scale(0.06)]"
    )
    opened.page.mouse.move(x + 2, high - 6)  # a little beyond the end of the axis, so that the largest value is inside
    opened.page.mouse.down()
    opened.page.mouse.move(x + 2, low, steps=6)
    opened.page.mouse.up()
    opened.settle()
    assert shown_labels(opened) == {p.label for p in report.comparison.points if p.values["lr"] > 0.05}
    opened.page.mouse.click(x + 2, low + 40)
    opened.settle()
    assert len(shown_labels(opened)) == len(report.comparison.points)


class Reader:
    """Somebody new to the page. What they do is counted: a click, a typed text, a choice, a key, a drag."""

    def __init__(self, opened: OpenPage) -> None:
        self.opened, self.page, self.actions = opened, opened.page, 0

    def click(self, selector: str) -> None:
        self.page.click(selector)
        self._count()

    def type(self, label: str, text: str) -> None:
        """Type into the field of that label, and leave it by Tab, as one does on the way to the next one."""
        field = self.page.get_by_label(label, exact=True)
        field.click()
        self.page.keyboard.type(text)
        self.page.keyboard.press("Tab")
        self._count()

    def choose(self, label: str, option: str) -> None:
        self.page.get_by_role("combobox", name=label, exact=True).select_option(label=option)
        self._count()

    def _count(self) -> None:
        self.actions += 1
        self.opened.settle()

    def reads(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


def test_five_questions_take_at_most_three_actions_each(browser: Any, questions: Any) -> None:
    points = questions.comparison.points

    def open_page() -> Reader:
        page = OpenPage(browser, page_url(questions.page), permissions=["clipboard-read", "clipboard-write"])
        return Reader(page)

    reader = open_page()
    reader.type("best within", "20M")  # best network under 20 MMACs
    best = max((p for p in points if p.macs <= 20e6), key=lambda p: p.mean)
    answer = reader.reads(".budget output")
    assert best.label in answer and f"{100 * best.mean:.2f}" in answer and reader.actions == 1

    reader = open_page()
    reader.type("find", "ResNet-20")  # does weight decay matter for ResNet-20
    reader.choose("across", "weight_decay")
    answer = reader.reads(".effect")
    assert reader.opened.run("return view.shown.every((i) => view.table.points.model[i].endsWith('resnet20'))")
    assert "5e-4" in answer or "0.0005" in answer
    assert "+1.0" in answer and "paired t-test, p" in answer and "2 pairs" in answer and reader.actions == 2

    reader = open_page()
    reader.click("text=not compared")  # which run diverged and why
    answer = reader.reads(".rows")
    assert "gone" in answer and "diverged" in answer and "the loss is nan at step 301" in answer and reader.actions == 1

    reader = open_page()
    reader.type("compare", "resnet20")  # is A better than B
    reader.type("compare with", "vgg11")
    answer = reader.reads(".compare")
    a, b = (max((p for p in points if p.model == model), key=lambda p: p.mean) for model in ("resnet20", "vgg11"))
    assert a.label in answer and b.label in answer and reader.actions == 2
    assert f"{100 * (b.mean - a.mean):+.2f} points (95 % interval" in answer and "paired t-test" in answer

    reader.click("text=copy link to this view")  # send me what you see
    link = reader.page.evaluate("navigator.clipboard.readText()")
    other = OpenPage(browser, link)
    assert other.page.inner_text(".compare") == answer and reader.actions == 3
    assert "Send this file with it" in reader.reads(".sent")
    other.close()
    for context in browser.contexts:
        context.close()


def test_by_keyboard_alone(opened: OpenPage, report: Any) -> None:
    """Choose, pin two, compare, filter, sort and read a row: with Tab, arrows, Enter and letters only."""
    press = opened.page.keyboard.press

    def tab_to(test: str) -> None:
        for _ in range(80):
            if opened.page.evaluate(f"() => {{ const e = document.activeElement; return Boolean({test}); }}"):
                return
            press("Tab")
        raise AssertionError(test)

    tab_to("e.id === 'explorer-text'")
    opened.page.keyboard.type("lr=0.1")
    tab_to("e.matches('.scatter .plot')")
    press("Home")
    press("p")
    press("ArrowUp")
    press("ArrowUp")
    press("p")
    press("Enter")
    opened.settle()
    assert opened.page.locator(".compare").count() == 1 and opened.page.locator(".detail .about h3").count() == 1
    tab_to("e.matches('.rows th button') && e.textContent === 'params'")
    press("Enter")
    opened.settle()
    assert opened.run("return view.state.values.sort") == "params"
    tab_to("e.matches('.rows td button')")
    press("ArrowDown")
    press("Enter")
    opened.settle()
    label = opened.run("return view.table.points.label[view.selected]")
    assert opened.page.inner_text(".detail h3 >> nth=0") == label
    outline = opened.run("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]")
    assert outline[0] != "none" and outline[1] != "0px"


def test_every_control_by_keyboard(opened: OpenPage, report: Any) -> None:
    """Tab, arrows, Enter, Space and letters reach and work each control; what each of them does is tested elsewhere."""
    press, write_text = opened.page.keyboard.press, opened.page.keyboard.type
    state: dict[str, Any] = {}

    def use(selector: str, *keys: str, text: str = "") -> dict[str, Any]:
        for _ in range(120):
            if opened.page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                break
            press("Tab")
        else:
            raise AssertionError(f"Tab does not reach {selector}")
        write_text(text)
        for key in keys:
            press(key)
        opened.settle()  # what is shown follows in the next frame
        state.update(opened.run("return {...view.state.values, shown: view.shown.length}"))
        if keys[-1:] in (("Enter",), ("Space",)):  # the focus stays where it is
            still = opened.page.evaluate("(selector) => document.activeElement.matches(selector)", selector)
            assert still or selector == ".filtering button"  # which is gone then
        return state

    assert use("#explorer-x", "ArrowDown")["x"] == "flops"
    assert use("#explorer-log", "Space")["log"] is False
    assert use("#explorer-y", "ArrowDown")["y"] == "test"
    assert use("#explorer-colour", "ArrowDown")["colour"] != "family"
    assert use("#explorer-colour", "ArrowUp")["colour"] == "family"
    use("[data-family=vgg]", "Enter")
    assert state["families"] == ["vgg"]
    assert use("#explorer-limit", text="400M")["budget"] == 4e8
    before = state["budget"]
    assert use("#explorer-budget", "ArrowLeft")["budget"] < before
    use(".filters summary", "Enter")
    assert use(".keys input[aria-label='lr, smallest']", "Tab", text="0.05")["ranges"] == {"lr": [0.05, None]}
    assert use(".scatter .plot", "Home", "+")["zoom"] is not None
    assert use(".scatter .plot", "0")["zoom"] is None
    use("input[name=drag]", "ArrowRight")
    assert opened.run("return view.dragFilters") is True
    for kind in ("svg", "png"):
        with opened.page.expect_download():
            use(f"[data-save={kind}][data-figure=accuracy]", "Enter")
    use("#explorer-compare0", "Tab", text="resnet20")
    use("#explorer-compare1", "Tab", text="vgg11")
    assert len(state["pins"]) == 2 and opened.page.locator(".compare").count() == 1
    use("[data-best]", "Enter")
    assert state["selected"]
    use("button[data-pin]", "Enter")
    assert len(state["pins"]) != 2
    assert use("#explorer-curve", "ArrowDown")["curve"] == "train/acc"
    assert use("[data-list=apart]", "Enter")["list"] == "apart"
    assert use("[data-list=points]", "Enter")["list"] == "points"
    assert use(".differing", "Space")["differing"] is False
    with opened.page.expect_download():
        use("[data-save=csv]", "Enter")
    assert use(".rows input[data-pin]", "Space")["pins"] != []
    use(".filtering button", "Enter")
    assert state["shown"] == len(report.comparison.points) and state["x"] == "macs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 768, 420])
def test_no_violation_and_no_overflow(browser: Any, report: Any, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="AXE IS NOT INSTALLED")
    page = OpenPage(browser, page_url(report.page), width=width, color_scheme=scheme, reduced_motion="reduce")
    page.run("view.select(view.front.at(-1)); view.togglePin(view.front[0]); view.togglePin(view.front.at(-1))")
    page.page.click(".filters summary")
    found = axe.Axe().run(page.page)
    assert [(v["id"], [node["target"] for node in v["nodes"]]) for v in found.response["violations"]] == []
    assert page.run("return document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("CIFAR_SCREENSHOTS"):
        page.page.screenshot(path=f"{folder}/{width}_{scheme}.png", full_page=True)
    if width == 1400:  # the other list, a run that is not compared, and the effect of a setting
        page.run("view.state.set({list: 'apart', x: 'setting:lr', text: ''}); view.selectRun(view.apart[0])")
        found = axe.Axe().run(page.page)
        assert [(v["id"], [node["target"] for node in v["nodes"]]) for v in found.response["violations"]] == []
    page.close()


def test_print_and_without_scripts(browser: Any, report: Any, tmp_path: Path) -> None:
    page = OpenPage(browser, page_url(report.page), width=794, color_scheme="dark")  # A4 at 96 dots an inch
    page.run("view.select(view.front.at(-1)); view.togglePin(view.front[0]); view.togglePin(view.front.at(-1))")
    page.page.emulate_media(media="print")
    page.settle()
    assert page.page.locator(".rows tbody tr").count() == len(report.comparison.points)  # not those in sight only
    for gone in (".fields", ".compare-bar input >> nth=0", "[data-save=csv]", "#explorer-budget"):
        assert page.page.is_hidden(gone)
    cut = page.run(
        "const wide = (e) => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth;"
        "return [...document.querySelectorAll('.scroll, .rows, section, .plot')].filter((e) => e.offsetWidth && wide(e))"
        ".map((e) => e.className)"
    )
    assert cut == []
    assert page.run("return getComputedStyle(document.body).color") == "rgb(31, 42, 55)"  # ink on paper, also of dark pages
    page.page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").stat().st_size > 20_000
    page.close()
    plain = OpenPage(browser, page_url(report.page), java_script_enabled=False)
    assert plain.page.is_hidden("#explorer")
    text = plain.page.inner_text("main")
    assert (
        "Accuracy against multiply-adds" in text
        and "Learning curves" in text
        and report.comparison.best.label.split(",")[0] in text
    )
    plain.close()


def test_hostile_names_do_nothing(browser: Any, tmp_path: Path) -> None:
    for n in range(3):
        write(
            tmp_path,
            f"hostile{n}",
            model="resnet20",
            name=HOSTILE,
            recipe=f"{HOSTILE}{n}",
            swept=("recipe",),
            tags=(HOSTILE, f"{n}"),
            state="failed" if n == 2 else "finished",
            reason=HOSTILE,
        )
        (tmp_path / f"hostile{n}" / "wandb").mkdir()
        (tmp_path / f"hostile{n}" / "wandb" / "url.txt").write_text("javascript:window.pwned=1")
    page = OpenPage(browser, page_url(write_report([], runs=tmp_path).page))
    page.run("view.select(0); view.togglePin(0); view.togglePin(1); view.state.set({colour: 'recipe'})")
    page.page.get_by_label("compare", exact=True).fill(HOSTILE)
    page.page.click("[data-list=apart]")
    page.settle()
    assert page.run("return window.pwned ?? 0") == 0
    assert page.page.locator("img").count() == 0 and page.page.locator("a[href^=javascript]").count() == 0
    assert "onerror" in page.page.inner_text(".rows")  # as text
    policy = page.page.get_attribute("meta[http-equiv=Content-Security-Policy]", "content")
    assert "unsafe-eval" not in policy and "script-src 'sha256-" in policy
    inserted = page.run(
        "const script = document.createElement('script'); script.textContent = 'window.pwned = 2';"
        "document.body.append(script); return window.pwned ?? 0"
    )
    assert inserted == 0  # the browser runs no script but ours
    page.close()


def test_what_leaves_the_page_says_that_the_data_is_a_stand_in(browser: Any, tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, f"standin{seed}", model="resnet20", seed=seed, dataset="stand-in")
    page = OpenPage(browser, page_url(write_report([], runs=tmp_path).page))
    page.run("view.select(0)")
    for button in ("[data-save=csv]", *(f"[data-figure={figure}][data-save=svg]" for figure in PICTURES)):
        with page.page.expect_download() as download:
            page.page.click(button)
        file = tmp_path / "file"
        download.value.save_as(file)
        assert "STAND-IN DATA, not CIFAR-10" in file.read_text()
    plain = page.run("view.table.banner = ''; return explorer.parts.scatter.toSvg()")
    assert "STAND-IN" not in plain
    page.close()


def test_runs_on_all_images_show_a_curve_that_they_have(browser: Any, tmp_path: Path) -> None:
    for n, model in enumerate(("resnet20", "vgg11")):
        record = write(tmp_path, model, model=model, epochs=9, layers=1, val_size=0, test=0.8 + 0.01 * n)
        rows = [{k: v for k, v in row.items() if not k.startswith("val/")} for row in record.read_rows()]
        (record.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = OpenPage(browser, page_url(write_report([], runs=tmp_path, split="test").page))
    page.run("view.select(0)")
    assert page.page.locator("#explorer-curve option").all_inner_texts() == ["training accuracy", "training loss"]
    assert page.page.input_value("#explorer-curve") == "train/acc"
    assert page.page.locator(".detail .chart path.line").count() == 1
    page.page.select_option("#explorer-curve", "train/loss")
    page.settle()
    assert page.page.input_value("#explorer-curve") == "train/loss" and not page.messages
    page.close()


def test_many_runs(browser: Any, tmp_path: Path) -> None:
    for n in range(150):
        write(
            tmp_path,
            f"many{n:03}",
            model=list(NETWORKS)[n % 8],
            seed=0,
            lr=0.001 * (n + 1),
            weight_decay=0.0001 * (n + 1),
            epochs=40,
            layers=1,
            swept=("model", "lr", "weight_decay"),
            predictions=n == 0,
        )
    file = write_report([], runs=tmp_path).page
    assert file.stat().st_size < 600_000  # with the figures, which are pictures where they would be large
    page = OpenPage(browser, page_url(file))
    assert page.page.locator(".rows tbody tr").count() < 60
    page.run("document.querySelector('.rows').scrollTop = 1e6")
    assert page.page.locator(".rows tbody tr[aria-rowindex='151']").count() == 1
    assert page.run("return document.documentElement.scrollHeight") < 12 * 900
    page.run("const known = await explorer.load.details([]); view.select(view.shown.find((i) => !known[view.idOf(i)]))")
    text = page.page.inner_text(".detail")
    assert "--keep RUN" in text and "--serve" in text and "At 32 epochs of each run" in text
    assert page.page.locator(".detail .chart path.line").count() == 1 and page.page.locator(".detail .heat").count() == 0
    assert "of all runs: not computed, lr and weight_decay vary together" in page.page.inner_text(".importance")
    page.page.fill("#explorer-text", "resnet20")
    page.settle()
    assert "of all runs, whatever is filtered" in page.page.inner_text(".importance")
    page.close()


def test_served_page_follows_the_runs(browser: Any, tmp_path: Path) -> None:
    import playwright.sync_api as playwright

    from cifar.report.serve import serve_report

    for seed in range(2):
        write(tmp_path, f"live{seed}", model="resnet20", seed=seed)
        write(tmp_path, f"other{seed}", model="vgg11", seed=seed)
    server = serve_report((), tmp_path, 0)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        page = OpenPage(browser, server.url)
        page.page.fill("#explorer-text", "resnet")
        page.settle()
        assert len(shown_labels(page)) == 1
        write(tmp_path, "new0", model="resnet56", seed=0)
        for _ in range(300):
            with contextlib.suppress(playwright.Error):  # in the middle of loading itself again
                page.page.wait_for_selector(READY)
                if len(shown_labels(page)) == 2:
                    break
        assert page.page.input_value("#explorer-text") == "resnet"  # what was chosen is still so
        details = page.run("const d = await explorer.load.details(['live1']); return Object.keys(d.live1.heat)")
        assert details == ["gradient_norm", "update_ratio"]
        assert all(url.startswith((server.url, "blob:", "data:")) for url in page.requests)
        answer = page.context.request.get(server.url, headers={"Host": "evil.example"})
        assert answer.status == 403
        for path in ("details/..%2f..%2fetc", "details/nothing", "other"):
            assert page.context.request.get(server.url + path).status == 404
        page.close()
    finally:
        server.stop()
        thread.join(10)
