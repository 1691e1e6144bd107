"""Eight agents that share a sweep train each cell once, and a killed one costs nothing, on SQLite and on PostgreSQL.

CIFAR_ROUNDS=5 python -m pytest -m slow tests/integration/test_eight_agents.py    # five rounds, and ten with two agents killed

Real trainings; the trials themselves write down what they do (the witness of helpers/fleet.py).
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from cifar.sweeps.local import LocalBackend
from cifar.tracking.run_dir import RunDir
from helpers.fleet import SWEEP, TOGETHER, Fleet, list_epochs
from helpers.processes import wait_for_exit, wait_until
from helpers.weights import hash_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROUNDS = int(os.environ.get("CIFAR_ROUNDS", "1"))
AGENTS, CELLS, EPOCHS = 8, 24, 6
GRID = "  width: {values: [2, 3, 4]}\n  witness: {values: [0, 1, 2, 3, 4, 5, 6, 7]}\n  probes: {value: witness}\n"
SHORT = GRID + "  epochs: {value: 1}\n"
LONG = GRID + f"  epochs: {{value: {EPOCHS}}}\n  checkpoint_every: {{value: 5}}\n  mixup: {{value: 0.2}}\n"
PAUSE = "0.3"  # seconds in each epoch, so that a moment is likely to fall into a trial


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("postgres_url") if request.param == "postgresql" else ""


@pytest.fixture
def world(tmp_path: Path, storage: str) -> Iterator[Fleet]:
    kept = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], "CIFAR_LEASE": "15"}
    world = Fleet(tmp_path, **kept, **({"CIFAR_STORAGE": storage} if storage else {}))
    yield world
    world.close()


def sweep_of(world: Fleet, text: str, url: str) -> LocalBackend:
    (world.folder / "sweep.yaml").write_text(SWEEP + text)
    output = world.run("sweep", str(world.folder / "sweep.yaml"), "--no-agent", "--dataset", "stand-in")
    backend = LocalBackend(output.split("python -m cifar agent ")[1].split()[0], world.runs, url)
    assert (backend.folder / "study.db").exists() != bool(url)
    return backend


def released(world: Fleet, backend: LocalBackend) -> dict[str, Popen[str]]:
    """Eight agents that begin at the same moment, each in a process of its own."""
    options = ("agent", backend.id, "--workers", "1", "--wandb", "disabled")
    ready, go = [world.folder / f"ready{n}" for n in range(AGENTS)], world.folder / "go"
    agents = {f"{n}-": world.start("-c", TOGETHER, str(path), str(go), *options, name=f"{n}-") for n, path in enumerate(ready)}
    wait_until(lambda: all(path.exists() for path in ready), 240)
    go.touch()
    return agents


@pytest.mark.parametrize("repetition", range(ROUNDS))
def test_eight_agents_released_together_train_each_of_24_cells_once(world: Fleet, storage: str, repetition: int) -> None:
    world.environment["CIFAR_LEASE"] = "60"
    backend = sweep_of(world, SHORT, storage)
    ends = [wait_for_exit(agent, 500) for agent in released(world, backend).values()]
    assert [code for code, _ in ends] == [0] * AGENTS, ends
    for what in ("begins", "trains"):
        executed = Counter((size, key) for _, size, key in world.read_witness(what))
        assert len(executed) == CELLS and set(executed.values()) == {1}, (what, executed)
    assert [record.id for record in world.load_records()] == [backend.run_id(cell) for cell in range(CELLS)]
    assert all(record.state == "finished" and list_epochs(record) == [1] for record in world.load_records())
    configs = [record.read_json("config") for record in world.load_records()]
    assert len({(config["width"], config["witness"]) for config in configs}) == CELLS
    assert backend.count_states() == {"finished": CELLS} and {cell["attempt"] for cell in backend.list_cells()} == {1}
    assert not world.find_processes()


def trained(record: RunDir) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    """What has to be the same to the bit: configuration, weights, all that was measured of the training."""
    rows = [{key: value for key, value in row.items() if not key.startswith("system/")} for row in record.read_rows()]
    return record.read_json("config"), hash_weights(record), rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The same sweep by one agent that nobody kills."""
    world = Fleet(tmp_path_factory.mktemp("undisturbed"), XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"])
    backend = sweep_of(world, LONG, "")
    world.run("agent", backend.id, "--workers", "2", "--wandb", "disabled")
    return {cell: trained(RunDir(world.runs / backend.run_id(cell))) for cell in range(CELLS)}


@pytest.mark.parametrize("repetition", range(2 * ROUNDS))
def test_two_of_eight_agents_killed_cost_nothing(
    world: Fleet, storage: str, repetition: int, undisturbed: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(f"{storage[:6]} {repetition}")
    backend = sweep_of(world, LONG, storage)
    world.environment["WITNESS_PAUSE"] = PAUSE
    agents = released(world, backend)
    log = world.folder / "witness.log"
    moments = sorted(chance.randrange(CELLS * EPOCHS * 2 // 3) for _ in range(2))  # while all of them have work
    lost: dict[int, list[dict[str, Any]]] = {}  # cell -> the rows it had when its agent was killed
    for name, moment in zip(chance.sample(sorted(agents), 2), moments, strict=True):
        wait_until(lambda moment=moment: log.exists() and log.read_bytes().count(b"\n") >= moment, 240)
        time.sleep(chance.uniform(0.0, 0.5))
        agent = agents.pop(name)
        world.kill(agent, name)
        wait_for_exit(agent)  # closes its output
        for cell in backend.list_cells():
            if cell["state"] == "running" and cell["worker"].endswith(f"-{agent.pid}"):
                lost[cell["cell"]] = list(RunDir(world.runs / cell["run_id"]).read_rows())
    ends = [wait_for_exit(agent, 500) for agent in agents.values()]
    assert [code for code, _ in ends] == [0] * (AGENTS - 2) and not world.find_processes(), ends
    assert backend.count_states() == {"finished": CELLS}
    again = {
        cell["cell"]: (cell["values"]["width"], cell["values"]["witness"])
        for cell in backend.list_cells()
        if cell["attempt"] == 2
    }
    assert lost.keys() <= again.keys() and len(again) <= 2 and {cell["attempt"] for cell in backend.list_cells()} <= {1, 2}
    assert [record.id for record in world.load_records()] == [backend.run_id(cell) for cell in range(CELLS)]
    executed: dict[tuple[int, int], list[int]] = {}  # a cell's own values -> the process of each of its epochs, in order
    for pid, size, key in world.read_witness("trains"):
        executed.setdefault((size, key), []).append(pid)
    parts = [len([pid for pid, _ in groupby(pids)]) for pids in executed.values()]
    assert len(parts) == CELLS and max(parts) <= 2 and sum(parts) - CELLS <= len(lost)  # one process after the other
    sizes = dict(zip((2, 3, 4), sorted({size for size, _ in executed}), strict=True))  # by width
    for cell in again.keys() - lost.keys():  # its agent died between the two writes of a claim: the next one had it at once
        width, key = again[cell]
        assert len({pid for pid, *mine in world.read_witness("begins") if mine == [sizes[width], key]}) == 1, (
            "begun by one process"
        )
    for cell, record in enumerate(world.load_records()):
        before, rows = lost.get(cell, [])[:-1], list(record.read_rows())  # the last one may lack its checkpoint
        assert record.state == "finished" and list_epochs(record) == list(range(1, EPOCHS + 1))
        assert rows[: len(before)] == before, "trained again from the beginning"
        assert trained(record) == undisturbed[cell], cell
    with capsys.disabled():
        print(f"\n  {len(lost)} trials were under way, at epochs {[len(rows) for rows in lost.values()]} of {EPOCHS}")
