"""Which models of a sweep are sent to W&B, and which one is the best.

Every run's, up to 200 runs and 2 GiB a sweep. Above that, those of the best ten and of the front of accuracy and MACs, among
the runs that have ended so far: who is among them in the end was among them when it ended, so none of them is missed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.errors import UserError
from cifar.integrations.wandb.artifacts import MODEL, WEIGHTS_FILE, collection_name, is_enabled
from cifar.tracking.run_dir import RunDir, list_folders, list_run_dirs, read_json

MAX_RUNS, MAX_BYTES = 200, 2 * 2**30  # of a sweep; above them the best ten and the front
NUM_BEST = 10
_KEPT_SECONDS = 5.0  # how long a list of a sweep's runs is used again: `push` asks for each run

_kept: dict[tuple[Path, str], tuple[float, list[Candidate]]] = {}


@dataclass(frozen=True)
class Candidate:
    """A finished run with weights. `accuracy`: val/acc of the last epoch, NaN if it has none."""

    run_id: str
    accuracy: float
    macs: float
    num_bytes: int
    cell: float = math.inf
    created: float = math.inf

    @property
    def rank(self) -> tuple[float, float, float, str]:
        """The smaller the better. Ties go to the first cell, then to the earliest run."""
        return -self.accuracy, self.cell, self.created, self.run_id


def read_candidate(values: Mapping[str, Any], num_bytes: int = 0) -> Candidate:
    """From the metadata of a model's version, or the same values of a run's folder."""
    number = {key: values.get(key) for key in ("val/acc", "macs", "cell", "created")}
    is_number = {key: isinstance(value, int | float) and not isinstance(value, bool) for key, value in number.items()}
    accuracy, macs, cell, created = (
        float(number[key]) if is_number[key] else default  # type: ignore[arg-type]
        for key, default in (("val/acc", math.nan), ("macs", math.nan), ("cell", math.inf), ("created", math.inf))
    )
    return Candidate(str(values.get("run")), accuracy, macs, num_bytes, cell, created)


def find_best(candidates: Iterable[Candidate]) -> Candidate | None:
    return min((each for each in candidates if not math.isnan(each.accuracy)), key=lambda each: each.rank, default=None)


def list_candidates(run_dir: RunDir) -> list[Candidate]:
    """The finished runs of this runs folder whose models are in the same collection as this run's."""
    runs_dir, collection = run_dir.path.parent, collection_name(MODEL, run_dir.read_json("run"))
    found = []
    for other in list_run_dirs(runs_dir):
        with contextlib.suppress(UserError, OSError):  # damaged, or just gone
            about = other.read_json("run")
            if collection_name(MODEL, about) != collection or other.state != "finished" or not is_enabled(other):
                continue
            if not (size := _weights_bytes(other.path)):
                continue
            values = {**other.read_json("summary"), "run": other.id, "cell": about.get("cell"), "created": about.get("created")}
            found.append(read_candidate({**values, "macs": (about.get("cost") or {}).get("macs")}, size))
    return found


def is_model_wanted(run_dir: RunDir) -> bool:
    """Whether the model of this finished run is sent to W&B."""
    about = run_dir.read_json("run")
    return not about.get("sweep") or not is_above_limit(run_dir) or run_dir.id in _choose(_list_kept(run_dir))


def is_above_limit(run_dir: RunDir) -> bool:
    """Whether the run's sweep has too many models for all of them to be sent."""
    runs_dir, sweep = run_dir.path.parent, str(run_dir.read_json("run").get("sweep") or "")
    if not sweep:
        return False
    with contextlib.suppress(UserError, OSError):
        if read_json(runs_dir / "sweeps" / sweep / "sweep.json").get("cells", 0) > MAX_RUNS:
            return True
    sizes = [_weights_bytes(folder) for folder in list_folders(runs_dir)]
    if sum(map(bool, sizes)) <= MAX_RUNS and sum(sizes) <= MAX_BYTES:
        return False  # all runs of the folder are within it: no file has to be read
    candidates = _list_kept(run_dir)
    return len(candidates) > MAX_RUNS or sum(each.num_bytes for each in candidates) > MAX_BYTES


def _weights_bytes(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return (folder / WEIGHTS_FILE).stat().st_size
    return 0


def _list_kept(run_dir: RunDir) -> list[Candidate]:
    key = (run_dir.path.parent, collection_name(MODEL, run_dir.read_json("run")))
    since, candidates = _kept.get(key, (-math.inf, []))
    if time.monotonic() - since > _KEPT_SECONDS or run_dir.id not in {each.run_id for each in candidates}:
        candidates = list_candidates(run_dir)
        _kept[key] = time.monotonic(), candidates
    return candidates


def _choose(candidates: Iterable[Candidate]) -> set[str]:
    """The run ids of the best ten, and of those that no other run beats in both accuracy and MACs."""
    ranked = sorted((each for each in candidates if not math.isnan(each.accuracy)), key=lambda each: each.rank)
    chosen, fewest_macs = {each.run_id for each in ranked[:NUM_BEST]}, math.inf
    for each in ranked:
        if each.macs < fewest_macs:
            fewest_macs = each.macs
            chosen.add(each.run_id)
    return chosen
