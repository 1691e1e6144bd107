"""Names are anybody's text: what looks like markup is shown as it is, and ends nothing."""

from __future__ import annotations

import threading

import pytest

from cifar.cli import console
from cifar.training.callbacks import ProgressBarCallback

NAME = "[/red] a [bold]b[/bold] <script>"


def test_a_table_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(NAME, ["[red]column"], [[NAME]])
    console.echo(NAME)
    shown = capsys.readouterr().out
    assert shown.count(NAME) == 3 and "[red]column" in shown


def test_the_progress_bar_survives_any_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    terminal = ProgressBarCallback()
    terminal.on_run_start({"name": NAME}, epochs=1, steps=2)
    terminal.on_step_end(1, 1)
    terminal.on_run_end("finished", "", {})
    assert "steps" in capsys.readouterr().out


def test_a_progress_bar_that_shows_nothing_has_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report uses other cores only while it has one thread."""
    monkeypatch.setattr(console, "console", type(console.console)(force_terminal=True))
    before = threading.active_count()
    with console.progress_bar("reading", "runs") as progress:
        assert threading.active_count() == before
        progress(1, 2)
        assert threading.active_count() == before + 1
