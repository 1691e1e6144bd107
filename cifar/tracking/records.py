"""What the files of a run's folder may hold: each known field with its kind. Files are checked here when they are read.

A field that is missing or null is always allowed: runs of earlier versions lack some. So are fields that are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cifar.errors import UserError
from cifar.states import RUN_STATES
from cifar.system.files import MAX_INTEGER, check_text, check_values, load_json, shorten_repr

SCHEMA = 1  # of run.json
MAX_NAME, MAX_REASON = 4096, 200_000  # characters
MAX_EPOCH = 10**9
MAX_TIME = 1e11  # seconds since 1970: the year 5138

Check = Callable[[Any], bool]


class UnknownSchemaError(UserError):
    """A file of another version of this program, in a form that this version does not know."""


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME


def is_number(value: Any) -> bool:
    """A number, perhaps NaN or infinite. A truth value is none."""
    return type(value) is float or (type(value) is int and abs(value) <= MAX_INTEGER)


def is_amount(value: Any) -> bool:
    """A finite number of at least 0."""
    return is_number(value) and math.isfinite(value) and value >= 0


def is_count(value: Any) -> bool:
    """A whole number of at least 0. W&B turns such numbers into floats."""
    if type(value) is int:  # nearly always, and asked of every trial
        return 0 <= value <= MAX_INTEGER
    return is_amount(value) and value == int(value)


def is_time(value: Any) -> bool:
    return is_amount(value) and value <= MAX_TIME


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_cost(value: Any) -> bool:
    return isinstance(value, dict) and all(check(value[key]) for key, (_, check) in _COST.items() if value.get(key) is not None)


_TEXT: tuple[str, Check] = ("text", is_text)
_TEXTS: tuple[str, Check] = ("a list of text", is_texts)
_COUNT: tuple[str, Check] = ("a whole number from 0", is_count)
_NUMBER: tuple[str, Check] = ("a number", is_number)
_AMOUNT: tuple[str, Check] = ("a finite number from 0", is_amount)
_TIME: tuple[str, Check] = ("a time in seconds", is_time)
_FLAG: tuple[str, Check] = ("true or false", _is_flag)

_COST = {"macs": _AMOUNT, "params": _COUNT, "activations": _COUNT, "norm_ops": _COUNT, "verified": _FLAG, "note": _TEXT}

# file -> field -> (what it has to be, in words; the check)
FIELDS: dict[str, dict[str, tuple[str, Check]]] = {
    "run": {
        **dict.fromkeys(
            ("id", "name", "group", "project", "entity", "sweep", "engine", "dataset", "command", "description", "artifacts"),
            _TEXT,
        ),
        "tags": _TEXTS,
        "swept": _TEXTS,
        "cell": _COUNT,
        "official": _FLAG,
        "cost": ("the cost of a network", _is_cost),
        "created": _TIME,
    },
    "status": {
        "state": (f"one of {', '.join(RUN_STATES)}", lambda value: value in RUN_STATES),
        "reason": ("text", lambda value: isinstance(value, str) and len(value) <= MAX_REASON),
        "epoch": _COUNT,
        "epochs": _COUNT,
        "time": _TIME,
        "pid": ("the number of a process", lambda value: is_count(value) and value < 2**31),
    },
    "summary": {
        "epochs": _COUNT,
        "seconds": _AMOUNT,
        "seconds_to_test": _AMOUNT,
        "images_per_second": _AMOUNT,
        "macs": _AMOUNT,
        "params": _COUNT,
        "macs_verified": _FLAG,
        **dict.fromkeys(("train_flops", "teacher_flops", "teacher_train_flops", "joules"), _AMOUNT),
        **dict.fromkeys(("latency_seconds", "latency_p5_seconds", "latency_p95_seconds"), _AMOUNT),
        **dict.fromkeys(("weights_bytes", "pack_size", "latency_n"), _COUNT),
        **dict.fromkeys(("joules_missing", "latency_device"), _TEXT),
        "test/views": ("a whole number from 1 to 1000", lambda value: is_count(value) and 1 <= value <= 1000),
    },
    "labels": {"layers": _TEXTS},
    # a sweep's own file
    "sweep": {
        **dict.fromkeys(("id", "name", "method", "dataset", "storage", "runs"), _TEXT),
        "created": _TIME,
        **dict.fromkeys(("cells", "threads", "sweep_seed"), _COUNT),
        "fixed": ("a mapping", lambda value: isinstance(value, dict)),
    },
}
_METRIC_PREFIXES = ("train/", "val/", "test/", "best/", "system/")  # of our own metrics


def check_fields(kind: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first field of a file (`run`, `status`, ...) that is not what it has to be."""
    for name, (what, check) in FIELDS.get(kind, {}).items():
        value = values.get(name)
        if value is not None and not check(value):
            raise ValueError(f"{name} is {_show(name, value)}, not {what}")
    if kind == "summary":
        for name, value in values.items():
            if name.startswith(_METRIC_PREFIXES) and value is not None and not is_number(value):
                raise ValueError(f"{name} is {shorten_repr(value)}, not a number")


