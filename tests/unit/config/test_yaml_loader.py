"""YAML: scalars are read as people mean them, and every mistake names its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cifar.config.yaml_loader import parse_yaml, read_yaml
from cifar.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("3E4", 3e4), ("-2e+3", -2e3), ("on", "on"), ("yes", "yes"), ("true", True), ("1.5", 1.5), (".5", 0.5),
     ("12", 12), ("1_0", "1_0"), ("v1e3", "v1e3"), ("null", None), ("[1e-3, no]", [1e-3, "no"])],
)  # fmt: skip
def test_scalars_are_read_as_people_mean_them(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value
    assert type(parse_yaml(text, "here")) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**40), 2**40) | st.booleans())
def test_numbers_survive_yaml(value: float | int | bool) -> None:
    assert parse_yaml(yaml.safe_dump(value).removesuffix("...\n"), "here") == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not valid YAML"),
        ("a: 1\na: 2", "stands twice"),
        ("a:\n\t- 1", "line 2"),
        ("!!python/object:os.system x", "YAML"),
    ],
)
def test_bad_yaml_names_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.yaml", "binary.yaml"):
        with pytest.raises(UserError, match=name):
            read_yaml(tmp_path / name)
