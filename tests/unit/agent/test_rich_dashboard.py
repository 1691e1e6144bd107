"""The live table in terminals of several sizes: one line a trial, running ones on top, and the footer is always there."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from cifar.agent.dashboard import Board, Row
from cifar.agent.rich_dashboard import BoardView, RichDashboard
from cifar.system.terminal import text_width

KEYS = ("model", "lr", "weight_decay")


def make_board(num_trials: int, num_running: int, keys: tuple[str, ...] = KEYS, suffix: str = "") -> Board:
    """Trials 0, 1, ..., of which the last ones run. `batch_size` is swept, but one value is met only."""
    board = Board("sweep 3k9x2m1p quickstart", "val/acc", start_time=time.monotonic() - 600)
    for cell in range(num_trials):
        is_running = cell >= num_trials - num_running
        state = "running" if is_running else "failed" if cell % 7 == 3 else "finished"
        values = {"batch_size": "128", **dict.fromkeys(keys, f"{cell % 5}{suffix}")}
        row = Row(cell, "", state, 2 if is_running else 10, 10, 0.2 if is_running else 1.0, 0.5, 12345.0, values=values)
        row.seconds = 0.0 if is_running else 40.0 * (cell + 1)
        board.rows[cell] = row
    num_failed = sum(row.state == "failed" for row in board.rows.values())
    board.counts = {"waiting": 50, "running": num_running, "finished": num_trials - num_running - num_failed}
    board.counts |= {"failed": num_failed} if num_failed else {}
    values = " ".join(f"{key}={value}" for key, value in board.rows[0].values.items())
    board.best = f"val/acc 61.20 % by 3k9x2m1p-004 ({values})"
    return board


def draw(board: Board, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(BoardView(board))
    return console.file.getvalue().splitlines()


BOARDS = {
    "12 trials, 3 workers": (12, 3),
    "200 trials": (200, 3),
    "64 workers": (200, 64),
    "many long keys": (30, 3, tuple(f"a_rather_long_key_{n}" for n in range(9))),
    "long values": (30, 3, KEYS, "-" + "x" * 60),
    "wide characters": (30, 3, KEYS, "[red]漢字" * 10),
    "nothing yet": (1, 1),
}


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 16), (200, 60)])
@pytest.mark.parametrize("name", BOARDS)
def test_it_fits_and_the_footer_is_there(name: str, width: int, height: int) -> None:
    board = make_board(*BOARDS[name])
    lines = draw(board, width, height)
    assert len(lines) <= height - 2 and max(map(text_width, lines)) <= width, "\n".join(lines)
    text = "\n".join(lines)
    for words in (f"{board.counts['running']} running", "50 waiting", "best val/acc 61.20 % by 3k9x2m1p-004", " left"):
        assert words in text, text
    rows = [line for line in lines if line[:5].strip().isdigit()]
    assert len(rows) == len(board.rows) or any(line.startswith("and ") for line in lines), text


def test_running_ones_are_on_top_and_then_the_latest() -> None:
    lines = draw(make_board(12, 3), 80, 24)
    assert [int(line[:5]) for line in lines[2:14]] == [9, 10, 11, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert lines[0] == "sweep 3k9x2m1p quickstart · all: batch_size=128"
    assert lines[1].split()[:5] == ["trial", "model", "lr", "weight_decay", "state"]
    assert lines[2].split() == ["009", "4", "4", "4", "running", "2/10", "50.00", "%", "12,345"]
    assert lines[-3].startswith("50 waiting, 3 running, 8 finished, 1 failed · about ") and lines[-3].endswith(" left")
    assert " ".join(lines[-2:]) == "best val/acc 61.20 % by 3k9x2m1p-004 (batch_size=128 model=0 lr=0 weight_decay=0)"


def test_what_has_no_room_is_folded_into_one_line() -> None:
    board = make_board(200, 3)
    small, large = draw(board, 80, 24), draw(board, 120, 40)
    assert [int(line[:5]) for line in small[2:6]] == [197, 198, 199, 196]
    assert len(small) == 22 and len(large) == 38, "the room is used"
    num_shown = sum(line[:5].strip().isdigit() for line in small)
    (folded,) = (line for line in small if line.startswith("and "))
    ended = [row.state for row in list(board.rows.values())[: 200 - num_shown]]
    assert folded == f"and {ended.count('finished')} finished, {ended.count('failed')} failed"
    busy = draw(make_board(200, 64), 80, 24)
    assert "running" in next(line for line in busy if line.startswith("and "))


def test_swept_keys_are_shortened_and_never_wrapped() -> None:
    lines = draw(make_board(12, 3, KEYS, "-" + "x" * 60), 80, 24)
    assert len(lines) == 2 + 12 + 3 and all("…" in line for line in lines[2:14])
    assert all("50.00 %" in line for line in lines[2:14]), "the accuracy is whole"
    lines = draw(make_board(12, 3, tuple(f"a_rather_long_key_{n}" for n in range(9))), 80, 24)
    assert "no room for a_rather_long_key" in lines[0]


def test_one_trial_shows_its_values() -> None:
    lines = draw(make_board(1, 1), 80, 24)
    assert lines[1].split()[1:5] == ["batch_size", "model", "lr", "weight_decay"] and "128" in lines[2]


def test_lines_scroll_above_it() -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    dashboard = RichDashboard(console)
    dashboard.show_board(make_board(12, 3))
    dashboard.print_epoch_line("trial 003 epoch 1/2: val/acc 50 %")
    dashboard.print_line("trial 004 pruned: val/acc 10 % (stopped early after epoch 3)")
    dashboard.print_line("see `python -m cifar gc` [bold]")
    dashboard.close()
    text = console.file.getvalue()
    assert "see `python -m cifar gc` [bold]" in text and "stopped early after epoch 3" in text and "epoch 1/2" not in text
