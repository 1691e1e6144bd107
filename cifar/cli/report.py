"""Commands about results: `report`, `push`."""

from __future__ import annotations

import contextlib
import json
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cifar.cli.completion import complete_sweep_or_run
from cifar.cli.console import (
    clean_text,
    console,
    echo,
    print_json,
    print_sentence,
    print_table,
    progress_bar,
    redirect_messages,
    spinner,
    warn_of_stand_in,
)
from cifar.cli.options import Artifacts, Json, RunsDir, Split
from cifar.errors import UserError
from cifar.states import ENDED_STATES
from cifar.system.names import is_id
from cifar.system.ownership import find_owner
from cifar.system.terminal import Column
from cifar.tracking import run_dir

MAX_BEST = 20  # points that are printed beside those of the front
MIN_PLOTTED = 5  # points that make a picture

if TYPE_CHECKING:
    from cifar.integrations.wandb.report import PublishedUrls
    from cifar.report import ReportResult
    from cifar.tracking.run_dir import RunDir


def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|SWEEP|ENTITY/PROJECT[/SWEEP]", help="[default: the newest sweep]", autocompletion=complete_sweep_or_run
        ),
    ] = None,
    split: Split = "val",
    budget: Annotated[str, typer.Option("--budget", metavar="MACS", help="name the best below it: 50M, 1.2G, 5e7")] = "",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where the page and the figures go")] = None,
    runs_dir: RunsDir = None,
    cost_unit: Annotated[str, typer.Option("--x", metavar="macs|flops", help="the axis of costs; FLOPs are 2 × MACs")] = "macs",
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="two points, by a run's id or a label: what differs, and the test"),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="RUN", help="keep its full curves on a page of many runs")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="print all points, not the front and the best 20")] = False,
    open_: Annotated[bool, typer.Option("--open", help="show the page in a browser")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="serve the page to this machine's browser; it follows the runs")
    ] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="of --serve [default: a free one]")] = 0,
    publish: Annotated[bool, typer.Option("--publish", help="make a report and a workspace on W&B, too")] = False,
    as_json: Json = False,
) -> int:
    """Read runs and draw accuracy against FLOPs: a page, figures, a table. Runs are here, or on W&B.

    Examples:

    `python -m cifar report`

    `python -m cifar report 3k9x2m1p --budget 50M`

    `python -m cifar report --split test`

    `python -m cifar report --compare resnet20 worksheet1`

    `python -m cifar report --serve --open`

    `python -m cifar report me/cifar/x7k2m1pq --publish`
    """
    runs = run_dir.resolve_runs_dir(runs_dir)
    if serve:
        _serve_report(names or [], runs, port, split=split, budget=budget, cost_unit=cost_unit, opens_browser=open_)
        return 0
    with redirect_messages(as_json):
        result = draw_report(names or [], runs=runs, split=split, budget=budget, out=out, cost_unit=cost_unit, kept=keep or [])
        if not as_json and compare:
            print_comparison(result, *compare)
        elif not as_json:
            print_report(result, runs, show_all=show_all)
        published = None
        if publish:
            with spinner("publishing on W&B ..."):
                published = _publish_report(names or [], result, runs, split)
            echo(f"on W&B: report {published.report}")
            echo(f"     workspace {published.workspace}")
    if as_json:
        # report.json's keys, and: sweep (id), files (paths), published (null, or the URLs of report and workspace)
        document = json.loads(next(path for path in result.paths if path.name == "report.json").read_text())
        for point in document["points"]:
            point |= {key: round(point[key]) for key in ("macs", "flops")}
        document |= {"sweep": result.sweep or None, "files": [str(path) for path in result.paths], "published": None}
        if published:
            document["published"] = {"report": published.report, "workspace": published.workspace}
        print_json(document)
    if open_:
        webbrowser.open(result.page.resolve().as_uri())
    return 0


def draw_report(
    names: Sequence[str],
    *,
    runs: Path,
    split: str = "val",
    budget: str = "",
    out: Path | None = None,
    cost_unit: str = "macs",
    kept: Sequence[str] = (),
) -> ReportResult:
    """Read runs, write the page and the figures."""
    with progress_bar("reading from W&B", "runs") as progress:
        from cifar import report as reports
        from cifar.report.formatting import parse_macs

        limit = parse_macs(budget) if budget else None
        return reports.write_report(
            names, runs=runs, out=out, split=split, budget=limit, cost_unit=cost_unit, kept=kept, progress=progress
        )


