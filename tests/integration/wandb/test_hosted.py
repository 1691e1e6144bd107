"""Sweeps on W&B, against the real client and a server of our own: every cell once, commands obeyed, nobody waits."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar.config.resolve import flatten_values
from cifar.config.yaml_loader import parse_yaml
from cifar.errors import UserError
from cifar.integrations.wandb import agent_slot, api, final_states
from cifar.integrations.wandb import backend as wandb_backend
from cifar.integrations.wandb.backend import WandbBackend, create_sweep, format_sweep_yaml
from cifar.integrations.wandb.mirror_process import stop_core
from cifar.integrations.wandb.paths import parse_sweep_path
from cifar.report import write_report
from cifar.sweeps import spec
from cifar.sweeps.backend import Trial
from cifar.tracking.run_dir import RunDir
from helpers.hosted_sweeps import GRID, assert_as_trained, start_command
from helpers.paths import ROOT
from helpers.processes import wait_for_exit, wait_until
from helpers.protocol import Fault, Server

Make = Callable[..., WandbBackend]


@pytest.fixture
def make(wandb_server: Server, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a sweep on the server and opens it."""
    monkeypatch.setattr(agent_slot, "HEARTBEAT_SECONDS", 0.1)
    stop_core()  # the next one reads the environment anew
    made = []

    def new(text: str = GRID, slots: int = 1, url: str = "") -> WandbBackend:
        read = spec.parse_sweep(parse_yaml(text, "tiny"), text, "tiny")
        made.append(WandbBackend(url or create_sweep(read, runs, fixed={}), runs, slots=slots))
        return made[-1]

    yield new
    for each in made:
        each.close()
    stop_core()


def claimed(backend: WandbBackend, most: int = 1) -> Trial:
    found = wait_until(lambda: (trial := backend.claim_trial("me", most)) != "wait" and trial)
    assert isinstance(found, Trial)
    return found


def test_names() -> None:
    assert parse_sweep_path("abc") == ("", "", "abc")
    assert parse_sweep_path("p/abc") == ("", "p", "abc") and parse_sweep_path("me/p/abc") == ("me", "p", "abc")
    for page in (
        "https://wandb.ai/me/p/sweeps/abc",
        "https://h.org/wandb/me/p/sweeps/abc?nw=x",
        "http://127.0.0.1:1/me/p/sweeps/abc/table",
    ):
        assert parse_sweep_path(page) == ("me", "p", "abc")
    for wrong in ("https://wandb.ai/me/p/runs/abc", "a/b/c/d", "a//c", "https://wandb.ai/sweeps/abc"):
        with pytest.raises(UserError, match=r"names no sweep|is not a sweep's page"):
            parse_sweep_path(wrong)


def test_the_file_is_sent_as_it_is_unless_wandb_would_read_other_values() -> None:
    def sent(text: str, **fixed: Any) -> str:
        return format_sweep_yaml(spec.parse_sweep(parse_yaml(text, "tiny"), text, "tiny"), fixed)

    assert sent(GRID) == GRID
    small = GRID.replace("0.01", "1e-2")  # PyYAML reads it as text
    assert yaml.safe_load(sent(small)) == yaml.safe_load(GRID)
    with_epochs = yaml.safe_load(sent(GRID, epochs=1))
    assert with_epochs["parameters"].pop("epochs") == {"value": 1} and with_epochs == yaml.safe_load(GRID)
    for path in sorted((ROOT / "sweeps").glob("*.yaml")):
        assert sent(path.read_text()) == path.read_text(), path


def test_two_slots_share_a_grid(make: Make, wandb_server: Server) -> None:
    backend = make(slots=2)
    sweep = wandb_server.only_sweep()
    assert sweep.text == GRID and (sweep.entity, sweep.project) == ("me", "cifar")
    assert (backend.folder / "sweep.yaml").read_text() == GRID and backend.info["cells"] == 4
    seen = []
    for _ in range(2):
        pair = [claimed(backend, 2), claimed(backend, 2)]
        assert backend.claim_trial("me", 0) is None  # no slot is free
        assert backend.count_states()["running"] == 2
        seen += pair
        assert pair[0].cell != pair[1].cell
        for trial in pair:
            assert backend.heartbeat(trial) == "go"
            wait_until(lambda trial=trial: wandb_server.runs[trial.run_id].sweep == sweep.id)  # W&B knows that it runs
            assert backend.finish_trial(trial, "finished", 0.5) == "finished"
    wait_until(lambda: backend.claim_trial("me", 2) is None)
    assert sorted((t.values["model"], t.values["lr"]) for t in seen) == [
        (m, lr) for m in ("conv4", "conv8") for lr in (0.01, 0.02)
    ]
    assert all(trial.values["train_size"] == 256 for trial in seen) and len({trial.run_id for trial in seen}) == 4
    assert set(wandb_server.runs) == {trial.run_id for trial in seen} and len(sweep.agents) == 2
    assert backend.count_states() == {"finished": 4} and len(backend.list_cells()) == 4


