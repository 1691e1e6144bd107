"""Which trials took the place of others: the cells of a sweep that were offered again, or added later.

In a new sweep the number of a trial is its cell. A cell that is offered again gets a further trial, and only its latest one
counts. From the first such trial on, no trial's number is its cell. What is said here of a trial never changes: an ended trial
stays ended, and one that somebody had is never as new again. So it is read once, and not for every claim and count.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence


class Offers:
    """What is known of the trials of one study, up to the one with the id `last_id`."""

    def __init__(self) -> None:
        self.last_id = 0
        self.first_id: int | None = None  # of the first trial whose number is not its cell; None: there is none
        self.replaced = set[int]()  # ids of the trials that do not count any more
        self.replaced_states = Counter[str]()  # their states
        self.unclaimed: list[tuple[int, int]] = []  # (cell, id) of the trials from `first_id` on that nobody may have had
        self._first_number = 0  # number of the trial `first_id`
        self._latest: dict[int, int] = {}  # cell -> id, of the trials from `first_id` on
        self._waiting_for_ids: set[int] = set()  # numbers of trials that are replaced, and whose ids are not known yet

    def add(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Note further trials, by id: (id, number, cell)."""
        for optuna_id, number, cell in rows:
            self.last_id = optuna_id
            if self.first_id is None:
                if cell == number:
                    continue
                self.first_id, self._first_number = optuna_id, number
            if (before := self._latest.get(cell)) is not None:
                self.replaced.add(before)
            elif cell < self._first_number:
                self._waiting_for_ids.add(cell)  # the cell's first trial has its number
            self._latest[cell] = optuna_id
            bisect.insort(self.unclaimed, (cell, optuna_id))

    @property
    def lacks_ids(self) -> bool:
        """Whether `resolve` has to be called."""
        return bool(self._waiting_for_ids)

    def resolve(self, originals: Iterable[tuple[int, int]]) -> None:
        """Tell the ids of the trials before `first_id`: (id, number)."""
        self.replaced |= {optuna_id for optuna_id, number in originals if number in self._waiting_for_ids}
        self._waiting_for_ids = set()

    def drop_claimed(self, start: int, seen: Sequence[tuple[int, int]], unclaimed_ids: set[int]) -> int:
        """Forget those of `seen`, which begin at `start`, that somebody has had -> where the ones after them begin."""
        kept = [pair for pair in seen if pair[1] in unclaimed_ids]
        self.unclaimed[start : start + len(seen)] = kept
        return start + len(kept)
