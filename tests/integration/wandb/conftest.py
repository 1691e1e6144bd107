"""Fixtures of several files of these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar.integrations.wandb.mirror_process import stop_core
from helpers.protocol import Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """One for each test, with a home and a cache of the test's own. What it was not taught fails the test."""
    stop_core()  # the next one reads the environment anew
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")  # as our code sets it for good where it is the first to import wandb
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.chdir(tmp_path)
    with Server() as one:
        for name, value in one.environment().items():
            monkeypatch.setenv(name, value)
        yield one
        stop_core()
        one.assert_understood()
    for name in ("WANDB_ENTITY", "WANDB_PROJECT"):  # wandb.sweep sets them
        os.environ.pop(name, None)