def test_a_joining_agent_needs_the_id_only(make: Make, wandb_server: Server) -> None:
    first = make()
    trial = claimed(first)
    wait_until(lambda: wandb_server.runs[trial.run_id].arrived)
    second = make(url=first.id)
    assert (
        second.wandb_target == first.wandb_target
        and second.sweep.text == GRID
        and second.count_states() == {"waiting": 3, "elsewhere": 1}
    )
    assert claimed(second).run_id != trial.run_id
    assert second.agree_on_threads(2) == 2 and first.agree_on_threads(1) == 2
    with pytest.raises(UserError, match="W&B has no sweep me/other/"):
        make(url=f"other/{first.id}")


def test_what_the_server_says_is_done(make: Make, wandb_server: Server) -> None:
    backend, sweep = make(slots=2), wandb_server.only_sweep()
    sweep.state = "PAUSED"
    assert backend.claim_trial("me") == "wait"
    assert (
        wait_until(backend.pop_messages) == ["the sweep is paused on W&B; waiting until it is resumed"]
        and not wandb_server.runs
    )
    sweep.state = "RUNNING"
    trial, other = claimed(backend, 2), claimed(backend, 2)
    wandb_server.world.stop(trial.run_id)
    wait_until(lambda: backend.heartbeat(trial) == "stop")
    assert backend.heartbeat(other) == "go" and backend.finish_trial(trial, "stopped") == "stopped"
    sweep.state = "CANCELED"
    wait_until(lambda: backend.heartbeat(other) == "stop")
    assert backend.finish_trial(other, "killed") == "killed"  # not tried again: W&B wants its end
    wait_until(lambda: backend.claim_trial("me", 2) is None)


def test_a_killed_run_goes_on_under_its_id(make: Make, wandb_server: Server) -> None:
    backend = make()
    trial = claimed(backend)
    for attempt in (2, 3):
        assert backend.finish_trial(trial, "killed") == "interrupted"
        trial = claimed(backend)
        assert trial.attempt == attempt and len(wandb_server.runs) == 1
    assert backend.finish_trial(trial, "killed") == "killed"
    assert claimed(backend).run_id != trial.run_id


def test_a_run_that_was_preempted_comes_back(make: Make, wandb_server: Server) -> None:
    backend = make()
    trial = claimed(backend)
    run = wandb_server.runs[trial.run_id]
    wait_until(lambda: run.sweep)
    run.preempting = True
    wandb_server.world.end(run, 1)
    assert backend.finish_trial(trial, "interrupted") == "interrupted"
    again = claimed(backend)
    assert (again.run_id, again.values, again.cell) == (trial.run_id, trial.values, trial.cell)


