"""Publishes a report and a saved workspace on W&B with our panels, by W&B's library wandb-workspaces."""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.errors import UserError
from cifar.integrations.wandb.download import connect_to_api, describe_error
from cifar.integrations.wandb.notes import read_notes, write_notes
from cifar.integrations.wandb.paths import WandbPath

MAX_LAYERS = 40  # in the panel of gradients by layer
PICTURE_NAMES = (
    "curves",
    "gradient_flow",
    "gradient_norms",
    "weight_updates",
    "histograms",
    "confusion",
    "mistakes",
)  # the names that the mirror gives them
MISSING_LIBRARY = "`pip install -e '.[publish]'` in the checkout brings what --publish needs (wandb-workspaces)"


@dataclass(frozen=True)
class PublishedUrls:
    """The addresses of the report and of the workspace."""

    report: str
    workspace: str


@dataclass(frozen=True)
class ReportContent:
    """What the report says: sentences (the answer first), the table of points, and the runs on W&B that it shows."""

    title: str
    sentences: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    run_ids: Sequence[str]  # of the runs that the points are made of
    split: str = "val"
    layers: Sequence[str] = ()  # metrics of the best network's gradients by layer, in the network's order


def publish_report(path: WandbPath, content: ReportContent, notes_file: Path) -> PublishedUrls:
    """Create both, or update those that an earlier call noted in `notes_file`. Raises UserError if W&B does not take them."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError(MISSING_LIBRARY) from None
    connect_to_api()
    old_ids: dict[str, str] = read_notes(notes_file).get(str(path), {})
    project = {"entity": path.entity, "project": path.project}
    report = reports.Report(
        **project,
        title=re.sub(r"[/?#%]+", " ", content.title)[:128],  # the title becomes a part of the report's address
        description=" ".join(content.sentences[:1])[:1000],
        width="fluid",
        blocks=_build_blocks(reports, project, content, _format_filter(path, content)),
    )
    workspace = workspaces.Workspace(
        **project,
        name=_remove_symbols(content.title),
        sections=[
            workspaces.Section(name=name, panels=panels, is_open=True)
            for name, panels in _build_sections(reports, content).items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis="epoch", max_runs=50),
        runset_settings=workspaces.RunsetSettings(filters=_format_filter(path, content)),
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the library prints the addresses; the command line does so too
            report.id = old_ids.get("report", "")
            workspace._internal_id, workspace._internal_name = old_ids.get("workspace", ""), old_ids.get("view", "")
            _save_or_recreate(report, "id")
            _save_or_recreate(workspace, "_internal_id")
    except Exception as error:  # the library passes on many kinds of errors from wandb and pydantic
        raise UserError(f"W&B did not take the report ({describe_error(error)})") from None
    new_ids = {"report": report.id, "workspace": workspace._internal_id, "view": workspace._internal_name}
    write_notes(notes_file, {str(path): new_ids})
    return PublishedUrls(report.url, workspace.url)


def _save_or_recreate(item: Any, id_attribute: str) -> None:
    """Update it; if it was deleted on W&B, create another one."""
    try:
        item.save()
    except Exception:
        if not getattr(item, id_attribute):
            raise
        setattr(item, id_attribute, "")
        item.save()


def _format_filter(path: WandbPath, content: ReportContent) -> str:
    """W&B's filter expression for the runs of the report."""
    if path.item_id and path.kind != "run":
        return f"Metric('Sweep') == '{path.item_id}'"
    return f"Metric('ID') in {list(content.run_ids)!r}"


def _build_blocks(reports: Any, project: Mapping[str, str], content: ReportContent, run_filter: str) -> list[Any]:
    """The blocks of the report from top to bottom: the answer, the scatter plot, the table, then the other panels."""

    def make_grid(panels: list[Any]) -> Any:
        return reports.PanelGrid(runsets=[reports.Runset(**project, name="runs", filters=run_filter)], panels=panels)

    blocks: list[Any] = [reports.P(sentence) for sentence in content.sentences]
    for name, panels in _build_sections(reports, content).items():
        blocks += [reports.H2(name), make_grid(panels)]
        if len(blocks) == len(content.sentences) + 2:
            blocks += [reports.H2("All points"), reports.MarkdownBlock(_format_table(content))]
    return blocks


def _build_sections(reports: Any, content: ReportContent) -> dict[str, list[Any]]:
    """Title -> panels. The report and the workspace have the same panels."""
    accuracy = reports.SummaryMetric(f"{content.split}/acc")

    def make_line_plot(title: str, *metrics: str, **options: Any) -> Any:
        return reports.LinePlot(title=title, x="epoch", y=list(metrics), **options)

    def make_wide(panel: Any, height: int = 12) -> Any:
        panel.layout = reports.Layout(0, 0, 24, height)
        return panel

    flow = [reports.SummaryMetric(column) for column in content.layers[:MAX_LAYERS]]
    gradient = content.layers[0].partition("/")[0] if flow else "gradient_norm"
    front = reports.ScatterPlot(
        title="Accuracy against multiply-adds; the line is the best so far: the Pareto front",
        x=reports.SummaryMetric("macs"),
        y=accuracy,
        log_x=True,
        running_ymax=True,
    )
    gradients = [make_line_plot("Gradient of each layer", metric_regex=f"^{gradient}/.*", log_y=True)]
    gradients += [
        make_line_plot("Gradient norm of all layers", "train/gradient_norm", log_y=True),
        make_line_plot("Update to weight, all layers", "train/update_ratio", log_y=True),
        make_line_plot("Zero gradients, all layers", "train/zero_gradients"),
    ]
    if flow:
        bars = reports.BarPlot(title="Gradient by layer, input → output, last epoch", metrics=flow, orientation="v")
        gradients.insert(0, make_wide(bars))
    sections = {
        "Accuracy against FLOPs": [make_wide(front)],
        "Curves": [
            make_line_plot("Validation accuracy", "val/acc"),
            make_line_plot("Loss", "train/loss", "val/loss"),
            make_line_plot("Training accuracy", "train/acc"),
            make_line_plot("Learning rate", "train/lr"),
        ],
        "Gradient flow": [*gradients, make_line_plot("Update to weight", metric_regex="^update_ratio/.*", log_y=True)],
        "Pictures": [make_wide(reports.MediaBrowser(media_keys=[f"pictures/{name}" for name in PICTURE_NAMES], num_columns=3))],
        "Time": [
            make_line_plot("Seconds an epoch", "system/seconds"),
            make_line_plot("Images a second", "system/images_per_second"),
        ],
    }
    for panels in sections.values():
        for n, panel in enumerate([panel for panel in panels if panel.layout.w != 24]):
            panel.layout = reports.Layout(x=12 * (n % 2), y=12 + 8 * (n // 2), w=12, h=8)
    return sections


def _format_table(content: ReportContent) -> str:
    """The table of points as Markdown. Characters of the cells that mean something in Markdown are escaped."""

    def format_row(cells: Sequence[str]) -> str:
        return (
            "| " + " | ".join(str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
        )

    head = [format_row(content.columns), format_row(["---"] * len(content.columns)).replace("\\", "")]
    return "\n".join([*head, *(format_row([row.get(column, "") for column in content.columns]) for row in content.rows)])


def _remove_symbols(name: str) -> str:
    """The name without symbols, which W&B does not accept in a workspace's name."""
    kept = "".join(letter for letter in name if unicodedata.category(letter) not in ("So", "Sk", "Sm", "Sc", "Cs"))
    return " ".join(kept.split())[:128] or "report"
