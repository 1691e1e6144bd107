"""Who owns a run's folder: one process at a time, on one machine or on many that share a file system.

    lock = RunLock(folder)
    lock.acquire()    # RunOwnedError if another process has it
    lock.check()      # before each write; OwnershipLostError if the folder belongs to another process by now
    lock.release()

Two files in the folder stand for it while it is owned. `owner.lock` is locked with flock, which ends with its process, also
after `kill -9`; child processes do not inherit it. `owner.json`, the lease, says who the owner is: host, boot, process and
the time that process started. The owner touches it every few seconds. Some file systems refuse flock, and on others a lock
holds on one machine only. There the lease alone decides.

A lease is free at once where it is known that its process has ended: on its own machine. Elsewhere it is free for a process
that has itself seen it untouched for the lease's time. Only the observer's own monotonic clock counts, so it does not matter
what any machine's clock says. Readers need no ownership.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cifar.errors import DiskFullError, UserError
from cifar.system.disk import is_disk_full_error
from cifar.system.variables import read_variable

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK_FILE, LEASE_FILE = "owner.lock", "owner.json"
DEFAULT_LEASE_SECONDS = 15.0
BEATS_PER_LEASE = 5
BUSY_SECONDS = 2.0  # that another process may hold the lock just to look whether the run is free
SETTLE_SECONDS = 1.0  # after a lease was taken over: the old owner's last write has ended, and of two takers one has won
POLL_SECONDS = 0.1
MAX_LEASE_BYTES = 4096
NO_FLOCK_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
NO_LINK_ERRNOS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class OwnershipError(UserError):
    """A run's folder is not this process's, or not any more. Nothing in it was changed. `folder`: which one.

    The arguments have defaults so that the error can be pickled, for other ranks.
    """

    def __init__(self, text: str, folder: Path = Path()) -> None:
        super().__init__(text)
        self.folder = folder


class RunOwnedError(OwnershipError):
    """Another process has the run."""


class OwnershipLostError(OwnershipError):
    """The run was this process's, and is not any more. `is_removed`: the folder, or its lease, was deleted."""

    def __init__(self, text: str, folder: Path = Path(), *, is_removed: bool = False) -> None:
        super().__init__(text, folder)
        self.is_removed = is_removed


def lease_seconds() -> float:
    """Seconds without a sign of life after which a claim of another machine is free: CIFAR_LEASE. Raises UserError."""
    text = read_variable("CIFAR_LEASE")
    try:
        seconds = float(text) if text else DEFAULT_LEASE_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(
            f"CIFAR_LEASE is {text[:40]!r}; give a number of seconds above 0, or unset it for {DEFAULT_LEASE_SECONDS:g}"
        )
    return seconds


# -- processes and machines --------------------------------------------------------------------------------------------


@functools.cache
def _read_first_line(path: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text().strip()
    return ""


def _boot_id() -> str:
    """Of the running kernel; containers share it with their host. Empty where the system does not tell."""
    return _read_first_line("/proc/sys/kernel/random/boot_id")


@functools.cache
def _machine_id() -> str:
    """Of this installation of the system, hashed, since the id itself is private; empty in many containers."""
    found = _read_first_line("/etc/machine-id")
    return hashlib.sha256(f"cifar {found}".encode()).hexdigest()[:16] if found else ""


def _host_name() -> str:
    import socket  # not for commands that only start

    return socket.gethostname()


def _pid_namespace() -> str:
    """Process ids mean the same to processes in one namespace: a container usually has its own."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _read_process(pid: int) -> tuple[str, str]:
    """(state, start time in ticks since the boot) of a process as Linux tells them; empty if it does not."""
    with contextlib.suppress(OSError, IndexError):
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return after_name[0], after_name[19]
    return "", ""


def _process_is_alive(pid: int, start: str) -> bool | None:
    """Whether the process that started at `start` lives. None: it cannot be known. A zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    state, start_now = _read_process(pid)
    if state in ("Z", "X"):
        return False
    return start_now == start if start_now and start else None


# -- the lease ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lease:
    """The content of owner.json. Empty strings stand for what the system did not tell, or for a file that is damaged."""

    token: str = ""  # of this claim; no two are equal
    doing: str = "used"  # what the owner does with the run: "trained", "removed", "sent to W&B"
    pid: int = 0
    start: str = ""  # when that process started, so that a process with a recycled id is not taken for it
    host: str = ""
    machine: str = ""
    boot: str = ""
    namespace: str = ""
    folder: str = ""  # its absolute path as the owner sees it
    since: float = 0.0  # Unix time, for people only
    has_flock: bool = False  # the owner holds the lock on owner.lock, too

    @classmethod
    def of_this_process(cls, folder: Path, doing: str, *, has_flock: bool) -> Lease:
        pid = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            doing=doing,
            pid=pid,
            start=_read_process(pid)[1],
            host=_host_name(),
            machine=_machine_id(),
            boot=_boot_id(),
            namespace=_pid_namespace(),
            folder=str(folder),
            since=time.time(),
            has_flock=has_flock,
        )

    @classmethod
    def parse(cls, content: bytes) -> Lease:
        """What can be read of it. A damaged file gives a lease without a token, of nobody that could be known."""
        try:
            value = json.loads(content)
            kinds: dict[str, Callable[[Any], Any]] = {"pid": int, "since": float, "has_flock": bool}
            names = {field.name for field in fields(cls)} & value.keys()
            return cls(**{name: kinds.get(name, str)(value[name]) for name in names})
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return cls()

    def describe(self, folder: Path) -> str:
        """Who has which run, since when."""
        if not self.pid:
            return f"run {folder.name} is being used by another process"
        host = "".join(character for character in self.host if character.isprintable())[:64]
        since = ""
        with contextlib.suppress(ValueError, OverflowError, OSError):
            since = f" since {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.since))}"
        doing = self.doing if self.doing in ("trained", "removed", "sent to W&B", "reset") else "used"
        return f"run {folder.name} is being {doing} by process {self.pid} on {host or 'another machine'}{since}"


