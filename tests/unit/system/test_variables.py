"""Environment variables: read in one place, with their kinds and limits."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from cifar.errors import UserError
from cifar.system import variables
from helpers.paths import PACKAGE

# They read what is not ours to check: the GPUs of a job, a path that is handed on, every value that may be a secret.
READ_ELSEWHERE = {"system/variables.py", "system/devices.py", "system/redact.py", "integrations/wandb/scheduler.py"}


@pytest.mark.parametrize("text", ["abc", "-5", "nan", "1e400", "0", "inf", "1,5", "15s", "\udcff"])
def test_a_wrong_number_is_one_sentence_with_the_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CIFAR_LEASE", text)
    with pytest.raises(UserError, match=r"CIFAR_LEASE is .*(or|and|correct).* unset it"):
        variables.read_number("CIFAR_LEASE", 15.0, low=0.01, high=1e7)


@pytest.mark.parametrize(("text", "value"), [("", 15.0), ("2", 2.0), ("0.5", 0.5), (" 1e3 ", 1000.0)])
def test_a_number_is_read(monkeypatch: pytest.MonkeyPatch, text: str, value: float) -> None:
    monkeypatch.setenv("CIFAR_LEASE", text)
    assert variables.read_number("CIFAR_LEASE", 15.0, low=0.01, high=1e7) == value


@pytest.mark.parametrize("text", ["abc", "-1", "0", "65537", "1.0", "9" * 5000, "²", "--1"])
def test_a_wrong_whole_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError, match=r"WORLD_SIZE is .*whole number from 1 to 65536"):
        variables.read_whole_number("WORLD_SIZE", 1, low=1, high=65536)


def test_a_home_of_nobody_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/x")
    with pytest.raises(UserError, match=r"XDG_CACHE_HOME.*no such user"):
        variables.read_path("XDG_CACHE_HOME", "~/.cache")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_module_reads_a_variable(path: Path) -> None:
    """Each reading of one variable (`os.environ[...]`, `.get(...)`, `os.getenv`) goes through `cifar.system.variables`."""
    if path.relative_to(PACKAGE).as_posix() in READ_ELSEWHERE:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript) else ""
        is_read = text.startswith(("os.environ.get(", "os.getenv("))
        is_item = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and text.startswith("os.environ[")
        assert not is_read and not is_item, f"{path}:{getattr(node, 'lineno', 0)}: {text[:80]}"
