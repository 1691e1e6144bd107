"""The SQL of local sweeps: what a claim, a count and a list need of Optuna's tables, without reading every trial.

Optuna reads a study's trials all at once, with five statements and an object for each row: a second or two for 10,000 trials.
It writes them one by one, with twelve statements and a commit each. So what happens often, or to all trials at once, is asked
and written here, in Optuna's own tables and columns. Optuna does all else. Both read and write the same rows, which
tests/unit/sweeps/test_trial_table.py compares, so a sweep's database stays one that Optuna can open.

What is used of Optuna's tables:

    trials                 trial_id · number · study_id · state · datetime_start (when it was claimed last) · datetime_complete
    trial_user_attributes  trial_id · key ("cell", "values", "now") · value_json

A cell that is offered again is a new trial with the same cell. Only ended cells are offered again, so of a cell's trials only
the latest can be open.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy
from sqlalchemy import ColumnElement, and_, bindparam, func, select

from cifar.errors import UserError
from cifar.sweeps import optuna_tables, trial_counts
from cifar.sweeps.optuna_tables import OptunaState
from cifar.sweeps.storage import Storage
from cifar.sweeps.storage_errors import explain_errors
from cifar.sweeps.trial_counts import EndedTrials, TrialCounter
from cifar.sweeps.trial_offers import Offers
from cifar.tracking.records import is_count

_decode = json.JSONDecoder().decode  # `json.loads` does the same and looks first at options and bytes
_TRIALS, _ATTRIBUTES = optuna_tables.TRIALS, optuna_tables.TRIAL_ATTRIBUTES
_CELL, _VALUES, _NOW = (_ATTRIBUTES.alias(key) for key in ("cell", "planned", "now"))
_CHUNK_SIZE = 32  # waiting trials that a claim reads at once
_INDEX, _INDEX_COLUMNS = "cifar_trials_by_state", "study_id, state, datetime_start, trial_id"
_INDEX_SECONDS = 20  # to make it: it waits for the transactions that are open
# whether the index of PostgreSQL can be used; no row: there is none
_FIND_INDEX = "select indisvalid from pg_index where indexrelid = to_regclass(:name)"
_NO_END = 2**62  # above every id
_IS_TRIAL = _TRIALS.c.trial_id == bindparam("id")
_SET_STATE = _TRIALS.update().where(_IS_TRIAL).values(state=bindparam("new"))
_SET_STARTED = _TRIALS.update().where(_IS_TRIAL).values(state=bindparam("new"), datetime_start=bindparam("start"))
_SET_ENDED = _TRIALS.update().where(_IS_TRIAL).values(state=bindparam("new"), datetime_complete=bindparam("end"))
_IS_NOW = and_(_ATTRIBUTES.c.trial_id == bindparam("id"), _ATTRIBUTES.c.key == "now")
_SET_NOW = _ATTRIBUTES.update().where(_IS_NOW).values(value_json=bindparam("text"))
_STUDY = optuna_tables.STUDY_ATTRIBUTES
_IS_ATTRIBUTE = and_(_STUDY.c.study_id == bindparam("study"), _STUDY.c.key == bindparam("name"))
_STUDY_ATTRIBUTE = select(_STUDY.c.value_json).where(_IS_ATTRIBUTE)
_WRITE_STUDY_ATTRIBUTE = sqlalchemy.text("""
insert into study_user_attributes (study_id, key, value_json) values (:study, :name, :text)
on conflict (study_id, key) do update set value_json = excluded.value_json
""")
_MAX_IDS = 500  # in one statement
_ENDED = "ended"  # the study's attribute with `EndedTrials`
_NUM_UNKEPT = 100  # trials whose end a first count reads by itself


@dataclass(frozen=True)
class StoredTrial:
    """A cell of the sweep, as the database has it."""

    optuna_id: int
    number: int  # 0, 1, ... in the order in which trials were made
    state: OptunaState
    cell: int
    values: dict[str, Any]
    now: dict[str, Any]  # what changes: attempt, worker, beat, kills, state, reason, value. {} if nobody has had it yet

    @property
    def trial_state(self) -> str:
        """One of TRIAL_STATES."""
        return "running" if self.state == OptunaState.RUNNING else str(self.now.get("state", "waiting"))

    @property
    def num_failures(self) -> int:
        return int(self.now.get("kills") or 0)

    @property
    def attempt(self) -> int:
        """The number of its last claim; 0 if there was none."""
        return int(self.now.get("attempt") or 0)


def parse_trial(optuna_id: int, number: int, state: OptunaState, attributes: Mapping[str, Any]) -> StoredTrial:
    """Check what a row says. Raises UserError for a trial that no version of this program has written."""
    cell, values, now = attributes.get("cell", number), attributes.get("values", {}), attributes.get("now", {})
    is_whole = is_count(cell) and isinstance(values, dict) and isinstance(now, dict)
    if not is_whole or not all(is_count(now.get(name) or 0) for name in ("attempt", "kills")):
        raise UserError(f"trial {number} of the sweep's database is damaged; restore the database from a copy")
    return StoredTrial(optuna_id, number, state, int(cell), values, now)


def parse_texts(optuna_id: int, number: int, state: OptunaState, texts: Sequence[str | None]) -> StoredTrial:
    """`parse_trial` of the attributes' JSON texts: cell, values, now. None: the trial has no such attribute."""
    named = zip(("cell", "values", "now"), texts, strict=True)
    return parse_trial(optuna_id, number, state, {key: _decode(text) for key, text in named if text is not None})


