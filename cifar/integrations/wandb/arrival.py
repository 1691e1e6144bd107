"""What W&B has of a run, read back through its API and compared with the run's folder.

    arrived = fetch_run(client.execute_graphql, place)     # state, number of rows, last row, summary; one request
    describe_missing(arrived, num_rows, last_row)          # "" or what is missing, in words
    compare_history(scan_history(run, 0, last), rows)      # row by row, where W&B had rows before this process

Two rows are the same if all their metrics are. Times, throughput and memory (`system/`) may differ where an epoch was trained
again: `compare_history` counts these apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cifar.integrations.wandb import artifact_arrival
from cifar.integrations.wandb.convert import build_row, parse_number
from cifar.integrations.wandb.document import (
    DOCUMENT_FILE,
    METRICS_FILE,
    build_document,
    compute_md5,
    describe_metrics,
    read_clean,
)
from cifar.integrations.wandb.workspace import build_summary
from cifar.states import WANDB_FINISHED_STATES
from cifar.tracking import console_log
from cifar.tracking.run_dir import RunDir
from cifar.tracking.system_metrics import read_samples

TIMES = "system/"  # prefix of what differs when the same epoch is trained again
INCOMPLETE = "incomplete"  # the summary's `state` while W&B lacks something of a run that has ended here
RUNS_PER_PAGE = 50
STEPS_PER_PAGE = 10_000  # of a history, in one request
PICTURES_FOLDER = "media/images/pictures/"  # where wandb puts the pictures among a run's files
_PICTURE_NAME = re.compile(re.escape(PICTURES_FOLDER) + r"[\w-][\w.-]*")  # in the folder, whatever a server says
_FIELDS = f"""name state historyLineCount historyTail summaryMetrics logLineCount eventsLineCount {artifact_arrival.RUN_FIELDS}
  document: files(names: ["{DOCUMENT_FILE}"], first: 1) {{ edges {{ node {{ name sizeBytes md5 }} }} }}"""
_METRICS = f'metrics: files(names: ["{METRICS_FILE}"], first: 1) {{ edges {{ node {{ name sizeBytes md5 }} }} }}'
_PICTURES = f'pictures: files(pattern: "{PICTURES_FOLDER}%", first: 100) {{ edges {{ node {{ name sizeBytes }} }} }}'
GET_RUN = f"""query ArrivedRun($name: String!, $project: String!, $entity: String!) {{
  project(name: $project, entityName: $entity) {{ run(name: $name) {{ {_FIELDS} }} }}
}}"""
GET_RUNS = f"""query ArrivedRuns($project: String!, $entity: String!, $filters: JSONString, $first: Int) {{
  project(name: $project, entityName: $entity) {{
    runs(filters: $filters, first: $first) {{ edges {{ node {{ {_FIELDS} {_PICTURES} {_METRICS} }} }} }}
  }}
}}"""
GET_PICTURES = f"""query ArrivedPictures($name: String!, $project: String!, $entity: String!) {{
  project(name: $project, entityName: $entity) {{ run(name: $name) {{ {_PICTURES} }} }}
}}"""

Execute = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class ArrivedRun:
    """What W&B says of one run. `state` is W&B's word. `pictures`: names of the files that it has; None if it was not asked."""

    state: str
    num_rows: int
    last_row: dict[str, Any]  # {} if there is none
    summary: dict[str, Any]
    num_log_lines: int = 0  # of the console
    num_event_lines: int = 0  # samples of system metrics
    pictures: frozenset[str] | None = None
    artifacts: tuple[artifact_arrival.ArrivedArtifact, ...] = ()  # that it made and uses
    media: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the last row and the summary: key -> W&B's description
    document_md5: str | None = None  # of cifar.json; None if it is not there, "" if W&B does not say
    metrics_md5: str | None = ""  # of metrics.jsonl, likewise; "" also if it was not asked

    def find_lost_pictures(self, pictures: Collection[str]) -> dict[str, str]:
        """Pictures that a row or the summary names, and whose files are not among these: key -> name of the file.

        The row and the summary may arrive before the files do.
        """
        names = {key: str(value.get("path")) for key, value in self.media.items()}
        return {key: name for key, name in names.items() if _PICTURE_NAME.fullmatch(name) and name not in pictures}