@dataclass(frozen=True)
class _Seen:
    """The lease file at one moment. Two that are equal were read from an untouched file."""

    lease: Lease
    mark: tuple[object, ...]  # differs after each beat


def _read_lease(folder: Path) -> _Seen | None:
    """The lease now, None if there is none. The file is opened each time, since network file systems check it only then."""
    path = folder / LEASE_FILE
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UserError(f"{path} is no file of a run's owner; delete it") from None
        if error.errno == errno.ESTALE:  # replaced on the server meanwhile
            return None
        raise
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path} is no file of a run's owner; delete it")
        content = os.read(handle, MAX_LEASE_BYTES)
    finally:
        os.close(handle)
    return _Seen(Lease.parse(content), (about.st_ino, about.st_mtime_ns, content))


def _judge(lease: Lease, folder: Path, *, have_flock: bool = False) -> Literal["alive", "dead", "unknown"]:
    """Whether a lease's process lives, as far as this process can know it. `have_flock`: this process has the lock."""
    if not lease.token:
        return "unknown"
    is_same_kernel = bool(lease.boot) and lease.boot == _boot_id()
    is_same_machine = is_same_kernel or (lease.host == _host_name() and lease.machine == _machine_id())
    if is_same_machine and _is_copy(lease, folder):
        return "dead"
    if is_same_kernel or (is_same_machine and not lease.boot):
        if lease.namespace == _pid_namespace():
            is_alive = _process_is_alive(lease.pid, lease.start)
            if is_alive is not None:
                return "alive" if is_alive else "dead"
        # The kernel, or on a system that tells no more the machine, has let go of the lock: its process has ended.
        return "dead" if have_flock and lease.has_flock else "unknown"
    if is_same_machine and lease.machine and _boot_id():
        return "dead"  # this machine has been started again since
    return "unknown"


def _is_copy(lease: Lease, folder: Path) -> bool:
    """Whether `folder` was copied from the one that is owned, together with its lease."""
    with contextlib.suppress(OSError, ValueError):
        return bool(lease.folder) and not os.path.samefile(lease.folder, folder)
    return False


