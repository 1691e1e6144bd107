"""The database of local sweeps, as Optuna opens it: it makes the tables, and keeps the trials of a search.

Importing it imports Optuna, so it has a module of its own, which `storage.Storage.optuna` imports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optuna
from optuna.storages import RDBStorage

from cifar.sweeps.storage_errors import explain_errors

optuna.logging.set_verbosity(optuna.logging.WARNING)


class GuardedStorage(RDBStorage):
    """Optuna's storage, where a damaged database or a lost server is one sentence. The cause stays in the error's chain."""


def _guard_method(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    @functools.wraps(method)
    def call(self: RDBStorage, *arguments: Any, **options: Any) -> Any:
        with explain_errors(self.engine, optuna.exceptions.StorageInternalError):
            return method(self, *arguments, **options)

    return call


for _name in ("get_all_trials", "get_trial", "create_new_trial", "set_trial_intermediate_value"):
    setattr(GuardedStorage, _name, _guard_method(_name))
