"""Reading files that may be damaged, hostile, or no files at all. Sizes and depths are bounded; nothing here waits.

A named pipe, a device or a folder in a file's place is refused before it is opened, because opening it could wait for ever.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any, BinaryIO

from cifar.errors import UserError

MIB = 2**20
MAX_TEXT_BYTES = 4 * MIB  # of a YAML or JSON file that people or this program write: a thousand times what one has
MAX_DEPTH = 50  # of lists and mappings in each other
MAX_INTEGER = 10**300  # the next power of ten that a float holds is 10**308
MAX_SHOWN = 60  # characters of a wrong value in a message

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class UnreadableFileError(UserError):
    """A file that cannot be read. `reason` is a few words, for a message that says what the file is for."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)} cannot be read ({reason}); check the path")
        self.reason = reason


class MissingFileError(UnreadableFileError):
    """There is no such file, or it is a link to nothing."""


def open_file(path: str | os.PathLike[str], max_bytes: int) -> BinaryIO:
    """Open a regular file of at most `max_bytes` bytes. Raises UnreadableFileError, for no file MissingFileError."""
    return os.fdopen(_open_handle(path, max_bytes)[0], "rb")


def read_bytes(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES, *, start: int = 0) -> bytes:
    """A file's content from byte `start`. Raises UnreadableFileError, for no file MissingFileError."""
    handle, size = _open_handle(path, max_bytes)
    try:
        if start:
            os.lseek(handle, start, os.SEEK_SET)
        content = os.read(handle, max(size - start, 0) + 1)
        while len(content) <= max_bytes and (more := os.read(handle, MIB)):  # it grows, or it is one of /proc
            content += more
    except OSError as error:
        raise UnreadableFileError(path, (error.strerror or str(error)).lower()) from None
    finally:
        os.close(handle)
    if len(content) > max_bytes:
        raise UnreadableFileError(path, f"it has more than the {max_bytes:,} bytes that one may have")
    return content


def _open_handle(path: str | os.PathLike[str], max_bytes: int) -> tuple[int, int]:
    """A descriptor of a regular file, and the file's size."""
    try:
        _check_kind(path, os.stat(path))  # before it is opened: opening a device can already do something
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise MissingFileError(path, "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UnreadableFileError(path, (getattr(error, "strerror", None) or str(error)).lower()) from None
    try:
        status = os.fstat(handle)
        _check_kind(path, status)
        if status.st_size > max_bytes:
            raise UnreadableFileError(path, f"its {status.st_size:,} bytes are more than the {max_bytes:,} that one may have")
    except BaseException:
        os.close(handle)
        raise
    return handle, status.st_size


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A text file's content. Raises UnreadableFileError, also for bytes that are not UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableFileError(path, f"not UTF-8 text: byte {error.start}") from None


def read_arrays(path: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The arrays of a .npz file that unpacks to at most `max_bytes`; pickled objects are refused.

    Raises UnreadableFileError, and ValueError for a damaged file.
    """
    import zipfile

    import numpy

    with open_file(path, max_bytes) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if sum(member.file_size for member in archive.infolist()) > max_bytes:
                    raise ValueError(f"it unpacks to more than {max_bytes:,} bytes")
            file.seek(0)
            with numpy.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # zipfile, zlib and numpy each raise their own
            raise ValueError(str(error) if type(error) is ValueError else type(error).__name__) from None


def is_regular_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file that can be opened without waiting. No error, whatever is there."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def parse_json(content: bytes | str) -> Any:
    """JSON -> values that can be handled and written again. Raises ValueError with a few words.

    Refused is also what Python's json reads but little else can take: whole numbers beyond a float, half of a surrogate pair,
    hundreds of brackets in each other.
    """
    value = load_json(content)
    check_values(value)
    return value


def load_json(content: bytes | str) -> Any:
    """JSON as Python's json reads it. Raises ValueError with a few words, also where it is nested too deeply."""
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from None
    except ValueError:  # Python's limit on the digits of a whole number
        raise ValueError("a whole number with too many digits") from None


def check_values(value: Any) -> None:
    """Raise ValueError for values that are nested too deeply, whole numbers that no float holds, and broken text."""
    check_all_values([value])


def check_all_values(values: list[Any]) -> None:
    """`check_values` of many: quicker, and the error is that of any of them."""
    layer = values
    for _ in range(MAX_DEPTH):
        kinds = set(map(type, layer))
        if str in kinds:
            texts = [item for item in layer if type(item) is str]
            if not "".join(texts).isascii():
                for text in texts:
                    check_text(text)
        if int in kinds:
            numbers = [item for item in layer if type(item) is int]
            if not -MAX_INTEGER <= min(numbers) <= max(numbers) <= MAX_INTEGER:
                raise ValueError("a whole number with too many digits")
        following: list[Any] = []
        for item in layer if kinds & _NESTED else ():
            if type(item) is dict:
                following += item
                following += item.values()
            elif type(item) is list:
                following += item
        if not following:
            return
        layer = following
    raise ValueError("nested too deeply")


_NESTED = {dict, list}


def check_text(text: str) -> None:
    """Raise ValueError for text that cannot be written: half of a surrogate pair, or bytes that were no UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{shorten_repr(text)} is not Unicode text") from None


def shorten_repr(value: Any) -> str:
    """A value for a message, on one line and not longer than MAX_SHOWN characters."""
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _check_kind(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "something else")
        raise UnreadableFileError(path, f"it is {kind}, not a file")
