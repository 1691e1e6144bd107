"""The GraphQL half: schema.graphql over a World. A field's resolver is the attribute of that name of the node's class."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import graphql
import yaml

from helpers.protocol.artifacts import ProjectArtifacts, RootArtifacts, RunArtifacts
from helpers.protocol.mongo import matches, ordered
from helpers.protocol.views import ProjectViews, RootViews
from helpers.protocol.world import Agent, Run, Sweep, World, key_of, violations

SCHEMA = graphql.build_schema("\n".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.graphql"))))


def date(stamp: float) -> str:
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def page(
    items: Sequence[Any], node: Callable[[Any], Any], first: int | None = None, after: str | None = None
) -> dict[str, Any]:
    """Relay's pages; a cursor is the position behind the item."""
    start = int(after or 0)
    end = len(items) if first is None else min(len(items), start + first)
    edges = [{"node": node(item), "cursor": str(start + n + 1)} for n, item in enumerate(items[start:end])]
    return {"edges": edges, "pageInfo": {"endCursor": str(end) if edges else None, "hasNextPage": end < len(items)}}


class ProjectNode(ProjectViews, ProjectArtifacts):
    def __init__(self, world: World, entity: str, name: str) -> None:
        self._world, self.entityName, self.name = world, entity, name
        self.id = key_of("Project", "v1", name, entity)
        self.internalId = str(1 + list(world.projects).index((entity, name)))
        self.entity = {"id": key_of("Entity", entity), "name": entity}
        self.readOnly = self.isBenchmark = False
        self.createdAt = date(world.projects[entity, name])

    def _runs(self, filters: str | None, order: str | None = None) -> list[Run]:
        mine = [r for r in self._world.runs.values() if (r.entity, r.project) == (self.entityName, self.name)]
        return ordered([run for run in mine if matches(run, json.loads(filters or "{}") or {})], order)

    def runCount(self, info: Any, filters: str | None = None) -> int:
        return len(self._runs(filters))

    def runs(self, info: Any, filters: str | None = None, order: str | None = None, first: int = 50, **where: Any) -> Any:
        return page(self._runs(filters, order), lambda run: RunNode(self._world, run), first, where.get("after"))

    def run(self, info: Any, name: str) -> RunNode | None:
        found = self._world.run(self.entityName, self.name, name)
        return RunNode(self._world, found) if found else None

    def bucket(self, info: Any, name: str, missingOk: bool = False) -> RunNode | None:
        found = self._world.run(self.entityName, self.name, name)
        return RunNode(self._world, found) if found and found.arrived else None

    def _sweeps(self) -> list[Sweep]:
        return [s for s in self._world.sweeps.values() if (s.entity, s.project) == (self.entityName, self.name)]

    def sweep(self, info: Any, sweepName: str) -> SweepNode | None:
        return next((SweepNode(self._world, sweep) for sweep in self._sweeps() if sweep.id == sweepName), None)

    def sweeps(self, info: Any, first: int = 50, after: str | None = None, filters: str = "{}") -> Any:
        assert not json.loads(filters or "{}"), f"no filters of sweeps yet: {filters}"
        return page(self._sweeps(), lambda sweep: SweepNode(self._world, sweep), first, after)

    def totalSweeps(self, info: Any) -> int:
        return len(self._sweeps())