def fetch_run(execute_graphql: Execute, entity: str, project: str, run_id: str) -> ArrivedRun | None:
    """The run as W&B has it now; None if there is no such run. Raises what wandb raises."""
    found = execute_graphql(GET_RUN, name=run_id, project=project, entity=entity).get("project") or {}
    return _parse_node(found["run"]) if found.get("run") else None


def fetch_runs(execute_graphql: Execute, entity: str, project: str, run_ids: Sequence[str]) -> dict[str, ArrivedRun]:
    """The same for many runs, by id; those that W&B does not have are left out."""
    runs: dict[str, ArrivedRun] = {}
    for start in range(0, len(run_ids), RUNS_PER_PAGE):
        filters = json.dumps({"name": {"$in": list(run_ids[start : start + RUNS_PER_PAGE])}})
        found = execute_graphql(GET_RUNS, project=project, entity=entity, filters=filters, first=RUNS_PER_PAGE).get("project")
        for edge in ((found or {}).get("runs") or {}).get("edges", ()):
            runs[edge["node"]["name"]] = _parse_node(edge["node"])
    return runs


def _parse_node(node: Mapping[str, Any]) -> ArrivedRun:
    tail = json.loads(node.get("historyTail") or "[]")
    last = json.loads(tail[-1]) if tail else {}
    summary = json.loads(node.get("summaryMetrics") or "{}")
    media = {key: value for key, value in {**last, **summary}.items() if isinstance(value, dict) and "path" in value}
    num_rows, num_log_lines, num_event_lines = (int(node.get(f"{kind}LineCount") or 0) for kind in ("history", "log", "events"))
    return ArrivedRun(
        str(node["state"]),
        num_rows,
        build_row(last),
        summary,
        num_log_lines,
        num_event_lines,
        _parse_pictures(node) if "pictures" in node else None,
        artifact_arrival.parse_artifacts(node),
        media,
        _parse_md5(node["document"]) if node.get("document") else None,
        _parse_md5(node["metrics"]) if node.get("metrics") else "",
    )


def _parse_md5(found: Mapping[str, Any]) -> str | None:
    """The digest of the file that was found; None if there is none, or an empty one, for which W&B waits."""
    files = [edge["node"] for edge in found.get("edges", ())]
    return next((str(file.get("md5") or "") for file in files if int(file.get("sizeBytes") or 0)), None)


def fetch_pictures(execute_graphql: Execute, entity: str, project: str, run_id: str) -> frozenset[str]:
    """The names of the run's pictures whose files W&B has. Raises what wandb raises."""
    found = execute_graphql(GET_PICTURES, name=run_id, project=project, entity=entity).get("project") or {}
    return _parse_pictures(found.get("run") or {})


def _parse_pictures(node: Mapping[str, Any]) -> frozenset[str]:
    """An empty file is one that W&B waits for."""
    nodes = [edge["node"] for edge in (node.get("pictures") or {}).get("edges", ())]
    return frozenset(str(file["name"]) for file in nodes if int(file.get("sizeBytes") or 0))


def scan_history(run: Any, first_step: int, last_step: int) -> Iterable[dict[str, Any]]:
    """Every row of a run's history, not a sample. `run`: of wandb's public API.

    run.scan_history() would ask for the last step again, one request for each run.
    """
    from wandb.apis.public import HistoryScan

    scan: Iterable[dict[str, Any]] = HistoryScan(
        run,
        service_api=run._service_api,
        min_step=first_step,
        max_step=last_step + 1,
        page_size=STEPS_PER_PAGE,
        use_cache=False,
    )
    return scan


