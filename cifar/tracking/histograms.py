"""histograms.jsonl of a run's folder: how the gradients and the weight updates of each layer were distributed, by epoch.

A line is one epoch that was looked at:

    {"epoch": 1, "steps": 8, "gradients": {"conv1": {"top": 0.5, "counts": [0, ...]}}, "updates": {...}}

steps: how many steps of the epoch were counted. counts: 64 numbers, how many values fell into each bin. The bins are symmetric
about zero, and each power of two is cut in half: the edges are 0, ±top/2^15 ..., ±top/2, ±0.75 top, ±top (`bin_edges`). So the
bins tell apart 4.7 powers of ten, and the two in the middle hold what is smaller, zero in the right one. top is the smallest
edge that no value reaches. A value that is an edge belongs to the bin away from zero.

The line of an epoch is written before its row of metrics.jsonl, and is cut off with it. This module does not import PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cifar.errors import UserError
from cifar.system.files import MissingFileError, UnreadableFileError, parse_json, read_bytes
from cifar.system.redact import redact

if TYPE_CHECKING:
    from cifar.tracking.run_dir import RunDir

FILE = "histograms.jsonl"
KINDS = ("gradients", "updates")
NUM_BINS = 64
MAX_BYTES = 64 * 2**20  # of the file: what does not fit is left out. ResNet-56 has 25 kB an epoch
MIN_TOP, MAX_TOP = 2.0**-110, 2.0**127  # between them all edges are normal 32-bit floats
NUM_LOOKED_AT = 22  # epochs, with `histograms: on`: the first, the last and 20 between


def is_looked_at(epoch: int, epochs: int, histograms: str) -> bool:
    """Whether an epoch of a run of so many gets histograms. It depends on nothing else, so a resumed run looks at the same.

    histograms: the configuration's key: "off", "every", or "on" for at most NUM_LOOKED_AT epochs, evenly apart.
    """
    if histograms == "off":
        return False
    if histograms == "every" or epochs <= NUM_LOOKED_AT:
        return True
    gaps = NUM_LOOKED_AT - 1
    return any(epoch == 1 + (2 * k * (epochs - 1) + gaps) // (2 * gaps) for k in range(NUM_LOOKED_AT))


def bin_edges(top: float) -> list[float]:
    """The 65 edges of the bins whose outermost are -top and top. top: a power of two, or 0.75 of one."""
    highest = struct.unpack("<I", struct.pack("<f", top))[0] >> 22  # sign, exponent and first bit of the mantissa
    half = NUM_BINS // 2
    upper = [struct.unpack("<f", struct.pack("<I", code << 22))[0] for code in range(highest - half + 1, highest + 1)]
    return [*(-edge for edge in reversed(upper)), 0.0, *upper]


# -- writing -----------------------------------------------------------------------------------------------------------


def append_histograms(run_dir: RunDir, line: Mapping[str, Any]) -> bool:
    """Add the line of an epoch; it is on disk when this returns. False if the file has grown too large for it."""
    clean = {key: _redact_layers(value) if key in KINDS else value for key, value in line.items()}
    content = json.dumps(clean, separators=(",", ":")).encode() + b"\n"
    path = run_dir.path / FILE
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size + len(content) > MAX_BYTES:
            return False
    run_dir.append_bytes(FILE, content)
    return True


def _redact_layers(layers: Mapping[str, Any]) -> dict[str, Any]:
    return {redact(layer): histogram for layer, histogram in layers.items()}


def cut_histograms(run_dir: RunDir, last_epoch: int) -> None:
    """Cut off the lines after an epoch, and a last line that was never finished."""
    try:
        content = read_bytes(run_dir.path / FILE, MAX_BYTES)
    except MissingFileError:
        return
    length = 0
    for line in content.splitlines(keepends=True):
        found = re.match(rb'\{"epoch":(\d{1,10}),', line)
        if not found or int(found[1]) > last_epoch or not line.endswith(b"\n"):
            break
        length += len(line)
    if length < len(content):
        run_dir.cut_file(FILE, length)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_histograms(run_dir: RunDir) -> Iterator[dict[str, Any]]:
    """The lines, checked. A last line without a newline is still being written, and is left out.

    Raises UserError that says what is damaged.
    """
    path = run_dir.path / FILE
    try:
        content = read_bytes(path, MAX_BYTES)
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                parsed = parse_json(line)
                check_line(parsed)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            yield parsed
    except MissingFileError:
        return
    except (UnreadableFileError, ValueError) as error:
        reason = error.reason if isinstance(error, UnreadableFileError) else str(error)
        raise UserError(f"{path} is damaged ({reason}); delete it: the run can do without") from None


def check_line(line: Any) -> None:
    """Raise ValueError for a line that is none of ours."""
    if not isinstance(line, dict) or type(line.get("epoch")) is not int or line["epoch"] < 1:
        raise ValueError("it is not the line of an epoch")
    for kind in KINDS:
        layers = line.get(kind, {})
        if not isinstance(layers, dict) or not all(map(_is_histogram, layers.values())):
            raise ValueError(f"{kind} are no histograms")


def _is_histogram(value: Any) -> bool:
    counts, top = (value.get("counts"), value.get("top")) if isinstance(value, dict) else (None, None)
    return (
        isinstance(counts, list)
        and len(counts) == NUM_BINS
        and all(type(count) is int and count >= 0 for count in counts)
        and isinstance(top, int | float)
        and MIN_TOP <= top <= MAX_TOP
        and bin_edges(top)[-1] == top
    )
