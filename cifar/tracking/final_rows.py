"""Which rows of a run are final: no resume trains their epochs again.

A resumed run goes on from its checkpoint, and the rows after it are deleted and made again. So the rows up to the last
checkpoint are final, and all rows of a run that came to its own end. This module does not import PyTorch.
"""

from __future__ import annotations

import itertools
import pickletools
import zipfile
from pathlib import Path

from cifar.states import CONCLUSIVE_STATES
from cifar.system.files import open_file
from cifar.tracking.run_dir import RunDir

MAX_FILE_BYTES = 2**37
_HEAD_BYTES, _HEAD_OPS = 4096, 16  # of the checkpoint's pickle: its first key is metrics_bytes


class FinalRows:
    """The final rows of one run folder. The checkpoint is read only when it has changed."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._stamp: tuple[int, int, int] | None = None
        self._num_bytes = 0

    def num_bytes(self) -> int:
        """The length of the beginning of metrics.jsonl that is final."""
        if self._run_dir.state in CONCLUSIVE_STATES:
            return self._run_dir.metrics_bytes()
        path = self._run_dir.path / "checkpoint.pt"
        try:
            found = path.stat()
        except OSError:
            return 0
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)  # it is replaced as a whole, so its inode changes
        if stamp != self._stamp:
            self._num_bytes, self._stamp = read_checkpoint_length(path), stamp
        return self._num_bytes


def read_checkpoint_length(path: Path) -> int:
    """The length of metrics.jsonl that a checkpoint notes; 0 if it cannot be read. Nothing in the file is executed."""
    try:
        with open_file(path, MAX_FILE_BYTES) as opened, zipfile.ZipFile(opened) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                head = file.read(_HEAD_BYTES)
        is_next = False
        for opcode, value, _ in itertools.islice(pickletools.genops(head), _HEAD_OPS):
            if "PUT" in opcode.name or opcode.name == "MEMOIZE":  # stands between the key and its value
                continue
            if is_next:
                return max(0, int(str(value)))
            is_next = value == "metrics_bytes"
    except Exception:  # zipfile and pickletools raise many kinds of errors for a damaged file; training says it in a sentence
        return 0
    return 0
