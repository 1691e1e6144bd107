"""What earlier reports of a runs folder made, so that the next one does not make the same again.

    <runs>/.cache/made.json   digest of all that a thing is made from -> what was made of it

A figure is made from what its select() gives, its title, and the program, libraries, settings and fonts that draw it. What is
kept of it are digests of its files; it is drawn again unless the files in the report's folder still have them. The importance
of settings is made from the settings and accuracies, and kept itself. A file that is damaged, or no such file at all, counts as
none; so does one that cannot be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar.errors import UserError
from cifar.report.run_cache import MIN_RUNS
from cifar.system.files import parse_json, read_bytes
from cifar.tracking.run_dir import CACHE_FOLDER, MADE_FILE, write_atomic

FORMAT = 1  # changes with what is in the file
MAX_KEPT = 200  # things; of more, those that were used last
MAX_FIGURE_BYTES = 2**27


class Made:
    """What was made before, and what is made now. `find` can be used in a copy of this process, `keep` in the original only."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / CACHE_FOLDER / MADE_FILE if folder else None
        self._known: dict[str, Any] = {}
        self._used: dict[str, Any] = {}
        with contextlib.suppress(UserError, ValueError, KeyError, TypeError, AttributeError):
            content = parse_json(read_bytes(self._file)) if self._file else {}
            self._known = {str(key): value for key, value in content["made"].items()} if content["format"] == FORMAT else {}

    @property
    def is_kept(self) -> bool:
        return self._file is not None

    def find(self, key: str) -> Any:
        """What was made from things with this digest; None if that is not known."""
        return self._known.get(key) if key else None

    def keep(self, key: str, value: Any) -> None:
        """Remember what was made. It can be written as JSON. Nothing happens where there is no digest."""
        if key:
            self._used[key] = value

    def write(self) -> None:
        """Write the file, if there is something new."""
        if self._file is None or all(self._known.get(key) == value for key, value in self._used.items()):
            return
        kept = {**{key: value for key, value in self._known.items() if key not in self._used}, **self._used}
        content = {"format": FORMAT, "made": dict([*kept.items()][-MAX_KEPT:])}
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(exist_ok=True)
            write_atomic(self._file, json.dumps(content, separators=(",", ":")).encode())


def open_made(paths: Sequence[Path]) -> Made:
    """What was made of the folder that most of these run folders are in. Nothing is known, and kept, of few runs."""
    ((folder, num_runs),) = Counter(path.parent for path in paths).most_common(1) or [(Path(), 0)]
    return Made(folder if num_runs >= MIN_RUNS else None)


def digest_content(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_same(path: Path, digest: Any) -> bytes | None:
    """The content of a file if it has this digest."""
    with contextlib.suppress(UserError):
        content = read_bytes(path, MAX_FIGURE_BYTES)
        if digest_content(content) == digest:
            return content
    return None
