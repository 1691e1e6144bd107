"""A run's folder: what was asked, where it ran, what was measured, how it ended. The truth; all else is made from it.

    RUN/
      run.json          schema, id, name, group, tags, sweep, cell, swept keys, dataset, cost, created, command
      config.json       the flat configuration, every key
      environment.json  versions, device, git state, data fingerprint
      labels.json       metric -> {"label", "unit"}; "layers" lists the layers in the network's order
      metrics.jsonl     a JSON object a line, one an epoch
      summary.json      last values, written once at the end
      status.json       {"state", "reason", "epoch", "epochs", "time", "pid"}; replaced as a whole
      checkpoint.pt     while unfinished; weights.pt once finished
      predictions.npz   what the final evaluation predicted, and its worst mistakes
      pictures/         drawn by the report

Every file but metrics.jsonl is replaced atomically. metrics.jsonl is only appended to, or cut back to a checkpoint's length.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar.errors import DiskFull, UserError

SCHEMA = 1
OPEN_STATES = ("running", "interrupted", "preempted")  # a run that may go on
END_STATES = ("finished", "failed", "killed", "diverged", "stopped", "pruned", "skipped")
DONE_STATES = ("finished", "diverged", "pruned", "skipped")  # its own ends: no other try would come to another
_SECRET = re.compile(r"(?i)(key|token|secret|passw|credential)")
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it
_URL_PASSWORD = re.compile(r"(\w+://[^:/@\s]*):[^@/\s]+@")


class Record:
    """One run's folder. Reading is lazy; writing is atomic."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def name(self) -> str:
        """What the run is called; nothing where its folder is damaged."""
        with contextlib.suppress(UserError):
            return str(self.read("run").get("name", ""))
        return ""

    @classmethod
    def create(cls, runs: Path, run_id: str, run: Mapping[str, Any], config: Mapping[str, Any]) -> Record:
        """Make the folder of a new run. Raises UserError where it cannot be written, and leaves nothing half-made."""
        record = cls(runs / run_id)
        made = not record.path.exists()
        try:
            record.path.mkdir(parents=True, exist_ok=True)
            record.write("config", config, mask=False)  # keys are ours: `token_mode` is no secret, and has to come back
            record.write("run", {"schema": SCHEMA, "id": run_id, "created": time.time(), **run})
        except OSError as error:
            if made:
                with contextlib.suppress(OSError):
                    for file in record.path.iterdir():
                        file.unlink()
                    record.path.rmdir()
            kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
            raise kind(
                f"the run folder {record.path} cannot be written ({error.strerror}); "
                "free some space or name another place with --runs-dir"
            ) from error
        return record

    # -- writing --

    def write(self, name: str, value: Mapping[str, Any], *, mask: bool = True) -> None:
        """Replace NAME.json as a whole, without secrets; `mask=False` keeps text under secret-looking names."""
        write_atomic(self.path / f"{name}.json", json.dumps(clean(value, mask=mask), indent=1, allow_nan=True).encode())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one metrics row; it is on disk when this returns."""
        line = json.dumps(clean(row), separators=(",", ":")) + "\n"
        with open(self.path / "metrics.jsonl", "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def metrics_bytes(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self.path / "metrics.jsonl").stat().st_size
        return 0

    def cut_metrics(self, length: int) -> None:
        """Drop what was appended after a checkpoint was taken."""
        with open(self.path / "metrics.jsonl", "ab") as file:
            file.truncate(length)

    def set_status(self, state: str, *, reason: str = "", epoch: int = 0, epochs: int = 0) -> None:
        assert state in OPEN_STATES + END_STATES, state
        self.write(
            "status",
            {
                "state": state,
                "reason": redact(reason),
                "epoch": epoch,
                "epochs": epochs,
                "time": time.time(),
                "pid": os.getpid(),
            },
        )

    # -- reading --

    def read(self, name: str) -> dict[str, Any]:
        """NAME.json, or {} where the run has not got there. Raises UserError where it is damaged."""
        return read_json(self.path / f"{name}.json")

    def rows(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """The metrics rows from byte `start`; a last line without its newline is still being written and is left out."""
        with contextlib.suppress(FileNotFoundError), open(self.path / "metrics.jsonl", "rb") as file:
            file.seek(start)
            for line in file:
                if line.endswith(b"\n"):
                    try:
                        yield json.loads(line)
                    except ValueError:
                        raise UserError(f"{file.name} is damaged; restore it, or delete {self.path}") from None

    def outcome(self, metric: str, objectives: Sequence[str]) -> dict[str, Any]:
        """How the run ended: state, reason, value (of `metric`) and objectives, None for each that it does not have."""
        rows, status = list(self.rows()), self.read("status")
        known = {**self.read("run").get("cost", {}), **(rows[-1] if rows else {}), **self.read("summary")}
        told = {"state": status["state"], "value": known.get(metric), "reason": status.get("reason", "")}
        return {**told, "objectives": [known.get(name) for name in objectives]}

    @property
    def state(self) -> str:
        return str(self.read("status").get("state", "running"))


def runs_dir(option: Path | None = None) -> Path:
    """--runs-dir, else CIFAR_RUNS, else ./runs."""
    return Path(option or os.environ.get("CIFAR_RUNS") or "runs").resolve()


def all_records(runs: Path) -> list[Record]:
    """Every run folder, oldest first."""
    found = [Record(path.parent) for path in runs.glob("*/run.json")]
    return sorted(found, key=lambda record: record.path.joinpath("run.json").stat().st_mtime)


def find(name: str, runs: Path) -> Record:
    """A run by path, id, unique start of an id, or unique name."""
    path = Path(name)
    if (path / "run.json").exists():
        return Record(path.resolve())
    if name and (runs / name / "run.json").exists():
        return Record(runs / name)
    records = all_records(runs)
    matches = [r for r in records if r.id.startswith(name)] or [r for r in records if r.name == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"'{name}' fits {len(matches)} runs ({', '.join(r.id for r in matches[:6])}); give more of the id")
    raise UserError(f"no run '{name}' in {runs}; `python -m cifar sweeps list` and `ls {runs}` show what there is")


def new_id() -> str:
    """Eight characters, as W&B takes them."""
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is none. Raises UserError where it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or delete {path.parent}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (not a JSON object); restore it, or delete {path.parent}")
    return value


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside `path`, then replace it, so that a reader or a crash sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o666 & ~_UMASK)  # mkstemp's 0600 would hide reports from colleagues and web servers
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def clean(value: Any, *, mask: bool = True) -> Any:
    """JSON-able copy without secrets: text under secret-looking names (with `mask`) and what `redact` finds."""
    if isinstance(value, Mapping):
        secret = {k for k, v in value.items() if mask and _SECRET.search(str(k)) and isinstance(v, str) and v}
        return {str(k): "***" if k in secret else clean(v, mask=mask) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item, mask=mask) for item in value]
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float) and not math.isfinite(value):
        return value  # json writes NaN and Infinity, and reads them back
    return value


def redact(text: str) -> str:
    """Mask passwords in URLs, and the values of secret-looking environment variables."""
    text = _URL_PASSWORD.sub(r"\1:***@", text)
    for name, secret in os.environ.items():
        if _SECRET.search(name) and len(secret) >= 8 and secret in text:
            text = text.replace(secret, "***")
    return text
