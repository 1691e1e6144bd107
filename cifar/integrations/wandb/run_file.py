"""Reads the file of a W&B run, `run-ID.wandb`: 7 bytes of W&B's, then protocol-buffer records in LevelDB's log format."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cifar.system.files import UnreadableFileError, read_bytes

HEADER_BYTES, BLOCK_BYTES = 7, 32768  # header: ":W&B", a magic number, a version; blocks: LevelDB's doc/log_format.md
MAX_BYTES = 2**30
FULL, FIRST, LAST = 1, 2, 4  # kinds of pieces of a record; 3 is one in the middle


def read_records(file: Path) -> Iterator[Any]:
    """Yield wandb's `protocol.Record`s. Raises OSError, and ValueError if the file is damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
    from wandb.proto import wandb_internal_pb2 as protocol

    try:
        data = read_bytes(file, MAX_BYTES)
    except UnreadableFileError as error:
        raise OSError(error.reason) from None
    for content in _read_payloads(data):
        try:
            yield protocol.Record.FromString(content)  # type: ignore[attr-defined, unused-ignore]
        except DecodeError as error:
            raise ValueError(f"it is damaged: {error}") from None


def wait_for_exit_record(file: Path, seconds: float, is_being_written: Callable[[], bool]) -> bool:
    """Wait until the file holds the run's end, for `seconds` at most and only while it is being written -> whether it does.

    wandb-core first answers that a run has ended, and then writes the last block (the whole file of a short run). If it is
    killed in between, that block is lost.
    """
    started, size, is_last_look = time.monotonic(), -1, False
    while True:
        try:
            if size != (size := file.stat().st_size) and any(r.WhichOneof("record_type") == "exit" for r in read_records(file)):
                return True
        except (OSError, ValueError):  # no file yet, or an incomplete record
            size = -1
        if is_last_look:
            return False
        time.sleep(0.005 if time.monotonic() < started + 0.1 else 0.1)
        waited = time.monotonic() - started
        is_last_look = waited > seconds or (waited > 0.1 and not is_being_written())


def _read_payloads(data: bytes) -> Iterator[bytes]:
    """Yield the complete records as bytes. If the file is being written or was cut off, the last part is ignored."""
    if data[:4] != b":W&B":
        raise ValueError("it is no .wandb file")
    offset, pieces = HEADER_BYTES, list[bytes]()
    while offset + 7 <= len(data):
        block_left = BLOCK_BYTES - offset % BLOCK_BYTES
        if block_left < 7:  # the rest of a block that is too short for a piece's header is zeros
            offset += block_left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, offset)
        piece = data[offset + 7 : offset + 7 + length]
        if len(piece) < length or not FULL <= kind <= LAST:
            return
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"it is damaged at byte {offset}")
        if kind in (FULL, FIRST):
            pieces = []
        pieces.append(piece)
        if kind in (FULL, LAST):
            yield b"".join(pieces)
        offset += 7 + length
