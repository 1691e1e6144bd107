"""What local sweeps use of Optuna's tables: columns, states of trials, and the version of the schema.

Optuna describes its tables too, but its import and its opening of a database take half a second: as long as all else that a
look at a sweep needs. tests/unit/sweeps/test_optuna_tables.py compares the two descriptions. To make tables, and to refuse
those of another version, is left to Optuna (`storage.Storage.optuna`).
"""

from __future__ import annotations

import enum
import math

import sqlalchemy
from sqlalchemy import Column, DateTime, Enum, Float, Integer, String, Table, Text, select

REVISION = "v3.2.0.a"  # of the schema that is described here


class OptunaState(enum.IntEnum):
    """The states that Optuna's tables know, with Optuna's numbers. Tables have the names."""

    RUNNING = 0
    COMPLETE = 1
    PRUNED = 2
    FAIL = 3
    WAITING = 4


_metadata = sqlalchemy.MetaData()
REVISIONS = Table("alembic_version", _metadata, Column("version_num", String(32), primary_key=True))
STUDIES = Table("studies", _metadata, Column("study_id", Integer, primary_key=True), Column("study_name", String(512)))
STUDY_ATTRIBUTES = Table(
    "study_user_attributes",
    _metadata,
    Column("study_user_attribute_id", Integer, primary_key=True),
    Column("study_id", Integer),
    Column("key", String(512)),
    Column("value_json", Text),
)
TRIALS = Table(
    "trials",
    _metadata,
    Column("trial_id", Integer, primary_key=True),
    Column("number", Integer),
    Column("study_id", Integer),
    Column("state", Enum(OptunaState, name="trialstate")),
    Column("datetime_start", DateTime),  # when it was claimed last
    Column("datetime_complete", DateTime),
)
TRIAL_ATTRIBUTES = Table(
    "trial_user_attributes",
    _metadata,
    Column("trial_user_attribute_id", Integer, primary_key=True),
    Column("trial_id", Integer),
    Column("key", String(512)),
    Column("value_json", Text),
)
TRIAL_VALUES = Table(
    "trial_values",
    _metadata,
    Column("trial_value_id", Integer, primary_key=True),
    Column("trial_id", Integer),
    Column("objective", Integer),
    Column("value", Float(53)),
    Column("value_type", Enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")),
)
INTERMEDIATE_VALUES = Table(
    "trial_intermediate_values",
    _metadata,
    Column("trial_intermediate_value_id", Integer, primary_key=True),
    Column("trial_id", Integer),
    Column("step", Integer),
    Column("intermediate_value", Float(53)),
    Column("intermediate_value_type", Enum("FINITE", "INF_POS", "INF_NEG", "NAN", name="trialintermediatevaluetype")),
)
TABLES = tuple(_metadata.tables.values())
_SPECIAL_VALUES = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}  # kind -> what stands there as null


def parse_value(value: float | None, kind: str) -> float:
    """An intermediate value, as a row has it. Raises LookupError for a kind that there is not."""
    return float(value) if kind == "FINITE" and value is not None else _SPECIAL_VALUES[kind]


def has_known_schema(engine: sqlalchemy.Engine) -> bool:
    """Whether a database has Optuna's tables as they are described here."""
    with engine.connect() as connection:
        if not sqlalchemy.inspect(connection).has_table(REVISIONS.name):
            return False
        return connection.execute(select(REVISIONS.c.version_num)).scalars().all() == [REVISION]
