"""Many agents without PyTorch against one sweep: every cell once, also where some of them are killed."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from cifar.states import ENDED_STATES
from helpers.engine_agents import read_claims, start_agents
from helpers.local_sweeps import METRIC, create_local_sweep

pytestmark = pytest.mark.slow
NUM_AGENTS = int(os.environ.get("CIFAR_TEST_ENGINE_AGENTS", "8"))  # a quarter of them is killed
TEXT = f"method: grid\n{METRIC}parameters:\n  model: {{value: conv}}\n  lr: {{value: 0.1}}\n  seed: {{values: %s}}\n"


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_nothing_is_lost_or_doubled_when_a_quarter_of_the_agents_is_killed(
    kind: str, runs: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = request.getfixturevalue("postgres_url") if kind == "postgresql" else ""
    monkeypatch.setenv("CIFAR_LEASE", "5")
    num_cells = 30 * NUM_AGENTS
    backend = create_local_sweep(runs, TEXT % list(range(num_cells)), url=url)
    agents = start_agents(NUM_AGENTS, backend.id, runs, url)
    (runs / "go").touch()
    deadline = time.monotonic() + 120
    while len(read_claims(runs)) < num_cells // 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for agent in agents[: NUM_AGENTS // 4]:
        agent.kill()
    codes = [agent.wait(150) for agent in agents]
    assert codes == [-9] * (NUM_AGENTS // 4) + [0] * (NUM_AGENTS - NUM_AGENTS // 4)
    assert backend.count_states() == {"finished": num_cells}
    ended = Counter(claim["cell"] for claim in read_claims(runs) if claim.get("ended") == "finished")
    assert max(ended.values()) == 1  # none twice; one that was killed after its end may not have logged it
    assert num_cells - len(ended) <= NUM_AGENTS // 4
    claims = Counter((claim["cell"], claim["attempt"]) for claim in read_claims(runs) if "ended" not in claim)
    assert max(claims.values()) == 1
    assert {cell["state"] for cell in backend.list_cells()} <= set(ENDED_STATES)
