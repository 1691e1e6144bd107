"""The hosted sweep: W&B hands out trials, and hears how they go, as `Local` in cifar/backends/local.py does on this machine.

    url = create(sweep, runs, fixed={})      # the file becomes a sweep on W&B
    backend = Hosted(url, runs, slots=2)     # one registered W&B agent a worker slot
    trial = backend.claim("me")              # a Trial, "wait" (none yet, or the sweep is paused), or None: W&B said exit

Every slot has a thread that beats, so that a slow or dead server holds up nobody but itself. What a run measures goes to
W&B through its mirror; here only who runs what is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from cifar.config.resolve import parse_yaml
from cifar.errors import UserError
from cifar.integrations.wandb import final_states as ends
from cifar.integrations.wandb.api import BEAT, CREATE, REGISTER, Service, refused
from cifar.integrations.wandb.mirror import stop_core
from cifar.integrations.wandb.scheduler import Beside
from cifar.sweeps import spec as sweeps
from cifar.sweeps.backend import RETRIES, STATES, Like, Trial
from cifar.sweeps.spec import Sweep
from cifar.tracking.run_dir import redact, write_atomic

BEAT_SECONDS = 5.0  # wandb's own agent beats as often
PATIENCE_SECONDS = 600.0  # that an idle agent waits for a server that has gone away
CLAIM_SECONDS = 0.25  # that `claim` waits for the answer to be there
PROJECT = "cifar"


def parts_of(name: str) -> tuple[str, str, str]:
    """`id`, `project/id`, `entity/project/id` or the sweep's page -> (entity, project, id), "" for what is not said."""
    parts = [unquote(part) for part in (urlsplit(name).path if "://" in name else name).strip("/").split("/")]
    if "://" in name:
        if "sweeps" not in parts[2:-1]:
            raise UserError(f"{name} is not a sweep's page; it looks like https://HOST/ENTITY/PROJECT/sweeps/ID")
        at = parts.index("sweeps", 2)
        parts = [*parts[at - 2 : at], parts[at + 1]]
    if len(parts) > 3 or not all(parts):
        raise UserError(f"'{name}' names no sweep; write ID, PROJECT/ID, ENTITY/PROJECT/ID or the URL of its page")
    entity, project, sweep_id = ["", "", *parts][-3:]
    return entity, project, sweep_id


def create(sweep: Sweep, runs: Path, *, fixed: Mapping[str, Any]) -> str:
    """Make the sweep on W&B and return the URL of its page. `fixed` becomes parameters, so that every agent knows it."""
    if sweep.scheduler and sweep.early:
        raise UserError("W&B takes no early_terminate beside a scheduler; remove the block, or use --wandb offline")
    service = Service()
    entity = sweep.entity or service.entity
    project = sweep.project or str(service.settings["project"] or PROJECT)
    text = text_for(sweep, fixed)
    try:
        made = service.ask(CREATE, config=text, entityName=entity or None, projectName=project)["upsertSweep"]
    except Exception as error:
        raise refused(error) from error
    finally:
        stop_core()
    where = made["sweep"].get("project") or {}
    place = {"id": made["sweep"]["name"], "project": where.get("name", project)}
    place["entity"] = (where.get("entity") or {}).get("name", entity)
    _keep(runs / "sweeps" / place["id"], text, {**place, "made": True})
    return f"{service.app_url}{place['entity']}/{place['project']}/sweeps/{place['id']}"


def text_for(sweep: Sweep, fixed: Mapping[str, Any]) -> str:
    """The file as W&B gets it: word for word, unless W&B's YAML would read it differently (1e-5 is text to PyYAML)."""
    import yaml

    content = parse_yaml(sweep.text, "the sweep file")
    both = sweep.scheduler is not None and content.pop("early_terminate", None) is not None  # W&B takes the one or the other
    if not fixed and not both and yaml.safe_load(sweep.text) == content:
        return sweep.text
    given = {key: {"value": value} for key, value in fixed.items()}
    return yaml.safe_dump({**content, "parameters": {**content["parameters"], **given}}, sort_keys=False)


