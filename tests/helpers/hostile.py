"""Damaged and hostile inputs: valid documents with a few bytes or values changed, and what may stand in a file's place."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

MAX_SECONDS = 10  # of processor time for one input
MAX_MORE_BYTES = 2**30  # of address space for one input
BIG = 10_000_000  # bytes

# Values as JSON or YAML may have them where another kind is expected.
HOSTILE_VALUES: list[Any] = [
    None, True, False, 0, -1, -0.0, 1.5, float("inf"), float("-inf"), float("nan"), 1e300, 1e-320, 10**25, 10**299,
    -(10**299), 2**63, 2**31, "", "x", "1", "-5", "nan", "\x1b[31m", "a\nb", "../../x", "é✓", "=1+1", "x" * 5000,
    [], {}, [[]], [1, "x"],
    {"x": {"y": 1}},
    ["x"] * 300, {"values": [1, 2]}, [None], {"": 0}, "0x10", "2020-13-45", "/dev/zero", "resnet20", "sgd",
]  # fmt: skip
# Text that no serialiser writes.
HOSTILE_TOKENS = [
    b"Infinity", b"-Infinity", b"NaN", b"1e400", b"-1e400", b"9" * 400, b"9" * 5000, b'"\\ud800"', b'"\\u0000"',
    b"[" * 1000, b"[" * 100_000, b"{" * 1000, b'{"a":' * 1000, b"&a [*a]", b"*b", b"<<: *a", b"<<: 1", b"? [a]\n: 1", b"[a]: 1",
    b"!!int abc",
    b"!!python/object:os.system x", b"!!timestamp x", b"2020-13-45", b"0x_", b"1_000", b"0x40", b"1:30", b"\x00",
    b"\xff\xfe", b"\xef\xbb\xbf",
    b"'", b'"', b"#", b"|", b">", b"%", b"@", b"`", b"- " * 200, b"? " * 200, b"\t", b"\r", b"...", b"---", b": ", b", ",
    b"}", b"]",
    b"min: 0", b"max: .inf", b"mu: 1000", b"distribution: [a]", b"distribution: log_normal", b"distribution: beta",
    b"q: 1.0e-300",
    b"run_cap: 999999999999", b"method: custom", b"method: bayes", b"depth=100000", b"values: []", b"probabilities: [1]",
]  # fmt: skip
KINDS = ("folder", "pipe", "device", "link to nothing", "link to itself", "socket", "nothing", "empty")
BIG_DOCUMENTS: dict[str, Callable[[], bytes]] = {  # made where they are needed: they take a second
    "zeros": lambda: bytes(BIG),
    "brackets": lambda: b"[" * BIG,
    "pairs of brackets": lambda: b"[" + b"[]," * (BIG // 3) + b"[]]",
    "a string": lambda: b'{"name": "' + b"x" * BIG + b'"}',
    "digits": lambda: b'{"epoch": ' + b"9" * BIG + b"}",
    "lines": lambda: b'{"epoch": 1}\n' * (BIG // 13),
    "other keys in each line": lambda: b"".join(b'{"epoch":1,"a/%d":1}\n' % i for i in range(BIG // 24)),
    "keys": lambda: b"{" + b",".join(b'"k%d":1' % i for i in range(BIG // 13)) + b"}",
    "a list": lambda: b"a: [" + b"1, " * (BIG // 3) + b"1]",
    "dashes": lambda: b"- " * (BIG // 2),
    "anchors": lambda: b"".join(b"a%d: &a%d 1\n" % (i, i) for i in range(BIG // 20)),
    "noise": lambda: bytes((i * 2654435761 >> 13) & 255 for i in range(1 << 16)) * (BIG >> 16),
}


@dataclass(frozen=True)
class Edit:
    """One change of a document's bytes, at a place and of a length that are shares of the whole."""

    kind: str  # delete, repeat, flip, insert, cut
    place: float
    length: float
    content: bytes = b""

    def apply(self, data: bytes) -> bytes:
        start = int(self.place * len(data))
        end = min(start + 1 + int(self.length * (len(data) - start)), len(data))
        if self.kind == "delete":
            return data[:start] + data[end:]
        if self.kind == "repeat":
            return data[:end] + data[start:end] * 3 + data[end:]
        if self.kind == "flip":
            return data[:start] + bytes(byte ^ (1 << (start % 8)) for byte in data[start : start + 1]) + data[start + 1 :]
        if self.kind == "insert":
            return data[:start] + self.content + data[start:]
        if self.kind == "replace":
            return data[:start] + self.content + data[end:]
        return data[:start]