def test_wandb_hears_of_ends_that_no_mirror_told(make: Make, wandb_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(final_states, "WAIT_SECONDS", 60.0)
    backend = make(slots=4)
    trials = [claimed(backend, 4) for _ in range(4)]
    runs = [wandb_server.runs[trial.run_id] for trial in trials]
    wait_until(lambda: all(run.arrived for run in runs))
    for trial, state in zip(trials, ("pruned", "diverged", "finished", "interrupted"), strict=True):
        backend.finish_trial(trial, state, retry=False)
    runs[2].end(1)  # its mirror's word stands
    backend.close()
    assert [run.state for run in runs] == ["failed", "failed", "failed", "running"]
    assert [run.summary.get("state") for run in runs] == ["incomplete", "incomplete", None, None]  # none of their rows is there
    assert "pruned where it ran" in runs[0].summary["reason"] and f"push {backend.id}" in runs[0].summary["reason"]
    assert all(run.sweep == backend.id for run in runs) and runs[2].exits == [1]


@pytest.mark.slow
def test_a_server_that_dies_holds_up_nobody(make: Make, wandb_server: Server) -> None:
    backend = make(slots=2)
    trial = claimed(backend)
    wandb_server.fault = Fault("hang")
    longest = 0.0
    for _ in range(5):
        began = time.monotonic()
        assert backend.claim_trial("me") == "wait" and backend.heartbeat(trial) == "go" and backend.count_states()
        longest = max(longest, time.monotonic() - began)
    assert longest < 1
    wandb_server.die()
    assert backend.finish_trial(trial, "finished", 0.1) == "finished"
    wandb_server.revive()
    wandb_server.heal()
    assert claimed(backend).run_id != trial.run_id
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 3


def test_nobody_waits_for_a_server_that_has_nothing_more(
    make: Make, wandb_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, patience in ((GRID.replace("[conv4, conv8]", "[conv4]").replace("[0.01, 0.02]", "[0.01]"), 600.0), (GRID, 0.0)):
        monkeypatch.setattr(wandb_backend, "MAX_SILENT_SECONDS", patience)
        backend = make(text)
        trial = claimed(backend)
        wait_until(lambda trial=trial: wandb_server.runs[trial.run_id].arrived)
        wandb_server.fault = Fault("status", 404)
        assert backend.finish_trial(trial, "finished", 0.5) == "finished"
        wait_until(lambda backend=backend: backend.claim_trial("me") is None)
        assert "W&B does not answer" in backend.pop_messages()[0]
        wandb_server.heal()


def test_no_server_is_a_sentence(wandb_server: Server, runs: Path) -> None:
    stop_core()
    wandb_server.fault = Fault("status", 401)
    with pytest.raises(UserError, match=r"W&B does not take it .*--wandb offline"):
        WandbBackend("me/p/abc", runs)
    stop_core()
    assert not (runs / "sweeps").exists()


@pytest.mark.slow
def test_a_core_that_starts_is_not_taken_for_a_dead_one(make: Make, wandb_server: Server) -> None:
    """While two clients start it anew, one of them makes requests all the time; nobody kills the other's new one."""
    backend = make()
    asker, answers, is_over = backend.client, [0], threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            with contextlib.suppress(Exception):  # the core was stopped under it; the next request must be answered
                asker.fetch_sweep("me", "cifar", backend.id)
                answers[0] += 1

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(12):
        stop_core()
        assert api.GraphqlClient().fetch_sweep("me", "cifar", backend.id)
        before = answers[0]
        wait_until(lambda before=before: answers[0] > before)
    is_over.set()
    for thread in threads:
        thread.join(60)


def test_what_is_private_of_wandb_is_as_it_was() -> None:
    """The one private thing that cifar/integrations/wandb/api.py calls, and the GraphQL that wandb's own agent says."""
    from wandb.apis.public import sweeps as theirs
    from wandb.apis.public.service_api import ServiceApi

    assert list(inspect.signature(ServiceApi.execute_graphql).parameters)[:4] == ["self", "query", "variables", "timeout"]
    assert isinstance(ServiceApi.app_url, property)
    same = {
        api.CREATE_SWEEP: theirs._upsert_sweep,
        api.REGISTER_AGENT: theirs._register_agent,
        api.SEND_HEARTBEAT: theirs._agent_heartbeat,
    }
    for ours, function in same.items():
        source = inspect.getsource(function)
        for name, kind in re.findall(r"\$(\w+): ([\w!]+)", ours):
            assert re.search(rf"\${name}: {kind}[,\s]", source), (name, kind)
        for pair in re.findall(r"(\w+: \$\w+)", ours):
            assert pair in source, pair
    binary = Path(theirs.__file__).parents[2] / "bin" / "wandb-core"
    said = re.search(rb"mutation UpsertBucket \(.*?inserted", binary.read_bytes(), re.DOTALL)
    assert said
    for field in (b"modelName:$project", b"entityName:$entity", b"sweep:$sweep", b"state:$state", b"name:$name"):
        assert field in said[0]


# -- real trainings ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands(wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    text = GRID + "  epochs: {value: 1}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "sweep", str(tmp_path / "tiny.yaml"), "--no-agent"))
    sweep = wandb_server.only_sweep()
    url = f"{wandb_server.url}/me/cifar/sweeps/{sweep.id}"
    assert code == 0 and url in output and sweep.text == text and not wandb_server.runs
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "agent", url, "--count", "2", "--workers", "2"))
    assert code == 0 and "2 finished" in output and len(wandb_server.runs) == 2, output
    for run_id, run in wandb_server.runs.items():
        assert run.state == "finished" and run.exits == [0]
        assert_as_trained(wandb_server, runs, run_id, 1)