def _keep(folder: Path, text: str, place: Mapping[str, Any]) -> None:
    """What later commands in this runs folder need to know of the sweep."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "sweep.yaml", text.encode())
    write_atomic(folder / "wandb.json", json.dumps(place, indent=1).encode())


def kept(sweep_id: str, runs: Path) -> dict[str, Any]:
    """What this runs folder knows of a hosted sweep: id, project, entity, threads, dataset, `made` here. {}: nothing."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return dict(json.loads((runs / "sweeps" / sweep_id / "wandb.json").read_bytes()))
    return {}


class _Slot(threading.Thread):
    """One registered W&B agent: at most one run at a time, and a thread that speaks for it. `Hosted` holds the lock."""

    def __init__(self, hosted: Hosted, number: int) -> None:
        super().__init__(daemon=True, name=f"slot-{number}")
        self.hosted, self.number = hosted, number
        self.agent = ""
        self.wanted = False  # a trial may be handed out
        self.given: Trial | None = None  # handed out, not yet taken
        self.run_id = ""  # taken, not yet finished
        self.said = False  # W&B knows that it runs
        self.again: Trial | None = None  # its process was killed; the same run, once more
        self.stopped = False  # W&B asked for its end
        self.exited = False  # W&B has no more for this agent
        self.wake = threading.Event()

    @property
    def free(self) -> bool:
        return not (self.run_id or self.given)

    def run(self) -> None:
        while not self.hosted.closed:
            with self.hosted.lock:
                speak = not self.exited and bool(self.run_id or (self.wanted and not self.given))
            if speak:
                try:
                    self._speak()
                    self.hosted.answered()
                except Exception as error:
                    self.hosted.unanswered(error)
            self.wake.wait(BEAT_SECONDS)
            self.wake.clear()

    def _speak(self) -> None:
        place = self.hosted.place
        if not self.agent:
            host = f"{socket.gethostname()}-{os.getpid()}-{self.number}"
            made = self.hosted.service.ask(
                REGISTER, host=host, sweep=self.hosted.id, projectName=place["project"], entityName=place["entity"]
            )
            self.agent = made["createAgent"]["agent"]["id"]
        with self.hosted.lock:
            running, said = self.run_id, self.said
        if running and not said:  # a run that W&B has not heard of is handed out again
            names = {"name": running, "project": place["project"], "entity": place["entity"]}
            self.hosted.service.ask(ends.UPSERT, **names, sweep=self.hosted.id, state="running")
            self.said = True
        states = json.dumps({running: True} if running else {})
        answer = self.hosted.service.ask(BEAT, id=self.agent, metrics="{}", runState=states)
        commands = json.loads(answer["agentHeartbeat"]["commands"] or "[]")
        for command in commands:
            self.hosted.obey(self, command)
        if not commands and not running:
            self.hosted.look()


