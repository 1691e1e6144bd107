"""Sends the samples of system_metrics.jsonl to the System section of a W&B run, with the times at which they were taken.

wandb's public interface samples its own process and machine. The record that its core sends for that is private: `_publish`
and `StatsRecord` of wandb 0.31 (contract-tested).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cifar.integrations.wandb.arrival import ArrivedRun
from cifar.integrations.wandb.feed import Feed
from cifar.integrations.wandb.settings import Mode
from cifar.tracking.system_metrics import FILE, read_samples

PREFIX = "system."  # wandb-core puts it before each name


class SystemMetricsFeed(Feed):
    """system_metrics.jsonl -> W&B's events. W&B counts those it has, and gets those after them."""

    def open(self, run: Any, arrived: ArrivedRun | None, mode: Mode) -> None:
        super().open(run, arrived, mode)
        self._num_sent = arrived.num_event_lines if arrived else 0
        self._size = -1  # of the file when it was read

    def send(self) -> None:
        path = self.run_dir.path / FILE
        size = path.stat().st_size if path.exists() else -1
        if size == self._size:
            return
        self._size = size
        for sample in read_samples(self.run_dir.path, self._num_sent):
            publish_sample(self.run, sample)
            self._num_sent += 1

    def finish(self) -> None:
        self.send()


def publish_sample(run: Any, sample: Mapping[str, Any]) -> None:
    """Send one sample. `run`: wandb's."""
    from wandb.proto import wandb_internal_pb2 as protocol

    record: Any = protocol.Record()  # type: ignore[attr-defined, unused-ignore]
    record.stats.stats_type = 0  # SYSTEM
    record.stats.timestamp.FromMicroseconds(round(float(sample["_timestamp"]) * 1e6))
    for name, value in sample.items():
        if name.startswith(PREFIX):
            record.stats.item.add(key=name.removeprefix(PREFIX), value_json=json.dumps(value))
    run._interface._publish(record)
