"""Keeps `cifar.json` among a run's files on W&B as the record is, and metrics.jsonl beside it once the run has ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cifar.integrations.wandb.arrival import ArrivedRun
from cifar.integrations.wandb.document import DOCUMENT_FILE, END_PARTS, METRICS_FILE, PARTS, build_document, compute_md5
from cifar.integrations.wandb.feed import Feed
from cifar.integrations.wandb.settings import Mode
from cifar.states import ENDED_STATES
from cifar.tracking.run_dir import RunDir, write_atomic


class DocumentFeed(Feed):
    """Sends the file when the W&B run was opened, and again when the record's small files have changed."""

    def __init__(self, run_dir: RunDir, on_message: Callable[[str], None]) -> None:
        super().__init__(run_dir, on_message)
        self.md5 = ""  # of what was sent last
        self._stamp: tuple[object, ...] = ()

    def open(self, run: Any, arrived: ArrivedRun | None, mode: Mode) -> None:
        super().open(run, arrived, mode)
        self.md5, self._stamp = "", ()

    def send(self) -> None:
        has_ended = self.run_dir.state in ENDED_STATES
        names = PARTS + END_PARTS * has_ended
        stamp = (has_ended, *(_stamp_file(self.run_dir.path / f"{name}.json") for name in names))
        if stamp != self._stamp:
            self._send_content()
            self._stamp = stamp

    def finish(self) -> None:
        self._send_content()

    def _send_content(self) -> None:
        content = build_document(self.run_dir)
        if (md5 := compute_md5(content)) == self.md5:
            return
        if json.loads(content).get("metrics"):
            self.run.save(str(self.run_dir.path / METRICS_FILE), base_path=str(self.run_dir.path), policy="now", glob=False)
        file = Path(self.run.dir) / DOCUMENT_FILE  # where it is written wandb need not copy it
        write_atomic(file, content)
        self.run.save(str(file), base_path=self.run.dir, policy="now", glob=False)
        self.md5 = md5


def _stamp_file(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns  # it is replaced as a whole, so its inode changes
