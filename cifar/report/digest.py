"""A digest of all that something is made from: the same digest, the same result."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import platform
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = Path(__file__).parents[1]  # its files say how things are made: the report's, and what these use


def compute_digest(*values: Any) -> str:
    """SHA-256 of values, to the last bit and with their types: numbers, texts, lists, mappings, arrays, dataclasses of these.

    "" where another kind of value is among them, of which nobody knows what it is.
    """
    digest = hashlib.sha256()
    try:
        for part in _describe(values):
            digest.update(part)
    except TypeError:
        return ""
    return digest.hexdigest()


def _describe(value: Any) -> Iterator[bytes]:
    """The value as bytes that no other value has. Raises TypeError for one of another kind."""
    kind = type(value)
    if kind is np.ndarray and value.dtype.kind in "biuf":
        yield f"array {value.dtype.str} {value.shape} ".encode()
        yield value.tobytes()
    elif kind is dict:
        yield from _describe_items([*value.items()], "dict")
    elif kind is list or kind is tuple:
        yield from _describe_items(value, kind.__name__)
    elif kind in _PLAIN or is_dataclass(kind):
        yield from _describe_items([value], "")
    else:
        raise TypeError(kind)


def _describe_items(items: Sequence[Any], name: str) -> Iterator[bytes]:
    """Many values of one kind are written by columns, as that takes a tenth of the time."""
    kinds = set(map(type, items))
    yield f"{name} {len(items)} {' '.join(sorted(kind.__qualname__ for kind in kinds))} ".encode()
    if kinds == {float}:
        yield array("d", items).tobytes()
    elif kinds <= _PLAIN:
        text = repr([*items]).encode()
        yield b"%d %s" % (len(text), text)
    elif kinds in ({list}, {tuple}):
        yield from _describe_items([*map(len, items)], "lengths")
        yield from _describe_items([*itertools.chain.from_iterable(items)], "items")
    elif len(kinds) == 1 and is_dataclass(kind := kinds.pop()):
        for field in fields(kind):
            yield from _describe_items([*map(attrgetter(field.name), items)], field.name)
    else:
        for item in items:
            yield from _describe(item)


_PLAIN = {bool, int, float, str, type(None)}


@functools.cache
def digest_program() -> str:
    """Of the program: its own files, Python, numpy, the machine. "" where its files cannot be read."""
    digest = hashlib.sha256(f"{sys.version} {np.__version__} {platform.machine()} {os.name}".encode())
    try:
        for file in sorted(PACKAGE.rglob("*.py")):
            digest.update(f"{file.relative_to(PACKAGE)}\n".encode() + file.read_bytes())
    except OSError:
        return ""
    return digest.hexdigest()


def find_versions(*packages: str) -> dict[str, str]:
    """The versions of installed packages, "" for those that are not there."""
    found = dict.fromkeys(packages, "")
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