class Hosted:
    """One sweep on W&B, opened for an agent with `slots` workers. Calls come from one thread, and none waits for W&B."""

    def __init__(self, name: str, runs: Path, *, slots: int = 1) -> None:
        entity, project, self.id = parts_of(name)
        self.runs, self.folder = runs, runs / "sweeps" / self.id
        self.service, known = Service(), kept(self.id, runs)
        entity = entity or known.get("entity") or self.service.entity
        project = project or known.get("project") or str(self.service.settings["project"] or PROJECT)
        self.place, self.afar = {"project": project, "entity": entity, "engine": "wandb"}, True
        try:
            found = self.service.sweep(entity, project, self.id)
        except Exception as error:
            raise refused(error) from error
        if not found:
            raise UserError(f"W&B has no sweep {entity}/{project}/{self.id}; name it as ENTITY/PROJECT/ID, or by its URL")
        text = found["config"]
        read = sweeps.parse(parse_yaml(text, "sweep.yaml"), text, f"sweep {self.id}", self.id)
        self.sweep = replace(read, early=None)  # who ends early is W&B's to say
        _keep(self.folder, text, {**known, "id": self.id, "project": project, "entity": entity})
        self.info: dict[str, Any] = {"cells": "any number of", "dataset": "", "fixed": {}}
        if known.get("dataset"):
            self.settle_dataset(known["dataset"])
        self.lock = threading.RLock()
        self.closed = False
        self._arrived = threading.Condition(self.lock)
        self._trials: dict[str, dict[str, Any]] = {}  # run id -> as `cells` tells it
        self._numbers: dict[str, int] = {}  # run id -> its number here, as they were handed out
        self._kills: Counter[str] = Counter()
        self._news: deque[str] = deque()
        self._state, self._silent = str(found["state"]), 0.0  # since when W&B has not answered
        self._count(found)
        self._slots = [_Slot(self, number) for number in range(slots)]
        for slot in self._slots:
            slot.start()
        self._scheduler: Beside | None = None
        if read.scheduler:
            self._schedule(made_here=bool(known.get("made")))

    def _schedule(self, *, made_here: bool) -> None:
        """Have W&B's scheduler at work, or say who has to."""
        if made_here:
            ahead = 2 * len(self._slots)  # one under way and one waiting for each worker: nobody waits for a suggestion
            self._scheduler = Beside(self.place, self.id, self.folder, ahead=ahead, run_cap=self.sweep.run_cap)
            self._news.append("W&B's sweep scheduler, which suggests the trials, runs beside this agent")
        else:
            path = "/".join((self.place["entity"], self.place["project"], self.id))
            self._news.append(
                "this sweep's trials are suggested by W&B's scheduler, which runs beside the agents of the runs folder where "
                f"the sweep was made; where there is none, run one, and one only: wandb sweep-scheduler {path}"
            )

    # -- what an agent asks --

    def settle_threads(self, threads: int) -> int:
        """The CPU threads of each trial: of the first agent in this runs folder, then the same for all of them."""
        known = kept(self.id, self.runs)
        known["threads"] = known.get("threads") or threads
        _keep(self.folder, self.sweep.text, known)
        return int(known["threads"])

    def settle_dataset(self, dataset: str) -> None:
        """What `auto` means for every trial from this runs folder."""
        self.info.update(dataset=dataset, fixed={"dataset": dataset})
        _keep(self.folder, self.sweep.text, {**kept(self.id, self.runs), "dataset": dataset})

    def claim(self, worker: str, most: int = 1, like: Like | None = None) -> Trial | Literal["wait"] | None:
        """A trial, "wait" while W&B has given none, or None once it has none for us. Up to `most` are asked for ahead."""
        with self.lock:
            for slot in self._slots:
                if slot.again:
                    trial, slot.again = slot.again, None
                    return self._taken(slot, trial)
            free = [slot for slot in self._slots if slot.free and not slot.exited]
            ready = [slot for slot in self._slots if slot.given]
            for slot in free[: max(0, most - len(ready))]:
                slot.wanted = True
                slot.wake.set()
            if not ready and free:
                self._arrived.wait(CLAIM_SECONDS)
            for slot in self._slots:
                if slot.given:
                    trial, slot.given = slot.given, None
                    slot.run_id, slot.said, slot.stopped = trial.run_id, False, False
                    slot.wake.set()
                    return self._taken(slot, trial)
            if self._scheduler and (said := self._scheduler.look()):
                self._news.append(said)
            if self._scheduler and self._scheduler.failed and all(slot.free for slot in self._slots):
                raise UserError(self._scheduler.failed)
            if self._silent and all(slot.free for slot in self._slots) and not self._worth_waiting():
                return None
            return "wait" if any(not slot.exited for slot in self._slots if slot.free) else None

    def beat(self, trial: Trial) -> Literal["go", "stop", "lost"]:
        """ "stop": somebody pressed the button, or W&B ended the sweep or this run."""
        with self.lock:
            return "stop" if self._slot(trial).stopped else "go"

    def report(self, trial: Trial, history: Mapping[int, float], best: float, epochs: int) -> bool:
        return True

    def finish(
        self,
        trial: Trial,
        state: str,
        value: float | None = None,
        reason: str = "",
        *,
        objectives: Sequence[float | None] = (),
        retry: bool | None = None,
    ) -> str:
        """How a trial ended -> its state now: "interrupted" is open again, here (a killed process) or elsewhere."""
        with self.lock:
            slot = self._slot(trial)
            self._kills[trial.run_id] += state in ("failed", "killed")
            again = state == "killed" if retry is None else retry
            if again and self._kills[trial.run_id] <= RETRIES and not slot.stopped:
                slot.again, state = replace(trial, attempt=trial.attempt + 1), "interrupted"
            else:
                slot.run_id, slot.stopped = "", False
                state = "interrupted" if state == "preempted" else state
            self._trials[trial.run_id].update(state=state, value=value, reason=reason, objectives=list(objectives))
            return state

    def cells(self) -> list[dict[str, Any]]:
        """This agent's own trials."""
        with self.lock:
            return list(self._trials.values())

    def counts(self) -> dict[str, int]:
        """State -> trials of this agent; those of other agents are `elsewhere`, those of a finite sweep to come `waiting`."""
        with self.lock:
            counted = Counter(cell["state"] for cell in self._trials.values())
            known = max(self._known, len(self._trials))
            counted["waiting"] += max(0, (self._expected or 0) - known)
            counted["elsewhere"] = known - len(self._trials)
        return {state: counted[state] for state in (*STATES, "elsewhere") if counted[state]}

    def news(self) -> list[str]:
        """What has come up since the last look, for people."""
        with self.lock:
            found = list(self._news)
            self._news.clear()
        return found

    def close(self) -> None:
        """No more beats. Waits a little only: for W&B to hear of ends that no mirror told it, and for a scheduler beside us."""
        self.closed = True
        for slot in self._slots:
            slot.wake.set()
        if self._scheduler:
            self._scheduler.close(over=all(slot.exited for slot in self._slots))
        if not self._silent:
            ends.tell(self.service.ask, self.place, self.id, {cell["run_id"]: cell["state"] for cell in self.cells()})
        stop_core()

    # -- what W&B says --

    def obey(self, slot: _Slot, command: dict[str, Any]) -> None:
        with self.lock:
            kind, run_id = command["type"], command.get("run_id", "")
            if kind in ("run", "resume"):
                values = sweeps.flat({name: given["value"] for name, given in command["args"].items()})
                cell = self._numbers.setdefault(run_id, len(self._numbers))
                slot.given, slot.wanted = Trial(cell, values, run_id, 1), False
                self._known += kind == "run"
                self._arrived.notify_all()
            elif kind == "stop":
                slot.stopped = slot.stopped or run_id == slot.run_id
            elif kind == "exit":
                slot.exited = slot.stopped = True
                self._arrived.notify_all()
            else:
                self._news.append(f"W&B says '{kind}', which this agent does not know")

    def look(self) -> None:
        """W&B had nothing for a slot: is the sweep paused?"""
        found = self.service.sweep(self.place["entity"], self.place["project"], self.id)
        with self.lock:
            before, self._state = self._state, str(found.get("state", "gone"))
            self._count(found)
            if self._state != before:
                waits = "; waiting until it is resumed" if self._state == "PAUSED" else ""
                self._news.append(f"the sweep is {self._state.lower()} on W&B{waits}")
            for slot in self._slots if not found else ():
                slot.exited = True

    def answered(self) -> None:
        with self.lock:
            if self._silent:
                self._news.append("W&B answers again")
            self._silent = 0.0

    def unanswered(self, error: Exception) -> None:
        with self.lock:
            if not self._silent and not self.closed:
                self._news.append(redact(f"W&B does not answer ({type(error).__name__}); trials go on".replace("\n", " ")))
            self._silent = self._silent or time.monotonic()

    # -- inside, under the lock --

    def _worth_waiting(self) -> bool:
        """Whether a server that does not answer may still have a trial for us."""
        handed_out = bool(self._expected) and self._known >= (self._expected or 0)
        return not handed_out and time.monotonic() - self._silent < PATIENCE_SECONDS

    def _count(self, found: Mapping[str, Any]) -> None:
        self._known, self._expected = int(found.get("runCount") or 0), found.get("runCountExpected")
        if self._expected:
            self.info["cells"] = self._expected

    def _taken(self, slot: _Slot, trial: Trial) -> Trial:
        shown = {"cell": trial.cell, "run_id": trial.run_id, "values": trial.values, "attempt": trial.attempt}
        self._trials[trial.run_id] = {
            **shown,
            "state": "running",
            "value": None,
            "objectives": [],
            "reason": "",
            "worker": slot.name,
        }
        return trial

    def _slot(self, trial: Trial) -> _Slot:
        return next(slot for slot in self._slots if slot.run_id == trial.run_id)
