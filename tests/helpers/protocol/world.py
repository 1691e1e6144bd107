"""What a W&B server knows: projects, runs, sweeps and agents, in memory, to be looked into by a test.

A sweep hands each agent one run at a time; a run that was handed out and never arrived is handed out again (as on W&B: an
offline run under an online agent); a run that said it is pre-empted and ended badly comes back as `resume`.
"""

from __future__ import annotations

import base64
import copy
import importlib.util
import itertools
import json
import math
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

# The schema by which W&B checks a sweep, read from its package without importing that (which wants an old NumPy).
_SWEEPS = importlib.util.find_spec("sweeps")
assert _SWEEPS and _SWEEPS.origin, "the tests' W&B server needs the package `sweeps`: pip install --no-deps sweeps==0.3.0"
SCHEMA = json.loads((Path(_SWEEPS.origin).parent / "config" / "schema.json").read_text())
ENDED = ("finished", "failed", "crashed", "killed")


def key_of(*parts: str) -> str:
    """An opaque id, as W&B makes them."""
    return base64.b64encode(":".join(parts).encode()).decode()


@dataclass
class Run:
    """One run. `config` without W&B's wrapping; `history` as it arrived; `state` as W&B would show it."""

    entity: str
    project: str
    id: str
    created: float = field(default_factory=time.time)
    beat: float = field(default_factory=time.time)
    display_name: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    host: str = ""
    commit: str = ""
    program: str = ""
    repository: str = ""
    tags: list[str] = field(default_factory=list)
    raw_config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history_lines: list[str] = field(default_factory=list)
    event_lines: list[str] = field(default_factory=list)
    log_lines: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    sweep: str = ""
    agent: str = ""
    arrived: bool = False  # a client has upserted it; not so while it is only handed out
    base_state: str = "pending"
    exit_code: int | None = None
    preempting: bool = False
    stop_asked: bool = False
    exits: list[int] = field(default_factory=list)  # every exit code that came
    exported: int = 0  # history lines that are in parquet exports
    overlap: int = 0  # how many of those are still answered as live rows, too

    @property
    def config(self) -> dict[str, Any]:
        return {
            k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in self.raw_config.items() if k != "_wandb"
        }

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history_lines]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history without W&B's own keys and without media."""
        clean = [{k: v for k, v in row.items() if k[0] != "_" and not isinstance(v, dict)} for row in self.history]
        return [row for row in clean if row]

    @property
    def state(self) -> str:
        if self.base_state == "running" and time.time() - self.beat > World.CRASH_SECONDS:
            return "crashed"
        return self.base_state

    def rewind(self, step: int) -> None:
        """Forget the history after this step."""
        self.history_lines[:] = [line for line in self.history_lines if json.loads(line).get("_step", 0) <= step]
        self.exported = min(self.exported, len(self.history_lines))

    def end(self, code: int) -> None:
        self.exit_code = code
        self.exits.append(code)
        self.base_state = "finished" if code == 0 else "preempted" if self.preempting else "failed"


@dataclass
class Agent:
    """One registered agent. `commands` is all that it was told."""

    id: str
    host: str
    sweep: str
    created: float = field(default_factory=time.time)
    beat: float = field(default_factory=time.time)
    running: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    commands: list[dict[str, Any]] = field(default_factory=list)
    exit_asked: bool = False


@dataclass
class Sweep:
    """One sweep. `state`: RUNNING, PAUSED, FINISHED or CANCELED."""

    entity: str
    project: str
    id: str
    text: str
    display_name: str = ""
    state: str = "RUNNING"
    created: float = field(default_factory=time.time)
    agents: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    again: list[dict[str, Any]] = field(default_factory=list)  # cells whose run never arrived
    requeued: list[str] = field(default_factory=list)  # pre-empted runs
    queue: list[str] = field(default_factory=list)  # runs that a scheduler beside us made, not handed out yet
    exhausted: bool = False  # every cell was handed out

    def __post_init__(self) -> None:
        self.read(self.text)

    def read(self, text: str) -> None:
        self.text, self.config = text, yaml.safe_load(text)
        self._cells = cells(self.config)

    def next_cell(self) -> dict[str, Any] | None:
        if self.again:
            return self.again.pop(0)
        if len(self.runs) >= self.config.get("run_cap", math.inf):
            return None
        return next(self._cells, None)

    @property
    def expected(self) -> int | None:
        cap = self.config.get("run_cap")
        if self.config["method"] != "grid":
            return cap
        total = len(list(cells(self.config)))
        return min(total, cap) if cap else total


