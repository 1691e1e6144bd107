"""A claim and an end of a trial, each as one transaction with two trips to the database.

These two happen once for each trial. As separate statements through SQLAlchemy they took 27 trips to PostgreSQL, and building
the statements took more time than answering them. So here are their SQL texts, as the driver takes them. They write the same
rows as `TrialTable`. What is rare (a lapsed claim, a search) has no text here: `LocalBackend` does that the long way.

    with transactions.begin_claim(offers) as (look, transaction):    # the sweep's lock is held, and what a claim needs is read
        transaction.write_claim(optuna_id, now)                      # written when the block ends

On PostgreSQL the lock belongs to the transaction, so both end at once. A process that is killed leaves all of it or nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cifar.sweeps.optuna_tables import OptunaState
from cifar.sweeps.storage import Storage, advisory_key, lock_storage
from cifar.sweeps.storage_errors import explain_errors
from cifar.sweeps.trial_offers import Offers
from cifar.sweeps.trial_table import StoredTrial, parse_texts

NUM_OFFERS = 4  # of the cells offered again that a claim looks at; where none of them waits, the long way looks at all
_NO_END = 2**62  # above every id

# What a claim needs to know, as rows of (what, trial_id, number, cell, values, now). Of running trials it needs no values.
# Attributes are subqueries and not joins: PostgreSQL then reads them by their index, whatever it believes of the tables' sizes.
_ATTRIBUTE = "(select value_json from trial_user_attributes as a where a.trial_id = t.trial_id and a.key = '{}')"
_CELL, _VALUES, _NOW = map(_ATTRIBUTE.format, ("cell", "values", "now"))
_LOOK = f"""
select 'running', trial_id, number, {_CELL}, null, {_NOW} from trials as t where study_id = :study and state = 'RUNNING'
union all
select 'open', trial_id, number, {_CELL}, {_VALUES}, {_NOW} from trials as t
where study_id = :study and state = 'WAITING' and datetime_start is not null
union all
select 'open', trial_id, number, {_CELL}, {_VALUES}, {_NOW} from (
    select trial_id, number from trials
    where study_id = :study and state = 'WAITING' and datetime_start is null and trial_id < :end
    order by datetime_start, trial_id limit 1
) as t
union all
select 'open', trial_id, number, {_CELL}, {_VALUES}, {_NOW} from trials as t
where trial_id in (:offers) and state = 'WAITING' and datetime_start is null
union all
select 'last', max(trial_id), 0, null, null, null from trials where study_id = :study
union all
select 'stopped', 0, 0, null, null, value_json from study_user_attributes where study_id = :study and key = 'stopped'
"""
_READ = f"select trial_id, number, {_CELL}, {_VALUES}, {_NOW}, state from trials as t where trial_id = :id"
_WRITE_NOW = """
insert into trial_user_attributes (trial_id, key, value_json) values (:id, 'now', :now)
on conflict (trial_id, key) do update set value_json = excluded.value_json
"""
_CLAIM = "update trials set state = 'RUNNING', datetime_start = :time where trial_id = :id"
_END = "update trials set state = :state, datetime_complete = :time where trial_id = :id"
_VALUE = "insert into trial_values (trial_id, objective, value, value_type) values (:id, :objective, :value, 'FINITE')"


@dataclass(frozen=True)
class Look:
    """What a claim has read."""

    last_id: int  # of the sweep's latest trial
    stop_mode: str
    running: list[StoredTrial]  # without their values
    open: list[StoredTrial]  # the next one to hand out is among them


@dataclass
class Transaction:
    """The statements that are written when the `with` block ends; none of them if it raises."""

    statements: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def write_claim(self, optuna_id: int, now: Mapping[str, Any]) -> None:
        self.statements.append((_WRITE_NOW, {"id": optuna_id, "now": json.dumps(now)}))
        self.statements.append((_CLAIM, {"id": optuna_id, "time": _utc_text()}))

    def write_end(
        self, optuna_id: int, now: Mapping[str, Any], state: OptunaState, values: Sequence[float] | None = None
    ) -> None:
        """`values`: one for each objective, if the trial has them. They are finite."""
        self.statements.append((_WRITE_NOW, {"id": optuna_id, "now": json.dumps(now)}))
        self.statements.append((_END, {"id": optuna_id, "state": state.name, "time": _utc_text()}))
        for number, each in enumerate(values or ()):
            self.statements.append((_VALUE, {"id": optuna_id, "objective": number, "value": each}))


class TrialTransactions:
    """The claims and ends of one sweep's trials. `name`: of its lock."""

    def __init__(self, storage: Storage, study: int, name: str) -> None:
        self._storage, self._study, self._name = storage, study, name
        self._is_sqlite = storage.engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def begin_claim(self, offers: Offers) -> Iterator[tuple[Look, Transaction]]:
        """Hold the sweep's lock and read what a claim needs. `offers`: what is known already of cells offered again."""
        end = _NO_END if offers.first_id is None else offers.first_id
        ids = [optuna_id for _, optuna_id in offers.unclaimed[:NUM_OFFERS]]
        look = _LOOK.replace(":offers", ", ".join(map(str, ids or [0])))
        with self._begin(look, {"study": self._study, "end": end}) as (rows, transaction):
            yield _parse_look(rows), transaction

    @contextlib.contextmanager
    def begin_end(self, optuna_id: int) -> Iterator[tuple[StoredTrial, Transaction]]:
        """Hold the sweep's lock and read a trial, which must be there."""
        with self._begin(_READ, {"id": optuna_id}) as (rows, transaction):
            ((*row, state),) = rows
            yield parse_texts(row[0], row[1], OptunaState[state], row[2:]), transaction

    @contextlib.contextmanager
    def _begin(self, question: str, parameters: Mapping[str, Any]) -> Iterator[tuple[Sequence[Any], Transaction]]:
        begin = self._begin_sqlite if self._is_sqlite else self._begin_postgresql
        with explain_errors(self._storage.engine), begin(question, parameters) as begun:
            yield begun

    @contextlib.contextmanager
    def _begin_sqlite(self, question: str, parameters: Mapping[str, Any]) -> Iterator[tuple[Sequence[Any], Transaction]]:
        transaction = Transaction()
        with lock_storage(self._storage, self._name), contextlib.closing(self._storage.engine.raw_connection()) as connection:
            cursor = connection.cursor()
            yield cursor.execute(question, parameters).fetchall(), transaction
            for statement, values in transaction.statements:
                cursor.execute(statement, values)
            connection.commit()  # if this is not reached, the pool rolls back

    @contextlib.contextmanager
    def _begin_postgresql(self, question: str, parameters: Mapping[str, Any]) -> Iterator[tuple[Sequence[Any], Transaction]]:
        transaction = Transaction()
        with contextlib.closing(self._storage.engine.raw_connection()) as connection:
            driver: Any = connection.driver_connection
            driver.autocommit = True  # else psycopg2 sends a BEGIN of its own
            try:
                cursor = connection.cursor()
                # Each statement sees what others have written until then, whatever the database's default is.
                lock = f"begin isolation level read committed; select pg_advisory_xact_lock({advisory_key(self._name)});"
                cursor.execute(lock + _name_parameters(question), parameters)
                yield cursor.fetchall(), transaction
                texts = [cursor.mogrify(_name_parameters(text), values).decode() for text, values in transaction.statements]
                cursor.execute("; ".join([*texts, "commit"]))
                driver.autocommit = False
            except BaseException:
                connection.invalidate()  # its transaction ends with it, and the lock
                raise


@functools.lru_cache(64)
def _name_parameters(text: str) -> str:
    """SQLite's names of parameters as psycopg2's."""
    return re.sub(r":(\w+)", r"%(\1)s", text)


def _parse_look(rows: Sequence[Any]) -> Look:
    last_id, stop_mode = 0, ""
    found: dict[str, list[StoredTrial]] = {"running": [], "open": []}
    states = {"running": OptunaState.RUNNING, "open": OptunaState.WAITING}
    for what, *row in rows:
        if what == "last":
            last_id = row[0] or 0
        elif what == "stopped":
            stop_mode = str(json.loads(row[-1]) or "")
        else:
            found[what].append(parse_texts(row[0], row[1], states[what], row[2:]))
    return Look(last_id, stop_mode, found["running"], found["open"])


def _utc_text() -> str:
    """The time as Optuna's tables have it: UTC, without a time zone."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