def read_history(api: Any, entity: str, project: str, run_id: str) -> Iterable[dict[str, Any]]:
    """Every row that W&B has of this run now. `api`: wandb's public API."""
    run = api.run(f"{entity}/{project}/{run_id}")
    last_step = int(run.lastHistoryStep)  # asked for now: the API remembers runs
    return scan_history(run, 0, last_step) if last_step >= 0 else ()


# -- rows --------------------------------------------------------------------------------------------------------------


def are_equal(a: Any, b: Any) -> bool:
    """Whether two values are the same in JSON: NaN equals NaN, 1 equals 1.0."""
    a, b = parse_number(a), parse_number(b)
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or bool(a == b)


def are_equal_rows(a: Mapping[str, Any], b: Mapping[str, Any], *, with_times: bool = False) -> bool:
    """Whether two rows have the same keys and values; without the times if not `with_times`."""
    keys = {key for key in {*a, *b} if with_times or not key.startswith(TIMES)}
    return all(key in a and key in b and are_equal(a[key], b[key]) for key in keys)


@dataclass(frozen=True)
class HistoryDifference:
    """How W&B's rows differ from those of the record. `num_equal`: leading rows that are the same to the last digit."""

    num_equal: int
    num_lines: int  # that W&B has
    last_step: int  # W&B's; -1 if it has no rows
    last_epoch: int  # the highest that W&B has; 0 if it has no rows
    wrong_epochs: tuple[int, ...] = ()  # in the record, and other than on W&B, or missing there between two others
    unknown_epochs: tuple[int, ...] = ()  # on W&B, and not in the record

    @property
    def is_prefix(self) -> bool:
        """Whether W&B has the first rows of the record and nothing else, so that the others can be sent after them."""
        return self.num_equal == self.num_lines


