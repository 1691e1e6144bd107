"""What `report --publish` makes arrives, and is read back with the library that made it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cifar.cli.app import main
from cifar.errors import UserError
from helpers.fake_runs import NETWORKS, write
from helpers.finished_sweeps import write_finished_sweep
from helpers.on_server import put
from helpers.protocol import Server

pytest.importorskip("wandb_workspaces")
TEXT = "name: which | net\ndescription: Which network?\nmethod: grid\nparameters:\n  model: {values: [a, b]}\n"


@pytest.fixture
def sweep_id(tmp_path: Path, server: Server) -> str:
    made = server.world.add_sweep("me", "cifar", TEXT)
    for n, model in enumerate(list(NETWORKS)[:4]):
        put(server, write(tmp_path / "away", f"r{n}", model=model, layers=5, sweep=made.id), made.id)
    return made.id


def views(server: Server, kind: str) -> list[Any]:
    return [view for view in server.world.views.values() if view.type == kind]


def panels_of(report: Any, reports: Any) -> list[Any]:
    return [panel for block in report.blocks if isinstance(block, reports.PanelGrid) for panel in block.panels]


def test_the_report_and_the_workspace_read_back(
    tmp_path: Path, server: Server, sweep_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    assert main(["report", f"me/cifar/{sweep_id}", "--out", str(tmp_path / "out"), "--budget", "50M", "--publish"]) == 0
    out = capsys.readouterr().out
    urls = [line.split()[-1] for line in out.splitlines() if server.url in line]
    assert len(urls) == 2
    report = reports.Report.from_url(urls[0])
    assert report.title == f"which | net ({sweep_id})" and report.project == "cifar"
    assert report.description.startswith("Best under 50 MMACs: resnet20")
    panels = panels_of(report, reports)
    (front,) = [panel for panel in panels if isinstance(panel, reports.ScatterPlot)]
    assert (front.x, front.y) == (reports.SummaryMetric("macs"), reports.SummaryMetric("val/acc"))
    assert front.log_x and front.running_ymax
    (flow,) = [panel for panel in panels if isinstance(panel, reports.BarPlot)]
    assert [metric.name for metric in flow.metrics] == [f"gradient_norm/layer{n}.conv" for n in range(5)]
    curves = {panel.title: panel for panel in panels if isinstance(panel, reports.LinePlot)}
    assert curves["Validation accuracy"].y == [reports.Metric("val/acc")]
    assert curves["Gradient of each layer"].metric_regex == "^gradient_norm/.*"
    assert curves["Gradient norm of all layers"].y == [reports.Metric("train/gradient_norm")]
    assert curves["Update to weight, all layers"].y == [reports.Metric("train/update_ratio")]
    (grid, *_) = [block for block in report.blocks if isinstance(block, reports.PanelGrid)]
    assert grid.runsets[0].filters == f"Metric(\"Sweep\") == '{sweep_id}'"
    (table,) = [block.text for block in report.blocks if isinstance(block, reports.MarkdownBlock)]
    assert table.count("\n") == 5 and "| resnet20 | 40.81 |" in table and "| network | MMACs |" in table

    workspace = workspaces.Workspace.from_url(urls[1])
    assert [section.name for section in workspace.sections] == [
        "Accuracy against FLOPs", "Curves", "Gradient flow", "Pictures", "Time",
    ]  # fmt: skip
    assert [type(panel) for section in workspace.sections for panel in section.panels] == [type(panel) for panel in panels]
    assert workspace.runset_settings.filters == f"Metric(\"Sweep\") == '{sweep_id}'" and workspace.settings.x_axis == "epoch"


@pytest.mark.slow
def test_publishing_again_renews_both(tmp_path: Path, server: Server, sweep_id: str) -> None:
    command = ["report", f"me/cifar/{sweep_id}", "--out", str(tmp_path / "out"), "--publish"]
    assert main(command) == main(command) == 0
    assert len(views(server, "runs")) == len(views(server, "project-view")) == 1


def test_what_somebody_has_deleted_is_published_anew(tmp_path: Path, server: Server, sweep_id: str) -> None:
    from cifar.integrations.wandb.paths import WandbPath
    from cifar.integrations.wandb.report import ReportContent, publish_report

    for _ in range(2):
        publish_report(WandbPath("me", "cifar"), ReportContent("x", [], [], [], []), tmp_path / "kept.json")
        assert len(views(server, "runs")) == len(views(server, "project-view")) == 1
        server.world.views.clear()


@pytest.mark.slow
def test_a_project_and_a_pushed_sweep(
    tmp_path: Path, runs: Path, server: Server, sweep_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb_workspaces.reports.v2 as reports

    assert main(["report", "me/cifar", "--out", str(tmp_path / "a"), "--publish"]) == 0
    (view,) = views(server, "runs")
    assert all(f'"r{n}"' in view.spec for n in range(4))
    url = next(line.split()[-1] for line in capsys.readouterr().out.splitlines() if "/reports/" in line)
    assert reports.Report.from_url(url).title == "me cifar"  # a "/" in a title is one in its address
    write_finished_sweep(runs, 2)
    capsys.readouterr()
    assert main(["report", "abcd1234", "--publish"]) == 2
    assert "`push` the sweep first" in capsys.readouterr().err
    assert main(["push", "abcd1234"]) == 0 and main(["report", "abcd1234", "--publish"]) == 0
    pushed = next(sweep for sweep in server.sweeps if sweep != sweep_id)
    assert pushed in views(server, "runs")[-1].spec


def test_without_the_library_it_says_what_to_install(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifar.integrations.wandb.paths import WandbPath
    from cifar.integrations.wandb.report import ReportContent, publish_report

    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match=r"pip install .*\[publish\]"):
        publish_report(WandbPath("me", "cifar"), ReportContent("x", [], [], [], []), tmp_path / "kept.json")
