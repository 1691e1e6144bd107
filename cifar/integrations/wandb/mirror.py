"""A record, repeated to Weights & Biases. One loop for live, offline, resumed and late runs: send what W&B lacks.

    mirror = Mirror(record, "offline")
    mirror.sync()            # as often as one likes, while the record grows
    mirror.finish(pictures)  # once the record has ended

Row e of the record is W&B's step e, so a server says by itself which rows it has. A file on disk cannot be gone on with:
an offline run that was left incomplete is deleted and written again, whole, from the record. wandb is imported when the
first run is opened. Only the process that calls this waits for W&B; training never does.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar.integrations.wandb.run_file import wait_for_end
from cifar.integrations.wandb.settings import Mode, mode_from_environment, server
from cifar.tracking.run_dir import END_STATES, OPEN_STATES, Record, redact, write_atomic

__all__ = ["Mirror", "answers", "kill_core", "mode_from_environment", "stop_core"]

WRITE_SECONDS = 10.0  # how long to wait for a file's last block
INIT_SECONDS, FINISH_SECONDS = 10.0, 120.0  # how long this process waits for a server, at the start and at the end of a run
PREDICTIONS, PREDICTIONS_BYTES = "predictions.npz", 1_000_000  # larger ones stay here
GOOD_STATES = ("finished", "stopped", "pruned", "skipped")  # W&B calls these finished, all others failed

# What one run is comes from its record; these would give the same id or name to every run of the process.
_OF_ONE_RUN = ("RUN_ID", "NAME", "NOTES", "TAGS", "JOB_TYPE", "RUN_GROUP", "RESUME", "RESUME_FROM", "FORK_FROM", "PROGRAM")
_OF_THE_PLACE = ("SWEEP_ID", "SWEEP_PARAM_PATH", "DIR", "MODE", "SERVICE")

_write_seconds = WRITE_SECONDS
_cores_stopped = 0  # runs opened before the last stop are dead


class Mirror:
    """The W&B run of one record. `mode` is "online" or "offline"; it turns to "offline" when the server cannot be used.

    `place` says what run.json does not, or otherwise: entity, project, sweep, engine.
    """

    def __init__(
        self, record: Record, mode: Mode, say: Callable[[str], None] = print, place: Mapping[str, str] | None = None
    ) -> None:
        assert mode in ("online", "offline"), mode
        self.record, self._say, self._place = record, say, place or {}
        self.mode: Mode = mode
        self._folder = record.path / "wandb"
        self._lock = FileLock(self._folder / "mirror.lock", timeout=0)
        self._run: Any = None
        self._core = 0
        self._sent: dict[int, bytes] = {}  # epoch -> digest of its line
        self._offset = 0
        self._held = False  # the last row is with W&B but not closed, so that the pictures can join it
        self._about = ""

    def sync(self) -> int:
        """Send the rows that W&B lacks and return how many. 0 where another process is at it, or where it has them all."""
        if self._run is not None and self._core != _cores_stopped:
            self._run = None
        if self._run is None and not self._open():
            return 0
        before = len(self._sent)
        epochs = self.record.read("config").get("epochs", 0)
        for line in self._lines():
            row = json.loads(line)
            epoch = int(row["epoch"])
            if epoch in self._sent:
                continue
            if len(self._sent) == before:
                self._describe()
            if epoch >= self._run.starting_step:  # less: the server has it since before a resume
                self._held = epoch == epochs
                self._run.log(row, step=epoch, commit=not self._held)
            self._sent[epoch] = _digest(line)
        return len(self._sent) - before

    def finish(self, media: Sequence[Path] = ()) -> bool:
        """Send the rest, the summary and the pictures, and close the run. True once W&B has all of the record.

        Nothing happens where W&B has it already. False while the record is open, or another process mirrors it.
        """
        state = self.record.state
        if state not in END_STATES:
            return False
        self.sync()
        if self._run is None:
            return self.complete()
        if self.mode == "offline" and self._sent != {int(json.loads(line)["epoch"]): _digest(line) for line in self._lines(0)}:
            self.leave()  # rows were cut off and made again by a resume after they were written here
            self.sync()
        self._send_media(media)
        self._send_predictions()
        self._describe()
        summary = self.record.read("summary")
        status = {name: value for name, value in self.record.read("status").items() if name != "pid"}
        self._run.summary.update({**summary, "state": state, "cifar": json.dumps({"status": status, "summary": summary})})
        whole = self._whole()
        run, self._run = self._run, None
        try:
            self._end(run, 0 if state in GOOD_STATES else 1)
            self._mark(whole)
        finally:
            self._lock.release()
        return True

    def leave(self) -> None:
        """Close the run without an end: the trial was interrupted, and whoever resumes it goes on from the record."""
        run, self._run = self._run, None
        try:
            if run is not None and self._core == _cores_stopped:
                if self.record.read("run").get("engine") == "wandb" and self.record.state in OPEN_STATES:
                    run.mark_preempting()  # W&B hands it out again
                self._end(run, 1)
        finally:
            self._lock.release()

    def _end(self, run: Any, code: int) -> None:
        global _write_seconds
        run.finish(exit_code=code)
        if self.mode != "offline":
            return
        file = Path(run.settings.sync_file)
        if wait_for_end(file, _write_seconds, lambda: bool(_core_pids())):
            _write_seconds = WRITE_SECONDS
        else:
            _write_seconds = 1.0 if _core_pids() else WRITE_SECONDS  # a disk that is full is so for the next run, too
            raise TimeoutError(f"wandb-core has not written the run's end to {file}")

    def _describe(self) -> None:
        """The rest of the record, as the configuration's key `cifar`: with it a run is read back whole (rebuild.py).

        As text, because W&B keeps neither the order of keys nor 1.0 from 1.
        """
        about = json.dumps({name: self.record.read(name) for name in ("run", "config", "labels", "environment")})
        if about != self._about:
            self._run.config.update({"cifar": about}, allow_val_change=True)
            self._about = about

    def _send_media(self, media: Sequence[Path]) -> None:
        import wandb

        pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in media}
        if self._held:
            self._run.log(pictures, commit=True)
        elif pictures:
            # A run that ended early: a row of its own would take the step of the next epoch, should the run be resumed.
            self._run.summary.update(pictures)

    def _send_predictions(self) -> None:
        """As a file of the run, so that its own report can be drawn from W&B too; some 0.2 MB, as its pictures are."""
        file = self.record.path / PREDICTIONS
        if file.exists() and file.stat().st_size <= PREDICTIONS_BYTES:
            self._run.save(str(file), base_path=str(self.record.path), policy="now")

    def _open(self) -> bool:
        """Start the W&B run, unless it is complete, the record is not there yet, or another process has it."""
        if self.complete() or not self.record.read("run"):
            return False
        try:
            self._folder.mkdir(exist_ok=True)
            self._lock.acquire()
        except Timeout:
            return False
        try:
            if self.complete():  # by whoever had the lock
                self._lock.release()
                return False
            self._sent, self._offset, self._held, self._about = {}, 0, False, ""
            self._mark("")
            if self.mode == "online":
                try:
                    self._run = self._start()
                except Exception as error:
                    reason = redact(f"{type(error).__name__}: {error}".replace("\n", " "))[:200]
                    self._say(f"{self.record.id}: W&B cannot be used ({reason}); writing an offline run for `wandb sync`")
                    stop_core()  # it keeps the run's id in use
                    self._delete("run-*")
                    self.mode = "offline"
            if self._run is None:
                self._run = self._start()
        except BaseException:
            self._lock.release()
            raise
        self._core = _cores_stopped
        return True

    def _start(self) -> Any:
        self._delete("offline-run-*" if self.mode == "offline" else "run-*")
        if "wandb" not in sys.modules:
            for name in _OF_ONE_RUN + _OF_THE_PLACE:
                os.environ.pop(f"WANDB_{name}", None)
            os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
        import wandb

        run = {**self.record.read("run"), **self._place}
        sweep = run.get("sweep") or None
        started = wandb.init(
            id=self.record.id,
            entity=run.get("entity") or None,
            project=run.get("project") or "cifar",
            name=str(run.get("name") or self.record.id)[:128],  # W&B's limits
            group=run.get("group") or sweep,
            tags=[str(tag)[:64] for tag in run.get("tags", []) if tag],
            notes=run.get("command"),
            job_type="sweep" if sweep else "train",
            config=self.record.read("config"),
            mode=self.mode,
            resume="allow" if self.mode == "online" else None,
            dir=str(self.record.path),
            reinit="create_new",
            settings=wandb.Settings(
                sweep_id=sweep if self.mode == "online" and run.get("engine") == "wandb" else None,
                silent=True,
                quiet=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                disable_job_creation=True,
                label_disable=True,
                program="cifar",
                symlink=False,
                use_dot_wandb=False,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=2.0,
            ),
        )
        # A row without an epoch must not be given one: every epoch stands once in the history.
        started.define_metric("epoch")
        started.define_metric("*", step_metric="epoch", step_sync=False)
        return started

    def _delete(self, pattern: str) -> None:
        for old in self._folder.glob(pattern):
            shutil.rmtree(old, ignore_errors=True)

    def _lines(self, start: int | None = None) -> Iterator[bytes]:
        """The whole lines of metrics.jsonl from byte `start`, or those that came since the last look.

        A file that was cut back in between is read from its beginning.
        """
        offset = self._offset if start is None else start
        with contextlib.suppress(FileNotFoundError), open(self.record.path / "metrics.jsonl", "rb") as file:
            if offset:
                file.seek(offset - 1)
                if file.read(1) != b"\n":
                    offset = file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                if start is None:
                    self._offset = offset
                yield line

    def _whole(self) -> str:
        """What the record holds now, as a digest."""
        files = [self.record.path / name for name in ("metrics.jsonl", "summary.json")]
        content = b"\0".join(file.read_bytes() if file.exists() else b"" for file in files)
        return _digest(content + self.record.state.encode()).hex()

    def complete(self) -> bool:
        """Whether W&B, or the offline file, has all of the record, as far as is known here."""
        return self.record.state in END_STATES and self._marks().get(self._mark_name) == self._whole()

    @property
    def _mark_name(self) -> str:
        where = "/".join(self._place.get(name, "") for name in ("server", "entity", "project"))
        return f"{self.mode} {where}" if self._place else self.mode

    def _marks(self) -> dict[str, str]:
        """mode (and place) -> digest of the record when its W&B run was closed; "" while it is open."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return dict(json.loads((self._folder / "mirror.json").read_bytes()))
        return {}

    def _mark(self, whole: str) -> None:
        write_atomic(self._folder / "mirror.json", json.dumps({**self._marks(), self._mark_name: whole}).encode())


