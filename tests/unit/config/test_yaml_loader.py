"""YAML: scalars are read as people mean them, and every mistake names its place."""

from __future__ import annotations

import json
import subprocess
import sys
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
     ("12", 12), ("1_0", 10), ("v1e3", "v1e3"), ("null", None), ("[1e-3, no]", [1e-3, "no"])],
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


MERGED = """
low: &low {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}
other: &other {max: 5, s: 1}
one: {<<: *low, max: 1.0e-2}
two: {<<: [*other, *low], min: 2}
three: {min: 3, <<: *low}
four: {<<: &four {<<: *low, min: 4}, max: 4}
five: *four
six: {<<: *low, <<: *other}
"""


@pytest.mark.parametrize(
    "text",
    [
        MERGED,
        "1_000",
        "0x40",
        "-0x1F",
        "0b1010",
        "+1_0",
        "1_000.5",
        "-1_0.2_5",
        "[0xFF, 2_0]",
        "a: &x [1, 2]\nb: *x",
        "2020-12-25",
        "!!int 0x10",
        "!!float 1",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!binary aGk=",
        "{=: 1}",
        "? a\n: b",
        "&a a: *a",
        "~",
        "",
        "0",
        "-0",
        ".5",
        "1.",
        "-.inf",
        "'1_0'",
        '"0x40"',
        "1_0_",
        "{a: {<<: {b: 1}}}",
        "<<: {a: 1}\nb: 2",
    ],
)
def test_what_pyyaml_reads_is_read_as_pyyaml_reads_it(text: str) -> None:
    ours, theirs = parse_yaml(text, "here"), yaml.safe_load(text)
    assert ours == theirs and repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("010", "010"),
        ("-010", "-010"),
        ("off", "off"),
        ("0o10", "0o10"),
        ("1e5", 1e5),
        ("1_0e5", "1_0e5"),
        ("0x", "0x"),
        ("0xG", "0xG"),
        ("_1", "_1"),
        ("1__0", 10),
        ("{<<: {a: 1}, a: 2}", {"a": 2}),
        ("m: &m {b: 1}\nn: {b: 3, <<: *m}", {"m": {"b": 1}, "n": {"b": 3}}),
    ],
)
def test_what_stays_text_and_what_wins(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value and type(parse_yaml(text, "here")) is type(value)


def bomb(levels: int, fan: int, form: str) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {form.format(', '.join([f'*a{i - 1}'] * fan))}" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]: 1", "cannot be a key"),
        ("{a: 1}: 2", "cannot be a key"),
        ("? [a]\n: 1", "cannot be a key"),
        ("lr: 2020-13-45", "kind"),
        ("!!int abc", "kind 'int'"),
        ("!!float x", "kind"),
        ("!!bool 2", "kind"),
        ("!!timestamp x", "kind"),
        ("0x_", "kind"),
        ("9" * 5000, "5,000 digits"),
        ("a: -" + "9" * 400, "401 digits"),
        ("0x" + "f" * 400, "digits"),
        ("[" * 1000, "deeply"),
        ("{a: " * 60 + "1" + "}" * 60, "deeply"),
        ("- " * 1000, "deeply"),
        ("? " * 1000, "deeply"),
        ("[" * 100_000 + "]" * 100_000, "deeply"),
        ("&a [*a]", "inside of what it names"),
        ("&a {b: [*a]}", "inside"),
        ("a: *b", "undefined"),
        (bomb(12, 9, "[{}]"), "aliases"),
        (bomb(12, 9, "{{<<: [{}]}}"), "aliases"),
        (bomb(60, 1, "[[[[{}]]]]"), "deeply"),
        ("<<: 1", "merging"),
        ("<<: [1]", "merging"),
        ("a: 1\n0: 1\n0x0: 2", "twice"),
        ("1: a\n1.0: b", "twice"),
        ("\udcff", "Unicode"),
        ('"\\ud800"', "YAML"),
        ("a: \x00", "YAML"),
        ("a: 1\n<<: {c: 1}\na: 2", "twice"),
        ("x" * 3_000_000, "characters"),
        ("[" + "1, " * 150_000 + "1]", "values"),
        ("\n".join(f"{i * (2**61 - 1)}: 1" for i in range(2000)), "keys that are not text"),
        ("--- 1\n--- 2", "document"),
        ("%X", "YAML"),
    ],
)
def test_hostile_yaml_is_one_short_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match="here") as caught:
        parse_yaml(text, "here")
    assert said in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.yaml", "binary.yaml"):
        with pytest.raises(UserError, match=name):
            read_yaml(tmp_path / name)


WITHOUT_LIBYAML = """
import json, sys, yaml
del yaml.CSafeLoader
yaml.__with_libyaml__ = False
from cifar.config.yaml_loader import parse_yaml
from cifar.errors import UserError
found = []
for text in json.load(sys.stdin):
    try:
        found.append(parse_yaml(text, "here"))
    except UserError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_a_pyyaml_without_libyaml_reads_the_same() -> None:
    texts = ["{lr: 1e-5, nesterov: on}", "a: &x {b: 1}\nc: {<<: *x, d: 2}", "- &x [1, 2]\n- *x", "a: 1\na: 2", "a: [1"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBYAML], input=json.dumps(texts), capture_output=True, text=True, check=True, timeout=60
    )
    *read, twice, broken = json.loads(done.stdout)
    assert read == [{"lr": 1e-5, "nesterov": "on"}, {"a": {"b": 1}, "c": {"b": 1, "d": 2}}, [[1, 2], [1, 2]]]
    assert "stands twice" in twice
    assert "not valid YAML" in broken
