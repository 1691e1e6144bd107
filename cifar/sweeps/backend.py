"""What an agent asks of whoever hands out trials: cifar/backends/local.py on this machine, cifar/wb/sweeps.py on W&B."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cifar.sweeps.spec import Sweep

STATES = (
    "waiting", "running", "interrupted", "preempted",
    "finished", "failed", "killed", "diverged", "stopped", "pruned", "skipped",
)  # fmt: skip
RETRIES = 2  # of a trial that failed where another try can help


Like = Callable[[Mapping[str, Any]], bool]  # whether a trial of these values is wanted; a backend may offer others too


@dataclass(frozen=True)
class Trial:
    """A claimed cell."""

    cell: int
    values: dict[str, Any]
    run_id: str
    attempt: int  # the claim's number, 1, 2, ...


class Backend(Protocol):
    """A sweep, as its agents see it. No call waits for a network longer than a database takes to answer."""

    id: str
    sweep: Sweep
    runs: Path
    folder: Path  # sweep.yaml and logs/
    info: dict[str, Any]  # cells, dataset, fixed
    afar: bool  # agents on other machines may take part
    place: dict[str, str]  # what its runs note down of where they belong: project, entity, engine

    def settle_threads(self, threads: int) -> int: ...
    def claim(self, worker: str, most: int = 1, like: Like | None = None) -> Trial | Literal["wait"] | None: ...
    def beat(self, trial: Trial) -> Literal["go", "stop", "lost"]: ...
    def report(self, trial: Trial, history: Mapping[int, float], best: float, epochs: int) -> bool: ...
    def finish(
        self,
        trial: Trial,
        state: str,
        value: float | None = None,
        reason: str = "",
        *,
        objectives: Sequence[float | None] = (),
        retry: bool | None = None,
    ) -> str: ...
    def cells(self) -> list[dict[str, Any]]: ...
    def counts(self) -> dict[str, int]: ...
    def news(self) -> list[str]: ...
    def close(self) -> None: ...
