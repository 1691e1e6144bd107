"""Copies a run folder to Weights & Biases. Live, offline, resumed and late runs use the same loop: send what W&B lacks.

    mirror = Mirror(run_dir, "offline")
    mirror.sync()            # as often as you like, while the run trains
    mirror.finish(pictures)  # when the run has ended

The row of epoch e is step e on W&B, so the server itself says which rows it has. An offline run is a file, which cannot be
continued: if it was left incomplete, it is deleted and written again from the run folder. wandb is imported when the first run
is opened. Only the process that calls the mirror waits for W&B; training never does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar.integrations.wandb.mirror_process import list_core_pids, num_core_stops, stop_core
from cifar.integrations.wandb.notes import read_notes, write_notes
from cifar.integrations.wandb.run_file import wait_for_exit_record
from cifar.integrations.wandb.settings import Mode
from cifar.states import ENDED_STATES, OPEN_RUN_STATES, WANDB_FINISHED_STATES
from cifar.system.names import escape_controls
from cifar.system.redact import mask_secrets, redact
from cifar.tracking.run_dir import RunDir, write_atomic

WRITE_TIMEOUT_SECONDS = 10.0  # how long to wait for the last block of an offline run's file
INIT_TIMEOUT_SECONDS, FINISH_TIMEOUT_SECONDS = 10.0, 120.0  # how long to wait for a server when a run begins and ends
PREDICTIONS_FILE, MAX_PREDICTIONS_BYTES = "predictions.npz", 1_000_000  # a larger file is not sent

NOTES_FILE = "mirror.json"  # in RUN/wandb: target -> digest of what W&B has
URL_FILE = "url.txt"  # in RUN/wandb: the address of the online run, which the command line prints

# Variables (WANDB_...) that are removed: they would give every run of this process the same id, name or place.
_RUN_VARIABLES = ("RUN_ID", "NAME", "NOTES", "TAGS", "JOB_TYPE", "RUN_GROUP", "RESUME", "RESUME_FROM", "FORK_FROM", "PROGRAM")
_LOCATION_VARIABLES = ("SWEEP_ID", "SWEEP_PARAM_PATH", "DIR", "MODE", "SERVICE")

_write_timeout = WRITE_TIMEOUT_SECONDS


class Mirror:
    """The W&B run of one run folder. `mode` is "online" or "offline"; it becomes "offline" if the server cannot be used.

    `target`: entity, project, sweep and engine, as far as they differ from run.json.
    """

    def __init__(
        self, run_dir: RunDir, mode: Mode, on_message: Callable[[str], None] = print, target: Mapping[str, str] | None = None
    ) -> None:
        assert mode in ("online", "offline"), mode
        self.run_dir, self._on_message, self._target = run_dir, on_message, target or {}
        self.mode: Mode = mode
        self._folder = run_dir.path / "wandb"
        self._lock = FileLock(self._folder / "mirror.lock", timeout=0)
        self._run: Any = None
        self._num_core_stops = 0
        self._sent_digests: dict[int, bytes] = {}  # epoch -> digest of its line in metrics.jsonl
        self._offset = 0
        self._is_last_row_open = False  # the last row was sent but not committed, so that the pictures can be part of it
        self._sent_description = ""

    def sync(self) -> int:
        """Send the rows that W&B lacks -> how many. 0 also if another process mirrors this run."""
        if self._run is not None and self._num_core_stops != num_core_stops():
            self._run = None
        if self._run is None and not self._open_run():
            return 0
        num_before = len(self._sent_digests)
        epochs = self.run_dir.read_json("config").get("epochs", 0)
        for line in self._read_lines():
            row = json.loads(line)
            epoch = int(row["epoch"])
            if epoch in self._sent_digests:
                continue
            if len(self._sent_digests) == num_before:
                self._send_description()
            if epoch >= self._run.starting_step:  # the server has the earlier ones
                self._is_last_row_open = epoch == epochs
                self._run.log(row, step=epoch, commit=not self._is_last_row_open)
            self._sent_digests[epoch] = _hash_bytes(line)
        return len(self._sent_digests) - num_before

    def finish(self, pictures: Sequence[Path] = ()) -> bool:
        """Send the rest, the summary and the pictures, and close the W&B run. True if W&B now has all of the run.

        Does nothing if W&B has it already. False if the run has not ended, or if another process mirrors it.
        """
        state = self.run_dir.state
        if state not in ENDED_STATES:
            return False
        self.sync()
        if self._run is None:
            return self.is_complete()
        if self.mode == "offline" and self._sent_digests != {
            int(json.loads(line)["epoch"]): _hash_bytes(line) for line in self._read_lines(0)
        }:
            self.suspend()  # a resume has removed rows that were written here, and trained those epochs again
            self.sync()
        self._send_pictures(pictures)
        self._send_predictions()
        self._send_description()
        summary = self._read_clean("summary")
        status = {name: value for name, value in self._read_clean("status").items() if name != "pid"}
        self._run.summary.update({**summary, "state": state, "cifar": json.dumps({"status": status, "summary": summary})})
        digest = self._compute_digest()
        run, self._run = self._run, None
        try:
            self._finish_run(run, 0 if state in WANDB_FINISHED_STATES else 1)
            self._write_digest(digest)
        finally:
            self._lock.release()
        return True

    def suspend(self) -> None:
        """Close the W&B run without a final state, because the run was interrupted and may be resumed."""
        run, self._run = self._run, None
        try:
            if run is not None and self._num_core_stops == num_core_stops():
                if self.run_dir.read_json("run").get("engine") == "wandb" and self.run_dir.state in OPEN_RUN_STATES:
                    run.mark_preempting()  # so that W&B gives it to an agent again
                self._finish_run(run, 1)
        finally:
            self._lock.release()

    def _finish_run(self, run: Any, exit_code: int) -> None:
        global _write_timeout
        run.finish(exit_code=exit_code)
        if self.mode != "offline":
            return
        file = Path(run.settings.sync_file)
        if wait_for_exit_record(file, _write_timeout, lambda: bool(list_core_pids())):
            _write_timeout = WRITE_TIMEOUT_SECONDS
        else:
            # If wandb-core lives, the disk may be full, and so it will be for the next run.
            _write_timeout = 1.0 if list_core_pids() else WRITE_TIMEOUT_SECONDS
            raise TimeoutError(f"wandb-core has not written the run's end to {file}")

    def _read_clean(self, name: str) -> dict[str, Any]:
        """A file of the record without secrets: an earlier version may have written some."""
        return dict(mask_secrets(self.run_dir.read_json(name), mask_keys=False))

    def _send_description(self) -> None:
        """Send run.json and its neighbours as the key `cifar` of the W&B configuration. convert.py reads them back.

        They are sent as text, because W&B keeps neither the order of keys nor the difference between 1.0 and 1.
        """
        description = json.dumps({name: self._read_clean(name) for name in ("run", "config", "labels", "environment")})
        if description != self._sent_description:
            self._run.config.update({"cifar": description}, allow_val_change=True)
            self._sent_description = description

    def _send_pictures(self, pictures: Sequence[Path]) -> None:
        import wandb

        images = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures}
        if self._is_last_row_open:
            self._run.log(images, commit=True)
        elif images:
            # The run ended early. A row for the pictures would take the step of the next epoch, if the run is resumed.
            self._run.summary.update(images)

    def _send_predictions(self) -> None:
        """Send predictions.npz (about 0.2 MB, like the pictures), so that the run's report can be drawn from W&B too."""
        file = self.run_dir.path / PREDICTIONS_FILE
        if file.exists() and file.stat().st_size <= MAX_PREDICTIONS_BYTES:
            self._run.save(str(file), base_path=str(self.run_dir.path), policy="now")

    def _open_run(self) -> bool:
        """Open the W&B run. False if it is complete, if run.json does not exist yet, or if another process mirrors the run."""
        if self.is_complete() or not self.run_dir.read_json("run"):
            return False
        try:
            self._folder.mkdir(exist_ok=True)
            self._lock.acquire()
        except Timeout:
            return False
        try:
            if self.is_complete():  # completed by the process that held the lock
                self._lock.release()
                return False
            self._sent_digests, self._offset, self._is_last_row_open, self._sent_description = {}, 0, False, ""
            self._write_digest("")
            if self.mode == "online":
                try:
                    self._run = self._init_run()
                    with contextlib.suppress(OSError):  # a full disk; the address is not needed
                        write_atomic(self._folder / URL_FILE, str(self._run.url or "").encode())
                except Exception as error:
                    reason = redact(f"{type(error).__name__}: {error}".replace("\n", " "))[:200]
                    self._on_message(
                        f"{self.run_dir.id}: W&B cannot be used ({reason}); writing an offline run for `wandb sync`"
                    )
                    stop_core()  # otherwise the run's id stays in use
                    self._delete_folders("run-*")
                    self.mode = "offline"
            if self._run is None:
                self._run = self._init_run()
        except BaseException:
            self._lock.release()
            raise
        self._num_core_stops = num_core_stops()
        return True

    def _init_run(self) -> Any:
        self._delete_folders("offline-run-*" if self.mode == "offline" else "run-*")
        if "wandb" not in sys.modules:
            for name in _RUN_VARIABLES + _LOCATION_VARIABLES:
                os.environ.pop(f"WANDB_{name}", None)
            os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
        import wandb

        run = {**self._read_clean("run"), **self._target}
        sweep = run.get("sweep") or None
        wandb_run = wandb.init(
            id=self.run_dir.id,
            entity=run.get("entity") or None,
            project=run.get("project") or "cifar",
            name=escape_controls(str(run.get("name") or self.run_dir.id))[:128],  # W&B's limits
            group=run.get("group") or sweep,
            tags=[escape_controls(str(tag))[:64] for tag in run.get("tags", []) if tag],
            notes=run.get("command"),
            job_type="sweep" if sweep else "train",
            config=self._read_clean("config"),
            mode=self.mode,
            resume="allow" if self.mode == "online" else None,
            dir=str(self.run_dir.path),
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
                init_timeout=INIT_TIMEOUT_SECONDS,
                finish_timeout=FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=2.0,
            ),
        )
        # step_sync=False: W&B must not add an epoch to a row that has none, so that the history has each epoch once.
        wandb_run.define_metric("epoch")
        wandb_run.define_metric("*", step_metric="epoch", step_sync=False)
        return wandb_run

    def _delete_folders(self, pattern: str) -> None:
        for old in self._folder.glob(pattern):
            shutil.rmtree(old, ignore_errors=True)

    def _read_lines(self, start: int | None = None) -> Iterator[bytes]:
        """The complete lines of metrics.jsonl from byte `start`, or those that are new since the last call.

        If the file was truncated in between, it is read from its beginning.
        """
        offset = self._offset if start is None else start
        with contextlib.suppress(FileNotFoundError), open(self.run_dir.path / "metrics.jsonl", "rb") as file:
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

    def _compute_digest(self) -> str:
        """A digest of what the run folder holds now: metrics, summary and state."""
        files = [self.run_dir.path / name for name in ("metrics.jsonl", "summary.json")]
        content = b"\0".join(file.read_bytes() if file.exists() else b"" for file in files)
        return _hash_bytes(content + self.run_dir.state.encode()).hex()

    def is_complete(self) -> bool:
        """Whether W&B (or the offline file) has all of the run, according to our notes."""
        return self.run_dir.state in ENDED_STATES and self._read_digests().get(self._digest_key) == self._compute_digest()

    @property
    def _digest_key(self) -> str:
        target = "/".join(self._target.get(name, "") for name in ("server", "entity", "project"))
        return f"{self.mode} {target}" if self._target else self.mode

    def _read_digests(self) -> dict[str, str]:
        """Mode (and target) -> digest of the run folder when its W&B run was closed; "" while it is open."""
        return read_notes(self._folder / NOTES_FILE)

    def _write_digest(self, digest: str) -> None:
        write_notes(self._folder / NOTES_FILE, {**self._read_digests(), self._digest_key: digest}, indent=None)


def read_run_url(run_dir: RunDir) -> str:
    """The address of this run's page on W&B; "" if no online run was opened."""
    file = run_dir.path / "wandb" / URL_FILE
    return file.read_text() if file.exists() else ""


def _hash_bytes(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
