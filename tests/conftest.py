"""One small world for all tests: their own caches and runs folder, no W&B account, one thread."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_WORLD = Path(tempfile.gettempdir()) / f"cifar-tests-{os.getuid()}"  # the stand-in data is generated once for many sessions
_WORLD.mkdir(exist_ok=True)
os.environ["XDG_CACHE_HOME"] = str(_WORLD)
os.environ["OMP_NUM_THREADS"] = "1"
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that runs of this test go to, also for child processes."""
    monkeypatch.setenv("CIFAR_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("CIFAR_PLUGINS", raising=False)
    yield tmp_path / "runs"