@pytest.mark.slow
def test_a_run_whose_mirror_cannot_start_is_no_longer_running(wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    text = GRID.replace("[conv4, conv8]", "[conv4]").replace("[0.01, 0.02]", "[0.01]") + "  epochs: {value: 1}\n"
    sweep = wandb_server.world.add_sweep("me", "cifar", text)
    wandb_server.fault = Fault("status", 403, where="RunResumeStatus")
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "agent", f"me/cifar/{sweep.id}", "--workers", "1"))
    (run,) = wandb_server.runs.values()
    assert code == 0 and wandb_server.fault.met and list((runs / run.id).glob("wandb/offline-run-*")), output
    assert run.state == "failed" and not run.exits and not run.rows, output
    assert run.summary["state"] == "incomplete" and "finished where it ran" in run.summary["reason"]
    wandb_server.heal()
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "push", sweep.id))
    assert code == 0 and run.state == "finished" and run.summary["state"] == "finished", output
    assert_as_trained(wandb_server, runs, run.id, 1)


@pytest.mark.slow
def test_two_agents_of_two_workers_share_twelve_cells(
    wandb_server: Server, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it arrives as it was trained, and a report made from the server is the one made from the disk."""
    text = GRID.replace("[0.01, 0.02]", "[0.01, 0.02, 0.05]") + "  seed: {values: [0, 1]}\n  epochs: {value: 3}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    assert wait_for_exit(start_command(wandb_server, "-m", "cifar", "sweep", str(tmp_path / "tiny.yaml"), "--no-agent"))[0] == 0
    sweep = wandb_server.only_sweep()
    agents = [start_command(wandb_server, "-m", "cifar", "agent", sweep.id, "--workers", "2") for _ in range(2)]
    for agent in agents:
        code, output = wait_for_exit(agent)
        assert code == 0 and "goes on from its checkpoint where both share the runs folder" in output, output
    assert len(wandb_server.runs) == 12 == len(sweep.runs) and len(sweep.agents) == 4 and sweep.state == "FINISHED"
    cells = {(run.config["model"], run.config["lr"], run.config["seed"]) for run in wandb_server.runs.values()}
    assert len(cells) == 12
    for run_id, run in wandb_server.runs.items():
        assert run.state == "finished" and run.exits == [0]
        assert_as_trained(wandb_server, runs, run_id, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stop_core()  # the next one reads the environment anew
    for name, where in ((str(runs), "here"), (f"me/cifar/{sweep.id}", "there")):
        made = write_report([name], runs=tmp_path / "none", out=tmp_path / where)
        assert sum(len(point.runs) for point in made.comparison.points) == 12
    here, there = (json.loads((tmp_path / where / "report.json").read_text()) for where in ("here", "there"))
    assert (tmp_path / "here/report.csv").read_bytes() == (tmp_path / "there/report.csv").read_bytes()
    assert here["points"] == there["points"] and here["apart"] == there["apart"]


@pytest.mark.slow
def test_a_run_that_is_stopped_on_the_server_is_stopped(wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    text = GRID.replace("[conv4, conv8]", "[conv4]").replace("[0.01, 0.02]", "[0.01]")
    text += "  epochs: {value: 100000}\n  checkpoint_every: {value: 4}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    process = start_command(wandb_server, "-m", "cifar", "sweep", str(tmp_path / "tiny.yaml"), "--workers", "1", "--no-report")
    run = wait_until(lambda: next(iter(wandb_server.runs.values()), None), 60)
    wait_until(lambda: len(run.rows) >= 2, 60)
    wandb_server.world.stop(run.id)
    code, output = wait_for_exit(process)
    record = RunDir(runs / run.id)
    assert code == 0 and record.state == "stopped" and "1 stopped" in output, output
    assert run.summary["state"] == "stopped" and "asked to end at step" in run.summary["reason"]
    assert run.exits == [255] and run.state == "failed" and run.rows == list(record.read_rows())


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plain_tools_run_every_sweep(path: Path, wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    """`wandb sweep FILE`, then `wandb agent ID`. The file itself is accepted; what the agent runs is a copy of it
    with two steps of one epoch of the stand-in data, for every other run of these files takes minutes.

    In a sweep with a `scheduler:` W&B has no trials of its own: the plain agent waits, until `wandb sweep-scheduler ID`, which
    `wandb sweep` names, is run beside it.
    """
    tools = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    code, output = wait_for_exit(start_command(wandb_server, "-m", "wandb", "sweep", "--project", "plain", str(path), **tools))
    assert code == 0 and "Creating sweep with ID" in output, output
    assert yaml.safe_load(wandb_server.only_sweep().text) == yaml.safe_load(path.read_text())
    content = yaml.safe_load(path.read_text())
    small = {"epochs": 1, "max_steps": 2, "dataset": "stand-in", "val_size": 200, "train_size": 512, "max_macs": 0.0}
    content["parameters"].update({key: {"value": value} for key, value in small.items()})
    content.setdefault("description", "What this sweep asks")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    code, output = wait_for_exit(
        start_command(wandb_server, "-m", "wandb", "sweep", "--project", "plain", str(tmp_path / "small.yaml"), **tools)
    )
    sweep = list(wandb_server.sweeps.values())[-1]
    plain = ("-m", "wandb", "agent", "--count", "2", f"me/plain/{sweep.id}")
    beside = None
    if "scheduler" in content:
        assert f"wandb sweep-scheduler me/plain/{sweep.id}" in re.sub(r"\x1b\[\d*m", "", output)
        asked = ("-m", "wandb", "sweep-scheduler", "--batch-size", "2", "--poll-interval", "1", f"me/plain/{sweep.id}")
        beside = start_command(wandb_server, *asked, **tools)
    code, output = wait_for_exit(start_command(wandb_server, *plain, **tools))
    assert code == 0, output
    if beside:
        beside.send_signal(signal.SIGINT)
        assert "the sweep can be resumed" in wait_for_exit(beside)[1]
    taken = [run_id for agent in sweep.agents for run_id in wandb_server.agents[agent].runs]
    assert len(taken) == 2 and taken == [run_id for run_id in sweep.runs if run_id not in sweep.queue]
    for run_id in taken:
        run = wandb_server.runs[run_id]
        assert run.state == "finished" and run.sweep == sweep.id and (run.entity, run.project) == ("me", "plain"), output
        assert_as_trained(wandb_server, runs, run_id, 1)
        given = flatten_values(_given(wandb_server, run_id))
        assert {key: run.config[key] for key in given} == given  # typed as the file has them
        assert "epochs=" not in run.display_name and "train_size=" not in run.display_name  # only what the sweep varies


@pytest.mark.slow
@pytest.mark.parametrize("preemptible", ["", "1"])
def test_a_run_of_the_plain_agent_is_stopped(preemptible: str, wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    tools = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "CIFAR_PREEMPTIBLE": preemptible}
    content = yaml.safe_load(GRID) | {key: yaml.safe_load((ROOT / "sweeps/quickstart.yaml").read_text())[key] for key in TOLD}
    content["parameters"] |= {"epochs": {"value": 100_000}, "model": {"value": "conv4"}, "lr": {"value": 0.01}}
    content["parameters"]["checkpoint_every"] = {"value": 4}  # its rows are final after each epoch
    sweep = wandb_server.world.add_sweep("me", "plain", yaml.safe_dump(content))
    process = start_command(wandb_server, "-m", "wandb", "agent", "--count", "1", f"me/plain/{sweep.id}", **tools)
    run = wait_until(lambda: next(iter(wandb_server.runs.values()), None), 60)
    wait_until(lambda: len(run.rows) >= 2, 60)
    wandb_server.world.stop(run.id)
    _, output = wait_for_exit(process)
    record = RunDir(runs / run.id)
    assert record.state == ("preempted" if preemptible else "stopped"), output
    assert run.state == ("preempted" if preemptible else "failed") and run.rows == list(record.read_rows())
    assert run.summary["state"] == record.state and "asked to end at step" in run.summary["reason"]
    assert sweep.requeued == ([run.id] if preemptible else [])


TOLD = ("program", "command")


def _given(server: Server, run_id: str) -> dict[str, Any]:
    """What W&B told the agent of a run."""
    (told,) = [c for agent in server.agents.values() for c in agent.commands if c.get("run_id") == run_id]
    return json.loads(json.dumps({name: each["value"] for name, each in told["args"].items()}))
