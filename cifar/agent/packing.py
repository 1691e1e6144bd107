"""Packs: trials that one worker trains side by side. They differ in seed and scalars only, and fit on a GPU together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from cifar.config.resolve import graph_signature, load_experiment, resolve_config
from cifar.errors import UserError
from cifar.states import CLAIMABLE_STATES
from cifar.sweeps.backend import Backend, Trial, TrialFilter
from cifar.system.devices import has_gpu
from cifar.system.ownership import LeaseObserver

MAX_PACK_SIZE = 16
MAX_EXPLAINED = 64  # waiting trials among which a network's other trials are looked for
FULL_GPU_MACS = 16e9  # MACs of a forward pass over a batch, from which on one trial fills a GPU by itself (LOG.md)


def check_pack_option(option: str) -> str:
    """Return the option if it is `auto`, `off` or a number of trials. Raises UserError for anything else."""
    if option in ("auto", "off") or (option.isdigit() and 1 <= int(option) <= 256):
        return option
    raise UserError(f"--pack {option}: write auto, off, or how many trials at most a worker trains side by side (1 to 256)")


def max_pack_size(option: str) -> int:
    """The most trials that any pack may hold. On CPUs `auto` packs nothing: trials would take turns, which gains nothing."""
    return int(option) if option.isdigit() else MAX_PACK_SIZE if option == "auto" and has_gpu() else 1


def best_pack_size(option: str, values: Mapping[str, Any]) -> tuple[int, str]:
    """How many trials like this one to train side by side, and why not more than one, where the trial itself is the reason."""
    if option != "auto" or max_pack_size(option) == 1:
        return max_pack_size(option), ""
    return pack_size_on_gpu(values)


def pack_size_on_gpu(values: Mapping[str, Any]) -> tuple[int, str]:
    """How many trials with these values fill a GPU, MAX_PACK_SIZE at most; and the reason where that is one, else ""."""
    config = resolve_config(values)
    if config.device == "cpu":
        return 1, "on a CPU they would take turns"
    if config.kwargs_for("model").get("dropout"):
        return 1, "its dropout draws random numbers on the GPU, where the trials of a pack share one generator"
    from cifar.training import run  # needs PyTorch, to count MACs

    macs = max(1, run.measure_cost(config).macs * config.batch_size)
    size = max(1, min(MAX_PACK_SIZE, int(FULL_GPU_MACS / macs)))
    limit = f"{FULL_GPU_MACS / 1e9:.0f} fill it; --pack 2 packs it"
    is_large = f"a step of {macs / 1e9:.0f} GMACs leaves a GPU no room for a second one ({limit})"
    return size, is_large if size == 1 else ""


class Packer:
    """Claims trials for an agent's workers, and groups those that can be trained side by side."""

    def __init__(self, backend: Backend, worker: str, option: str, count: float) -> None:
        self.backend, self.worker, self.option = backend, worker, option
        self.num_left = count  # trials that may still be claimed; inf: any number
        # claimed, but not packable with those that were handed out, or another process trains the run
        self.set_aside: list[Trial] = []
        self.messages: list[str] = []  # to print
        self.can_start: Callable[[Trial], bool] = lambda trial: True  # on a worker that is free now
        self._observers: dict[str, LeaseObserver] = {}  # run id -> of the process that has the run of a trial set aside
        self._single_cells: set[int] = set()  # cells that failed in a pack: each is trained alone from now on
        self._explained: set[tuple[Any, ...]] = set()  # networks of which it was said why their trials are not packed
        self._max_size = MAX_PACK_SIZE  # of a pack, as far as failures have shown

    def has_more(self) -> bool:
        return self.num_left > 0 or bool(self.set_aside)

    def claim_group(
        self,
        num_free: int,
        training_values: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        preferred: TrialFilter | None = None,
    ) -> list[Trial] | Literal["wait"] | None:
        """Trials for one of `num_free` workers, or what `Backend.claim_trial` returned instead of a trial.

        training_values: a trial's values -> its values as a worker trains them. preferred: which trial to begin with, if
        there is one of that kind.
        """
        first = self._next_trial(num_free, preferred) if preferred and not self.set_aside else "wait"
        if not isinstance(first, Trial):
            first = self._next_trial(num_free)
        if not isinstance(first, Trial):
            return first
        trials = [first]
        try:
            self._add_matching(trials, num_free, training_values)
        except BaseException:
            self.set_aside += trials  # claimed, but no worker has them
            raise
        return trials

    def _add_matching(
        self, trials: list[Trial], num_free: int, training_values: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> None:
        first, first_values = trials[0], training_values(trials[0].values)
        is_single = first.cell in self._single_cells
        best_size, reason = best_pack_size(self.option, first_values)
        pack_size = 1 if is_single else min(best_size, self._max_size)
        if pack_size > 1:  # divide the open trials evenly among the free workers
            counts = self.backend.count_states()
            num_open = 1 + len(self.set_aside) + sum(counts.get(state, 0) for state in CLAIMABLE_STATES)
            pack_size = min(pack_size, math.ceil(num_open / num_free))
        read_experiment = functools.cache(load_experiment)  # a filter may be asked about thousands of trials

        def sign(values: Mapping[str, Any]) -> dict[str, Any]:
            """What trials of one pack have in common."""
            return graph_signature(resolve_config(values, read_experiment=read_experiment))

        if reason and not is_single:
            self._explain_single(first_values, reason, lambda values: sign(training_values(values)))
        signature = sign(first_values) if len(trials) < pack_size else {}
        if len(trials) < pack_size:
            self._claim_batch(pack_size - len(trials), lambda values: sign(training_values(values)) == signature)
        while len(trials) < pack_size:
            other = self._next_trial(pack_size - len(trials), lambda values: sign(training_values(values)) == signature)
            if not isinstance(other, Trial):
                break
            if other.cell in self._single_cells or sign(training_values(other.values)) != signature:
                self.set_aside.append(other)
                break
            trials.append(other)

    def _claim_batch(self, num_wanted: int, trial_filter: TrialFilter) -> None:
        """Claim trials of a pack at once. They are set aside, from where `_next_trial` takes them."""
        num_here = sum(trial.cell not in self._single_cells and trial_filter(trial.values) for trial in self.set_aside)
        count = int(min(self.num_left, num_wanted - num_here))
        claimed = self.backend.claim_more(self.worker, count, trial_filter) if count > 0 else []
        self.num_left -= len(claimed)
        for trial in claimed:
            self.set_aside.append(trial)
            if owner := self._find_owner(trial):
                self.messages.append(f"trial {trial.cell:03d} waits: {owner}")

    def _explain_single(
        self, values: Mapping[str, Any], reason: str, sign: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> None:
        """Say once for each network why its trials are not packed, where others of its kind wait."""
        config = resolve_config(values)
        network = config.model, config.batch_size, tuple(sorted(config.kwargs_for("model").items()))
        if network in self._explained:
            return
        self._explained.add(network)
        signature = graph_signature(config)
        if any(sign(other) == signature for other in self.backend.peek_values(MAX_EXPLAINED) or ()):
            self.messages.append(
                f"trials of {config.model} at batch_size {config.batch_size} are trained one after the other: {reason}"
            )

    def send_heartbeats(self) -> None:
        """Keep the claims on what was set aside. A trial that another agent has claimed meanwhile is dropped."""
        answers = self.backend.heartbeats(self.set_aside)
        self.set_aside = [trial for trial, answer in zip(self.set_aside, answers, strict=True) if answer != "lost"]

    def record_pack_failure(self, trial: Trial, pack_size: int) -> None:
        """A pack of that size failed: this trial of it is trained alone from now on, and packs are at most half as large."""
        self._single_cells.add(trial.cell)
        self._max_size = max(1, min(self._max_size, pack_size // 2))

    def _next_trial(self, num_wanted: int, trial_filter: TrialFilter | None = None) -> Trial | Literal["wait"] | None:
        """A trial that was set aside, else a newly claimed one. num_wanted: how many will be claimed one after the other."""
        for trial in self.set_aside:
            is_wanted = trial_filter is None or (trial.cell not in self._single_cells and trial_filter(trial.values))
            if is_wanted and self.can_start(trial) and not self._find_owner(trial):
                self.set_aside.remove(trial)
                return trial
        while self.num_left > 0:
            claimed = self.backend.claim_trial(self.worker, int(min(self.num_left, num_wanted)), trial_filter)
            if not isinstance(claimed, Trial):
                return claimed
            self.num_left -= 1
            if not self.can_start(claimed):  # it waits for another GPU
                self.set_aside.append(claimed)
                continue
            owner = self._find_owner(claimed)
            if not owner:
                return claimed
            self.set_aside.append(claimed)
            self.messages.append(f"trial {claimed.cell:03d} waits: {owner}")
        return None

    def _find_owner(self, trial: Trial) -> str:
        """Which other process has the trial's run, in words; "" if the run is free."""
        folder = self.backend.runs_dir / trial.run_id
        observer = self._observers.setdefault(trial.run_id, LeaseObserver(folder))
        try:
            found = observer.find_owner()
        except (OSError, UserError):  # the worker that gets it reports what is wrong
            found = None
        if found is None:
            del self._observers[trial.run_id]
            return ""
        return found[0].describe(folder)