class LeaseObserver:
    """Watches the lease of one folder, and how long it has been untouched by this process's own clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark: tuple[object, ...] | None = None
        self._first_seen = 0.0

    def find_owner(self, *, have_flock: bool = False) -> tuple[Lease, bool] | None:
        """(the lease of another process, whether that is known to live), or None if the folder is free."""
        seen = _read_lease(self.folder)
        if seen is None:
            self._mark = None
            return None
        verdict = _judge(seen.lease, self.folder, have_flock=have_flock)
        if verdict != "unknown":
            return (seen.lease, True) if verdict == "alive" else None
        if seen.mark != self._mark:
            self._mark, self._first_seen = seen.mark, time.monotonic()
        if time.monotonic() - self._first_seen > lease_seconds():
            return None
        return seen.lease, False


def find_owner(folder: Path) -> Lease | None:
    """The process that has this run, or may have it. None if the run is free, or if its owner is known to have ended."""
    found = LeaseObserver(Path(folder)).find_owner()
    return found[0] if found else None


# -- owning ------------------------------------------------------------------------------------------------------------


class RunLock:
    """The ownership of one run's folder, for `doing`: "trained", "removed", "sent to W&B" or "reset"."""

    def __init__(self, folder: Path, doing: str = "trained", observer: LeaseObserver | None = None) -> None:
        """`observer`: one that has watched this folder's lease for a while already."""
        self.folder, self.doing = Path(os.path.abspath(folder)), doing
        self._observer = observer or LeaseObserver(self.folder)
        self._flock: BaseFileLock | None = None
        self._lease: Lease | None = None
        self._pid = 0  # of the process that owns; a forked child does not
        self._inode = 0

    @property
    def is_held(self) -> bool:
        return self._lease is not None and self._pid == os.getpid()

    def acquire(self, *, wait: bool = True, on_wait: Callable[[str], None] | None = None) -> None:
        """Own the folder, or raise RunOwnedError.

        An owner that lives is not waited for. One of which that cannot be known is watched for the time of a lease, unless
        `wait` is false; `on_wait` gets a sentence about it. Raises UserError if the folder cannot be written, and
        OwnershipLostError if there is none.
        """
        assert not self.is_held
        started, has_told = time.monotonic(), False
        while (owner := self._try_acquire()) is not None:
            lease, is_alive, is_busy = owner
            waited = time.monotonic() - started
            is_over = waited > (BUSY_SECONDS if is_busy else lease_seconds() + BUSY_SECONDS)
            if (is_alive and not is_busy) or is_over or not wait:
                advice = "wait for it to end, or end that process first"
                raise RunOwnedError(f"{lease.describe(self.folder)}; {advice}", self.folder)
            if on_wait and not has_told and waited > BUSY_SECONDS:
                has_told = True
                on_wait(f"{lease.describe(self.folder)}; waiting up to {lease_seconds():g} s for a sign of life")
            time.sleep(POLL_SECONDS)

    def _try_acquire(self) -> tuple[Lease, bool, bool] | None:
        """None: owned. Else the lease in the way, whether its process is known to live, and whether the lock is busy."""
        with self._explain_errors():
            found = self._observer.find_owner()
            if found and found[1]:
                return (*found, False)
            has_flock = self._lock_file()
            if has_flock is None:
                found = self._observer.find_owner()
                # nobody that is known to live: another process may just be looking, as this one does
                return (found[0], found[1], not found[1]) if found else (Lease(), False, True)
            try:
                owner = self._take_lease(has_flock)
            except BaseException:
                self._unlock_file()
                raise
            if owner is not None:
                self._unlock_file()
                return (*owner, False)
        try:
            _beats.add(self)
        except BaseException:  # no more threads can be started
            self.release()
            raise
        return None

    def _lock_file(self) -> bool | None:
        """Lock owner.lock. True: locked; False: this file system has no locks; None: another process has it."""
        from filelock import FileLock, Timeout

        os.stat(self.folder)  # FileLock would make a folder that is gone
        flock = FileLock(self.folder / LOCK_FILE, timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            flock.acquire()
        except Timeout:
            return None
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.ELOOP):
                raise UserError(f"{self.folder / LOCK_FILE} is no file of a run's owner; delete it") from None
            if error.errno not in NO_FLOCK_ERRNOS:
                raise
            return False
        self._flock = flock
        return True

    def _unlock_file(self, *, is_unused: bool = False) -> None:
        """Unlock owner.lock. `is_unused`: nobody has locked it, and it goes too."""
        flock, self._flock = self._flock, None
        if flock is not None or is_unused:
            with contextlib.suppress(OSError):  # before it is unlocked: who waits for it sees that it has no name any more
                (self.folder / LOCK_FILE).unlink()
        if flock is not None:
            flock.release()

    def _take_lease(self, has_flock: bool) -> tuple[Lease, bool] | None:
        """Write our lease where there is none, or over one that is free. Returns the owner in the way, if there is one."""
        lease = Lease.of_this_process(self.folder, self.doing, has_flock=has_flock)
        before = _read_lease(self.folder)
        if before is None:
            if not _create_exclusively(self.folder / LEASE_FILE, lease):
                return Lease(), False
        else:
            if owner := self._observer.find_owner(have_flock=has_flock):
                return owner
            # With the lock, a dead process of this machine leaves nobody to compete with.
            is_certain = has_flock and _judge(before.lease, self.folder, have_flock=True) == "dead"
            if not self._replace_lease(before, lease):
                return Lease(), False
            if not is_certain:
                time.sleep(SETTLE_SECONDS)
                now = _read_lease(self.folder)
                if now is None or now.lease.token != lease.token:
                    return (now.lease if now else Lease()), False
        self._lease, self._pid = lease, os.getpid()
        self._inode = os.stat(self.folder / LEASE_FILE).st_ino
        return None

    def _replace_lease(self, before: _Seen, lease: Lease) -> bool:
        """Put our lease in the place of `before`. False if that is not there any more."""
        temporary = _write_temporary(self.folder, lease)
        try:
            now = _read_lease(self.folder)
            if now is None or now.mark != before.mark:
                return False
            os.replace(temporary, self.folder / LEASE_FILE)
            return True
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise OwnershipLostError(
                f"the folder of run {self.folder.name} is gone: {self.folder}", self.folder, is_removed=True
            ) from None
        except OSError as error:
            kind = DiskFullError if is_disk_full_error(error) else UserError
            advice = "free some space" if kind is DiskFullError else "repair that, or name another place with --runs-dir"
            raise kind(f"the run folder {self.folder} cannot be written ({error.strerror}); {advice}") from error

    def check(self) -> None:
        """Raise OwnershipLostError if the folder is not this process's any more. To be called before each write.

        A process that was stopped for long finds out here. Without a lock it says that it lives before it looks, so who has
        not taken the lease by then has to wait for a whole lease again.
        """
        assert self._lease is not None
        if self._flock is None:
            self.beat()
        seen = _read_lease(self.folder)
        if seen is not None and seen.lease.token == self._lease.token and self._pid == os.getpid():
            return
        for _ in range(5):  # a network file system may say so for a moment while the file is replaced
            if seen is None:
                time.sleep(POLL_SECONDS)
                seen = _read_lease(self.folder)
        if seen is None:
            raise OwnershipLostError(
                f"the folder of run {self.folder.name} was removed while it was being {self.doing}; nothing more was written",
                self.folder,
                is_removed=True,
            )
        raise OwnershipLostError(
            f"run {self.folder.name} was taken over while this process ({os.getpid()}) gave no sign of life: "
            f"{seen.lease.describe(self.folder)}; this process has stopped and written nothing more",
            self.folder,
            is_removed=False,
        )

    def beat(self) -> None:
        """Say that the owner lives."""
        path = self.folder / LEASE_FILE
        with contextlib.suppress(OSError):  # `check` finds out what that means
            if os.stat(path).st_ino == self._inode:
                os.utime(path)

    def release(self) -> None:
        """Give the folder back. Nothing happens if this process does not own it."""
        if not self.is_held:
            return
        _beats.discard(self)
        lease, self._lease = self._lease, None
        is_ours = False
        with contextlib.suppress(OSError, UserError):
            seen = _read_lease(self.folder)
            is_ours = seen is not None and lease is not None and seen.lease.token == lease.token
            if is_ours:
                (self.folder / LEASE_FILE).unlink()
        self._unlock_file(is_unused=is_ours)

    def __enter__(self) -> RunLock:
        if not self.is_held:
            self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _write_temporary(folder: Path, lease: Lease) -> str:
    """A file beside the lease's place with our lease in it -> its path."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{LEASE_FILE}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # others read it, too
            file.write(json.dumps(asdict(lease)).encode())
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


def _create_exclusively(path: Path, lease: Lease) -> bool:
    """Write the lease if there is none: whole or not at all. False if another process was faster."""
    temporary = _write_temporary(path.parent, lease)
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINK_ERRNOS:
            raise
    finally:
        os.unlink(temporary)
    try:  # a file system without links: a reader may see the file before its content, and takes that for a lease of nobody
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(json.dumps(asdict(lease)).encode())
    return True


class _Beats:
    """One thread that says for all locks of this process that their owner lives. It ends when there are none."""

    def __init__(self) -> None:
        self._locks: weakref.WeakSet[RunLock] = weakref.WeakSet()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._interval = 1.0  # seconds

    def add(self, lock: RunLock) -> None:
        with self._condition:
            self._locks.add(lock)
            self._interval = lease_seconds() / BEATS_PER_LEASE
            if self._thread is None:
                thread = threading.Thread(target=self._run, daemon=True, name="run-owner")
                thread.start()
                self._thread = thread

    def discard(self, lock: RunLock) -> None:
        with self._condition:
            self._locks.discard(lock)
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait(self._interval)
                locks = list(self._locks)
                if not locks:
                    self._thread = None
                    return
            for lock in locks:
                lock.beat()


_beats = _Beats()


def _forget_beats() -> None:
    """In a forked child: it owns nothing, and the thread is not in it."""
    global _beats
    _beats = _Beats()


os.register_at_fork(after_in_child=_forget_beats)
