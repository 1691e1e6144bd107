"""Errors that are meant for the user, and the words that messages share."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path

MAX_MESSAGE = 4000  # characters; a longer message quotes a value of megabytes, and loses its middle


class UserError(Exception):
    """Bad input. Its text is one clear sentence that says what to do; the command line prints it and exits with 2."""

    def __str__(self) -> str:
        text = super().__str__()
        text = text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()  # halves of characters
        return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 600]} … {text[-500:]}"


class PartError(UserError):
    """A part of a run, such as a plug-in's network, cannot be trained. Other runs can be."""


class DeviceError(UserError):
    """A device that does not exist here, or cannot be used. Runs on other devices can be trained."""


class DiskFullError(UserError):
    """No space is left on the disk. The run can go on once there is some."""


DiskFull = DiskFullError  # old name, for plug-ins


def is_out_of_threads(error: BaseException) -> bool:
    """Whether no thread could be started, since the limit of processes is reached. Python has no class for this error."""
    return isinstance(error, RuntimeError) and error.args == ("can't start new thread",)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known names, up to three, then all of them."""
    known, wrong = sorted(known), wrong[:100]
    similar = [f"'{name}'" for name in difflib.get_close_matches(wrong, known, n=3, cutoff=0.6)]
    listed = f"known: {', '.join(known)}"
    if not similar:
        return listed
    return f"did you mean {' or '.join([', '.join(similar[:-1])] * (len(similar) > 1) + similar[-1:])}? ({listed})"


choices = did_you_mean  # old name, for plug-ins


def program_name() -> str:
    """How this program was started: `cifar`, the installed command, or `python -m cifar`."""
    return "cifar" if Path(sys.argv[0] if sys.argv else "").name in ("cifar", "cifar.exe") else "python -m cifar"


def name_program(text: str) -> str:
    """A message that names commands, with the program named as it was started.

    Messages are written with `python -m cifar`, which works everywhere. What is kept in files stays so.
    """
    return text.replace("python -m cifar", program_name())
