"""Our description of Optuna's tables, compared with Optuna's own."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy
from optuna.storages._rdb import models
from optuna.trial import TrialState

from cifar.errors import UserError
from cifar.sweeps import optuna_tables, storage
from helpers.local_sweeps import create_local_sweep
from helpers.paths import ROOT


@pytest.mark.parametrize("table", optuna_tables.TABLES, ids=str)
def test_columns_are_optunas(table: sqlalchemy.Table) -> None:
    if table is optuna_tables.REVISIONS:
        return  # of Alembic; the next test reads it
    theirs = models.BaseModel.metadata.tables[table.name]

    def describe(column: sqlalchemy.Column[object]) -> tuple[object, ...]:
        kind = column.type
        about = (kind.name, kind.enums) if isinstance(kind, sqlalchemy.Enum) else (getattr(kind, "length", None),)
        return column.name, kind.__visit_name__, about, column.primary_key

    assert [describe(column) for column in table.c] == [describe(column) for column in theirs.c]


def test_states_and_special_values_are_optunas() -> None:
    assert {state.name: int(state) for state in optuna_tables.OptunaState} == {s.name: int(s) for s in TrialState}
    model = models.TrialIntermediateValueModel
    for value in (0.1 + 0.2, -5.0, math.inf, -math.inf, math.nan):
        stored, kind = model.intermediate_value_to_stored_repr(value)
        found = optuna_tables.parse_value(stored, kind.name)
        assert found == value or (math.isnan(found) and math.isnan(value))
        assert repr(found) == repr(model.stored_repr_to_intermediate_value(stored, kind))
    with pytest.raises(LookupError):
        optuna_tables.parse_value(None, "FINITE")


def test_optuna_makes_the_schema_that_is_described_and_others_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    made = storage.open_storage(url)
    assert "optuna" in vars(made)  # it has made the tables
    assert optuna_tables.has_known_schema(made.engine)
    assert "optuna" not in vars(storage.open_storage(url))
    with made.engine.begin() as connection:
        connection.execute(sqlalchemy.text("update alembic_version set version_num = 'v9.0.0.a'"))
    assert not optuna_tables.has_known_schema(made.engine)
    with pytest.raises(UserError, match=r"cannot be opened \(RuntimeError\)"):
        storage.open_storage(url)


def test_a_grid_is_looked_at_and_worked_on_without_optuna(runs: Path) -> None:
    backend = create_local_sweep(runs)
    script = f"""
import sys
from pathlib import Path
from cifar.sweeps.local import LocalBackend
backend = LocalBackend({backend.id!r}, Path({str(runs)!r}))
backend.agree_on_threads(2)
trials = [backend.claim_trial("me") for _ in range(3)]
backend.heartbeats(trials)
for trial, state in zip(trials, ("finished", "failed", "interrupted")):
    backend.finish_trial(trial, state, 0.5, retry=False)
backend.stop_sweep()
backend.retry_cells()
print(backend.count_states(), len(backend.list_cells()))
print(sorted({{"optuna", "alembic", "numpy", "sqlalchemy.orm"}} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["{'waiting': 1, 'finished': 1, 'stopped': 22} 24", "[]"]