def _serve_report(
    names: Sequence[str], runs: Path, port: int, *, split: str, budget: str, cost_unit: str, opens_browser: bool
) -> None:
    """Serve the page until Ctrl-C."""
    from cifar.report.formatting import parse_macs
    from cifar.report.serve import serve_report

    limit = parse_macs(budget) if budget else None
    server = serve_report(names, runs, port, split=split, budget=limit, cost_unit=cost_unit)
    echo(f"{server.url} follows the runs in {runs}; Ctrl-C ends it")
    if opens_browser:
        webbrowser.open(server.url)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve()


def print_comparison(result: ReportResult, first: str, second: str) -> None:
    """Print two points side by side: the settings that differ, and the test of their accuracies."""
    from cifar.report import compare

    points = [compare.find_point(result.comparison, name) for name in (first, second)]
    if points[0] is points[1]:
        raise UserError(f"--compare {first} {second}: these are the same point; name two")
    rows, sentences = compare.describe_comparison(result.comparison, *points)
    print_table("", ["", points[0].label, points[1].label], rows)
    echo()
    for sentence in sentences:
        print_sentence(sentence)


def print_report(result: ReportResult, runs: Path, *, show_all: bool = False) -> None:
    """Print a plot, the table, the answers, how the best run is repeated, and where the files are."""
    if result.banner:
        warn_of_stand_in(f"{result.banner}: these accuracies compare with nothing else.")
    for line in _draw_plot(result):
        echo(line)
    if result.rows:
        chosen = _choose_rows(result, show_all)
        rows = [[result.rows[index].get(column) for column in result.columns] for index in chosen]
        print_table(result.title, _make_columns(result), rows)
        if len(chosen) < len(result.rows):
            echo(f"the front and the best {MAX_BEST} of {len(result.rows)} points; --all prints all of them")
        echo()
    for index, note in enumerate(result.notes):
        print_sentence(note)
        if index == 0:  # the answer, which names the best
            _print_best_run(result, runs)
    for path in result.paths:
        if path.suffix != ".svg":  # beside each PNG
            echo(f"{path.suffix[1:]:<5} {path}")


def _draw_plot(result: ReportResult) -> list[str]:
    """The points as a few lines of text, where there are enough for a picture."""
    from cifar.report.formatting import format_macs
    from cifar.report.text_plot import TextPoint, draw_text_plot

    comparison = result.comparison
    points = [
        TextPoint(point.macs * comparison.cost_factor, point.mean, point.on_front)
        for point in comparison.points
        if point.num_views == 1
    ]
    if len(points) < MIN_PLOTTED:
        return []
    unit = comparison.cost_column[1:]  # MACs or FLOPs
    lines = draw_text_plot(points, lambda cost: format_macs(cost).removesuffix("MACs") + unit, width=min(console.width, 76))
    return [f"{comparison.accuracy_label}, % against {unit} (log); ● the front", *lines, ""] if lines else []


def _choose_rows(result: ReportResult, show_all: bool) -> list[int]:
    """Indices of the points that are printed, in their order."""
    points = result.comparison.points
    if show_all:
        return list(range(len(points)))
    best = set(sorted(range(len(points)), key=lambda index: -points[index].mean)[:MAX_BEST])
    return [index for index, point in enumerate(points) if point.on_front or index in best]


def _make_columns(result: ReportResult) -> list[Column]:
    """The report's columns. Where there is little room, what tells the points apart and the accuracies stay."""
    drop_orders = {"latency": 6, "energy a run": 6, "params M": 5, "time a run": 4, "n": 3, "front": 2}
    network_width = max(len(row["network"]) for row in result.rows)
    keys = list(result.comparison.points[0].values)  # `model` is the column network
    columns = []
    for name in result.columns:
        if name == "network" or name in keys:
            is_key = name != "network"
            min_width = 8 if is_key else network_width
            columns.append(Column(name, is_number=is_key, drop_order=int(is_key), min_width=min_width, can_be_shared=True))
        else:
            columns.append(
                Column(
                    name,
                    is_number=name != "front",
                    drop_order=drop_orders.get(name, 0),
                    is_extra=name == "params M",
                    can_be_shared=name in ("MMACs", "MFLOPs", "params M", "± 95 %", "n"),
                )
            )
    return columns


