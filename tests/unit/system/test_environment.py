"""Where a run ran: the command without secrets, and uncommitted changes only where they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cifar.system import environment
from cifar.system.environment import git_diff, mask_arguments
from cifar.system.redact import forget_secrets


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["train", "lr=0.1", "--runs-dir", "/tmp/x"], ["train", "lr=0.1", "--runs-dir", "/tmp/x"]),
        (["--storage", "postgresql://me:hunter22@host/db"], ["--storage", "postgresql://me:***@host/db"]),
        (["--api-key", "abcdefgh", "rest"], ["--api-key", "***", "rest"]),
        (["--password=abcdefgh", "rest"], ["--password=***", "rest"]),
        (["--token", "--flag"], ["--token", "--flag"]),
        (["it is correct-horse-battery"], ["it is ***"]),
        ([], []),
    ],
)
def test_a_command_line_has_no_secrets(given: list[str], kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "correct-horse-battery")
    forget_secrets()
    assert mask_arguments(given) == kept
    forget_secrets()


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_uncommitted_changes_have_no_secrets_and_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_diff(tmp_path) == b"", "no checkout"
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init")
    (folder / "code.py").write_text("lr = 0.1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "one")
    git_diff.cache_clear()
    assert git_diff(folder) == b""
    (folder / "code.py").write_text("lr = 0.2\nurl = 'https://me:hunter22@host/x'\n")
    git_diff.cache_clear()
    text = git_diff(folder).decode()
    assert "-lr = 0.1\n+lr = 0.2\n+url = 'https://me:***@host/x'\n" in text
    monkeypatch.setattr(environment, "MAX_DIFF_BYTES", 120)
    git_diff.cache_clear()
    assert len(git_diff(folder)) < 200 and git_diff(folder).endswith(b"# the rest is left out: it is too large\n")
    git_diff.cache_clear()


def test_the_option_is_for_this_process_and_those_that_it_starts(tmp_path: Path) -> None:
    code = (
        "import os, typer; from typer.testing import CliRunner; from cifar.cli.options import SaveDiff; app = typer.Typer();"
        "exec('def command(save_diff: SaveDiff = False): print(repr(os.environ.get(\"CIFAR_SAVE_DIFF\")))');"
        "app.command()(command);"
        "print(CliRunner().invoke(app, ['--save-diff']).output, CliRunner().invoke(app, []).output)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["'on'", "''"], done.stdout  # empty is not set
