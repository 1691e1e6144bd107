"""Histograms of gradients and updates on W&B: part of the rows of the epochs that were looked at, one for each layer.

`gradients/LAYER` is the name that wandb.watch uses; `updates/LAYER` is what the optimizer did with them. They are hidden from
the automatic panels, which a deep network would fill, and kept out of the summary; a panel of one's own shows them. The bins
are not equally wide. W&B's own import from TensorBoard sends such bins too, since TensorBoard's grow by a factor.

In a row a histogram is a mapping, and wandb-core (0.31) decides of each value in it whether the summary has it. A name is cut
at its dots to find the place in the summary, so a dot that belongs to a layer's name is written `\\.` there. Globs do not fit
such names. All this was tried out with wandb-core, whose source is not in its wheel; a test tries it again.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from cifar.errors import UserError
from cifar.integrations.wandb.arrival import ArrivedRun
from cifar.integrations.wandb.feed import Feed
from cifar.integrations.wandb.settings import Mode
from cifar.system.files import open_file
from cifar.tracking.histograms import FILE, KINDS, MAX_BYTES, bin_edges, check_line

_LINE = re.compile(rb'\{"epoch":(\d{1,10}),')


class HistogramFeed(Feed):
    """Adds `wandb.Histogram` objects to the rows. Keeps the places of the lines, and reads one line at a time."""

    def open(self, run: Any, arrived: ArrivedRun | None, mode: Mode) -> None:
        super().open(run, arrived, mode)
        self._places: dict[int, tuple[int, int]] = {}  # epoch -> where its line is, and its length
        self._end = 0  # of the last complete line that is known
        self._defined: set[str] = set()
        self._is_damaged = False

    def add_to_row(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._is_damaged:
            return {}
        try:
            line = self._read_line(int(row["epoch"]))
        except (UserError, OSError, ValueError) as error:
            self._is_damaged = True
            self.on_message(f"{self.run_dir.id}: {FILE} is damaged ({error}); its histograms are not sent")
            return {}
        if line is None:
            return {}
        import wandb

        histograms = {
            f"{kind}/{layer}": wandb.Histogram(np_histogram=_halve(value))  # type: ignore[arg-type]
            for kind in KINDS
            for layer, value in line.get(kind, {}).items()
        }
        new = {key: value for key, value in histograms.items() if key not in row}  # a plug-in's metric may have the name
        for key in sorted(new.keys() - self._defined):
            self._define(key)
        return new

    def _define(self, key: str) -> None:
        self._defined.add(key)
        if "*" in key:
            return  # W&B takes it for a glob
        self.run.define_metric(key, step_metric="epoch", step_sync=False, hidden=True, summary="none")
        for name in ("_type", "values", "bins"):
            self.run.define_metric(key.replace(".", "\\.") + f".{name}", summary="none")

    def _read_line(self, epoch: int) -> dict[str, Any] | None:
        """The line of an epoch, None if it has none. Raises ValueError for one that is damaged."""
        try:
            size = os.stat(self.run_dir.path / FILE).st_size
        except FileNotFoundError:
            return None
        with open_file(self.run_dir.path / FILE, MAX_BYTES) as file:
            for _ in range(2):
                if size < self._end:  # it was cut
                    self._places, self._end = {}, 0
                file.seek(self._end)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    if found := _LINE.match(line):
                        self._places[int(found[1])] = self._end, len(line)
                    self._end += len(line)
                if epoch not in self._places:
                    return None
                start, length = self._places[epoch]
                file.seek(start)
                found = _LINE.match(content := file.read(length))
                if found and int(found[1]) == epoch and content.endswith(b"\n"):
                    line_read = json.loads(content)
                    check_line(line_read)
                    return dict(line_read)
                self._places, self._end = {}, 0  # it was cut and written again
        return None


def _halve(histogram: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Counts and edges of half as many bins, each twice as wide, the edges with four digits.

    Who reads a history from W&B gets its histograms too, so their size counts: 44 of them a row for a ResNet-20.
    """
    counts, edges = histogram["counts"], bin_edges(histogram["top"])[::2]
    return [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)], [float(f"{edge:.4g}") for edge in edges]
