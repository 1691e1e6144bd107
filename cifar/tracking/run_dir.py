"""A run's folder: its configuration, where it ran, what was measured, how it ended. Everything else is made from it.

    RUN/
      run.json          schema, id, name, group, tags, sweep, cell, swept and sweep_keys, dataset, cost, created, command
      config.json       the flat configuration, every key
      environment.json  versions, device, git state, data fingerprint
      labels.json       metric -> {"label", "unit"}; "layers" lists the layers in the network's order
      metrics.jsonl     a JSON object a line, one an epoch
      histograms.jsonl  the same for some epochs: histograms of gradients and updates (tracking/histograms.py)
      output.log        what the run printed (console_log.py)
      system_metrics.jsonl   use of CPU, memory, disk, network and GPU; machine.json, requirements.txt: where it ran (the
                             sidecar writes these three: system_metrics.py, machine.py)
      summary.json      last values, written once at the end
      status.json       {"state", "reason", "epoch", "epochs", "time", "pid"}; replaced as a whole
      checkpoint.pt     while unfinished; weights.pt once finished
      predictions.npz   what the final evaluation predicted, and its worst mistakes
      pictures/         drawn by the report
      owner.json, owner.lock   while a process owns the folder (system/ownership.py): the one that may write to it
      card.json         of a pretrained network only (pretrained.py), whose folder is never written to

metrics.jsonl and histograms.jsonl are only appended to, or cut back to what a checkpoint knows. output.log and
system_metrics.jsonl are only appended to. Every other file is replaced atomically.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from cifar.errors import DiskFullError, UserError
from cifar.states import RUN_STATES
from cifar.system.disk import is_disk_full_error
from cifar.system.files import MissingFileError, UnreadableFileError, is_regular_file, parse_json, read_bytes, shorten_repr
from cifar.system.names import check_id, check_name, escape_controls
from cifar.system.ownership import LEASE_FILE, LOCK_FILE, RunLock
from cifar.system.redact import mask_secrets, redact
from cifar.system.variables import read_path
from cifar.tracking.histograms import FILE as HISTOGRAMS_FILE
from cifar.tracking.histograms import cut_histograms
from cifar.tracking.records import SCHEMA, UnknownSchemaError, check_fields, parse_rows

CARD_FILE = "card.json"  # in the folder of a pretrained network
# In a runs folder: what can be made again; `gc` removes it.
CACHE_FOLDER, CACHE_FILE, MADE_FILE = ".cache", "runs.npz", "made.json"
MAX_METRICS_BYTES = 2**30  # a thousand epochs of a network of a thousand layers have a fifth of it
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can be read only by setting it


class RunDir:
    """A run's folder. Files are read when they are asked for; writing is atomic.

    While this object owns the folder (`acquire`, `release`), each write makes sure first that it still does, and raises
    OwnershipLostError if not. Reading needs no ownership.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: RunLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_lock": None}  # a copy in another process owns nothing

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def name(self) -> str:
        """The run's name; "" if its folder is damaged."""
        with contextlib.suppress(UserError):
            return escape_controls(redact(str(self.read_json("run").get("name", ""))))
        return ""

    def exists(self) -> bool:
        """Whether there is anything at its place. An empty folder is nothing; a link to a disk that is away is something."""
        try:
            with os.scandir(self.path) as entries:
                return any(entry.name not in (LOCK_FILE, LEASE_FILE) for entry in entries)
        except FileNotFoundError:
            return self.path.is_symlink()
        except OSError:  # not a folder, or it cannot be read
            return True

    @classmethod
    def create(cls, runs_dir: Path, run_id: str, run: Mapping[str, Any], config: Mapping[str, Any]) -> RunDir:
        """Make the folder of a new run. Raises UserError if it cannot be written, and then leaves no part of it."""
        run_dir = cls(runs_dir / check_id(run_id, "the run's id"))
        is_new = not run_dir.path.exists()
        try:
            run_dir.path.mkdir(parents=True, exist_ok=True)
            run_dir.write_json("config", config, mask_keys=False)  # the keys are ours: `token_mode` is no secret
            run_dir.write_json("run", {"schema": SCHEMA, "id": run_id, "created": time.time(), **run})
        except OSError as error:
            if is_new:
                with contextlib.suppress(OSError):
                    for file in run_dir.path.iterdir():
                        file.unlink()
                    run_dir.path.rmdir()
            kind = DiskFullError if is_disk_full_error(error) else UserError
            raise kind(
                f"the run folder {run_dir.path} cannot be written ({error.strerror}); "
                "free some space or name another place with --runs-dir"
            ) from error
        return run_dir

    # -- owning --

    @property
    def is_owned(self) -> bool:
        """Whether this object owns the folder."""
        return self._lock is not None and self._lock.is_held

    def acquire(self, doing: str = "trained", *, wait: bool = True, on_wait: Callable[[str], None] | None = None) -> None:
        """Own the folder until `release`, as `RunLock.acquire` describes. Nothing happens if this object owns it already.

        Raises UserError for a pretrained network.
        """
        if os.path.lexists(self.path / CARD_FILE):
            raise UserError(
                f"{self.id} is a pretrained network, whose record stays as it is; for a run like it: "
                f"python -m cifar train --from {self.id}"
            )
        if not self.is_owned:
            lock = RunLock(self.path, doing)
            lock.acquire(wait=wait, on_wait=on_wait)
            self._lock = lock

    def release(self) -> None:
        """Give the folder back. Nothing happens if this object does not own it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    @contextlib.contextmanager
    def own(self, doing: str, *, wait: bool = True) -> Iterator[None]:
        """Own the folder while this is open."""
        self.acquire(doing, wait=wait)
        try:
            yield
        finally:
            self.release()

    def check_ownership(self) -> None:
        """Raise OwnershipLostError if this object owns the folder and another process has taken it."""
        if self._lock is not None:
            self._lock.check()

    # -- writing --

    def write_file(self, name: str, content: bytes) -> None:
        """Replace a file as a whole."""
        self.check_ownership()
        write_atomic(self.path / name, content, before_replacing=self.check_ownership)

    def remove_file(self, name: str) -> None:
        """Delete a file, if there is one."""
        self.check_ownership()
        (self.path / name).unlink(missing_ok=True)

    def write_json(self, name: str, value: Mapping[str, Any], *, mask_keys: bool = True) -> None:
        """Replace NAME.json as a whole, without secrets; `mask_keys=False` keeps text under names that look like secrets."""
        self.write_file(f"{name}.json", json.dumps(mask_secrets(value, mask_keys=mask_keys), indent=1, allow_nan=True).encode())

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add one metrics row; it is on disk when this returns."""
        self.append_bytes("metrics.jsonl", json.dumps(mask_secrets(row), separators=(",", ":")).encode() + b"\n")

    def append_bytes(self, name: str, content: bytes) -> None:
        """Add to a file; it is on disk when this returns."""
        self.check_ownership()
        with open(self.path / name, "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def metrics_bytes(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self.path / "metrics.jsonl").stat().st_size
        return 0

    def truncate_metrics(self, length: int) -> None:
        """Cut metrics.jsonl back to the length that it had at a checkpoint, in bytes. The histograms of those rows go too."""
        self.cut_file("metrics.jsonl", length)
        num_rows = read_bytes(self.path / "metrics.jsonl", MAX_METRICS_BYTES).count(
            b"\n"
        )  # the rows are those of epochs 1, 2, ...
        cut_histograms(self, num_rows)

    def cut_file(self, name: str, length: int) -> None:
        """Cut a file that is appended to, so that it has this many bytes."""
        self.check_ownership()
        with open(self.path / name, "ab") as file:
            file.truncate(length)

    def set_status(self, state: str, *, reason: str = "", epoch: int = 0, epochs: int = 0) -> None:
        assert state in RUN_STATES, state
        self.write_json(
            "status",
            {
                "state": state,
                "reason": escape_controls(redact(reason), keeps_lines=True),
                "epoch": epoch,
                "epochs": epochs,
                "time": time.time(),
                "pid": os.getpid(),
            },
        )

    # -- reading --

    def read_json(self, name: str) -> dict[str, Any]:
        """NAME.json, or {} if it is not written yet. Raises UserError if it is damaged, or of a schema that is not known."""
        return read_json(self.path / f"{name}.json", name)

    def check_resumable(self) -> None:
        """Raise UserError unless its files can be read, and say what training needs: a configuration and the network's cost."""
        run, config = self.read_json("run"), self.read_json("config")
        self.read_json("status")
        cost = run.get("cost") or {}
        missing = [f"run.json: cost.{name}" for name in ("macs", "params", "verified") if cost.get(name) is None]
        missing += ["config.json"] * (not config)
        for name in ("metrics.jsonl", HISTOGRAMS_FILE, "checkpoint.pt"):
            if os.path.lexists(self.path / name) and not is_regular_file(self.path / name):
                raise UserError(f"{self.path / name} is damaged (it is not a file); restore it, or delete {self.path}")
        if missing:
            raise UserError(f"{self.path} is damaged (it lacks {missing[0]}); restore it, or delete it and train it again")

    def read_rows(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """The metrics rows from byte `start`; a last line without a newline is still being written, and is left out."""
        file = self.path / "metrics.jsonl"
        try:
            yield from parse_rows(read_bytes(file, MAX_METRICS_BYTES, start=start))
        except MissingFileError:
            return
        except (UnreadableFileError, ValueError) as error:
            raise UserError(f"{file} is damaged ({_reason(error)}); restore it, or delete {self.path}") from None

    def read_outcome(self, metric: str, objectives: Sequence[str]) -> dict[str, Any]:
        """How the run ended: state, reason, value (of `metric`) and objectives; None for a metric that it does not have."""
        rows, status = list(self.read_rows()), self.read_json("status")
        known = {**(self.read_json("run").get("cost") or {}), **(rows[-1] if rows else {}), **self.read_json("summary")}
        objective_values = [known.get(name) for name in objectives]
        outcome = {"state": status.get("state", "running"), "value": known.get(metric), "reason": status.get("reason", "")}
        return {**outcome, "objectives": objective_values}

    @property
    def state(self) -> str:
        return str(self.read_json("status").get("state", "running"))


def resolve_runs_dir(option: Path | None = None) -> Path:
    """--runs-dir, else CIFAR_RUNS, else ./runs."""
    return Path(os.path.realpath(option or read_path("CIFAR_RUNS", "runs")))  # also of a link to itself


def list_run_dirs(runs_dir: Path) -> list[RunDir]:
    """Every run folder, oldest first. A folder whose run.json is a link to nothing counts as none."""
    found = []
    for path in list_folders(runs_dir):
        with contextlib.suppress(OSError):
            found.append((os.stat(f"{path}/run.json").st_mtime, path))
    return [RunDir(path) for _, path in sorted(found, key=itemgetter(0))]  # of the same age: by name, as they come


def list_folders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted by name, without hidden ones; none where it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = sorted((entry.name, entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        return [Path(path) for _, path in found]
    return []


def find_run_dir(name: str, runs_dir: Path) -> RunDir:
    """A run by its path, its id, a unique start of its id, or a unique name. Raises UserError."""
    check_name(name, "the run")
    path = Path(name)
    if is_regular_file(path / "run.json"):
        return RunDir(path.resolve())
    if is_regular_file(runs_dir / name / "run.json"):
        return RunDir(runs_dir / name)
    run_dirs = list_run_dirs(runs_dir)
    matches = [r for r in run_dirs if r.id.startswith(name)] or [r for r in run_dirs if r.name == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"'{name}' fits {len(matches)} runs ({', '.join(r.id for r in matches[:6])}); give more of the id")
    raise UserError(f"no run '{name}' in {runs_dir}; `python -m cifar sweeps list` and `ls {runs_dir}` show what there is")


def format_repeat_command(run_dir: Path, runs_dir: Path) -> str:
    """The command that trains a run's configuration again. Written from where it works: with the folders it needs."""
    return next(format_repeat_commands([run_dir], runs_dir))


def format_repeat_commands(run_dirs: Iterable[Path], runs_dir: Path) -> Iterator[str]:
    """`format_repeat_command` of many runs."""
    home = runs_dir.resolve()
    option = "" if resolve_runs_dir() == home else f" --runs-dir {shlex.quote(str(runs_dir))}"
    parents: dict[Path, bool] = {}  # a folder -> whether it is the runs folder
    for run_dir in run_dirs:
        if run_dir.is_symlink():
            is_inside = run_dir.resolve().parent == home
        else:
            parent = run_dir.parent
            is_inside = parents[parent] if parent in parents else parents.setdefault(parent, parent.resolve() == home)
        if is_inside:
            yield f"python -m cifar train --from {run_dir.name}{option}"
        else:
            yield f"python -m cifar train --from {shlex.quote(str(run_dir))}"


def generate_id() -> str:
    """A random id of eight characters, as W&B's ids are."""
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))


def read_json(path: Path | str, kind: str = "") -> dict[str, Any]:
    """A JSON object from a file, {} if there is no file. Raises UserError if it is damaged.

    kind: the key of `records.FIELDS` by which its fields are checked.
    """
    try:
        value = parse_json(read_bytes(path))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if kind == "run":
            check_schema(value, path)
        check_fields(kind, value)
    except MissingFileError:
        return {}
    except (UnreadableFileError, ValueError) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}); restore it, or delete {os.path.dirname(path)}") from None
    return value


def check_schema(run: Mapping[str, Any], path: Path | str) -> None:
    """Raise UnknownSchemaError if another version has written this run.json."""
    if run.get("schema", SCHEMA) != SCHEMA:
        raise UnknownSchemaError(
            f"{path} has schema {shorten_repr(run['schema'])}, and this version reads schema {SCHEMA}; "
            "a newer version wrote it: update cifar"
        )


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, UnreadableFileError) else str(error)


def write_atomic(path: Path, content: bytes, *, before_replacing: Callable[[], None] | None = None) -> None:
    """Write beside `path`, then replace it, so that a reader or a crash sees the old file or the new one.

    before_replacing: called when all is written; if it raises, the old file stays.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o666 & ~_UMASK)  # mkstemp's 0600 would hide reports from colleagues and web servers
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if before_replacing:
            before_replacing()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


redact_text = redact  # its old name, for plug-ins