@dataclass(frozen=True)
class Input:
    """What a reader is given: `data`, or if `kind` is not empty, what stands in the file's place."""

    data: bytes = b""
    kind: str = ""

    def __repr__(self) -> str:
        shown = self.kind or (f"{self.data[:200]!r}... of {len(self.data)}" if len(self.data) > 200 else repr(self.data))
        return f"Input({shown})"


def edits() -> st.SearchStrategy[Edit]:
    share = st.floats(0, 0.999)
    short = st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.1, 0.5, 0.999])
    content = st.sampled_from(HOSTILE_TOKENS) | st.binary(max_size=8)
    kinds = st.sampled_from(["delete", "repeat", "flip", "insert", "replace", "cut"])
    return st.builds(Edit, kinds, share, short, content)


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """One of the seeds with one to four edits."""
    data = draw(st.sampled_from(seeds))
    for edit in draw(st.lists(edits(), min_size=1, max_size=4)):
        data = edit.apply(data)
    return data


@st.composite
def replaced_value(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A JSON seed in which one value, chosen anywhere, is another one, or one key is gone or new."""
    document = json.loads(draw(st.sampled_from(seeds)))
    places: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        item = waiting.pop()
        for key in list(item) if isinstance(item, dict) else range(len(item)):
            places.append((item, key))
            if isinstance(item[key], dict | list):
                waiting.append(item[key])
    for _ in range(draw(st.integers(1, 3))):
        if places:
            holder, key = draw(st.sampled_from(places))
            with contextlib.suppress(IndexError, KeyError):
                action = draw(st.sampled_from(["set", "set", "set", "remove", "add"]))
                if action == "remove":
                    del holder[key]
                elif action == "add" and isinstance(holder, dict):
                    holder[draw(st.sampled_from(["", "x", "schema", "epoch", "layers", "\udcff", "k" * 300]))] = draw(
                        st.sampled_from(HOSTILE_VALUES)
                    )
                else:
                    holder[key] = draw(st.sampled_from(HOSTILE_VALUES))
    return json.dumps(document).encode()


def inputs(*seeds: bytes, is_json: bool = False, is_file: bool = True) -> st.SearchStrategy[Input]:
    """Inputs for a reader whose valid documents are `seeds`. is_json: values are replaced too; is_file: file kinds too."""
    of_bytes = [mutated(seeds).map(Input), st.binary(max_size=100).map(Input), st.sampled_from(HOSTILE_TOKENS).map(Input)]
    chosen = [of_bytes[0]] * 6 + of_bytes[1:]
    if is_json:
        chosen += [replaced_value(seeds).map(Input)] * 8
    if is_file:
        chosen.append(st.sampled_from(KINDS).map(lambda kind: Input(kind=kind)))
    return st.one_of(chosen)


def place_input(given: Input, path: Path) -> None:
    """Put an input in the place of a file."""
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if given.kind == "folder":
        path.mkdir()
        (path / "inside").write_text("x")
    elif given.kind == "pipe":
        os.mkfifo(path)
    elif given.kind == "device":
        path.symlink_to("/dev/zero")
    elif given.kind == "link to nothing":
        path.symlink_to("/nowhere/at/all")
    elif given.kind == "link to itself":
        path.symlink_to(path)
    elif given.kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # a socket's path has at most 107 bytes
            server.bind(path.name)
    elif given.kind != "nothing":
        path.write_bytes(given.data)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


class TooLate(BaseException):
    """A reader has used MAX_SECONDS of processor time. No `except Exception` catches it."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise TooLate after MAX_SECONDS of processor time; more than MAX_MORE_BYTES of new memory cannot be had."""

    def stop(*_: object) -> None:
        raise TooLate

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MORE_BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def make_wandb_file(*records: bytes) -> bytes:
    """A .wandb file of these records: protocol buffers in LevelDB's log format, each in as many pieces as its length takes."""
    data = bytearray(b":W&B\xe1\xbe\x00")
    for record in records:
        start, is_first = 0, True
        while is_first or start < len(record):
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                continue
            piece = record[start : start + room - 7]
            start += len(piece)
            is_last = start == len(record)
            kind = (1 if is_last else 2) if is_first else (4 if is_last else 3)
            data += struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece
            is_first = False
    return bytes(data)
