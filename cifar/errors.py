"""The one exception that is meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. Its text is one clear sentence that says what to do; the command line prints it and exits with 2."""


class DiskFull(UserError):
    """No space is left; what was begun can go on once there is some."""


def choices(wrong: str, known: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the nearest known one, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    listed = f"known: {', '.join(known)}"
    return f"did you mean '{near[0]}'? ({listed})" if near else listed
