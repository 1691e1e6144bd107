"""The W&B server of our tests: the real client is content with it, and it is strict."""

from __future__ import annotations

import http.client
import json
import math
import multiprocessing
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.protocol import Fault, Run, Server

GRID = "method: grid\nparameters: {lr: {values: [0.1, 0.2]}, width: {values: [4, 8]}, seed: {value: 1}}\n"
BEAT = "mutation Heartbeat($id: ID!, $s: JSONString) { agentHeartbeat(input: {id: $id, runState: $s}) { commands } }"
ARRIVE = """mutation UpsertBucket($run: String, $sweep: String) {
  upsertBucket(input: {name: $run, sweep: $sweep, modelName: "p", entityName: "me"}) { bucket { sweepName } inserted }
}"""


@pytest.fixture
def server() -> Any:
    with Server() as found:
        yield found
        found.assert_understood()


def ask(server: Server, query: str, **variables: Any) -> Any:
    status, found = server.graphql({"query": query, "variables": variables})
    assert status == 200 and "errors" not in found, found
    return found["data"]


def sweep_and_agents(server: Server, text: str, count: int = 1) -> tuple[str, list[str]]:
    create = 'mutation UpsertSweep($c: String) { upsertSweep(input: {config: $c, projectName: "p"}) { sweep { name } } }'
    sweep: str = ask(server, create, c=text)["upsertSweep"]["sweep"]["name"]
    register = """mutation CreateAgent($s: String!) {
      createAgent(input: {host: "h", sweep: $s, projectName: "p"}) { agent { id } } }"""
    return sweep, [ask(server, register, s=sweep)["createAgent"]["agent"]["id"] for _ in range(count)]


def told(server: Server, agent: str, *running: str) -> list[dict[str, Any]]:
    answer = ask(server, BEAT, id=agent, s=json.dumps(dict.fromkeys(running, True)))
    return list(json.loads(answer["agentHeartbeat"]["commands"]))


def arrive(server: Server, sweep: str, run: str) -> Run:
    assert ask(server, ARRIVE, run=run, sweep=sweep)["upsertBucket"]["bucket"]["sweepName"] == sweep
    return server.runs[run]


