"""A report and a saved workspace on W&B, with the panels of this suite. W&B's own library makes them: wandb-workspaces."""

from __future__ import annotations

import contextlib
import io
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.errors import UserError
from cifar.integrations.wandb.download import Place, connect, reason
from cifar.tracking.run_dir import write_atomic

LAYERS = 40  # of a network in its panel of gradients
PICTURES = ("curves", "gradient_flow", "weight_updates", "confusion", "mistakes")  # as the mirror names them
NEEDS = "`pip install -e '.[publish]'` in the checkout brings what --publish needs (wandb-workspaces)"


@dataclass(frozen=True)
class Published:
    """Their addresses."""

    report: str
    workspace: str


@dataclass(frozen=True)
class Content:
    """What is to be told: sentences (the answer first), the table of points, and where in W&B its numbers are."""

    title: str
    sentences: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    runs: Sequence[str]  # ids of what the points are made from
    split: str = "val"
    layers: Sequence[str] = ()  # the gradients of the best network's layers, as columns, in the network's order


def publish(place: Place, content: Content, kept: Path) -> Published:
    """Make both, or renew those that an earlier call noted in the file `kept`. Raises UserError where that cannot be."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError(NEEDS) from None
    connect()
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(kept.read_bytes()).get(str(place), {})
    where = {"entity": place.entity, "project": place.project}
    report = reports.Report(
        **where,
        title=re.sub(r"[/?#%]+", " ", content.title)[:128],  # it becomes a part of the report's address
        description=" ".join(content.sentences[:1])[:1000],
        width="fluid",
        blocks=_blocks(reports, where, content, _filter(place, content)),
    )
    workspace = workspaces.Workspace(
        **where,
        name=_plain(content.title),
        sections=[
            workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in _sections(reports, content).items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis="epoch", max_runs=50),
        runset_settings=workspaces.RunsetSettings(filters=_filter(place, content)),
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it says where things are; so do we
            report.id = known.get("report", "")
            workspace._internal_id, workspace._internal_name = known.get("workspace", ""), known.get("view", "")
            _save(report, "id")
            _save(workspace, "_internal_id")
    except Exception as error:  # the library passes on whatever wandb and pydantic raise
        raise UserError(f"W&B did not take the report ({reason(error)})") from None
    made = {"report": report.id, "workspace": workspace._internal_id, "view": workspace._internal_name}
    write_atomic(kept, json.dumps({str(place): made}, indent=1).encode())
    return Published(report.url, workspace.url)


def _save(thing: Any, key: str) -> None:
    """Renew it; where it was deleted on W&B, make another."""
    try:
        thing.save()
    except Exception:
        if not getattr(thing, key):
            raise
        setattr(thing, key, "")
        thing.save()


def _filter(place: Place, content: Content) -> str:
    """The runs of the report, in W&B's words."""
    if place.part and place.kind != "run":
        return f"Metric('Sweep') == '{place.part}'"
    return f"Metric('ID') in {list(content.runs)!r}"


def _blocks(reports: Any, where: Mapping[str, str], content: Content, chosen: str) -> list[Any]:
    """The report from top to bottom: the answer, the picture, the table, then how it came about."""

    def grid(panels: list[Any]) -> Any:
        return reports.PanelGrid(runsets=[reports.Runset(**where, name="runs", filters=chosen)], panels=panels)

    blocks: list[Any] = [reports.P(sentence) for sentence in content.sentences]
    for name, panels in _sections(reports, content).items():
        blocks += [reports.H2(name), grid(panels)]
        if len(blocks) == len(content.sentences) + 2:
            blocks += [reports.H2("All points"), reports.MarkdownBlock(_table(content))]
    return blocks


def _sections(reports: Any, content: Content) -> dict[str, list[Any]]:
    """Title -> panels. The same panels stand in the report and in the workspace."""
    accuracy = reports.SummaryMetric(f"{content.split}/acc")

    def curve(title: str, *metrics: str, **options: Any) -> Any:
        return reports.LinePlot(title=title, x="epoch", y=list(metrics), **options)

    def wide(panel: Any, height: int = 12) -> Any:
        panel.layout = reports.Layout(0, 0, 24, height)
        return panel

    flow = [reports.SummaryMetric(column) for column in content.layers[:LAYERS]]
    gradient = content.layers[0].partition("/")[0] if flow else "gradient_norm"
    front = reports.ScatterPlot(
        title="Accuracy against multiply-adds; the line is the best so far: the Pareto front",
        x=reports.SummaryMetric("macs"),
        y=accuracy,
        log_x=True,
        running_ymax=True,
    )
    gradients = [curve("Gradient of each layer", metric_regex=f"^{gradient}/.*", log_y=True)]
    if flow:
        bars = reports.BarPlot(title="Gradient by layer, input → output, last epoch", metrics=flow, orientation="v")
        gradients.insert(0, wide(bars))
    found = {
        "Accuracy against FLOPs": [wide(front)],
        "Curves": [
            curve("Validation accuracy", "val/acc"),
            curve("Loss", "train/loss", "val/loss"),
            curve("Training accuracy", "train/acc"),
            curve("Learning rate", "train/lr"),
        ],
        "Gradient flow": [*gradients, curve("Update to weight", metric_regex="^update_ratio/.*", log_y=True)],
        "Pictures": [wide(reports.MediaBrowser(media_keys=[f"pictures/{name}" for name in PICTURES], num_columns=3))],
        "Time": [curve("Seconds an epoch", "system/seconds")],
    }
    for panels in found.values():
        for n, panel in enumerate([panel for panel in panels if panel.layout.w != 24]):
            panel.layout = reports.Layout(x=12 * (n % 2), y=12 + 8 * (n // 2), w=12, h=8)
    return found


def _table(content: Content) -> str:
    """Markdown, with what could be taken for it escaped."""

    def line(cells: Sequence[str]) -> str:
        return (
            "| " + " | ".join(str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
        )

    head = [line(content.columns), line(["---"] * len(content.columns)).replace("\\", "")]
    return "\n".join([*head, *(line([row.get(column, "") for column in content.columns]) for row in content.rows)])


def _plain(name: str) -> str:
    """W&B takes no symbols in a workspace's name."""
    kept = "".join(letter for letter in name if unicodedata.category(letter) not in ("So", "Sk", "Sm", "Sc", "Cs"))
    return " ".join(kept.split())[:128] or "report"
