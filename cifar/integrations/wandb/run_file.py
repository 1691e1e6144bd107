"""The file of a W&B run, `run-ID.wandb`: a log of protocol-buffer records in LevelDB's form, behind 7 bytes of W&B's."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32768  # bytes; ":W&B", a magic number and a version; LevelDB's doc/log_format.md
FULL, FIRST, LAST = 1, 2, 4  # kinds of pieces; 3: in the middle


def records(file: Path) -> Iterator[Any]:
    """wandb's protocol.Record, one after the other. Raises OSError, and ValueError for what is damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
    from wandb.proto import wandb_internal_pb2 as protocol

    for content in _contents(file.read_bytes()):
        try:
            yield protocol.Record.FromString(content)  # type: ignore[attr-defined, unused-ignore]
        except DecodeError as error:
            raise ValueError(f"it is damaged: {error}") from None


def wait_for_end(file: Path, seconds: float, writes: Callable[[], bool]) -> bool:
    """Whether the file holds its run's end, waiting for it that long, and only while somebody `writes`.

    wandb-core answers that a run has ended, and writes the last block (all of a short run) after that. A core that is killed
    in between takes it along.
    """
    begun, size, last = time.monotonic(), -1, False
    while True:
        try:
            if size != (size := file.stat().st_size) and any(r.WhichOneof("record_type") == "exit" for r in records(file)):
                return True
        except (OSError, ValueError):  # not there, or half of a record
            size = -1
        if last:
            return False
        time.sleep(0.005 if time.monotonic() < begun + 0.1 else 0.1)
        waited = time.monotonic() - begun
        last = waited > seconds or (waited > 0.1 and not writes())


def _contents(data: bytes) -> Iterator[bytes]:
    """The whole records; a file that is being written, or was cut off, ends with its last whole one."""
    if data[:4] != b":W&B":
        raise ValueError("it is no .wandb file")
    at, begun = HEADER, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # a block's end is filled up with zeros
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        if len(piece) < length or not FULL <= kind <= LAST:
            return
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"it is damaged at byte {at}")
        begun = piece if kind in (FULL, FIRST) else begun + piece
        if kind in (FULL, LAST):
            yield begun
        at += 7 + length