def stream(server: Server, run: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{server.url}/files/me/p/{run}/file_stream", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def test_a_grid_is_handed_out_once_and_ends(server: Server) -> None:
    sweep, agents = sweep_and_agents(server, GRID, 3)
    seen = []
    for agent in [*agents, agents[0]]:
        held = server.agents[agent].running
        for run in held:
            arrive(server, sweep, run)
            stream(server, run, {"exitcode": 0, "complete": True})
        (command,) = told(server, agent)
        assert command["type"] == "run" and told(server, agent, command["run_id"]) == []
        seen.append({name: given["value"] for name, given in command["args"].items()})
    assert sorted((cell["lr"], cell["width"]) for cell in seen) == [(0.1, 4), (0.1, 8), (0.2, 4), (0.2, 8)]
    for run in list(server.runs):
        arrive(server, sweep, run)
    assert told(server, agents[1]) == [{"type": "exit"}] and server.sweeps[sweep].state == "RUNNING"
    for run in server.runs:
        stream(server, run, {"exitcode": 0, "complete": True})
    assert server.sweeps[sweep].state == "FINISHED" and {run.state for run in server.runs.values()} == {"finished"}


def test_random_search_ends_at_its_cap_and_pausing_holds_it(server: Server) -> None:
    text = "method: random\nrun_cap: 2\nparameters: {lr: {min: 0.0, max: 1.0}, n: {min: 1, max: 9}}\n"
    sweep, (agent,) = sweep_and_agents(server, text)
    server.sweeps[sweep].state = "PAUSED"
    assert told(server, agent) == []
    server.sweeps[sweep].state = "RUNNING"
    for _ in range(2):
        (command,) = told(server, agent)
        assert 0 <= command["args"]["lr"]["value"] <= 1 and command["args"]["n"]["value"] in range(1, 10)
        arrive(server, sweep, command["run_id"])
    assert told(server, agent) == [{"type": "exit"}]


def test_stop_resume_and_a_run_that_never_arrived(server: Server) -> None:
    sweep, (one, two) = sweep_and_agents(server, GRID, 2)
    (first,) = told(server, one)
    (second,) = told(server, one)  # the first was never heard of: its cell comes again, in a new run
    assert second["args"] == first["args"] and second["run_id"] != first["run_id"] and first["run_id"] not in server.runs
    run = arrive(server, sweep, second["run_id"])
    assert stream(server, run.id, {})["stopped"] is False
    server.world.stop(run.id)
    assert told(server, one, run.id) == [{"type": "stop", "run_id": run.id}] and stream(server, run.id, {})["stopped"] is True
    stream(server, run.id, {"preempting": True})
    stream(server, run.id, {"exitcode": 1, "complete": True})
    assert run.state == "preempted"
    (again,) = told(server, two)
    assert (again["type"], again["run_id"], again["args"]) == ("resume", run.id, first["args"])
    server.sweeps[sweep].state = "CANCELED"
    assert told(server, two, run.id) == [{"type": "exit"}]


def test_what_it_was_not_taught_is_named(wandb_server: Server) -> None:
    status, _ = wandb_server.graphql({"query": "query Nonsense { nonsense { x } }"})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{wandb_server.url}/nowhere/at/all")
    assert status == 400
    with pytest.raises(AssertionError, match=r"(?s)query Nonsense.*GET /nowhere/at/all"):
        wandb_server.assert_understood()
    wandb_server.unknown.clear()
    status, answer = wandb_server.graphql(
        {"query": 'mutation M { upsertSweep(input: {config: "method: grid\\nnonsense: 1"}) { sweep { name } } }'}
    )
    assert "nonsense" in answer["errors"][0]["message"] and not wandb_server.sweeps


def test_faults(server: Server) -> None:
    def viewer(timeout: float = 5) -> float:
        began = time.monotonic()
        body = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/graphql", body), timeout=timeout).read()
        return time.monotonic() - began

    viewer()
    server.fault = Fault("status", 429, where="Viewer", times=1)
    with pytest.raises(urllib.error.HTTPError, match="429"):
        viewer()
    viewer()
    server.fault = Fault("slow", 0.5)
    assert 0.5 <= viewer() < 2
    server.fault = Fault("drop")
    with pytest.raises((OSError, http.client.HTTPException)):
        viewer()
    server.fault = Fault("hang")
    with pytest.raises(TimeoutError):
        viewer(0.3)
    began = time.monotonic()
    threading.Timer(0.5, server.heal).start()
    viewer()
    assert 0.5 <= time.monotonic() - began < 3
    url = server.url
    heir = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    heir.start()  # a process that another thread starts has the server's sockets for a moment too
    try:
        server.die()
        with pytest.raises(urllib.error.URLError):
            viewer()
        server.revive()
        viewer()
    finally:
        heir.kill()
        heir.join()
    assert server.url == url


CLIENT = """
import json, wandb
for name in ("one", "two", "three"):
    with wandb.init(project="p", id=name, config={"lr": 1e-5, "flag": True}, group="g", tags=["t"]) as run:
        for step in range(6):
            run.log({"x": step / 3, "epoch": step, "nothing": float("nan")})
with wandb.init(project="p", id="one", resume="must") as run:
    assert run.starting_step == 6, run.starting_step  # run.step is 0 until the first row (wandb 0.31)
    run.log({"x": 7.5, "epoch": 6})
api = wandb.Api()
runs = api.runs("me/p", filters={"group": "g", "config.lr": 1e-5}, order="-created_at", per_page=2)
read = {run.id: [row["x"] for row in run.scan_history(use_cache=False)] for run in runs}
some = [row for row in api.run("me/p/one").scan_history(keys=["x"], use_cache=False)]
print(json.dumps({"read": read, "config": api.run("me/p/two").config, "some": some, "state": api.run("me/p/two").state}))
"""


@pytest.mark.slow
def test_the_real_client_writes_and_reads(wandb_server: Server, tmp_path: Path) -> None:
    def client(code: str) -> Any:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    answer = client(CLIENT)
    six = [step / 3 for step in range(6)]
    assert answer["read"] == {"three": six, "two": six, "one": [*six, 7.5]}
    assert answer["config"] == {"lr": 1e-5, "flag": True} and answer["state"] == "finished"
    assert [row["x"] for row in answer["some"]] == [*six, 7.5]
    run = wandb_server.runs["one"]
    assert [row["x"] for row in run.rows] == [*six, 7.5] and run.summary["x"] == 7.5 and run.exits == [0, 0]
    assert math.isnan(run.rows[0]["nothing"]) and run.tags == ["t"]
    for exported in (7, 4):  # wandb-core reads the same of parquet exports and their live rest
        wandb_server.export("one", exported)
        code = "import json, wandb; scan = wandb.Api().run('me/p/one').scan_history(use_cache=False)"
        assert client(f"{code}; print(json.dumps([row['x'] for row in scan]))") == [*six, 7.5]
    assert wandb_server.asked("parquet")


@pytest.mark.slow
def test_the_command_line_makes_pauses_and_stops_a_sweep(wandb_server: Server, tmp_path: Path) -> None:
    def wandb(*arguments: str) -> str:
        command = [sys.executable, "-m", "wandb", "sweep", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        return done.stdout + done.stderr

    (tmp_path / "grid.yaml").write_text(GRID)
    assert "Creating sweep with ID" in wandb("--project", "p", "grid.yaml")
    sweep = wandb_server.only_sweep()
    assert yaml.safe_load(sweep.text) == yaml.safe_load(GRID) and (sweep.entity, sweep.project) == ("me", "p")
    wandb("--pause", f"me/p/{sweep.id}")
    assert sweep.state == "PAUSED"
    wandb("--cancel", f"me/p/{sweep.id}")
    assert sweep.state == "CANCELED"
    (tmp_path / "grid.yaml").write_text(GRID + "max_macs: 5\n")
    assert "max_macs" in wandb("--project", "p", "grid.yaml") and len(wandb_server.sweeps) == 1


@pytest.mark.slow
def test_artifacts_of_the_real_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> None:
    """Made, found again by alias, deduplicated, used, and read back byte for byte."""
    from cifar.integrations.wandb.mirror_process import stop_core

    stop_core()
    for name, value in {**server.environment(), "HOME": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_meta=True, x_disable_stats=True)
    for run_id, content in (("r0", b"one"), ("r1", b"two"), ("r2", b"two")):
        with wandb.init(project="p", id=run_id, reinit="create_new", settings=settings) as run:
            data = wandb.Artifact("images", type="dataset")
            data.add_reference("https://example.org/x.tar.gz", name="x", checksum=False)
            run.use_artifact(data)
            (tmp_path / run_id).write_bytes(content)
            model = wandb.Artifact("net", type="model", metadata={"from": run_id})
            model.add_file(str(tmp_path / run_id), name="w.pt")
            run.log_artifact(model, aliases=["latest", f"of-{run_id}"])
    first, second = server.artifacts.committed("model")
    assert (first.name, first.run, first.aliases) == ("net:v0", "r0", ["of-r0"])
    assert (second.name, second.run, sorted(second.aliases)) == ("net:v1", "r1", ["latest", "of-r1", "of-r2"])
    (data_there,) = server.artifacts.committed("dataset")
    assert data_there.used_by == ["r0", "r1", "r2"] and data_there.entries["x"]["ref"] == "https://example.org/x.tar.gz"
    found = wandb.Api().artifact("me/p/net:of-r0")
    assert (Path(found.download(root=str(tmp_path / "back"))) / "w.pt").read_bytes() == b"one"
    assert found.metadata == {"from": "r0"} and len(wandb.Api().artifact("me/p/images:v0").used_by()) == 3
    stop_core()
