"""The data of the page: small, and what the runs say. That the page decodes it is tested in a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar.errors import UserError
from cifar.report import write_report
from cifar.report.explorer import document
from cifar.report.explorer.page import FOLDER, read_script
from cifar.report.load import load_run
from cifar.report.text_plot import TextPoint, draw_text_plot
from helpers.fake_runs import NETWORKS, write


def unpack(page: str, name: str) -> bytes:
    match = re.search(rf'<script type="text/plain" id="explorer-{name}">([^<]*)</script>', page)
    assert match
    return gzip.decompress(base64.b64decode(match.group(1)))


def decode_curves(content: bytes, num_runs: int, metrics: list[str], scales: list[float]) -> list[dict[str, list[float]]]:
    """A reader of its own, from the format's description."""
    at = 0

    def read_block(size: int) -> list[int]:
        nonlocal at
        low, high = content[at : at + size], content[at + size : at + 2 * size]
        at += 2 * size
        return [a + 256 * b for a, b in zip(low, high, strict=True)]

    counts = read_block(num_runs)
    columns = {name: read_block(sum(counts)) for name in ("epoch", *metrics)}
    assert at == len(content)
    found: list[dict[str, list[float]]] = []
    start = 0
    for count in counts:
        run = {}
        for name, scale in zip(columns, [1.0, *scales], strict=True):
            coded = columns[name][start : start + count]
            steps = np.cumsum([-(c + 1) // 2 if c % 2 else c // 2 for c in coded]) % 65536
            run[name] = [float(step) / scale if step != 65535 else float("nan") for step in steps]
        found.append(run)
        start += count
    return found


def test_curves_travel_within_half_a_step(tmp_path: Path) -> None:
    for n, epochs in enumerate((1, 7, 32, 33, 150)):
        write(tmp_path, f"run{n}", model=list(NETWORKS)[n], epochs=epochs, layers=2)
    result = write_report([], runs=tmp_path)
    page = result.page.read_text()
    table: dict[str, Any] = json.loads(unpack(page, "table"))
    decoded = decode_curves(unpack(page, "curves"), 5, table["curves"]["metrics"], table["curves"]["scales"])
    runs = {run.id: run for run in result.comparison.runs}
    for run_id, curve in zip(table["runs"]["id"], decoded, strict=True):
        rows = {row["epoch"]: row for row in runs[run_id].rows}
        assert len(curve["epoch"]) == min(32, len(rows)) and curve["epoch"][-1] == len(rows)
        for metric, scale in document.CURVE_METRICS.items():
            assert curve[metric] == pytest.approx([rows[int(e)][metric] for e in curve["epoch"]], abs=0.51 / scale)


@pytest.mark.parametrize(
    ("model", "family"),
    [("resnet20", "resnet"), ("shufflenet_v2_x0_5", "shufflenet_v2"), ("preact_resnet18", "preact_resnet"), ("vit", "vit"),
     ("wrn_16_4", "wrn"), ("conv8", "conv"), ("densenet_bc_100_12", "densenet_bc"), ("worksheet1", "worksheet")],
)  # fmt: skip
def test_family(model: str, family: str) -> None:
    assert document.name_family(model) == family


@pytest.mark.slow
def test_details_are_those_of_few_runs_and_of_kept_ones(tmp_path: Path) -> None:
    for n in range(90):
        write(
            tmp_path,
            f"run{n:02}",
            model="resnet20",
            lr=0.001 * (n + 1),
            epochs=2,
            layers=1,
            accuracy=0.5 + 0.001 * n,
            swept=("lr",),
        )
    details = json.loads(unpack(write_report([], runs=tmp_path).page.read_text(), "details"))
    assert set(details) == {f"run{n:02}" for n in range(60, 90)}
    details = json.loads(unpack(write_report([], runs=tmp_path, kept=["run03"]).page.read_text(), "details"))
    assert "run03" in details and len(details) == 31
    with pytest.raises(UserError, match="--keep nothing: no run"):
        write_report([], runs=tmp_path, kept=["nothing"])


def test_a_network_whose_outputs_are_no_numbers_has_mistakes_without_confidence(tmp_path: Path) -> None:
    record = write(tmp_path, "run0", predictions=True)
    with np.load(record.path / "predictions.npz") as arrays:
        np.savez(record.path / "predictions.npz", **{**arrays, "confidence": np.full_like(arrays["confidence"], np.nan)})
    details = document.describe_details(load_run(record.path))
    json.dumps(details, allow_nan=False)  # as the page has it
    assert details["mistakes"]["confidence"] == [None] * document.MAX_MISTAKES


@pytest.mark.parametrize("loss", [1e306, 200.0])
def test_a_loss_beyond_all_bounds_has_a_page(tmp_path: Path, loss: float) -> None:
    record = write(tmp_path, "run0", epochs=3)
    write(tmp_path, "run1", model="vgg11", epochs=3)
    rows = [{**row, "val/loss": loss} for row in record.read_rows()]
    (record.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([], runs=tmp_path).page.read_text()
    table = json.loads(unpack(page, "table"))
    curves = decode_curves(unpack(page, "curves"), 2, table["curves"]["metrics"], table["curves"]["scales"])
    assert all(np.isnan(curves[table["runs"]["id"].index("run0")]["val/loss"]))


def test_tags_that_all_runs_have_or_that_say_the_network_are_left_out(tmp_path: Path) -> None:
    for n, tags in enumerate((("all", "a"), ("all", "b", "a"), ("all", "not a \u202e name"))):
        write(tmp_path, f"run{n}", model=list(NETWORKS)[n], epochs=1, layers=1, tags=tags)
    runs = [load_run(tmp_path / f"run{n}") for n in range(3)]
    assert document.list_tags(runs) == ["a", "b", "not a \\u202e name"]
    assert document.list_tags([]) == document.list_tags(runs[:1]) == []


def test_what_few_runs_have_measured_travels(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path, f"run{n}", model=list(NETWORKS)[n], epochs=1, layers=1, measured={"joules": 7.5} if n == 1 else None)
    table = json.loads(unpack(write_report([], runs=tmp_path).page.read_text(), "table"))
    assert [cost["key"] for cost in table["costs"]] == ["joules"] and "latency_seconds" not in table["runs"]
    assert dict(zip(table["runs"]["id"], table["runs"]["joules"], strict=True)) == {"run0": None, "run1": 7.5, "run2": None}


def test_flops_are_twice_the_macs(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path, f"run{n}", model=list(NETWORKS)[n], epochs=2)
    result = write_report([], runs=tmp_path, cost_unit="flops")
    assert result.rows[0]["MFLOPs"] == "13.31"  # worksheet 1 has 6,654,464 MACs
    assert json.loads(unpack(result.page.read_text(), "table"))["x"] == "flops"
    with pytest.raises(UserError, match="--x watts: choose macs or flops"):
        write_report([], runs=tmp_path, cost_unit="watts")


def test_the_built_program_is_that_of_its_sources() -> None:
    """`npm ci && npm run build` in report/explorer/web writes explorer.js with a digest of what it was made of."""
    web = FOLDER / "web"
    digest = hashlib.sha256()
    for path in [web / "package-lock.json", web / "build.mjs", *sorted((web / "src").iterdir())]:
        digest.update(path.read_bytes())
    assert f"sources {digest.hexdigest()} */" in read_script()[:200]
    assert "</script" not in read_script() and "eval(" not in read_script()
    head = read_script()[:20_000]
    assert "Permission to use, copy, modify" in head and "Redistribution and use in source" in head  # the licences travel
    for name in re.findall(r'"(d3-[a-z]+)":', (web / "package.json").read_text()):
        assert f"{name} " in (FOLDER / "LICENSES.txt").read_text()


def test_a_plot_of_text() -> None:
    points = [TextPoint(1e6, 0.5, True), TextPoint(1e7, 0.7, True), TextPoint(1e8, 0.6, False), TextPoint(1e9, 0.9, True)]
    lines = draw_text_plot(points, lambda cost: f"{cost:.0e}", width=40, height=9)
    assert len(lines) == 11 and max(map(len, lines)) <= 40
    assert lines[0].startswith(" 90.0 │") and lines[0].endswith("●") and lines[8].startswith(" 50.0 │●")
    assert sum(line.count("●") for line in lines) == 3 and sum(line.count("·") for line in lines) == 1
    assert lines[4].index("●") - 7 == round(32 / 3)  # 1e7 is a third of the way on a logarithmic axis
    assert lines[-1].split() == ["1e+06", "1e+09"]
    assert draw_text_plot(points[:1], str) == []
