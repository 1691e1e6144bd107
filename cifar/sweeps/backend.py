"""The backend protocol: where agents claim trials. Implemented by sweeps/local.py and integrations/wandb/backend.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cifar.sweeps.spec import Sweep

MAX_RETRIES = 2  # of a failed trial, where another try can help


TrialFilter = Callable[[Mapping[str, Any]], bool]  # whether a trial with these values is wanted; a backend may ignore it


@dataclass(frozen=True)
class Trial:
    """A claimed cell of a sweep."""

    cell: int
    values: dict[str, Any]
    run_id: str
    attempt: int  # the number of this claim of the cell: 1, 2, ...


class Backend(Protocol):
    """A sweep as its agents see it. No call waits longer than a database takes to answer.

    The methods are described in `sweeps.local.LocalBackend`.
    """

    id: str
    sweep: Sweep
    runs_dir: Path
    folder: Path  # sweep.yaml and logs/
    info: dict[str, Any]  # cells, dataset, fixed
    shared_storage: bool  # agents on other machines can join
    wandb_target: dict[str, str]  # written to each run.json: project, entity and engine, as far as they are set

    def agree_on_threads(self, threads: int) -> int: ...
    def claim_trial(
        self, worker: str, max_trials: int = 1, trial_filter: TrialFilter | None = None
    ) -> Trial | Literal["wait"] | None: ...
    def claim_more(self, worker: str, count: int, trial_filter: TrialFilter) -> list[Trial]: ...
    def peek_values(self, limit: int) -> list[dict[str, Any]] | None: ...
    def heartbeat(self, trial: Trial) -> Literal["go", "stop", "lost"]: ...
    def heartbeats(self, trials: Sequence[Trial]) -> list[Literal["go", "stop", "lost"]]: ...
    def report_metric(self, trial: Trial, history: Mapping[int, float], best: float, epochs: int) -> bool: ...
    def finish_trial(
        self,
        trial: Trial,
        state: str,
        value: float | None = None,
        reason: str = "",
        *,
        objectives: Sequence[float | None] = (),
        retry: bool | None = None,
    ) -> str: ...
    def list_cells(self, state: str = "") -> list[dict[str, Any]]: ...
    def list_all_cells(self) -> list[dict[str, Any]]: ...
    def list_cells_without_folder(self) -> list[dict[str, Any]]: ...
    def list_swept_keys(self, cells: Sequence[Mapping[str, Any]] | None = None) -> list[str]: ...
    def count_states(self, cells: Sequence[Mapping[str, Any]] | None = None) -> dict[str, int]: ...
    def pop_messages(self) -> list[str]: ...
    def close(self) -> None: ...
