"""One sweep for many machines: the local backend on a real PostgreSQL server (its agents: test_eight_agents.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
from test_local import GRID, taken

from cifar.config.resolve import parse_yaml
from cifar.sweeps import amend, local
from cifar.sweeps import spec as sweeps
from cifar.sweeps.local import Local, Trial

pytestmark = pytest.mark.slow


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
