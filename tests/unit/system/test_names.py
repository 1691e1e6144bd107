"""Ids are names of folders and of nothing else; what is printed moves no cursor."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar.errors import UserError
from cifar.system.names import check_id, escape_controls, escape_in_json, is_id

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", ["abc", "3k9x2m1p-004", "my-run_1.2", "_x", "Größe 3", "a..b", "x" * 128])
def test_these_are_ids(text: str) -> None:
    assert check_id(text, "the run") == text


@pytest.mark.parametrize(
    "text",
    [
        "..",
        ".",
        "../x",
        "../../x",
        "a/b",
        "a\\b",
        "/tmp/x",
        ".hidden",
        "-rf",
        "a\nb",
        "a\x1b[31m",
        "a\0b",
        "x" * 129,
        " a",
        "a ",
        "a\u202eb",
        "~",
        "$HOME",
        "sweeps",
        "report",
        "a:b",
        "\udc9b",
        "%2e%2e%2f",
        "_",
    ],
)
def test_these_are_not(text: str) -> None:
    with pytest.raises(UserError, match=r"no id") as error:
        check_id(text, "the run")
    assert not UNSAFE.search(str(error.value))


@pytest.mark.parametrize("text", ["", " ", "\n", "\t "])
def test_an_empty_id_is_said(text: str) -> None:
    with pytest.raises(UserError, match="WANDB_RUN_ID is empty"):
        check_id(text, "WANDB_RUN_ID")


@given(st.text(st.characters()))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert not UNSAFE.search(escape_controls(text))
    assert set(UNSAFE.findall(escape_controls(text, keeps_lines=True))) <= {"\n", "\t"}
    escape_controls(text).encode()  # it can be printed
    document = escape_in_json(json.dumps([text], ensure_ascii=False))
    assert json.loads(document) == [text] and not UNSAFE.search(document)


@pytest.mark.parametrize("text", ["plain", "Größe 3 · ± 0.1 ✓", "日本語", "👩‍🔬", "a b"])
def test_other_text_stays(text: str) -> None:
    assert escape_controls(text) == text


def test_what_is_escaped_can_be_read() -> None:
    assert escape_controls("a\x1b[31mb\x9b\u202e\n\t") == "a\\x1b[31mb\\x9b\\u202e\\n\\t"


@given(st.text(st.characters(), max_size=20))
def test_an_id_has_no_way_out(text: str) -> None:
    if is_id(text):
        assert "/" not in text and "\\" not in text and not text.startswith(".") and text.strip() and text.isprintable()