def violations(config: Any) -> list[str]:
    """What the public schema of W&B sweeps says against a sweep."""
    found = jsonschema.Draft7Validator(SCHEMA).iter_errors(config)
    told = [f"{'/'.join(map(str, error.absolute_path)) or 'sweep'}: {error.message}"[:300] for error in found]
    if told or not {"scheduler", "metrics"} & set(config):
        return told
    # What its package says beyond the schema (sweeps 0.3.0, config/cfg.py).
    custom = config["method"] == "custom"
    rules = {
        "`metric` and `metrics` cannot both be set": "metric" in config and "metrics" in config,
        "`metrics` requires `method: custom`": "metrics" in config and not custom,
        "`early_terminate` cannot be used together with `scheduler`": "early_terminate" in config and "scheduler" in config,
        "scheduler.engine does not support this method": custom == (config.get("scheduler", {}).get("engine") == "wandb"),
    }
    return [rule for rule, broken in rules.items() if broken]


def cells(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameter values, one trial after the other: a grid's product, or a seeded stream (bayes searches at random here)."""
    parameters = config.get("parameters", {})
    if config["method"] == "grid":
        names = list(parameters)
        for values in itertools.product(*(_grid(parameters[name]) for name in names)):
            yield dict(zip(names, values, strict=True))
        return
    chance = random.Random(json.dumps(config, sort_keys=True))
    while True:
        yield {name: _draw(spec, chance) for name, spec in parameters.items()}


def _grid(spec: dict[str, Any]) -> list[Any]:
    if "parameters" in spec:
        return list(cells({"method": "grid", "parameters": spec["parameters"]}))
    if "values" in spec:
        return list(spec["values"])
    if "value" in spec:
        return [spec["value"]]
    step = spec.get("q", 1)
    return [spec["min"] + step * n for n in range(int((spec["max"] - spec["min"]) / step + 1e-9) + 1)]


def _draw(spec: dict[str, Any], chance: random.Random) -> Any:
    if "parameters" in spec:
        return {name: _draw(inner, chance) for name, inner in spec["parameters"].items()}
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return chance.choices(spec["values"], spec.get("probabilities"))[0]
    low, high, kind = spec["min"], spec["max"], spec.get("distribution", "")
    whole = isinstance(low, int) and isinstance(high, int)
    if "log" in kind:
        drawn = math.exp(chance.uniform(math.log(low), math.log(high)) if "values" in kind else chance.uniform(low, high))
    else:
        drawn = chance.randint(low, high) if whole and kind in ("", "int_uniform") else chance.uniform(low, high)
    return round(drawn / spec["q"]) * spec["q"] if "q" in spec else drawn


class World:
    """Everything, and what an agent is told. Callers hold `lock`."""

    CRASH_SECONDS = 300.0

    def __init__(self, entity: str = "me") -> None:
        self.entity = entity
        self.lock = threading.RLock()
        self.projects: dict[tuple[str, str], float] = {}
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.agents: dict[str, Agent] = {}
        self.has_lost_rows = False  # so that a client may go on behind rows that are not here
        self.rewinds = True  # W&B gives this to some accounts only
        self.artifacts: Any = None  # a Store of artifacts.py
        self.views: dict[str, Any] = {}  # reports and saved workspaces, of views.py
        self._ids = random.Random(7)

    def new_id(self) -> str:
        return "".join(self._ids.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))

    def run(self, entity: str, project: str, run_id: str) -> Run | None:
        found = self.runs.get(run_id)
        return found if found and (found.entity, found.project) == (entity, project) else None

    def add_run(self, entity: str, project: str, run_id: str) -> Run:
        if run_id in self.runs:
            other = self.runs[run_id]
            raise ValueError(f"run {run_id} is in {other.entity}/{other.project}, and was sent to {entity}/{project}")
        self.projects.setdefault((entity, project), time.time())
        self.runs[run_id] = Run(entity, project, run_id)
        return self.runs[run_id]

    def add_sweep(self, entity: str, project: str, text: str) -> Sweep:
        sweep = Sweep(entity, project, self.new_id(), text)
        self.projects.setdefault((entity, project), time.time())
        self.sweeps[sweep.id] = sweep
        return sweep

    def enqueue(self, sweep: Sweep, config: dict[str, Any]) -> Run:
        """A run of a custom sweep: W&B tries nothing there by itself."""
        if sweep.config["method"] != "custom" or set(config) != set(sweep.config["parameters"]):
            raise ValueError(f"sweep {sweep.id} takes no such run: {config}")
        run = self.add_run(sweep.entity, sweep.project, self.new_id())
        run.raw_config = config
        sweep.runs.append(run.id)
        sweep.queue.append(run.id)
        return run

    def add_agent(self, sweep: Sweep, host: str) -> Agent:
        agent = Agent(key_of("Agent", self.new_id()), host, sweep.id)
        self.agents[agent.id] = agent
        sweep.agents.append(agent.id)
        return agent

    def remember(self) -> dict[str, Run]:
        """What it knows of the runs now, to be put back by `restore`."""
        with self.lock:
            return copy.deepcopy(self.runs)

    def restore(self, runs: dict[str, Run]) -> None:
        """Know of the runs what it knew then, as after a crash: what came later is lost. Sweeps and agents stay."""
        with self.lock:
            for run_id, run in self.runs.items():
                old = runs.get(run_id) or Run(run.entity, run.project, run_id, agent=run.agent, raw_config=run.raw_config)
                vars(run).update(vars(copy.deepcopy(old)))
            self.has_lost_rows = True

    def stop(self, run_id: str) -> None:
        """The button on the run's page."""
        self.runs[run_id].stop_asked = True

    def end(self, run: Run, code: int) -> None:
        """A client says that its run is over."""
        run.end(code)
        if run.state == "preempted" and run.sweep and run.id not in self.sweeps[run.sweep].requeued:
            self.sweeps[run.sweep].requeued.append(run.id)
        if run.sweep:
            self._settle(self.sweeps[run.sweep])

    def _settle(self, sweep: Sweep) -> None:
        if sweep.exhausted and all(self.runs[run_id].state in ENDED for run_id in sweep.runs):
            sweep.state = "FINISHED"

    def commands(self, agent: Agent, running: list[str]) -> list[dict[str, Any]]:
        """What the agent is to do now; `running` is what it says it runs."""
        sweep = self.sweeps[agent.sweep]
        agent.beat, lost = time.time(), set(agent.running) - set(running)
        for run_id in lost & set(self.runs):
            run = self.runs[run_id]
            if not run.arrived:  # it ended without W&B ever hearing of it
                if sweep.config["method"] == "custom":
                    sweep.queue.insert(0, run_id)
                    continue
                sweep.again.append(run.config)
                sweep.runs.remove(run_id)
                del self.runs[run_id]
        for run_id in set(running) & set(self.runs):
            self.runs[run_id].beat = time.time()
        agent.running = list(running)
        told = self._decide(agent, sweep, running)
        for command in told:
            if command["type"] in ("run", "resume"):
                agent.running.append(command["run_id"])
        agent.commands += told
        return told

    def _decide(self, agent: Agent, sweep: Sweep, running: list[str]) -> list[dict[str, Any]]:
        if agent.exit_asked or sweep.state == "CANCELED":
            return [{"type": "exit"}]
        stops = [{"type": "stop", "run_id": id_} for id_ in running if id_ in self.runs and self.runs[id_].stop_asked]
        if stops or running or sweep.state == "PAUSED":
            return stops
        if sweep.state == "FINISHED":
            return [{"type": "exit"}]
        if sweep.requeued:
            run = self.runs[sweep.requeued.pop(0)]
            run.preempting, run.base_state, run.agent, run.stop_asked = False, "pending", agent.id, False
            return [self._command("resume", run, sweep)]
        if sweep.config["method"] == "custom":
            handed_out = len(sweep.runs) - len(sweep.queue)
            if handed_out >= sweep.config.get("run_cap", math.inf):
                return [{"type": "exit"}]
            if not sweep.queue:
                return []  # its scheduler has not thought of any
            run = self.runs[sweep.queue.pop(0)]
            run.agent = agent.id
            agent.runs.append(run.id)
            return [self._command("run", run, sweep)]
        cell = sweep.next_cell()
        if cell is None:
            sweep.exhausted = True
            self._settle(sweep)
            return [{"type": "exit"}]
        run = self.add_run(sweep.entity, sweep.project, self.new_id())
        run.raw_config = {name: {"value": value} for name, value in cell.items()}
        run.agent = agent.id  # it belongs to the sweep once its client says so
        sweep.runs.append(run.id)
        agent.runs.append(run.id)
        return [self._command("run", run, sweep)]

    def _command(self, kind: str, run: Run, sweep: Sweep) -> dict[str, Any]:
        names = set(sweep.config.get("parameters", {}))
        return {
            "id": self.new_id(),
            "type": kind,
            "run_id": run.id,
            "run_storage_id": key_of("Run", "v1", run.id, run.project, run.entity),
            "program": sweep.config.get("program", ""),
            "args": {name: {"value": value} for name, value in run.config.items() if name in names},
            "logs": [],
        }