def compare_history(lines: Iterable[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> HistoryDifference:
    """Compare W&B's history with the record's rows. Where W&B has an epoch twice, the later line counts."""
    there: dict[int, dict[str, Any]] = {}
    num_lines, num_equal, last_step = 0, 0, -1
    for line in lines:
        row = build_row(line)
        last_step = max(last_step, int(line.get("_step", -1)))
        if "epoch" not in row:
            continue
        if num_equal == num_lines < len(rows) and are_equal_rows(row, build_row(rows[num_lines]), with_times=True):
            num_equal += 1
        num_lines += 1
        there[row["epoch"]] = row
    here = {int(row["epoch"]): build_row(row) for row in rows}
    last = max(there, default=0)
    wrong = [e for e, row in here.items() if e <= last and not (e in there and are_equal_rows(there[e], row))]
    unknown = tuple(sorted(set(there) - set(here)))
    return HistoryDifference(num_equal, num_lines, last_step, last, tuple(wrong), unknown)


def describe_missing_rows(arrived: ArrivedRun | None, num_rows: int, last_row: Mapping[str, Any]) -> str:
    """What W&B lacks of the rows, in words; "" if it has `num_rows` rows, and the last one is the record's."""
    if arrived is None:
        return "W&B does not have the run"
    if arrived.num_rows != num_rows:
        return f"W&B has {arrived.num_rows} of {num_rows} rows"
    if last_row and not are_equal_rows(arrived.last_row, build_row(last_row)):
        return f"W&B's last row is not that of epoch {last_row.get('epoch')}"
    return ""


# -- summary and state -------------------------------------------------------------------------------------------------


def describe_missing_document(arrived: ArrivedRun | None, md5: str) -> str:
    """Whether W&B lacks `cifar.json`, in words; "" if it has it. `md5`: of what it should have."""
    if arrived is None or arrived.document_md5 in (md5, ""):
        return ""
    return f"W&B does not have {DOCUMENT_FILE}" + " as it is here" * (arrived.document_md5 is not None)


def is_old_form(arrived: ArrivedRun) -> bool:
    """Whether an earlier version sent this run, with the record's files as text in the configuration and in the summary."""
    return bool(arrived.summary.get("cifar")) and arrived.document_md5 is None


def _build_old_summary(run_dir: RunDir) -> dict[str, Any]:
    """What an earlier version wrote into the summary of a run that has ended."""
    summary, status = read_clean(run_dir, "summary"), read_clean(run_dir, "status")
    status.pop("pid", None)
    reason = str(status.get("reason") or "")
    return {**summary, "state": run_dir.state, "reason": reason, "cifar": json.dumps({"status": status, "summary": summary})}


def describe_wrong_end(arrived: ArrivedRun, run_dir: RunDir) -> str:
    """How W&B's word for the state of an ended run, or its summary, differs from the record; "" if it does not."""
    state = run_dir.state
    is_finished = state in WANDB_FINISHED_STATES
    if (arrived.state == "finished") != is_finished or arrived.state in ("running", "pending"):
        return f"W&B calls the run {arrived.state}, and it is {state}"
    there = {"reason": "", **arrived.summary}  # earlier versions sent no reason
    here = _build_old_summary(run_dir) if is_old_form(arrived) else build_summary(run_dir)
    wrong = [key for key, value in here.items() if key not in there or not are_equal(there[key], value)]
    if wrong:
        return f"W&B's summary has other values of {', '.join(wrong[:4])}"
    if is_old_form(arrived) or arrived.document_md5 == compute_md5(build_document(run_dir, with_metrics=False)):
        return ""  # an earlier version sent it
    difference = describe_missing_document(arrived, compute_md5(build_document(run_dir)))
    return difference or _describe_missing_metrics(arrived, run_dir)


def _describe_missing_metrics(arrived: ArrivedRun, run_dir: RunDir) -> str:
    """Whether W&B lacks the file of the rows, in words; "" if not."""
    md5 = describe_metrics(run_dir).get("md5")
    if md5 is None or arrived.metrics_md5 in (md5, ""):
        return ""
    return f"W&B does not have {METRICS_FILE}" + " as it is here" * (arrived.metrics_md5 is not None)


def describe_difference(
    arrived: ArrivedRun | None, run_dir: RunDir, read_history: Callable[[], Iterable[dict[str, Any]]]
) -> str:
    """How a run on W&B differs from its record, in words; "" if it does not.

    Looks at the number of rows, the last row, state, summary, cifar.json and pictures. `read_history` is called if there are
    too many rows: those of epochs that were sent twice may be right.
    """
    rows = list(run_dir.read_rows())
    difference = describe_missing_rows(arrived, len(rows), rows[-1] if rows else {})
    if arrived is not None and difference and arrived.num_rows > len(rows):
        compared = compare_history(read_history(), rows)
        if not compared.wrong_epochs and not compared.unknown_epochs and compared.num_lines >= len(rows):
            difference = ""
    if arrived is None or difference:
        return difference
    lost = arrived.find_lost_pictures(arrived.pictures) if arrived.pictures is not None else {}
    difference = describe_wrong_end(arrived, run_dir) or describe_missing_lines(arrived, run_dir)
    difference = difference or (f"W&B lacks the files of {', '.join(lost)}" if lost else "")
    return difference or artifact_arrival.describe_missing(arrived.artifacts, run_dir)


def describe_missing_lines(arrived: ArrivedRun, run_dir: RunDir) -> str:
    """What W&B lacks of the console's lines and of the system metrics, in words; "" if nothing."""
    counts = {
        "console lines": (arrived.num_log_lines, console_log.count_lines(run_dir.path)),
        "samples of system metrics": (arrived.num_event_lines, sum(1 for _ in read_samples(run_dir.path))),
    }
    return next((f"W&B has {there} of {here} {what}" for what, (there, here) in counts.items() if there < here), "")
