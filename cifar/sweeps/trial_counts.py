"""How many trials of a sweep are in each state, asked of the database without a look at every trial's text.

Optuna's own state says it of a trial that nobody has claimed, that runs, or that has a result; an index counts these. How a
trial ended without a result (failed, pruned, ...) stands in a text of it, which takes many times as long to read. But it never
changes, and trials only join those that have ended. So each text is read once, and again only if the number is not right.

What is known of those that had ended by some time is also written to the database, by agents (`TrialTable.keep_counts`): then
a process that counts for the first time reads the texts of few.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy
from sqlalchemy import bindparam

SETTLE_SECONDS = 5.0  # so long after its end a trial is taken to be seen by all: transactions take a moment, and clocks differ
_START = "0001-01-01 00:00:00"  # before every trial
# (Optuna's state, whether somebody has claimed it) -> what it says; only a stop of the sweep ends what nobody has claimed
_STATES = {
    ("WAITING", False): "waiting",
    ("RUNNING", False): "running",
    ("RUNNING", True): "running",
    ("COMPLETE", True): "finished",
    ("FAIL", False): "stopped",
}
_ENDED = (("FAIL", True), ("PRUNED", True))  # says no more than that it has ended; of all others a text says it
_TEXT = "(select value_json from trial_user_attributes as a where a.trial_id = t.trial_id and a.key = 'now')"
_WORDS = {"sqlite": f"json_extract({_TEXT}, '$.state')", "postgresql": f"cast({_TEXT} as json) ->> 'state'"}
# Rows of (kind, state, number, number of those that somebody has claimed, or whether they have settled). One statement, so that
# a trial that changes meanwhile is counted once.
_COUNT = """
select 'optuna', cast(state as varchar), number, num_claimed from (
    select state, count(*) as number, count(datetime_start) as num_claimed
    from trials where study_id = :study and {which} group by state
) as states
union all
select 'text', word, count(*), 0 from (
    select {word} as word from trials as t where study_id = :study and {which}
    and state = 'WAITING' and datetime_start is not null
    union all
    select {word} from trials as t where study_id = :study and {which}
    and state in ('COMPLETE', 'PRUNED') and datetime_start is null
) as texts group by word
"""
_COUNT_WITH_ENDS = f"""{_COUNT}
union all
select 'ended', word, count(*), is_settled from (
    select {{word}} as word, case when datetime_complete <= :settled then 1 else 0 end as is_settled
    from trials as t where study_id = :study and {{which}}
    and state in ('FAIL', 'PRUNED') and datetime_start is not null
    and (datetime_complete > :until or datetime_complete is null)
) as ends group by word, is_settled
"""


@dataclass(frozen=True)
class EndedTrials:
    """Of the trials that had ended without a result `until` then (UTC, by their agents' clocks): state -> number."""

    until: str = _START
    states: Counter[str] = field(default_factory=Counter)

    def describe(self) -> dict[str, Any]:
        """What `parse_ended` reads."""
        return {"until": self.until, "states": self.states}


def parse_ended(text: str) -> EndedTrials:
    """What an agent has written, as JSON. If it is damaged, nothing is known."""
    try:
        value = json.loads(text)
        until = datetime.datetime.fromisoformat(value["until"]).isoformat(" ", "microseconds")
        states = {str(state): number for state, number in value["states"].items() if type(number) is int and number > 0}
    except (TypeError, KeyError, ValueError, AttributeError):
        return EndedTrials()
    return EndedTrials(until, Counter(states))


class TrialCounter:
    """Counts the trials of a study, and keeps what it has read. `ended`: what is known before."""

    def __init__(self, study: int, ended: EndedTrials) -> None:
        self.ended = ended
        self._study = study
        self._all_ended = ended.states  # also those that have just ended, when last counted

    def count(self, connection: sqlalchemy.Connection, last_id: int) -> Counter[str]:
        """Trial state -> number of trials, up to an id."""
        which = {"study": self._study, "last": last_id}
        counts = _add_rows(connection.execute(_make_count(connection, "trial_id <= :last", with_ends=False), which))
        if counts.num_ended == self._all_ended.total():
            return counts.others + self._all_ended
        with_ends = _make_count(connection, "trial_id <= :last", with_ends=True)
        for known in (self.ended, EndedTrials()):
            settled = max(known.until, _utc_text(-SETTLE_SECONDS))
            counts = _add_rows(connection.execute(with_ends, {**which, "until": known.until, "settled": settled}))
            self.ended = EndedTrials(settled, known.states + counts.settled)
            self._all_ended = self.ended.states + counts.unsettled
            if counts.num_ended == self._all_ended.total():
                break  # else one has been added whose agent's clock was late
        return counts.others + self._all_ended


def count_ids(connection: sqlalchemy.Connection, study: int, ids: Sequence[int]) -> Counter[str]:
    """Trial state -> number of a study's trials, of those with these ids."""
    which = {"study": study, "ids": list(ids), "until": _START, "settled": _START}
    statement = _make_count(connection, "trial_id in :ids", with_ends=True).bindparams(bindparam("ids", expanding=True))
    counts = _add_rows(connection.execute(statement, which))
    return counts.others + counts.unsettled


@dataclass
class _Counts:
    others: Counter[str] = field(default_factory=Counter)  # that may change, or have a result
    settled: Counter[str] = field(default_factory=Counter)  # that have ended without one, as their texts say
    unsettled: Counter[str] = field(default_factory=Counter)  # the same, but just now, or it is not known when
    num_ended: int = 0  # of all that have


def _add_rows(rows: Iterable[Any]) -> _Counts:
    counts = _Counts()
    for kind, state, number, about in rows:
        if kind == "text":
            counts.others[str(state)] += number
        elif kind == "ended":
            (counts.settled if about else counts.unsettled)[str(state)] += number
        else:
            for each, was_claimed in ((about, True), (number - about, False)):
                if (state, was_claimed) in _ENDED:
                    counts.num_ended += each
                elif said := _STATES.get((state, was_claimed)):
                    counts.others[said] += each
    return counts


def _make_count(connection: sqlalchemy.Connection, which: str, *, with_ends: bool) -> sqlalchemy.TextClause:
    return _make_statement(connection.dialect.name, which, with_ends)


@functools.cache
def _make_statement(dialect: str, which: str, with_ends: bool) -> sqlalchemy.TextClause:
    return sqlalchemy.text((_COUNT_WITH_ENDS if with_ends else _COUNT).format(which=which, word=_WORDS[dialect]))


def _utc_text(seconds: float) -> str:
    """The time in so many seconds, as Optuna's tables have it: UTC, without a time zone."""
    time = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return time.replace(tzinfo=None).isoformat(" ", "microseconds")
