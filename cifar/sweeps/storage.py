"""The databases of local sweeps: opening one, and locking it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy

from cifar.errors import UserError
from cifar.sweeps import optuna_tables
from cifar.sweeps.storage_errors import StorageError, explain_errors, redact_url
from cifar.system.files import is_regular_file
from cifar.system.ownership import NO_FLOCK_ERRNOS

if TYPE_CHECKING:
    from cifar.sweeps.optuna_storage import GuardedStorage

CONNECT_SECONDS = 8  # to wait for a server that does not answer
LOCK_TIMEOUT_SECONDS = 300.0  # for others' claims; that of a search takes seconds in a sweep of thousands of cells
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.0005, 0.005  # between two tries for a file's lock
LOCAL_FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay")


def default_url(folder: Path) -> str:
    """The URL of a SQLite file in the sweep's own folder."""
    return f"sqlite:///{folder / 'study.db'}"


class Storage:
    """The database of local sweeps. `engine`: its connections, for our own SQL."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._url, self._options = url, options
        self.engine = sqlalchemy.create_engine(url, **options)

    @functools.cached_property
    def optuna(self) -> GuardedStorage:
        """The same database through Optuna, with connections of its own.

        To make tables and studies, and for searches. All else does without: the import and the opening take half a second.
        """
        from cifar.sweeps.optuna_storage import GuardedStorage

        with explain_errors(self.engine):
            return GuardedStorage(self._url, engine_kwargs=dict(self._options))


def open_storage(url: str) -> Storage:
    """Connect, and make Optuna's tables if there are none. Raises UserError."""
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        raise UserError("the storage is no database URL; write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DB") from None
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise UserError(f"storage '{backend}' cannot lock a claim; use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DB")
    if backend == "postgresql":  # SQLAlchemy 2.1 would look for psycopg 3; claims are written for psycopg2
        parsed = parsed.set(drivername="postgresql+psycopg2")
    sqlite = {
        "connect_args": {
            "timeout": 60,
            "factory": _WalConnection if _is_on_local_disk(parsed.database) else _RollbackConnection,
        }
    }
    if backend == "sqlite":
        _check_sqlite_file(parsed.database)
    timeout = {} if "connect_timeout" in parsed.query else {"connect_timeout": CONNECT_SECONDS}
    options = sqlite if backend == "sqlite" else {"pool_pre_ping": True, "connect_args": timeout}
    try:
        whole = redact_url(url) if backend == "sqlite" else parsed.render_as_string(hide_password=False)
        storage = Storage(whole, options)
        if not optuna_tables.has_known_schema(storage.engine):
            _ = storage.optuna  # it makes the tables, or refuses those of another version
        return storage
    except Exception as error:  # a file that is no database of Optuna's can raise anything
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):  # that is no fault of the storage
            raise
        cause = error.__cause__ if isinstance(error, StorageError) else error
        what = "install psycopg2-binary" if isinstance(error, ImportError) else type(cause).__name__
        raise UserError(f"the storage {redact_url(url)} cannot be opened ({what}); check the URL and its server") from None


def find_study(storage: Storage, name: str) -> int | None:
    """The id of the study of that name; None if there is none."""
    studies = optuna_tables.STUDIES.c
    with explain_errors(storage.engine), storage.engine.connect() as connection:
        return connection.execute(sqlalchemy.select(studies.study_id).where(studies.study_name == name)).scalar()


def _check_sqlite_file(database: str | None) -> None:
    """Raise UserError for what SQLite would wait for, or write into without an error: a pipe, a device."""
    if not database or database == ":memory:":
        raise UserError("the storage names no file; write sqlite:///FILE, as all agents have to find it")
    if os.path.lexists(database) and not is_regular_file(database):
        raise UserError(f"the storage {database} is not a file; name another one")


class _WalConnection(sqlite3.Connection):
    """A SQLite file with a write-ahead log. A commit does not wait for the disk, so an agent hands out trials faster.

    A killed process loses nothing. A power cut may lose the last second, but never the file. The cells of that second are
    offered again, and how their runs ended is read from the run folders, which are on disk.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("pragma journal_mode = wal")
        self.execute("pragma synchronous = normal")


class _RollbackConnection(sqlite3.Connection):
    """SQLite's default journal, for network disks: the write-ahead log needs memory shared by all processes that use it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("pragma journal_mode = delete")


def _is_on_local_disk(database: str | None) -> bool:
    """Whether a file is on a disk of this machine, as far as /proc/self/mounts tells."""
    if not database:
        return False
    place, kinds = os.path.realpath(database), {"/": ""}
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        kinds |= {mount[1]: mount[2] for mount in mounts}  # a later mount hides an earlier one at the same place
    point = max((point for point in kinds if place.startswith(f"{point.rstrip('/')}/")), key=len)
    return kinds[point] in LOCAL_FILESYSTEMS


@contextlib.contextmanager
def lock_storage(storage: Storage, name: str) -> Iterator[None]:
    """Hold the lock of a sweep: one process at a time, of all that share the storage. It is released when its process ends.

    Optuna's own claim is not enough: two processes can be given the same waiting trial of a SQLite file.
    """
    if storage.engine.dialect.name == "sqlite":
        with _explain_lock_errors(storage):
            descriptor = _lock_file(f"{storage.engine.url.database}.lock")
        try:
            yield
        finally:
            _unlock_file(descriptor)
        return
    key = {"key": advisory_key(name)}
    with storage.engine.connect() as connection:
        connection.execute(sqlalchemy.text("select pg_advisory_lock(:key)"), key)
        try:
            yield
        finally:
            connection.execute(sqlalchemy.text("select pg_advisory_unlock(:key)"), key)


def advisory_key(name: str) -> int:
    """The key of a sweep's lock in PostgreSQL."""
    return zlib.crc32(name.encode())


@contextlib.contextmanager
def _explain_lock_errors(storage: Storage) -> Iterator[None]:
    """Turn what the file system refuses to a SQLite file's lock into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_FLOCK_ERRNOS:
            raise
        url = redact_url(storage.engine.url.render_as_string(hide_password=False))
        raise UserError(
            f"the file system of {url} has no locks ({error.strerror}), without which agents cannot share a SQLite file; "
            "keep the runs folder on another one, or the sweep in PostgreSQL (CIFAR_STORAGE)"
        ) from error


def _lock_file(path: str) -> int:
    """Wait for the lock of a file -> its descriptor. The `filelock` library waits 50 ms where a claim takes one."""
    deadline, pause = time.monotonic() + LOCK_TIMEOUT_SECONDS, FIRST_PAUSE_SECONDS
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"another process has held the lock {path} for {LOCK_TIMEOUT_SECONDS:.0f} s; "
                "find the one that is stopped, and let it go on or end it"
            )
        time.sleep(pause)
        pause = min(1.3 * pause, MAX_PAUSE_SECONDS)
    return descriptor


def _try_lock(path: str) -> int | None:
    """Lock a file -> its descriptor; None where another process has the lock, or has removed the file meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    is_locked = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = os.fstat(descriptor).st_nlink > 0
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
    finally:
        if not is_locked:
            os.close(descriptor)
    return descriptor if is_locked else None


def _unlock_file(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that is being started may have the descriptor for a moment
    os.close(descriptor)
