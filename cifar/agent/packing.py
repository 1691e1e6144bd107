"""Which trials a worker trains side by side: those that differ in seed and scalars only, as many as a GPU has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from cifar.config import resolve as configuration
from cifar.errors import UserError
from cifar.sweeps.backend import Backend, Like, Trial
from cifar.system.devices import any_gpu

MOST = 16
FULL = 16e9  # multiply-adds of a forward pass over a batch from which on one trial fills a GPU by itself (LOG.md)


def checked(asked: str) -> str:
    """`auto`, `off` or a number of trials. Raises UserError for anything else."""
    if asked in ("auto", "off") or (asked.isdigit() and 1 <= int(asked) <= 256):
        return asked
    raise UserError(f"--pack {asked}: write auto, off, or how many trials at most a worker trains side by side (1 to 256)")


def limit(asked: str) -> int:
    """The most that any pack may hold. On CPUs `auto` packs nothing: trials take turns there, and nothing is won."""
    return int(asked) if asked.isdigit() else MOST if asked == "auto" and any_gpu() else 1


def most(asked: str, values: Mapping[str, Any]) -> int:
    """How many trials like this one to train side by side."""
    if asked != "auto" or limit(asked) == 1:
        return limit(asked)
    config = configuration.resolve(values)
    if config.device == "cpu" or config.part("model").get("dropout"):
        return 1
    from cifar.training import run  # PyTorch, to count

    return max(1, min(MOST, int(FULL / (run.cost_of(config).macs * config.batch_size))))


def fit(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two trials' values can be trained together."""
    return configuration.form(configuration.resolve(one)) == configuration.form(configuration.resolve(other))


class Packer:
    """Claims trials for an agent's workers, and puts together those that can be trained side by side."""

    def __init__(self, backend: Backend, worker: str, asked: str, count: float) -> None:
        self.backend, self.worker, self.asked = backend, worker, asked
        self.left = count  # trials that may still be claimed
        self.aside: list[Trial] = []  # claimed, but of another kind than those that were handed out
        self._apart: set[int] = set()  # cells that failed side by side: each alone from now on
        self._room = MOST  # how many have room side by side, as far as we know

    def more(self) -> bool:
        return self.left > 0 or bool(self.aside)

    def take(self, free: int, values: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> list[Trial] | Literal["wait"] | None:
        """Trials for one of `free` workers, with `values` as they are trained; "wait" or None as a backend's claim says."""
        first = self._next(free)
        if not isinstance(first, Trial):
            return first
        trials = [first]
        try:
            self._join(trials, free, values)
        except BaseException:
            self.aside += trials  # claimed, and nobody else knows of them
            raise
        return trials

    def _join(self, trials: list[Trial], free: int, values: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        first, its = trials[0], values(trials[0].values)
        share = 1 if first.cell in self._apart else min(most(self.asked, its), self._room)
        if share > 1:  # what is open is shared out evenly
            counts = self.backend.counts()
            open_ = 1 + len(self.aside) + sum(counts.get(state, 0) for state in ("waiting", "interrupted", "preempted"))
            share = min(share, math.ceil(open_ / free))
        while len(trials) < share:
            other = self._next(share - len(trials), lambda raw: fit(its, values(raw)))
            if not isinstance(other, Trial):
                break
            if other.cell in self._apart or not fit(its, values(other.values)):
                self.aside.append(other)
                break
            trials.append(other)

    def beat(self) -> None:
        """Hold on to what was set aside; what others have taken over meanwhile is theirs."""
        self.aside = [trial for trial in self.aside if self.backend.beat(trial) != "lost"]

    def failed_together(self, trial: Trial, together: int) -> None:
        """A pack of so many failed: this one of them is alone from now on, and others are fewer."""
        self._apart.add(trial.cell)
        self._room = max(1, min(self._room, together // 2))

    def _next(self, ahead: int, like: Like | None = None) -> Trial | Literal["wait"] | None:
        """A trial that was set aside, else a claimed one. `ahead`: how many will be wanted."""
        for trial in self.aside:
            if like is None or (trial.cell not in self._apart and like(trial.values)):
                self.aside.remove(trial)
                return trial
        if self.left <= 0:
            return None
        claimed = self.backend.claim(self.worker, int(min(self.left, ahead)), like)
        self.left -= isinstance(claimed, Trial)
        return claimed
