"""One small world for all tests: their own caches and runs folder, no W&B account, one thread."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from cifar.system.redact import forget_secrets

if TYPE_CHECKING:
    from helpers.protocol import Server

pytest.register_assert_rewrite("helpers")  # before the first import of any

# An example that is slow on a busy machine is no failure. Before the first import of a test, as `given` reads it then.
hypothesis.settings.register_profile("cifar", deadline=None)
hypothesis.settings.load_profile("cifar")

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
    for name in [name for name in os.environ if name.startswith("WANDB_")]:  # wandb itself leaves some behind
        monkeypatch.delenv(name)
    monkeypatch.delenv("CIFAR_PLUGINS", raising=False)
    forget_secrets()  # those of the tests before
    yield tmp_path / "runs"
    left = [thread.name for thread in threading.enumerate() if "serve_forever" in thread.name]
    assert not left, "a server that goes on serving takes time from every test after this one"


@pytest.fixture
def wandb_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A W&B server that this process and its children talk to. The test fails where they ask what it was not taught."""
    from helpers.protocol import Server

    with Server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        yield server
        server.assert_understood()