def _print_best_run(result: ReportResult, runs: Path) -> None:
    if best := result.comparison.best:
        first, *others = best.runs
        own = first.own_command or "(its folder is gone, and its command is not known)"
        command = clean_text(own) if first.is_rebuilt else run_dir.format_repeat_command(first.path, runs)
        seeds = f", the first of {len(best.runs)} seeds" if others else ""
        echo(f"      run {first.id}{seeds}; repeat it: {command}")


def _publish_report(names: Sequence[str], result: ReportResult, runs: Path, split: str) -> PublishedUrls:
    from cifar.integrations.wandb import report as publishing
    from cifar.integrations.wandb.paths import parse_wandb_path
    from cifar.integrations.wandb.upload import find_pushed_sweep

    place = parse_wandb_path(names[0]) if len(names) == 1 and "/" in names[0] else None
    place = place or (find_pushed_sweep(runs / "sweeps" / result.sweep) if result.sweep else None)
    if place is None:
        raise UserError("--publish needs one place on W&B: name ENTITY/PROJECT[/SWEEP], or `push` the sweep first")
    best = result.comparison.best
    run = best.runs[0] if best else None
    metric = next((m for m in ("gradient_norm", "gradient_mean") if run and run.layers_with(m)), "")
    content = publishing.ReportContent(
        title=clean_text(" – ".join(part for part in (result.banner, result.comparison.title) if part)),
        sentences=[clean_text(note) for note in result.notes],
        columns=result.columns,
        rows=result.rows,
        run_ids=[run.id for point in result.comparison.points for run in point.runs],
        split=split,
        layers=[f"{metric}/{layer}" for layer in run.layers_with(metric)] if run and metric else [],
    )
    return publishing.publish_report(place, content, result.page.parent / "published.json")


def push(
    name: Annotated[
        str, typer.Argument(metavar="SWEEP|RUN", help="a sweep's id or name, or a run's", autocompletion=complete_sweep_or_run)
    ],
    project: Annotated[str, typer.Option("--project", help="on W&B [default: the file's, else the runs']")] = "",
    entity: Annotated[str, typer.Option("--entity", help="user or team [default: yours]")] = "",
    artifacts: Artifacts = None,
    runs_dir: RunsDir = None,
) -> int:
    """Make a local sweep a sweep on W&B, with all its runs; send what W&B lacks of a run. Again: only what is new.

    Example: `python -m cifar push 3k9x2m1p --project cifar`
    """
    from cifar.integrations.wandb import upload
    from cifar.sweeps import local

    runs = run_dir.resolve_runs_dir(runs_dir)
    sweep_id = local.find_sweep_id(name, runs)
    folder = runs / "sweeps" / sweep_id
    records = _list_readable(runs, sweep_id)
    if not is_id(sweep_id) or not (folder / "sweep.json").exists():  # else it is a run, by its path perhaps
        records = records or [run_dir.find_run_dir(name, runs)]
        ended = [record for record in records if record.state in ENDED_STATES]
        if len(records) == 1 and (owner := find_owner(records[0].path)):
            raise UserError(f"{owner.describe(records[0].path)}; push it when it has ended")
        with progress_bar(f"sending {name} to W&B", "runs") as progress:
            num_sent = upload.push_runs(ended, entity=entity, project=project, progress=progress, on_message=echo)
        echo(f"{len(ended)} run{'s' * (len(ended) != 1)} of {name} on W&B ({num_sent} sent now)")
        _print_open_runs([record.id for record in records if record not in ended])
        return 0
    with progress_bar(f"sending {sweep_id} to W&B", "runs") as progress:
        pushed = upload.push_sweep(folder, records, entity=entity, project=project, progress=progress, on_message=echo)
    echo(f"{len(records) - len(pushed.open_run_ids)} runs of {sweep_id} are on W&B ({pushed.num_sent} sent now): {pushed.url}")
    _print_open_runs(pushed.open_run_ids)
    return 0


def _list_readable(runs: Path, sweep_id: str) -> list[RunDir]:
    """The runs of a sweep that can be read. Those that cannot are named and left out."""
    found = []
    for record in run_dir.list_run_dirs(runs):
        try:
            about = record.read_json("run")
            if about.get("sweep") == sweep_id:
                for name in ("config", "status", "summary"):
                    record.read_json(name)
                list(record.read_rows())
                found.append(record)
        except UserError as error:
            if record.id.startswith(f"{sweep_id}-"):
                echo(f"left out: {error}")
    return found


def _print_open_runs(ids: Sequence[str]) -> None:
    if ids:
        echo(f"not ended yet, push again later: {', '.join(ids)}")