def _write_now(connection: sqlalchemy.Connection, optuna_id: int, now: Mapping[str, Any]) -> None:
    text = json.dumps(now)
    if not connection.execute(_SET_NOW, {"id": optuna_id, "text": text}).rowcount:
        connection.execute(_ATTRIBUTES.insert(), {"trial_id": optuna_id, "key": "now", "value_json": text})


def _parse_cell(row: Any) -> int:
    """A trial's cell, of (id, number, its text). Early versions did not write it where it is the trial's number."""
    try:
        return int(row[1] if row[2] is None else json.loads(row[2]))
    except (ValueError, TypeError):
        raise UserError(f"trial {row[1]} of the sweep's database is damaged; restore the database from a copy") from None


def _utc_now() -> datetime.datetime:
    """The time as Optuna's tables have it: UTC, without a time zone."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


class TrialTable:
    """The trials of one study. Who changes something, or relies on an answer, holds the sweep's lock."""

    def __init__(self, storage: Storage, study: int) -> None:
        self._storage, self._study = storage, study
        self._offers, self._guard = Offers(), threading.RLock()
        self._counter: TrialCounter | None = None  # made by the first count
        self._num_kept = 0  # of the trials that it knows to have ended, those that the database says it of
        self._of_study = _TRIALS.c.study_id == study
        # Statements of every claim and end, made once: SQLAlchemy takes longer to make one than a database to answer it.
        is_unclaimed = and_(self._has_state(OptunaState.WAITING), _TRIALS.c.datetime_start.is_(None))
        was_claimed = and_(self._has_state(OptunaState.WAITING), _TRIALS.c.datetime_start.is_not(None))
        joined: sqlalchemy.FromClause = _TRIALS
        for attributes, key in ((_CELL, "cell"), (_VALUES, "values"), (_NOW, "now")):
            joined = joined.outerjoin(attributes, self._has_key(attributes, key))
        columns = (_TRIALS.c.trial_id, _TRIALS.c.number, _TRIALS.c.state, _TRIALS.c.datetime_start)  # the last: to check it
        self._whole = select(*columns, *(a.c.value_json for a in (_CELL, _VALUES, _NOW))).select_from(joined)
        is_named = _TRIALS.c.trial_id.in_(bindparam("ids", expanding=True))
        self._by_id, self._unclaimed_by_id = self._whole.where(is_named), self._whole.where(is_named, is_unclaimed)
        self._running = self._whole.where(self._has_state(OptunaState.RUNNING))
        self._given_back = self._whole.where(was_claimed)
        # the order of the index; datetime_start is the same for all, and the cell is the trial's number
        ids = select(_TRIALS.c.trial_id).where(is_unclaimed)
        ids = ids.where(_TRIALS.c.trial_id > bindparam("after"), _TRIALS.c.trial_id < bindparam("end"))
        self._unclaimed_ids = ids.order_by(_TRIALS.c.datetime_start, _TRIALS.c.trial_id)
        named = select(_TRIALS.c.trial_id, _TRIALS.c.number, _CELL.c.value_json)
        self._named = named.select_from(_TRIALS.outerjoin(_CELL, self._has_key(_CELL, "cell")))
        last_id = select(func.max(_TRIALS.c.trial_id)).where(self._of_study).scalar_subquery()
        self._last = self._named.where(_TRIALS.c.trial_id == last_id)

    @property
    def known_offers(self) -> Offers:
        """What this process has read of cells that were offered again. The database may have more."""
        return self._offers

    # -- reading -------------------------------------------------------------------------------------------------------

    def list_trials(self) -> list[StoredTrial]:
        """One trial for each cell, by cell. Of a cell that was offered again, the latest."""
        with self._connect() as connection:
            everything = self._whole.where(self._of_study).order_by(_TRIALS.c.number, _TRIALS.c.trial_id)
            trials = _read_trials(connection, everything)
        return sorted({trial.cell: trial for trial in trials}.values(), key=lambda trial: trial.cell)

    def list_running(self) -> list[StoredTrial]:
        """The trials that an agent has, by cell."""
        with self._connect() as connection:
            trials = _read_trials(connection, self._running)
        return sorted(trials, key=lambda trial: trial.cell)

    def read_trial(self, optuna_id: int) -> StoredTrial:
        return self.read_trials([optuna_id])[optuna_id]

    def read_trials(self, optuna_ids: Sequence[int]) -> dict[int, StoredTrial]:
        """The trials by Optuna's ids, which must be there."""
        found: dict[int, StoredTrial] = {}
        with self._connect() as connection:
            for start in range(0, len(optuna_ids), _MAX_IDS):
                trials = _read_trials(connection, self._by_id, optuna_ids[start : start + _MAX_IDS])
                found |= {trial.optuna_id: trial for trial in trials}
        return found

    def iterate_waiting(self) -> Iterator[StoredTrial]:
        """The trials that can be claimed, in the order in which they are handed out: what failed comes last, else by cell.

        They are read as far as the caller goes.
        """
        with self._connect() as connection:
            offers = self._update_offers(connection)
        streams = [self._iterate_unclaimed(offers.first_id), self._list_given_back()]
        if offers.first_id is not None:
            streams.append(self._iterate_offers())
        yield from heapq.merge(*streams, key=lambda trial: (trial.num_failures, trial.cell))

    def _iterate_unclaimed(self, end_id: int | None) -> Iterator[StoredTrial]:
        """The waiting trials before `end_id` that nobody has claimed yet, by cell. None of them has failed."""
        bounds = {"after": 0, "end": _NO_END if end_id is None else end_id}
        while True:
            with self._connect() as connection:
                found = connection.execute(self._unclaimed_ids.limit(_CHUNK_SIZE), bounds).scalars().all()
                trials = _read_trials(connection, self._by_id, found) if found else []
            yield from sorted(trials, key=lambda trial: trial.cell)
            if len(found) < _CHUNK_SIZE:
                return
            bounds["after"] = found[-1]

    def _iterate_offers(self) -> Iterator[StoredTrial]:
        """The waiting trials of cells that were offered again or added later, which nobody has claimed yet, by cell."""
        start = 0
        while True:
            with self._guard:
                seen = self._offers.unclaimed[start : start + _CHUNK_SIZE]
                if not seen:
                    return
                with self._connect() as connection:
                    trials = _read_trials(connection, self._unclaimed_by_id, [optuna_id for _, optuna_id in seen])
                start = self._offers.drop_claimed(start, seen, {trial.optuna_id for trial in trials})
            yield from sorted(trials, key=lambda trial: trial.cell)

    def _list_given_back(self) -> list[StoredTrial]:
        """The waiting trials that an agent has had already: few, as they were running at some time."""
        with self._connect() as connection:
            trials = _read_trials(connection, self._given_back)
        return sorted(trials, key=lambda trial: (trial.num_failures, trial.cell))

    def count_cells(self) -> int:
        with self._connect() as connection:
            offers = self._update_offers(connection)
            is_known = and_(self._of_study, _TRIALS.c.trial_id <= offers.last_id)
            num_trials = connection.execute(select(func.count()).select_from(_TRIALS).where(is_known)).scalar_one()
        return int(num_trials) - len(offers.replaced)

    def count_states(self) -> dict[str, int]:
        """Trial state -> number of cells."""
        with self._connect() as connection:
            offers = self._update_offers(connection)
            if self._counter is None:
                text = connection.execute(_STUDY_ATTRIBUTE, {"study": self._study, "name": _ENDED}).scalar()
                kept = trial_counts.parse_ended(text or "null")
                self._counter, self._num_kept = TrialCounter(self._study, kept), kept.states.total()
            counted = self._counter.count(connection, offers.last_id)  # a trial that was added since is not counted
        counted.subtract(offers.replaced_states)
        return dict(+counted)

    def keep_counts(self) -> None:
        """Write down for other processes how trials have ended, if the last count knows of many more than are written."""
        ended = EndedTrials() if self._counter is None else self._counter.ended
        if ended.states.total() >= self._num_kept + _NUM_UNKEPT:
            self.write_study_attribute(_ENDED, ended.describe())
            self._num_kept = ended.states.total()

    def list_values_at(self, step: int) -> list[float]:
        """The intermediate values at a step: one for each cell whose latest trial has come to it."""
        reached = optuna_tables.INTERMEDIATE_VALUES
        columns = _TRIALS.c.trial_id, reached.c.intermediate_value, reached.c.intermediate_value_type
        found = select(*columns).select_from(reached.join(_TRIALS, _TRIALS.c.trial_id == reached.c.trial_id))
        found = found.where(self._of_study, reached.c.step == step).order_by(_TRIALS.c.trial_id)
        with self._connect() as connection:
            offers = self._update_offers(connection)
            rows = connection.execute(found).all()
            return [
                optuna_tables.parse_value(value, kind) for optuna_id, value, kind in rows if optuna_id not in offers.replaced
            ]

    def read_study_attribute(self, key: str) -> Any:
        """One of the study's user attributes; None where it has none of that name. Another one is the sweep's whole text."""
        with self._connect() as connection:
            text = connection.execute(_STUDY_ATTRIBUTE, {"study": self._study, "name": key}).scalar()
            return None if text is None else json.loads(text)

    # -- writing -------------------------------------------------------------------------------------------------------

    def insert_waiting(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """Add waiting trials with these user attributes, in one transaction: as `create_new_trial` would, one by one."""
        with self._begin() as connection:
            study = optuna_tables.STUDIES
            connection.execute(select(study.c.study_id).where(study.c.study_id == self._study).with_for_update())
            first = connection.execute(select(func.count()).select_from(_TRIALS).where(self._of_study)).scalar_one()
            rows = [{"number": first + n, "study_id": self._study, "state": OptunaState.WAITING} for n in range(len(trials))]
            if not rows:
                return
            connection.execute(_TRIALS.insert(), rows)
            made = select(_TRIALS.c.trial_id).where(self._of_study, _TRIALS.c.number >= first).order_by(_TRIALS.c.number)
            ids = connection.execute(made).scalars().all()
            attributes = [
                {"trial_id": optuna_id, "key": key, "value_json": json.dumps(value)}
                for optuna_id, about in zip(ids, trials, strict=True)
                for key, value in about.items()
            ]
            connection.execute(_ATTRIBUTES.insert(), attributes)
        self._update_statistics()

    def _update_statistics(self) -> None:
        """PostgreSQL would plan for small tables until it looks by itself. Nothing waits for it, and nothing needs it."""
        if self._storage.engine.dialect.name != "postgresql":
            return
        # Not within a transaction that has written: an index that is being made waits for that one, and this for the index.
        options = {"isolation_level": "AUTOCOMMIT"}
        with (
            contextlib.suppress(sqlalchemy.exc.SQLAlchemyError),
            self._storage.engine.connect().execution_options(**options) as connection,
        ):
            connection.execute(sqlalchemy.text("set lock_timeout = '2s'"))
            try:
                connection.execute(sqlalchemy.text("analyze trials, trial_user_attributes"))
            finally:
                connection.execute(sqlalchemy.text("reset lock_timeout"))

    def update_trial(self, optuna_id: int, now: Mapping[str, Any], state: OptunaState | None = None) -> None:
        """Write what changes of an open trial, and Optuna's state with it if given: a killed process leaves both or none."""
        self.update_trials({optuna_id: now}, state)

    def update_trials(self, changes: Mapping[int, Mapping[str, Any]], state: OptunaState | None = None) -> None:
        """`update_trial` of several trials, in one transaction: Optuna's id -> what `now` says from then on."""
        if not changes:
            return
        start = {"start": _utc_now()} if state == OptunaState.RUNNING else {}
        with self._begin() as connection:
            for optuna_id, now in changes.items():
                _write_now(connection, optuna_id, now)
                if state is not None:
                    connection.execute(_SET_STARTED if start else _SET_STATE, {"id": optuna_id, "new": state, **start})

    def end_trial(
        self, optuna_id: int, now: Mapping[str, Any], state: OptunaState, values: Sequence[float] | None = None
    ) -> None:
        """End a trial that runs, in one transaction. `values`: one for each objective, finite, if it has them."""
        with self._begin() as connection:
            _write_now(connection, optuna_id, now)
            connection.execute(_SET_ENDED, {"id": optuna_id, "new": state, "end": _utc_now()})
            rows = [
                {"trial_id": optuna_id, "objective": number, "value": value, "value_type": "FINITE"}
                for number, value in enumerate(values or ())
            ]
            if rows:
                connection.execute(optuna_tables.TRIAL_VALUES.insert(), rows)

    def end_waiting(self, ended: Mapping[int, Mapping[str, Any]], state: OptunaState) -> None:
        """End waiting trials in one transaction. `ended`: Optuna's id -> what `now` says from then on."""
        if not ended:
            return
        ids = list(ended)
        with self._begin() as connection:
            for start in range(0, len(ids), _MAX_IDS):
                chunk = ids[start : start + _MAX_IDS]
                connection.execute(_ATTRIBUTES.delete().where(_ATTRIBUTES.c.key == "now", _ATTRIBUTES.c.trial_id.in_(chunk)))
                is_ended = _TRIALS.c.trial_id.in_(chunk)
                connection.execute(_TRIALS.update().where(is_ended).values(state=state, datetime_complete=_utc_now()))
            rows = [{"trial_id": optuna_id, "key": "now", "value_json": json.dumps(ended[optuna_id])} for optuna_id in ids]
            connection.execute(_ATTRIBUTES.insert(), rows)

    def write_study_attribute(self, key: str, value: Any) -> None:
        """Set one of the study's user attributes."""
        with self._begin() as connection:
            row = {"study": self._study, "name": key, "text": json.dumps(value)}
            connection.execute(_WRITE_STUDY_ATTRIBUTE, row)

    def add_index(self) -> None:
        """Let a claim find the open trials without a look at the others. Optuna has an index of the studies only.

        Other sweeps of a PostgreSQL database go on meanwhile: it is made beside their writes, and only if it is not there.
        Without it (a sweep of an earlier version, a database that refuses it) all answers are the same.
        """
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError):
            if self._storage.engine.dialect.name == "sqlite":
                with self._storage.engine.begin() as connection:
                    connection.execute(sqlalchemy.text(f"create index if not exists {_INDEX} on trials ({_INDEX_COLUMNS})"))
                return
            with self._storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                found = connection.execute(sqlalchemy.text(_FIND_INDEX), {"name": _INDEX}).scalar()
                if found is True:
                    return
                connection.execute(sqlalchemy.text(f"set statement_timeout = '{_INDEX_SECONDS}s'"))
                try:
                    if found is False:  # whoever began to make it was killed
                        connection.execute(sqlalchemy.text(f"drop index concurrently if exists {_INDEX}"))
                    make = f"create index concurrently if not exists {_INDEX} on trials ({_INDEX_COLUMNS})"
                    connection.execute(sqlalchemy.text(make))
                finally:
                    connection.execute(sqlalchemy.text("reset statement_timeout"))

    # -- statements ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlalchemy.Connection]:
        with explain_errors(self._storage.engine), self._storage.engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sqlalchemy.Connection]:
        with explain_errors(self._storage.engine), self._storage.engine.begin() as connection:
            yield connection

    def _has_state(self, state: OptunaState) -> ColumnElement[bool]:
        return and_(self._of_study, _TRIALS.c.state == state)

    def _has_key(self, attributes: Any, key: str) -> ColumnElement[bool]:
        """The condition of a join that gives each trial one of its attributes."""
        return and_(attributes.c.trial_id == _TRIALS.c.trial_id, attributes.c.key == key)

    def _update_offers(self, connection: sqlalchemy.Connection) -> Offers:
        """Read of the trials that are not known yet whether they took the place of others."""
        with self._guard:
            offers = self._offers
            last = connection.execute(self._last).first()
            if last is None or last[0] == offers.last_id:
                return offers
            rows = [last]
            if offers.first_id is not None or _parse_cell(last) != last[1]:
                is_new = and_(self._of_study, _TRIALS.c.trial_id > offers.last_id, _TRIALS.c.trial_id <= last[0])
                rows = list(connection.execute(self._named.where(is_new).order_by(_TRIALS.c.trial_id)))
            # else: from the first offer on no number is a cell, so with this one all before it are their cells' first
            before = set(offers.replaced)
            offers.add((row[0], row[1], _parse_cell(row)) for row in rows)
            if offers.lacks_ids:
                originals = select(_TRIALS.c.trial_id, _TRIALS.c.number).where(self._of_study)
                rows = list(connection.execute(originals.where(_TRIALS.c.trial_id < offers.first_id)))
                offers.resolve((row[0], row[1]) for row in rows)
            ids = sorted(offers.replaced - before)
            for start in range(0, len(ids), _MAX_IDS):
                chunk = ids[start : start + _MAX_IDS]
                offers.replaced_states += trial_counts.count_ids(connection, self._study, chunk)
            return offers


def _read_trials(connection: sqlalchemy.Connection, found: Any, ids: Sequence[int] | None = None) -> list[StoredTrial]:
    """The trials that a select of `TrialTable._whole` finds. `ids`: where it asks for some."""
    rows = connection.execute(found, {} if ids is None else {"ids": list(ids)}).all()
    return [parse_texts(optuna_id, number, state, texts) for optuna_id, number, state, _, *texts in rows]
