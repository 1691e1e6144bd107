"""Errors of a plug-in: the user's lines are found, ours and the libraries' are folded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cifar.errors import is_out_of_threads
from cifar.system import user_code
from cifar.system.disk import is_caused_by_full_disk


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(user_code, "_plugin_files", set())
    return tmp_path / "mine.py"


def run_plugin(path: Path, text: str) -> BaseException:
    path.write_text(text)
    user_code.note_plugin_file(path)
    with pytest.raises(BaseException) as caught:
        exec(compile(text, str(path), "exec"), {"json": json})
    error = caught.value
    error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None  # without this file's line
    return error


def test_the_last_line_of_the_users_own_is_named(plugin: Path) -> None:
    error = run_plugin(plugin, "def read(text):\n    return json.loads(text)\n\nread('{')\n")
    assert user_code.locate_error(error) == f"{plugin}:2, in read"
    assert user_code.is_plugin_error(error)
    assert user_code.describe_error(error).startswith("JSONDecodeError: Expecting property name")
    assert user_code.describe_failure(error).endswith(f"({plugin}:2, in read)")


def test_frames_of_libraries_are_counted(plugin: Path) -> None:
    folded = user_code.format_folded(run_plugin(plugin, "def read(text):\n    return json.loads(text)\n\nread('{')\n"))
    assert folded.splitlines()[:5] == [
        "Traceback (most recent call last):",
        f'  File "{plugin}", line 4, in <module>',
        "    read('{')",
        f'  File "{plugin}", line 2, in read',
        "    return json.loads(text)",
    ]
    assert "... 3 lines of cifar and its libraries" in folded and "decoder.py" not in folded
    assert folded.splitlines()[-1].startswith("json.decoder.JSONDecodeError: Expecting")


def test_what_led_to_an_error_comes_first(plugin: Path) -> None:
    text = "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('no rate') from error\n"
    folded = user_code.format_folded(run_plugin(plugin, text))
    assert folded.index("ZeroDivisionError") < folded.index("ValueError: no rate")


def test_an_error_without_a_plugin_is_ours() -> None:
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    assert not user_code.is_plugin_error(caught.value)
    assert user_code.describe_failure(caught.value) == f"JSONDecodeError: {caught.value}"


def test_a_syntax_error_has_the_place_that_it_names(plugin: Path) -> None:
    error = run_plugin(plugin, "raise SyntaxError('bad', ('elsewhere.py', 7, 1, 'x'))\n")
    assert user_code.describe_error(error) == "SyntaxError: bad (elsewhere.py:7)"


def test_long_texts_are_cut() -> None:
    said = user_code.describe_error(ValueError("word " * 200))
    assert len(said) < 330 and said.endswith("...")


def test_a_line_is_found_in_the_text_of_a_traceback(plugin: Path) -> None:
    user_code.note_plugin_file(plugin)
    text = f'Error detected in Mul. File "/usr/x/site-packages/torch/a.py", line 3\n  File "{plugin}", line 12, in forward\n'
    assert user_code.find_user_line(text) == f"{plugin}:12"
    assert user_code.find_user_line("nothing") == ""


@pytest.mark.parametrize("method", ["raise SystemExit(3)", "return 3"])
def test_an_error_that_cannot_say_its_text_is_still_described(plugin: Path, method: str) -> None:
    error = run_plugin(plugin, f"class Mute(BaseException):\n    def __str__(self):\n        {method}\n\nraise Mute\n")
    why = "SystemExit" if "raise" in method else "TypeError"
    assert user_code.describe_error(error) == f"Mute: its text cannot be made, {why} ({plugin}:5)"
    assert user_code.describe_failure(error) == f"Mute: its text cannot be made, {why} ({plugin}:5)"
    assert not is_caused_by_full_disk(error) and not is_out_of_threads(error)


def test_ctrl_c_is_nobodys_fault() -> None:
    with pytest.raises(KeyboardInterrupt):
        user_code.pass_interrupt(KeyboardInterrupt())
    user_code.pass_interrupt(SystemExit(3))
