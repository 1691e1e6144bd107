"""Errors in somebody's plug-in: at which of their lines, with our frames and PyTorch's left out."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
MAX_TEXT = 300  # characters of an error's own text in a sentence

_plugin_files: set[str] = set()  # that this process has imported


def note_plugin_file(path: Path) -> None:
    """From now on frames of this file are somebody's plug-in."""
    _plugin_files.add(str(path))


def pass_interrupt(error: BaseException) -> None:
    """Raise it again if it is Ctrl-C or the end of a generator: for `except BaseException` around somebody's code.

    That code may raise anything: SystemExit, or a class of its own that is no Exception.
    """
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        raise error


def is_plugin_error(error: BaseException) -> bool:
    """Whether a plug-in had a part in it: one of its lines is in the traceback."""
    return any(frame.filename in _plugin_files for each in _chain(error) for frame in traceback.extract_tb(each.__traceback__))


def describe_error(error: BaseException) -> str:
    """An error in a few words, with the last line of the user's own code that it came through: for a sentence."""
    text = " ".join(read_error_text(error).split()) if not isinstance(error, SyntaxError) else str(error.msg)
    text = text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
    said = f"{type(error).__name__}: {text}".removesuffix(": ")
    return f"{said} ({place})" if (place := locate_error(error)) else said


def locate_error(error: BaseException) -> str:
    """The user's own line that an error came through last, as `FILE:LINE, in FUNCTION`; "" if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_user_file(frame.filename)]
    if not frames:
        return ""
    last = frames[-1]
    return f"{last.filename}:{last.lineno}" + f", in {last.name}" * (last.name != "<module>")


def describe_failure(error: BaseException) -> str:
    """An error in full; where a plug-in had a part in it, with the user's own line."""
    place = locate_error(error) if is_plugin_error(error) else ""
    return f"{type(error).__name__}: {read_error_text(error)}".removesuffix(": ") + f" ({place})" * bool(place)


def read_error_text(error: BaseException) -> str:
    """The error's own text; a class of somebody's may fail to make one."""
    try:
        return str(error)
    except BaseException as failure:
        pass_interrupt(failure)
        return f"its text cannot be made, {type(failure).__name__}"


def find_user_line(text: str) -> str:
    """The last of the user's own lines in the text of a traceback, as `FILE:LINE`; "" if there is none."""
    found = re.findall(r'File "([^"]+)", line (\d+)', text)
    return next((f"{file}:{line}" for file, line in reversed(found) if _is_user_file(file)), "")


def format_folded(error: BaseException) -> str:
    """A traceback of the user's own lines; how many others were left out stands between them."""
    parts = []
    for each in _chain(error):
        report = traceback.TracebackException.from_exception(each)
        report.__cause__ = report.__context__ = None
        lines = ["Traceback (most recent call last):"]
        num_folded = 0
        for frame in report.stack:
            if not _is_user_file(frame.filename):
                num_folded += 1
                continue
            lines += _folded_line(num_folded)
            num_folded = 0
            lines += traceback.StackSummary.from_list([frame]).format()[0].rstrip("\n").splitlines()
        report.stack = traceback.StackSummary()
        lines += [*_folded_line(num_folded), *"".join(report.format_exception_only()).rstrip("\n").splitlines()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _folded_line(num_folded: int) -> list[str]:
    return [f"  ... {num_folded} line{'s' * (num_folded > 1)} of cifar and its libraries"] if num_folded else []


def _chain(error: BaseException) -> Iterator[BaseException]:
    """What led to an error, first to last, and the error itself."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return reversed(seen)


def _is_user_file(filename: str) -> bool:
    if filename in _plugin_files:
        return True
    if filename.startswith("<"):
        return False
    path = Path(filename)
    is_library = {"site-packages", "dist-packages"}.intersection(path.parts) or path.is_relative_to(_STANDARD_LIBRARY)
    return path.is_absolute() and not is_library and not path.is_relative_to(PACKAGE)
