"""One sweep for many machines: the local backend on a real PostgreSQL server, with real agents."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
from test_fleet import SWEEP, TOGETHER, World, ended, until
from test_local import GRID, taken

from cifar import sweep as sweeps
from cifar.backends import amend, local
from cifar.backends.local import Local, Trial
from cifar.config import parse_yaml

pytestmark = pytest.mark.slow
AGENTS = 8


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    given = os.environ.get("CIFAR_POSTGRES", "")
    if given:
        yield given
    elif postgres.binaries():
        with postgres.server() as started:
            yield started
    else:
        pytest.skip("NO POSTGRESQL HERE (apt-get install postgresql, or CIFAR_POSTGRES=URL): nothing was shown of it")


def made(runs: Path, url: str, text: str = GRID) -> Local:
    read = sweeps.parse(parse_yaml(text, "sweep"), text, "sweep", "a sweep")
    return Local(local.create(read, runs, fixed={"dataset": "stand-in"}, url=url), runs, url)


def test_leases_retries_and_extensions_as_on_a_file(
    runs: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_LEASE", "1.0")
    mine = made(runs, url, GRID + "\nrun_cap: 2")
    theirs = Local(mine.id, tmp_path / "another machine", url)
    trial, other = taken(mine), taken(theirs, "they")
    assert (trial.cell, other.cell) == (0, 1) and mine.finish(other, "killed") == "interrupted"
    assert theirs.claim("they") is not None and theirs.claim("they") == "wait"
    time.sleep(1.2)
    again = taken(theirs, "they")
    assert (again.run_id, again.attempt) == (trial.run_id, 2) and mine.beat(trial) == "lost"
    assert theirs.finish(again, "failed", reason="because") == "failed" and amend.retry(mine) == 1
    assert taken(mine).attempt == 3
    larger = tmp_path / "larger.yaml"
    larger.write_text(GRID + "\nrun_cap: 5\n")
    assert amend.extend(mine, larger) == 3 and isinstance(theirs.claim("they"), Trial)


def test_eight_agents_released_together_train_each_of_24_cells_once(tmp_path: Path, url: str) -> None:
    world = World(tmp_path, XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"], CIFAR_STORAGE=url, CIFAR_LEASE="60")
    try:
        grid = "  width: {values: [2, 3, 4]}\n  witness: {values: [0, 1, 2, 3, 4, 5, 6, 7]}\n  epochs: {value: 1}\n"
        (tmp_path / "sweep.yaml").write_text(SWEEP + grid + "  probes: {value: witness}\n")
        output = world.run("sweep", str(tmp_path / "sweep.yaml"), "--no-agent", "--dataset", "stand-in")
        backend = Local(output.split("python -m cifar agent ")[1].split()[0], world.runs, url)
        assert not (backend.folder / "study.db").exists()
        options = ("agent", backend.id, "--workers", "1", "--wandb", "disabled")
        agents = [
            world.start("-c", TOGETHER, str(tmp_path / f"ready{n}"), str(tmp_path / "go"), *options) for n in range(AGENTS)
        ]
        until(lambda: len(list(tmp_path.glob("ready*"))) == AGENTS, 240)
        (tmp_path / "go").touch()
        ends = [ended(agent, 500) for agent in agents]
        assert [code for code, _ in ends] == [0] * AGENTS, ends
        for what in ("begins", "trains"):
            cells = Counter((size, key) for _, size, key in world.said(what))
            assert len(cells) == 24 and set(cells.values()) == {1}, (what, cells)
        assert backend.counts() == {"finished": 24} and {cell["attempt"] for cell in backend.cells()} == {1}
        assert not world.marked()
    finally:
        world.close()
