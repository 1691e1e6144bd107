"""Files are read whole or refused in a few words, and nothing that could be waited for is opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar.system.files import (
    MAX_DEPTH,
    MissingFileError,
    UnreadableFileError,
    parse_json,
    read_arrays,
    read_bytes,
    read_text,
    shorten_repr,
)
from helpers import hostile

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**299), 10**299) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_what_is_in_a_file_is_read(tmp_path_factory: pytest.TempPathFactory, content: bytes, start: int) -> None:
    path = tmp_path_factory.getbasetemp() / "one"
    path.write_bytes(content)
    assert read_bytes(path, start=start) == content[start:]
    assert read_bytes(path, max(len(content), 1)) == content


def test_a_file_of_proc_has_no_size_and_is_read() -> None:
    assert read_bytes("/proc/self/status").startswith(b"Name:")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("folder", "a folder"),
        ("pipe", "a named pipe"),
        ("device", "a device"),
        ("socket", "a socket"),
        ("link to itself", "level"),
    ],
)
def test_what_is_no_file_is_said(tmp_path: Path, kind: str, said: str) -> None:
    hostile.place_input(hostile.Input(kind=kind), tmp_path / "one")
    with pytest.raises(UnreadableFileError, match=said) as caught:
        read_bytes(tmp_path / "one")
    assert not isinstance(caught.value, MissingFileError) and str(tmp_path / "one") in str(caught.value)


@pytest.mark.parametrize("kind", ["nothing", "link to nothing"])
def test_no_file_is_told_from_a_damaged_one(tmp_path: Path, kind: str) -> None:
    hostile.place_input(hostile.Input(kind=kind), tmp_path / "one")
    with pytest.raises(MissingFileError):
        read_bytes(tmp_path / "one")


def test_a_larger_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(1001))
    with pytest.raises(UnreadableFileError, match="1,001 bytes are more than the 1,000"):
        read_bytes(tmp_path / "one", 1000)
    assert len(read_bytes(tmp_path / "one", 1001)) == 1001


def test_text_that_is_no_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"abc\xff")
    with pytest.raises(UnreadableFileError, match="byte 3"):
        read_text(tmp_path / "one")


@given(JSON)
def test_json_is_read_as_python_reads_it(value: object) -> None:
    text = json.dumps(value)
    assert repr(parse_json(text)) == repr(json.loads(text)) == repr(parse_json(text.encode()))


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 500, 5000, 500_000])
def test_the_depth_of_json_is_bounded(depth: int) -> None:
    if depth < MAX_DEPTH:
        parse_json("[" * depth + "]" * depth)
        return
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * depth + "[]" + "]" * depth)


@pytest.mark.parametrize("text", ["9" * 400, "-" + "9" * 302, "9" * 5000, '["\\ud800"]', '{"\\udfff": 1}', b'"\xff"', "[1", ""])
def test_json_that_cannot_be_handled_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200 and type(caught.value) is ValueError


def test_arrays_are_read_and_bombs_are_not(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    np.savez_compressed(path, a=np.arange(5))
    assert read_arrays(path, 1000)["a"].tolist() == [0, 1, 2, 3, 4]
    np.savez_compressed(path, a=np.zeros(10**7, np.uint8))
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match="unpacks to more than"):
        read_arrays(path, 10**6)
    np.savez(path, a=np.array([{}]))
    with pytest.raises(ValueError):
        read_arrays(path, 10**6)
    os.truncate(path, 100)
    with pytest.raises(ValueError, match="BadZipFile"):
        read_arrays(path, 10**6)


@given(st.text(max_size=3000) | st.integers() | st.lists(st.integers(), max_size=500))
def test_a_value_in_a_message_is_short(value: object) -> None:
    assert len(shorten_repr(value)) <= 60 and "\n" not in shorten_repr(value)