class RunNode(RunArtifacts):
    __typename = "Run"

    def __init__(self, world: World, run: Run) -> None:
        self._world, self._run = world, run
        self.id = key_of("Run", "v1", run.id, run.project, run.entity)
        self.name, self.displayName, self.state, self.group = run.id, run.display_name or run.id, run.state, run.group
        self.jobType, self.notes, self.tags, self.exitcode = run.job_type, run.notes, run.tags, run.exit_code
        self.sweepName, self.shouldStop, self.stopped = run.sweep or None, run.stop_asked, run.stop_asked
        self.running, self.failed = run.state == "running", run.state in ("failed", "crashed")
        self.createdAt, self.heartbeatAt = date(run.created), date(run.beat)
        self.historyLineCount, self.eventsLineCount = len(run.history_lines), len(run.event_lines)
        self.logLineCount, self.fileCount = len(run.log_lines), len(run.files)
        self.readOnly, self.commit, self.description, self.systemMetrics = False, run.commit or None, "", "{}"

    def projectId(self, info: Any) -> int:
        return int(self.project(info).internalId)

    def project(self, info: Any) -> ProjectNode:
        return ProjectNode(self._world, self._run.entity, self._run.project)

    def user(self, info: Any) -> dict[str, Any]:
        return viewer(self._world)

    def config(self, info: Any) -> str:
        return json.dumps(self._run.raw_config)

    def summaryMetrics(self, info: Any) -> str:
        return json.dumps(self._run.summary)

    def historyTail(self, info: Any) -> str:
        return json.dumps(self._run.history_lines[-1:])

    def eventsTail(self, info: Any) -> str:
        return json.dumps(self._run.event_lines[-1:])

    def wandbConfig(self, info: Any, keys: list[str] | None = None) -> str:
        kept = self._run.raw_config.get("_wandb", {}).get("value", {})
        return json.dumps({key: kept[key] for key in keys or kept if key in kept})

    def historyKeys(self, info: Any) -> dict[str, Any]:
        rows = self._run.history
        keys = dict.fromkeys(key for row in rows for key in row)
        last = max((row.get("_step", 0) for row in rows), default=-1)
        return {"lastStep": last, "sets": [], "keys": {key: {"typeCounts": [{"type": "number", "count": 1}]} for key in keys}}

    def history(self, info: Any, minStep: int = 0, maxStep: int = 2**62, samples: int | None = None) -> list[str]:
        whole = maxStep == 2**62  # else wandb-core asks, beside the exports; what is in them comes from there
        lines = self._run.history_lines[0 if whole else max(0, self._run.exported - self._run.overlap) :]
        return [line for line in lines if int(minStep) <= json.loads(line).get("_step", 0) < int(maxStep)][:samples]

    def events(self, info: Any, samples: int | None = None) -> list[str]:
        return self._run.event_lines[:samples]

    def sampledHistory(self, info: Any, specs: list[str]) -> list[Any]:
        found = []
        for spec in map(json.loads, specs):
            keys = spec.get("keys") or []
            live = max(0, self._run.exported - self._run.overlap) if "minStep" in spec else 0
            rows = [row for row in self._run.history[live:] if all(key in row for key in keys)]
            rows = [row for row in rows if spec.get("minStep", 0) <= row.get("_step", 0) <= spec.get("maxStep", 2**62)]
            step = max(1, -(-len(rows) // spec.get("samples", 500)))
            found.append([{key: row[key] for key in keys} if keys else row for row in rows[::step]])
        return found

    def parquetHistory(self, info: Any, liveKeys: list[str]) -> dict[str, Any]:
        live = [json.loads(line) for line in self._run.history_lines[self._run.exported :]]
        urls = [f"{info.context.url}/parquet/{self._run.id}.parquet"] if self._run.exported else []
        return {"parquetUrls": urls, "liveData": [{k: row[k] for k in liveKeys if k in row} for row in live]}

    def files(self, info: Any, names: Any = None, pattern: str | None = None, after: Any = None, first: int = 50) -> Any:
        glob = re.compile(re.escape(pattern).replace("%", ".*")) if pattern else None
        wanted = [name for name in self._run.files if (not names or name in names) and (not glob or glob.fullmatch(name))]
        return page(wanted, lambda name: self._file(info, name), first, after)

    def _file(self, info: Any, name: str) -> dict[str, Any]:
        run = self._run
        url = f"{info.context.url}/storage/{run.entity}/{run.project}/{run.id}/{name}"
        content = run.files[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        key = key_of("File", run.id, name)
        return {"id": key, "name": name, "url": url, "directUrl": url, "sizeBytes": len(content), "md5": md5}


class SweepNode:
    def __init__(self, world: World, sweep: Sweep) -> None:
        self._world, self._sweep = world, sweep
        self.id = key_of("Sweep", "v1", sweep.id, sweep.project, sweep.entity)
        self.name, self.state, self.config, self.method = sweep.id, sweep.state, sweep.text, sweep.config["method"]
        self.displayName, self.description = sweep.display_name or None, sweep.config.get("description")
        self.createdAt = self.updatedAt = self.heartbeatAt = date(sweep.created)
        self.runCount, self.runCountExpected = len(sweep.runs), sweep.expected
        self.bestLoss = self.controller = None
        scheduler = sweep.config.get("scheduler")
        self.controllerRunName = f"{sweep.id}-controller" if scheduler else None
        self.scheduler, self.earlyStopJobRunning = json.dumps(scheduler) if scheduler else None, False

    def project(self, info: Any) -> ProjectNode:
        return ProjectNode(self._world, self._sweep.entity, self._sweep.project)

    def runs(self, info: Any, first: int | None = None, after: str | None = None) -> Any:
        return page([self._world.runs[i] for i in self._sweep.runs], lambda run: RunNode(self._world, run), first, after)

    def agent(self, info: Any, agentName: str) -> AgentNode | None:
        return AgentNode(self._world, self._world.agents[agentName]) if agentName in self._sweep.agents else None

    def agents(self, info: Any) -> Any:
        return page([self._world.agents[i] for i in self._sweep.agents], lambda agent: AgentNode(self._world, agent))


class AgentNode:
    def __init__(self, world: World, agent: Agent) -> None:
        self._world, self._agent = world, agent
        self.id = self.name = agent.id
        self.host, self.state, self.totalRuns = agent.host, "RUNNING", len(agent.runs)
        self.createdAt, self.heartbeatAt = date(agent.created), date(agent.beat)

    def runs(self, info: Any, first: int = 50, after: str | None = None, **_: Any) -> Any:
        return page([self._world.runs[i] for i in self._agent.runs], lambda run: RunNode(self._world, run), first, after)


def viewer(world: World) -> dict[str, Any]:
    who = {"id": key_of("User", world.entity), "name": world.entity, "username": world.entity, "entity": world.entity}
    teams = {"edges": [{"node": {"id": key_of("Entity", world.entity), "name": world.entity}}]}
    return {**who, "email": "me@example.org", "admin": False, "flags": "{}", "apiKeys": {"edges": []}, "teams": teams}


class Root(RootViews, RootArtifacts):
    """The queries and mutations. `url`: where this server is."""

    def __init__(self, world: World, url: str) -> None:
        self._world, self.url = world, url

    # -- queries --

    def viewer(self, info: Any) -> dict[str, Any]:
        return viewer(self._world)

    def serverInfo(self, info: Any) -> dict[str, Any]:
        return {
            "cliVersionInfo": {"max_cli_version": "0.31.99"},
            "features": [{"name": "SWEEPS_LOCAL_SCHEDULER", "isEnabled": True}],
        }

    def entity(self, info: Any, name: str) -> dict[str, Any]:
        return {"id": key_of("Entity", name), "name": name, "organization": None, "xxhashDigestsEnabled": False}

    def organization(self, info: Any, name: str) -> dict[str, Any]:
        return {"name": name, "featureFlags": lambda info, rampIDType: []}

    def project(self, info: Any, name: str | None = None, entityName: str | None = None) -> ProjectNode | None:
        place = (entityName or self._world.entity, name or "uncategorized")
        return ProjectNode(self._world, *place) if place in self._world.projects else None

    model = project

    def models(self, info: Any, entityName: str | None = None, first: int = 50, after: str | None = None) -> Any:
        mine = [place for place in self._world.projects if place[0] == (entityName or self._world.entity)]
        return page(mine, lambda place: ProjectNode(self._world, *place), first, after)

    # -- mutations --

    def upsertModel(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        place = (input.get("entityName") or self._world.entity, input["name"])
        inserted = self._world.projects.setdefault(place, -1.0) == -1.0
        node = ProjectNode(self._world, *place)
        return {"model": node, "project": node, "inserted": inserted}

    def upsertBucket(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        world, place = self._world, (input.get("entityName") or self._world.entity, input.get("modelName") or "uncategorized")
        by_key = {RunNode(world, run).id: run for run in world.runs.values()} if input.get("id") else {}
        run = by_key.get(input.get("id", "")) or world.run(*place, input.get("name") or "")
        inserted = run is None or not run.arrived
        run = run or world.add_run(*place, input.get("name") or world.new_id())
        if sweep := input.get("sweep"):
            if sweep not in world.sweeps:
                raise ValueError(f"run {run.id}: there is no sweep {sweep}")
            if run.id not in world.sweeps[sweep].runs:
                world.sweeps[sweep].runs.append(run.id)
            run.sweep = sweep
        given = {"display_name": "displayName", "group": "groupName", "job_type": "jobType", "notes": "notes", "tags": "tags"}
        given |= {"host": "host", "commit": "commit", "program": "jobProgram", "repository": "jobRepo"}
        for ours, theirs in given.items():
            if input.get(theirs) is not None:
                setattr(run, ours, input[theirs])
        if input.get("config"):
            run.raw_config = {**run.raw_config, **json.loads(input["config"])}
        if input.get("summaryMetrics"):
            run.summary.update(json.loads(input["summaryMetrics"]))
        run.arrived, run.beat = True, datetime.now().timestamp()
        if not input.get("id"):  # the public API changes a run by its id; a client that trains gives its name
            run.base_state, run.exit_code = input.get("state") or "running", None
        return {"bucket": RunNode(world, run), "inserted": inserted}

    def deleteFiles(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        for run in self._world.runs.values():
            for name in [name for name in run.files if key_of("File", run.id, name) in input["files"]]:
                del run.files[name]
        return {"success": True}

    def rewindRun(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        place = (input.get("entityName") or self._world.entity, input.get("projectName") or "uncategorized")
        run = self._world.run(*place, input["runName"])
        if run is None or not self._world.rewinds:
            raise ValueError(f"run {input['runName']} cannot be rewound")
        run.rewind(int(input["metricValue"]))
        return {"rewoundRun": RunNode(self._world, run)}

    def upsertSweep(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        world, sweep = self._world, None
        if input.get("id"):
            sweep = next((s for s in world.sweeps.values() if SweepNode(world, s).id == input["id"]), None)
            if sweep is None:
                raise ValueError(f"there is no sweep {input['id']}")
        if input.get("config"):
            wrong = violations(yaml.safe_load(input["config"]))
            if wrong:
                raise ValueError(f"the sweep is not valid: {'; '.join(wrong)}")
            if sweep:
                sweep.read(input["config"])
        place = (input.get("entityName") or world.entity, input.get("projectName") or "uncategorized")
        sweep = sweep or world.add_sweep(*place, input["config"])
        sweep.state = input.get("state") or sweep.state
        sweep.display_name = input.get("displayName") or sweep.display_name
        if filters := input.get("priorRunsFilters"):
            for run in world.runs.values():
                if matches(run, json.loads(filters)) and (run.entity, run.project) == (sweep.entity, sweep.project):
                    run.sweep = sweep.id
                    sweep.runs += [run.id] if run.id not in sweep.runs else []
        return {"sweep": SweepNode(world, sweep), "configValidationWarnings": []}

    def enqueueSweepRun(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        sweep = next((s for s in self._world.sweeps.values() if SweepNode(self._world, s).id == input["id"]), None)
        if sweep is None:
            raise ValueError(f"there is no sweep {input['id']}")
        run = self._world.enqueue(sweep, json.loads(input["config"]))
        return {"id": run.id, "runQueueItemId": key_of("RunQueueItem", run.id)}

    def createAgent(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        sweep = self._world.sweeps.get(input["sweep"])
        place = (input.get("entityName") or self._world.entity, input.get("projectName") or "uncategorized")
        if sweep is None or (sweep.entity, sweep.project) != place:
            raise ValueError(f"could not find sweep {'/'.join(place)}/{input['sweep']}")
        return {"agent": AgentNode(self._world, self._world.add_agent(sweep, input["host"]))}

    def agentHeartbeat(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        agent = self._world.agents[input["id"]]
        states = json.loads(input.get("runState") or "{}")
        told = self._world.commands(agent, [run_id for run_id, running in states.items() if running])
        return {"agent": AgentNode(self._world, agent), "commands": json.dumps(told)}

    def createRunFiles(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        place = (input["entityName"], input["projectName"], input["runName"])
        assert self._world.run(*place), place
        urls = [{"name": f, "uploadUrl": f"{self.url}/storage/{'/'.join(place)}/{f}"} for f in input["files"]]
        return {"runID": key_of("Run", *place), "uploadHeaders": [], "files": urls}

    def markRunFilesUploaded(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        return {"success": True}

    def stopRun(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        run = next(r for r in self._world.runs.values() if RunNode(self._world, r).id == input["id"])
        self._world.stop(run.id)
        return {"success": True}

    def deleteRun(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        run = next(r for r in self._world.runs.values() if RunNode(self._world, r).id == input["id"])
        del self._world.runs[run.id]
        if run.sweep:
            self._world.sweeps[run.sweep].runs.remove(run.id)
        return {"clientMutationId": None}


_parsed: dict[str, Any] = {}  # text -> its document, or what is wrong with it


def answer(root: Root, text: str, variables: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
    """One GraphQL request -> (HTTP status, answer, what was not understood)."""
    if text not in _parsed:
        document = graphql.parse(text)
        wrong = graphql.validate(SCHEMA, document)
        _parsed[text] = "; ".join(error.message for error in wrong) or document
    document = _parsed[text]
    if isinstance(document, str):
        return 400, {"errors": [{"message": document}], "data": None}, f"{document}\n{text}"
    with root._world.lock:
        result = graphql.execute_sync(SCHEMA, document, root, root, variables)
    found = {"data": result.data, **({"errors": [error.formatted for error in result.errors]} if result.errors else {})}
    strange = [error for error in result.errors or [] if not isinstance(error.original_error, ValueError)]
    return 200, found, "\n".join(f"{error} in {text} with {variables}" for error in strange)