def answers(seconds: float) -> bool:
    """Whether the configured server says anything at all, but that it is broken (5xx) or overloaded (429)."""
    try:
        with urllib.request.urlopen(f"{server().rstrip('/')}/healthz", timeout=seconds) as answer:
            answer.read()
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code != 429
    except (OSError, ValueError, http.client.HTTPException):
        return False


def kill_core() -> None:
    """End this process's wandb-core now. It has a session of its own, so nothing that ends this process ends it in time."""
    for pid in _core_pids():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def stop_core() -> None:
    """The same, and let the next run start another one. Runs that are open are opened again by their mirrors."""
    global _cores_stopped
    _cores_stopped += 1
    kill_core()
    if "wandb" in sys.modules:
        import wandb

        with contextlib.suppress(Exception, SystemExit):  # it exits with the killed core's code
            wandb.teardown()


def _core_pids() -> list[int]:
    """The wandb-core processes that this process started and that have not ended."""
    if Path("/proc/self/stat").exists():
        processes = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # "pid (name) state parent ..."; a name may hold anything
                start, _, end = stat.read_text().rpartition(")")
                state, parent = end.split()[:2]
                processes.append((stat.parent.name, parent, state, start.partition("(")[2]))
    else:
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat=,comm="], capture_output=True, text=True, check=False
        ).stdout
        processes = [
            (pid, parent, state, name) for pid, parent, state, name in (row.split(None, 3) for row in listing.splitlines())
        ]
    ours = str(os.getpid())
    return [int(pid) for pid, of, state, name in processes if of == ours and "wandb-core" in name and state[0] != "Z"]


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
