"""Copies a run folder to Weights & Biases. Live, offline, resumed and late runs use the same loop: send what W&B lacks.

    mirror = Mirror(run_dir, "offline")
    mirror.sync()            # as often as you like, while the run trains
    mirror.finish(pictures)  # when the run has ended

The row of epoch e is step e on W&B, so the server itself says which rows it has. Three rules keep what W&B says true:

1. W&B gets a row once it is final: once no resume can train its epoch again (`tracking/final_rows.py`).
2. W&B hears that a run has ended only after it was asked, and has answered that all rows are there (`arrival.py`). Until then
   the run stays open, or its summary says `incomplete`.
3. Where W&B has rows already, they are read back and compared. Rows that the record does not have any more are taken back
   (W&B calls it rewinding a run). A server that cannot do that is sent the record's row of such an epoch once more, at a
   later step.

An offline run is a file, which cannot be continued: if it was left incomplete, it is deleted and written again from the run
folder. wandb is imported when the first run is opened. Only the process that calls the mirror waits for W&B, never training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar.errors import UserError
from cifar.integrations.wandb import arrival
from cifar.integrations.wandb.api import GraphqlClient
from cifar.integrations.wandb.arrival import INCOMPLETE, PICTURES_FOLDER, ArrivedRun
from cifar.integrations.wandb.charts import CHART_KEY, TABLE_KEY, build_chart, define_chart
from cifar.integrations.wandb.document import read_clean
from cifar.integrations.wandb.document_feed import DocumentFeed
from cifar.integrations.wandb.feeds import FEEDS
from cifar.integrations.wandb.mirror_process import is_core_death, list_core_pids, num_core_stops, reset_dead_core, stop_core
from cifar.integrations.wandb.naming import settle_name
from cifar.integrations.wandb.notes import read_or_set_aside, write_notes
from cifar.integrations.wandb.run_file import wait_for_exit_record
from cifar.integrations.wandb.settings import Mode
from cifar.integrations.wandb.workspace import PICTURES, MetricDefinitions, build_config, build_summary, list_outdated_keys
from cifar.states import ENDED_STATES, OPEN_RUN_STATES, wandb_exit_code
from cifar.system.files import MissingFileError, open_file, read_bytes, read_text
from cifar.system.names import escape_controls
from cifar.system.redact import redact
from cifar.tracking.final_rows import FinalRows
from cifar.tracking.run_dir import MAX_METRICS_BYTES, RunDir, write_atomic

WRITE_TIMEOUT_SECONDS = 10.0  # how long to wait for the last block of an offline run's file
INIT_TIMEOUT_SECONDS, FINISH_TIMEOUT_SECONDS = 10.0, 120.0  # how long to wait for a server when a run begins and ends
QUERY_TIMEOUT_SECONDS = 10.0  # for one question to the server
TRANSMIT_SECONDS = 1.0  # wandb-core sends what is new so often (below 1 it takes 15). Rows come at checkpoints, so it is seldom
RETRY_SECONDS = 10.0  # the longest pause of wandb-core between two tries
LOST_SECONDS = 15.0  # a row that has not arrived after this time, at a server that answers, is lost; above RETRY_SECONDS
MAX_RESENDS = 2  # how often the rest is sent again in one `finish`
PREDICTIONS_FILE, MAX_PREDICTIONS_BYTES = "predictions.npz", 1_000_000  # a larger file is not sent

NOTES_FILE = "mirror.json"  # in RUN/wandb: target -> digest of what W&B has
URL_FILE = "url.txt"  # in RUN/wandb: the address of the online run, which the command line prints

# Variables (WANDB_...) that are removed: they would give every run of this process the same id, name or place.
_RUN_VARIABLES = ("RUN_ID", "NAME", "NOTES", "TAGS", "JOB_TYPE", "RUN_GROUP", "RESUME", "RESUME_FROM", "FORK_FROM", "PROGRAM")
_LOCATION_VARIABLES = ("SWEEP_ID", "SWEEP_PARAM_PATH", "DIR", "MODE", "SERVICE")

_write_timeout = WRITE_TIMEOUT_SECONDS
_client: tuple[int, GraphqlClient] | None = None  # the number of core stops when it was made, and the client


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
        self._final_rows = FinalRows(run_dir)
        self._document = DocumentFeed(run_dir, on_message)
        self._feeds = [self._document, *(feed(run_dir, on_message) for feed in FEEDS)]
        self._run: Any = None
        self._num_core_stops = 0
        self.has_given_up = False  # W&B has something that cannot be mended
        self._was_opened, self._most_rows = False, -1
        self._reset_transfer()

    def _reset_transfer(self) -> None:
        """Set what is known of the W&B run that is open now to that of a new one."""
        self._sent_digests: dict[int, bytes] = {}  # epoch -> digest of its line in metrics.jsonl
        self._offset = 0
        self._is_last_row_open = False  # the last row was sent but not committed, so that the pictures can be part of it
        self._has_sent_media = False
        self._num_expected = 0  # history rows that W&B has once all that was sent has arrived
        self._has_stale_rows = False  # W&B has rows that are not the record's, and cannot take them back
        self._had_pictures = False  # W&B had pictures before this process
        self._picture_hashes: dict[str, str] = {}  # pictures that W&B has in its summary: key -> SHA-256
        self._lost_pictures: dict[str, str] = {}  # those whose files it does not have: key -> name of the file
        self._arrived: ArrivedRun | None = None  # what W&B had before this process
        self._progress = (-1, time.monotonic())  # rows that W&B had when it was asked, and since when

    @property
    def is_open(self) -> bool:
        return self._run is not None

    @property
    def progress(self) -> tuple[bool, int]:
        """Whether the W&B run was opened, and the most rows that W&B has had. It only grows: a server that loses rows again and
        again makes no progress. Another thread may read it."""
        return self._was_opened, self._most_rows

    def sync(self, *, everything: bool = False) -> int:
        """Send the final rows that W&B lacks, or all rows -> how many. 0 also if another process mirrors this run."""
        if self._run is not None and self._num_core_stops != num_core_stops():
            self._run = None
        if self._run is None and not self._open_run():
            return 0
        num_before = len(self._sent_digests)
        epochs = self.run_dir.read_json("config").get("epochs", 0)
        # an offline file is written again if its rows are made again, so it need not wait
        limit = None if everything or self.mode == "offline" else self._final_rows.num_bytes()
        for line in self._read_lines(limit=limit):
            row = json.loads(line)
            epoch = int(row["epoch"])
            if epoch in self._sent_digests:
                continue
            self._definitions.define(row)
            if epoch >= self._run.starting_step:  # the server has the earlier ones
                self._is_last_row_open = epoch == epochs
                self._run.log(self._complete_row(row), step=epoch, commit=not self._is_last_row_open)
                self._num_expected += 1
            self._sent_digests[epoch] = _hash_bytes(line)
        for feed in self._feeds:
            feed.send()
        return len(self._sent_digests) - num_before

    def _complete_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the record and what belongs to it on W&B."""
        content = dict(row)
        for feed in self._feeds:
            content |= feed.add_to_row(dict(row))
        return content

    def holds_rows_back(self) -> bool:
        """Whether the run has rows that are not sent yet, because another try of it would make them again."""
        return self.mode == "online" and self._final_rows.num_bytes() < self.run_dir.metrics_bytes()

    def finish(self, pictures: Sequence[Path] = (), patience: float = LOST_SECONDS) -> bool:
        """Send the rest, the summary and the pictures, and close the W&B run. True if W&B now has all of the run.

        Does nothing if W&B has it already. False if the run has not ended, if another process mirrors it, or if W&B does not
        have all rows after `patience` seconds: then the W&B run stays open, and the next call goes on.
        """
        state = self.run_dir.state
        if state not in ENDED_STATES:
            return False
        self.sync(everything=True)
        if self._run is None:
            return self.is_complete()
        if self._sent_digests != {int(json.loads(line)["epoch"]): _hash_bytes(line) for line in self._read_lines(0)}:
            self._reopen()  # a resume has removed rows that were sent here, and trained those epochs again
            if self._run is None:
                return False
        self._send_media(pictures)
        for feed in self._feeds:
            feed.finish()
        if self.mode == "online" and not self._has_arrived(pictures, patience):
            return False
        self._run.summary.update(build_summary(self.run_dir))
        digest = self._compute_digest()
        run, self._run = self._run, None
        try:
            self._finish_run(run, wandb_exit_code(state))
            if self._had_pictures:
                with contextlib.suppress(Exception):  # they stay then
                    self._delete_old_pictures()
            self._write_digest(digest)
        finally:
            self._lock.release()
        return True

    def suspend(self) -> None:
        """Close the W&B run without a final state, because the run was interrupted and may be resumed."""
        run, self._run = self._run, None
        try:
            if run is not None and self._num_core_stops == num_core_stops():
                state = self.run_dir.state
                if self.run_dir.read_json("run").get("engine") == "wandb" and state in OPEN_RUN_STATES:
                    run.mark_preempting()  # so that W&B gives it to an agent again
                reason = str(self.run_dir.read_json("status").get("reason") or "")
                if state == "running":  # its process is gone and could not say so
                    state, reason = "interrupted", "its process is gone; it can go on from its checkpoint"
                run.summary.update({"state": state, "reason": redact(reason)})
                self._finish_run(run, 1)
        finally:
            self._lock.release()

    def note_complete(self) -> None:
        """Note that W&B has all of the run, because it was asked."""
        with contextlib.suppress(OSError), contextlib.suppress(Timeout), self._lock:
            self._write_digest(self._compute_digest())

    def forget(self) -> None:
        """Forget that W&B has all of the run, because it was found that it has not. `finish` looks at every row then."""
        self._write_digest("")

    def release(self) -> None:
        """Leave the W&B run open as it is, so that this or another process can go on with it later."""
        self._run = None
        stop_core()
        self._lock.release()

    def _reopen(self) -> None:
        """Close the W&B run as incomplete and open it again: rows that it has are compared, and the others sent."""
        run, self._run = self._run, None
        try:
            if run is not None and self._num_core_stops == num_core_stops():
                run.summary.update({"state": INCOMPLETE, "reason": "its rows are being sent again"})
                self._finish_run(run, 1)
        finally:
            self._lock.release()
        self.sync(everything=True)

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

    # -- what has arrived --

    def _has_arrived(self, pictures: Sequence[Path], patience: float) -> bool:
        """Whether W&B has every row. Waits up to `patience` seconds; what is lost by then is sent again.

        If W&B cannot be completed, its summary says `incomplete`.
        """
        deadline, num_resends = time.monotonic() + patience, 0
        rows = list(self.run_dir.read_rows())
        while True:
            if self._has_stale_rows and (problem := self._repeat_rows(rows)):
                return self._call_incomplete(problem)
            missing = self._wait_for_content(rows, deadline)
            if missing == "":
                return all(feed.has_arrived(patience) for feed in self._feeds)
            if missing is None or time.monotonic() - self._progress[1] < LOST_SECONDS:
                return False  # W&B does not answer, or the rows may still be on their way
            if num_resends == MAX_RESENDS:
                return self._call_incomplete(missing)
            self._on_message(f"{self.run_dir.id}: {missing}; sending the rest again")
            num_resends += 1
            self._reopen()
            if self._run is None or self.mode != "online":
                return False
            self._send_media(pictures)
            for feed in self._feeds:
                feed.finish()
            deadline = time.monotonic() + patience

    def _wait_for_content(self, rows: Sequence[Mapping[str, Any]], deadline: float) -> str | None:
        """Wait until W&B has all rows and cifar.json -> what it lacks, in words; None if it does not answer."""
        pause = 0.05
        while True:
            try:
                arrived = arrival.fetch_run(_connect().execute_graphql, self._run.entity, self._run.project, self.run_dir.id)
            except Exception:
                if not list_core_pids():
                    raise
                self._progress = (-1, time.monotonic())
                return None
            missing = arrival.describe_missing_rows(arrived, self._num_expected, rows[-1] if rows else {})
            missing = missing or arrival.describe_missing_document(arrived, self._document.md5)
            if not missing:
                return ""
            num_rows = arrived.num_rows if arrived else -1
            self._most_rows = max(self._most_rows, num_rows)
            if num_rows != self._progress[0]:
                self._progress = (num_rows, time.monotonic())
            if time.monotonic() > min(deadline, self._progress[1] + LOST_SECONDS):
                return missing
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _repeat_rows(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Send rows that are other ones on W&B again, at later steps, since W&B can take nothing back -> "" or a problem."""
        difference, self._has_stale_rows = self._compare_with_server(rows), False
        if difference.unknown_epochs:
            epochs = ", ".join(map(str, difference.unknown_epochs[:6]))
            return f"W&B has rows of epochs that the record does not have ({epochs}), and cannot take them back"
        skipped = range(difference.last_epoch + 1, self._run.starting_step)  # wandb went on behind them
        repeated = [row for row in rows if int(row["epoch"]) in difference.wrong_epochs or int(row["epoch"]) in skipped]
        step = max(difference.last_step, len(rows), self._run.step)
        for row in [*repeated, *(rows[-1:] if repeated else ())]:  # the last epoch's row stays the last one
            step += 1
            self._run.log(self._complete_row(row), step=step, commit=True)
            self._num_expected += 1
        return ""

    def _call_incomplete(self, problem: str) -> bool:
        """Give up: close the W&B run as failed, and say in its summary that it is incomplete."""
        self._on_message(f"{self.run_dir.id}: incomplete on W&B: {problem}")
        self.has_given_up = True
        run, self._run = self._run, None
        try:
            reason = redact(f"{self.run_dir.state} where it ran; {problem}")
            run.summary.update({"state": INCOMPLETE, "reason": reason})
            self._finish_run(run, 1)
        finally:
            self._lock.release()
        return False

    def _delete_old_pictures(self) -> None:
        """Delete pictures of an earlier end, of a failed run that was resumed: W&B keeps them beside the new ones."""
        client, (entity, project) = _connect(), self._place()
        arrived = arrival.fetch_run(client.execute_graphql, entity, project, self.run_dir.id)
        shown = {str(value.get("path")) for value in (arrived.media if arrived else {}).values()}
        if arrived is None or not shown:
            return
        for file in client.api.run(f"{entity}/{project}/{self.run_dir.id}").files(pattern=f"{PICTURES_FOLDER}%"):
            if file.name.startswith(PICTURES_FOLDER) and file.name not in shown:
                file.delete()

    def _compare_with_server(self, rows: Sequence[Mapping[str, Any]]) -> arrival.HistoryDifference:
        return arrival.compare_history(arrival.read_history(_connect().api, *self._place(), self.run_dir.id), rows)

    def _place(self) -> tuple[str, str]:
        """Entity and project of the run on W&B."""
        run = {**self.run_dir.read_json("run"), **self._target}
        return run.get("entity") or _connect().entity, run.get("project") or "cifar"

    # -- configuration, pictures, files --

    def _send_media(self, pictures: Sequence[Path]) -> None:
        """Send the pictures that W&B lacks, and the predictions. Once each time the run is opened."""
        if self._has_sent_media:
            return
        import wandb

        keys = {f"{PICTURES}{path.stem}": path for path in pictures}
        images = {
            key: wandb.Image(str(path))
            for key, path in keys.items()
            # in the last row they are part of it; the same picture at the same step is the same file
            if self._is_last_row_open or self._picture_hashes.get(key) != _hash_bytes(path.read_bytes()).hex()
        }
        chart = build_chart(list(self.run_dir.read_rows()), self.run_dir.read_json("labels").get("layers") or [])
        self._definitions.define([*images, TABLE_KEY])
        if self._is_last_row_open:
            self._remove_from_summary([key for key in (self._arrived.summary if self._arrived else {}) if key in images])
            self._run.log({**images, **({CHART_KEY: chart} if chart else {})}, commit=True)
            self._is_last_row_open = False
        else:
            # The run ended early. A row for the pictures would take the step of the next epoch, if the run is resumed.
            if chart:
                define_chart(self._run, chart)
            if chart and TABLE_KEY not in self._picture_hashes:
                images[TABLE_KEY] = chart.table
            if images:
                self._run.summary.update(images)
        for key, name in self._lost_pictures.items():
            if key in keys and key not in images:
                self._send_picture_file(keys[key], name)
        self._send_predictions()
        self._has_sent_media = True

    def _send_picture_file(self, picture: Path, name: str) -> None:
        """Send the file that a row on W&B names already. wandb was killed before it sent the file, or the server lost it."""
        file = Path(self._run.dir) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, file)
        self._run.save(str(file), base_path=self._run.dir, policy="now")

    def _send_predictions(self) -> None:
        """Send predictions.npz (about 0.2 MB, like the pictures), so that the run's report can be drawn from W&B too."""
        file = self.run_dir.path / PREDICTIONS_FILE
        if file.exists() and file.stat().st_size <= MAX_PREDICTIONS_BYTES:
            self._run.save(str(file), base_path=str(self.run_dir.path), policy="now")

    # -- opening --

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
            self._reset_transfer()
            self._write_digest("")
            reset_dead_core()
            if self.mode == "online":
                try:
                    self._open_online()
                    with contextlib.suppress(OSError):  # a full disk; the address is not needed
                        write_atomic(self._folder / URL_FILE, str(self._run.url or "").encode())
                except Exception as error:
                    if is_core_death(error) and reset_dead_core():
                        raise  # the server may be well
                    reason = redact(f"{type(error).__name__}: {error}".replace("\n", " "))[:200]
                    self._on_message(
                        f"{self.run_dir.id}: W&B cannot be used ({reason}); writing an offline run for `wandb sync`"
                    )
                    stop_core()  # otherwise the run's id stays in use
                    self._delete_folders("run-*")
                    self._run, self.mode = None, "offline"
            if self._run is None:
                self._reset_transfer()
                self._run = self._init_run()
            is_over = self.run_dir.state in ENDED_STATES
            word, reason = (INCOMPLETE, "its record is being sent") if is_over else ("running", "")
            self._run.summary.update({**build_summary(self.run_dir), "state": word, "reason": reason})
            if self._arrived:
                self._remove_from_summary(list_outdated_keys(self._arrived.summary))
            for feed in self._feeds:
                feed.open(self._run, self._arrived, self.mode)
        except BaseException:
            self._run = None
            self._lock.release()
            raise
        self._num_core_stops = num_core_stops()
        self._was_opened = True
        return True

    def _open_online(self) -> None:
        """Open the run on the server. If it has other rows than the record, they are taken back, or noted as stale."""
        client, (entity, project) = _connect(), self._place()
        settle_name(self.run_dir, client, entity, project)
        self._arrived = arrived = arrival.fetch_run(client.execute_graphql, entity, project, self.run_dir.id)
        if arrived:
            self._picture_hashes = {key: str(value.get("sha256", "")) for key, value in arrived.media.items()}
            self._had_pictures = bool(arrived.media)
            if arrived.media:
                there = arrival.fetch_pictures(client.execute_graphql, entity, project, self.run_dir.id)
                self._lost_pictures = arrived.find_lost_pictures(there)
        last_known = int(arrived.summary.get("_step", -1)) if arrived else -1  # wandb goes on from there
        if not arrived or (not arrived.num_rows and last_known < 0):
            self._run = self._init_run()
            return
        is_over = self.run_dir.state in ENDED_STATES
        limit = None if is_over else self._final_rows.num_bytes()
        rows = [json.loads(line) for line in self._read_lines(0, limit)]
        difference = self._compare_with_server(rows)
        self._num_expected = arrived.num_rows
        if not difference.is_prefix or last_known > difference.last_step:
            num_equal = difference.num_equal
            try:
                self._run = self._init_run(rewind_to=int(rows[num_equal - 1]["epoch"]) if num_equal else 0)
                self._num_expected, self._picture_hashes, self._lost_pictures = num_equal, {}, {}  # the summary is gone too
                # wandb-core writes the other lines from their beginning again, too
                self._arrived = dataclasses.replace(arrived, num_log_lines=0, num_event_lines=0)
                return
            except Exception as error:
                self._on_message(f"{self.run_dir.id}: W&B cannot take rows back ({type(error).__name__})")
                stop_core()  # otherwise the run's id stays in use
                self._delete_folders("run-*")
                self._has_stale_rows = True
        self._run = self._init_run()

    def _init_run(self, rewind_to: int | None = None) -> Any:
        """wandb.init. `rewind_to`: the step after which W&B forgets its rows of this run."""
        self._delete_folders("offline-run-*" if self.mode == "offline" else "run-*")
        if "wandb" not in sys.modules:
            for name in _RUN_VARIABLES + _LOCATION_VARIABLES:
                os.environ.pop(f"WANDB_{name}", None)
            os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
        import wandb

        run = {**read_clean(self.run_dir, "run"), **self._target}
        sweep = run.get("sweep") or None
        is_online = self.mode == "online"
        wandb_run = wandb.init(
            id=self.run_dir.id,
            entity=run.get("entity") or None,
            project=run.get("project") or "cifar",
            name=escape_controls(str(run.get("name") or self.run_dir.id))[:128],  # W&B's limits
            group=run.get("group") or sweep,
            tags=[escape_controls(str(tag))[:64] for tag in run.get("tags") or [] if tag],
            notes=run.get("description") or run.get("command"),
            job_type="sweep" if sweep else "train",
            config=build_config(self.run_dir),
            mode=self.mode,
            resume="allow" if is_online and rewind_to is None else None,
            resume_from=f"{self.run_dir.id}?_step={rewind_to}" if rewind_to is not None else None,
            dir=str(self.run_dir.path),
            reinit="create_new",
            settings=wandb.Settings(
                sweep_id=sweep if is_online and run.get("engine") == "wandb" else None,
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
                host="",  # not this process's: the environment's feed sends what the record says
                x_save_requirements=False,
                x_transaction_log_flush_interval=2.0,
                x_file_stream_transmit_interval=TRANSMIT_SECONDS,
                x_file_stream_retry_wait_max_seconds=RETRY_SECONDS,
            ),
        )
        config: Any = wandb_run.config
        if config.get("cifar"):  # an earlier version sent the record's files as text; they are in cifar.json now
            config.update({"cifar": None}, allow_val_change=True)
        self._definitions = MetricDefinitions(wandb_run)
        return wandb_run

    def _remove_from_summary(self, keys: Sequence[str]) -> None:
        for key in keys:
            with contextlib.suppress(KeyError):  # W&B has it, and this run was opened without it
                del self._run.summary[key]

    def _delete_folders(self, pattern: str) -> None:
        for old in self._folder.glob(pattern):
            shutil.rmtree(old, ignore_errors=True)

    def _read_lines(self, start: int | None = None, limit: int | None = None) -> Iterator[bytes]:
        """The complete lines of metrics.jsonl from byte `start` to `limit`, or those that are new since the last call.

        If the file was truncated in between, it is read from its beginning.
        """
        offset = self._offset if start is None else start
        with contextlib.suppress(MissingFileError), open_file(self.run_dir.path / "metrics.jsonl", MAX_METRICS_BYTES) as file:
            if offset:
                file.seek(offset - 1)
                if file.read(1) != b"\n":
                    offset = file.seek(0)
            for line in file:
                if not line.endswith(b"\n") or (limit is not None and offset + len(line) > limit):
                    break
                offset += len(line)
                if start is None:
                    self._offset = offset
                yield line

    def _compute_digest(self) -> str:
        """A digest of what the run folder holds now: metrics, summary and state."""
        files = [self.run_dir.path / name for name in ("metrics.jsonl", "summary.json")]
        content = b"\0".join(read_bytes(file, MAX_METRICS_BYTES) if file.exists() else b"" for file in files)
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
        return {str(key): str(value) for key, value in read_or_set_aside(self._folder / NOTES_FILE).items()}

    def _write_digest(self, digest: str) -> None:
        write_notes(self._folder / NOTES_FILE, {**self._read_digests(), self._digest_key: digest}, indent=None)


def read_run_url(run_dir: RunDir) -> str:
    """The address of this run's page on W&B; "" if no online run was opened."""
    with contextlib.suppress(UserError):
        return read_text(run_dir.path / "wandb" / URL_FILE)
    return ""


def _connect() -> GraphqlClient:
    """The client for questions to the server; another one after wandb-core was stopped."""
    global _client
    if _client is None or _client[0] != num_core_stops():
        _client = num_core_stops(), GraphqlClient(QUERY_TIMEOUT_SECONDS)
    return _client[1]


def _hash_bytes(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
