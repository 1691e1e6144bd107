"""What is said of a database of local sweeps: its URL without the password, and its errors in one sentence."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import sqlalchemy

from cifar.errors import UserError
from cifar.system.redact import redact


class StorageError(UserError):
    """A database that does not do what it should."""


def redact_url(url: str) -> str:
    """The URL as it may be shown and written to files: without passwords, with the absolute path of a SQLite file."""
    if not url:
        return ""
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        return "***"
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        return f"sqlite:///{os.path.realpath(parsed.database)}"
    secret = {key: "***" for key in parsed.query if "pass" in key.lower() or "key" in key.lower()}
    return parsed.update_query_dict(secret).render_as_string(hide_password=True)


# What Optuna and SQLAlchemy raise at rows that Optuna never wrote.
_DAMAGE = (ValueError, TypeError, AssertionError, AttributeError, LookupError, OverflowError, RecursionError)


@contextlib.contextmanager
def explain_errors(engine: sqlalchemy.Engine, *wrappers: type[Exception]) -> Iterator[None]:
    """Turn what a damaged database or a lost server raises into one sentence. `wrappers`: errors whose cause says more."""
    driver: Any = engine.dialect.loaded_dbapi
    explained: tuple[type[Exception], ...] = (sqlalchemy.exc.SQLAlchemyError, driver.Error, *wrappers, *_DAMAGE)
    try:
        yield
    except explained as error:
        cause = error.__cause__ if isinstance(error, wrappers) else error
        what = " ".join(str(getattr(cause, "orig", cause) or error).split())[:200] or type(error).__name__
        raise StorageError(
            f"the storage {redact_url(str(engine.url))} is damaged or does not answer ({redact(what)}); "
            "restore it, or check its server"
        ) from error