def check_all_fields(kind: str, documents: Sequence[Mapping[str, Any]]) -> None:
    """`check_fields` of many files: by columns, which is quicker. The error does not say of which file."""
    checks = dict(FIELDS.get(kind, {}))
    if kind == "summary":
        metrics = [name for name in set().union(*documents) if name.startswith(_METRIC_PREFIXES)]
        checks = {**dict.fromkeys(metrics, _NUMBER), **checks}
    for name, (what, check) in checks.items():
        if not is_column_right([document.get(name) for document in documents], check):
            raise ValueError(f"a {name} is not {what}")


def is_column_right(values: Sequence[Any], check: Check) -> bool:
    """Whether all values that are not None pass the check. Equal ones are checked once."""
    kinds = set(map(type, values)) - {type(None)}
    is_plain = len(kinds) == 1 and kinds <= {str, int, float, bool}  # of other types, values that are equal may differ
    return all(check(value) for value in (set(values) if is_plain else values) if value is not None)


def _show(name: str, value: Any) -> str:
    if name == "cost" and isinstance(value, dict):
        wrong = next(key for key, (_, check) in _COST.items() if value.get(key) is not None and not check(value[key]))
        return f"{{{wrong}: {shorten_repr(value[wrong])}}}"
    return shorten_repr(value)


def parse_rows(content: bytes) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl -> rows. Raises ValueError that names the line.

    Our own metrics are numbers in every row. What follows the last newline is still being written, and is left out.
    """
    from pydantic_core import from_json

    lines = content.split(b"\n")[:-1]
    try:
        rows = list(map(from_json, lines))  # in a quarter of the time of the json module
        is_read = True
    except ValueError:  # json accepts a little more, and its errors say better what is wrong
        rows, is_read = [], False
    is_plain = is_read and content.isascii() and b"\\" not in content  # so every name can be written
    for number, line in enumerate(lines, start=1):
        try:
            if not is_read:
                rows.append(load_json(line))
            row = rows[number - 1]
            if not is_plain or not _is_plain_row(row):
                _check_row(row)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


_NUMBER_TYPES = {int, float}


def _is_plain_row(row: Any) -> bool:
    """Whether a row of plain names is certainly right. Quick, as rows have many values."""
    if type(row) is not dict or not set(map(type, row.values())) <= _NUMBER_TYPES:
        return False
    try:
        sum(row.values(), 0.0)
    except OverflowError:  # a whole number that no float holds
        return False
    epoch = row.get("epoch", 0)
    return type(epoch) is int and 0 <= epoch <= MAX_EPOCH


def _check_row(row: Any) -> None:
    if type(row) is not dict:
        raise ValueError("it is no row")
    values = row.values()
    if not set(map(type, values)) <= _NUMBER_TYPES:
        for name, value in row.items():
            if name.startswith(_METRIC_PREFIXES) and not is_number(value):
                raise ValueError(f"{shorten_repr(name)} is {shorten_repr(value)}, not a number")
            if isinstance(value, list | dict):
                check_values(value)
    for value in values:
        if type(value) is int and not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise ValueError("a whole number with too many digits")
    for name in row:
        if not name.isascii():
            check_text(name)
    epoch = row.get("epoch", 0)
    if not is_count(epoch) or epoch > MAX_EPOCH:
        raise ValueError(f"epoch is {shorten_repr(epoch)}, not a whole number from 0")
