"""The sidecar: a process beside the trainer that mirrors run folders to W&B, measures the trainer and its machine, and draws a
run's pictures when it has ended.

    python -m cifar.sidecar --wandb auto

It reads JSON lines from its parent: {"run": FOLDER} follow this run, {"close": FOLDER} the process that wrote it is gone,
{"end": true} finish what has ended, then exit. When W&B is slow or does not answer, only this process waits. It never outlives
its parent: if the input ends without {"end": true}, the parent was killed, and this process and its wandb-core end within three
seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar.errors import UserError
from cifar.states import ENDED_STATES, FAILURE_STATES
from cifar.system.devices import num_cores
from cifar.system.names import escape_controls
from cifar.system.redact import redact
from cifar.system.redacted_streams import finish_output, install_redacted_output
from cifar.tracking.run_dir import RunDir
from cifar.tracking.system_metrics import SystemMetricsRecorder

if TYPE_CHECKING:
    from cifar.integrations.wandb.mirror import Mirror
    from cifar.integrations.wandb.settings import Mode

POLL_SECONDS = 0.5
IMPORT_DELAY_SECONDS = 2.0  # from the first run's start: until then W&B is imported, and the training begins
ORPHAN_GRACE_SECONDS = 1.5  # to clean up after the parent was killed
PING_TIMEOUT_SECONDS = 1.0  # at the end, for the server to answer a ping
LATER_PING_TIMEOUT_SECONDS = 3.0  # the same while runs are being sent: their files may fill the line
PING_PAUSE_SECONDS = 0.5  # between two pings of a server that has answered: it may die while runs are being finished
SERVER_TIMEOUT_SECONDS = 3.0  # the same for all pings together, including the name service
PATIENCE_SECONDS = 0.1  # how long a run's mirror waits for its rows to arrive, before the other runs have their turn
MAX_DEAD_CORES = 5  # how often a run is sent on after wandb-core was killed
MAX_DRAWING_PROCESSES = 32  # at most, and at most one for two cores: eight GPUs end about ten small trials a second (LOG.md)
WAIT_MARGIN_SECONDS = 3.0  # that the parent waits beyond the sidecar's own limits

_drawing_processes: list[subprocess.Popen[bytes]] = []  # children of this process


class SidecarHandle:
    """The sidecar as its parent sees it. No method but `shut_down` waits, and none raises."""

    def __init__(self, mode: str = "auto", *, log: Path | None = None, grace: float = 20.0) -> None:
        self._grace = grace
        self._folders: set[Path] = set()
        command = [sys.executable, "-m", "cifar.sidecar", "--wandb", mode, "--grace", str(grace)]
        with contextlib.ExitStack() as files:
            output = files.enter_context(open(log, "ab")) if log else subprocess.DEVNULL
            # A session of its own: the parent answers Ctrl-C, and the sidecar ends after it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, bufsize=0, start_new_session=True
            )
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def follow_run(self, folder: Path) -> None:
        """Mirror this run from now on. Called again when a run goes on after an end."""
        self._folders.add(Path(folder))
        self._send_message(run=str(Path(folder).resolve()))

    def mark_writer_gone(self, folder: Path) -> None:
        """The process that wrote this run is gone, whatever the run's status says."""
        self._send_message(close=str(Path(folder).resolve()))

    def shut_down(self, timeout: float | None = None) -> bool:
        """Let it finish within `timeout` seconds. True if W&B has all runs that have ended; else `push` sends the rest.

        The default is `grace` seconds from one progress to the next, for each run. If the server does not answer, it takes
        hardly longer than the pictures.
        """
        self._send_message(end=True)
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            default_timeout = self._grace * (1 + 2 * len(self._folders)) + WAIT_MARGIN_SECONDS
            return self._process.wait(default_timeout if timeout is None else timeout) == 0
        except subprocess.TimeoutExpired:
            self._process.terminate()  # it ends its wandb-core, then itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            self._process.kill()
            self._process.wait()
            return False

    def _send_message(self, **message: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # the sidecar may be gone, or its pipe may be full
            os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]


class _FollowedRun:
    """A run in the sidecar process. A run may end more than once (a failed one is resumed), so ends are told apart by time."""

    def __init__(self, folder: str) -> None:
        self.run_dir = RunDir(Path(folder))
        self.mirror: Mirror | None = None
        self.is_writer_gone = False
        self.drawn_end = 0.0  # time of the end whose pictures are drawn
        self.sampled_end = 0.0  # time of the end after which its process was measured for the last time
        self.system_metrics = SystemMetricsRecorder(self.run_dir)
        self.mirrored_end = -1.0  # time of the end that W&B has, or has refused; 0.0: it failed while the run was open
        self.is_incomplete = False  # W&B does not have all of it
        self.is_waiting = False  # W&B has not got all rows yet; its mirror asks again
        self.suspended_end = 0.0  # time of the failed end after which W&B has the final rows only: it may be tried again
        self.num_dead_cores = 0  # how often wandb-core was killed while this run was being mirrored

    @property
    def progress(self) -> tuple[object, ...]:
        """Changes each time that something of what is left to do at the end is done.

        Many runs are sent at once. Where W&B is slow, all of them are opened before the first one has arrived.
        """
        return self.drawn_end, self.mirrored_end, self.mirror.progress if self.mirror else None

    def end_time(self) -> float:
        """When the run ended; 0.0 while it is open, or if its status cannot be read."""
        status: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, UserError):
            status = self.run_dir.read_json("status")
        return float(status["time"]) if status.get("state") in ENDED_STATES else 0.0


class Sidecar:
    """Three threads: one draws, one measures, one mirrors, so that the others go on while W&B does not answer."""

    def __init__(self, mode: Mode, log: Callable[[str], None]) -> None:
        self._mode, self._log = mode, log
        self._followed: dict[str, _FollowedRun] = {}
        self._lock = threading.Lock()
        self._end_requested = threading.Event()
        self._server_is_silent: bool | None = None  # not asked yet
        self._has_sampling_failed = False
        self._drawing_thread = threading.Thread(target=self._keep_drawing, daemon=True)
        self._sampling_thread = threading.Thread(target=self._keep_sampling, daemon=True)
        self._threads = [self._drawing_thread, self._sampling_thread]
        if mode != "disabled":
            self._threads.append(threading.Thread(target=self._keep_mirroring, daemon=True))
        for thread in self._threads:
            thread.start()

    def receive_message(self, message: dict[str, str]) -> None:
        if folder := message.get("run"):
            with self._lock:
                run = self._followed.setdefault(folder, _FollowedRun(folder))
                run.is_writer_gone, run.mirrored_end, run.is_waiting, run.sampled_end = False, -1.0, False, 0.0
        elif (folder := message.get("close")) and folder in self._followed:
            self._followed[folder].is_writer_gone = True

    def finish_runs(self, seconds: float, is_orphaned: Callable[[], bool]) -> bool:
        """Finish the ended runs, with `seconds` at most from one progress to the next. True if W&B has all of them."""
        deadline, server_deadline = time.monotonic() + seconds, time.monotonic() + SERVER_TIMEOUT_SECONDS
        self._end_requested.set()
        if self._mode == "online":
            threading.Thread(target=self._keep_pinging, daemon=True).start()  # a thread, since the name service can take long
        progress_before: list[tuple[object, ...]] = []
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:
            time.sleep(0.05)
            progress = [run.progress for run in list(self._followed.values())]
            if is_orphaned():
                deadline = min(deadline, time.monotonic() + ORPHAN_GRACE_SECONDS)
            elif progress != progress_before:
                progress_before, deadline = progress, time.monotonic() + seconds
            is_silent = self._server_is_silent or (self._server_is_silent is None and time.monotonic() > server_deadline)
            if is_silent and not self._drawing_thread.is_alive() and self._needs_server():
                self._log("W&B does not answer; the records have everything, and `python -m cifar push` sends it")
                return False
        is_late = any(thread.is_alive() for thread in self._threads)
        if is_late:
            self._log("the pictures or W&B took too long; the records have everything, and `python -m cifar push` sends it")
        return not is_late and not any(run.is_incomplete for run in self._followed.values())

    def _keep_pinging(self) -> None:
        """Find out whether the server answers, until it does not. wandb's own calls do not tell: they try again for minutes."""
        from cifar.integrations.wandb.api import is_server_reachable

        num_silent, allowed, timeout = 0, 1, PING_TIMEOUT_SECONDS  # pings in a row without an answer
        while num_silent <= allowed:
            if is_server_reachable(timeout):
                self._server_is_silent, num_silent, allowed, timeout = False, 0, 2, LATER_PING_TIMEOUT_SECONDS
                time.sleep(PING_PAUSE_SECONDS)
            else:
                num_silent += 1
                time.sleep(PING_PAUSE_SECONDS if self._server_is_silent is False else 0)
        self._server_is_silent = True

    def _needs_server(self) -> bool:
        """Whether a run is still to be sent to W&B, and not just written to a file."""
        if self._mode != "online":
            return False
        return any(run.mirror is None or run.mirror.mode == "online" for run in list(self._followed.values()))

    def _keep_drawing(self) -> None:
        is_last = False
        if num_cores() > 2:  # else it would take the time from the training
            self._import_figures()
        while not is_last:
            is_last = self._end_requested.is_set()
            while ended_runs := [
                (run, end) for run in list(self._followed.values()) if (end := run.end_time()) != run.drawn_end
            ]:
                if not self._draw_in_parallel(ended_runs):
                    self._draw_pictures(*ended_runs[0])  # one only: more runs may have ended meanwhile
            self._sleep()

    def _import_figures(self) -> None:
        """Import what draws, while the first run trains: its user waits for the pictures at its end."""
        while not self._followed:
            if self._end_requested.wait(POLL_SECONDS):
                return
        if not self._end_requested.wait(IMPORT_DELAY_SECONDS):
            with contextlib.suppress(Exception):  # drawing reports it
                from cifar.report.build import import_figures

                import_figures()

    def _keep_mirroring(self) -> None:
        while True:
            # asked first: what is drawn and measured last has to be sent, too
            is_last = not (self._drawing_thread.is_alive() or self._sampling_thread.is_alive())
            for run in list(self._followed.values()):
                self._mirror_run(run, is_last)
            if is_last and not any(run.is_waiting for run in list(self._followed.values())):
                break
            self._sleep()
        if "wandb" in sys.modules:  # else nothing was sent
            from cifar.integrations.wandb import artifact_settle

            artifact_settle.settle(self._log, everything=True)

    def _keep_sampling(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._end_requested.is_set()
            for run in list(self._followed.values()):
                if not run.sampled_end and not run.is_writer_gone:
                    self._sample_run(run)
            self._sleep()

    def _sample_run(self, run: _FollowedRun) -> None:
        end = run.end_time()
        try:
            if not self._has_sampling_failed:
                run.system_metrics.finish() if end else run.system_metrics.poll()
        except (OSError, UserError):  # a full disk, or a damaged folder: those who train find out
            pass
        except Exception as error:  # psutil is not installed, or does not know this system
            self._has_sampling_failed = True
            self._log(f"no system metrics ({type(error).__name__}: {error})")
        run.sampled_end = end

    def _sleep(self) -> None:
        self._end_requested.wait(POLL_SECONDS)
        if self._end_requested.is_set():
            time.sleep(0.02)

    def _draw_pictures(self, run: _FollowedRun, end: float) -> None:
        try:
            if end:
                from cifar.report import draw_pictures

                draw_pictures(run.run_dir.path)
        except Exception as error:
            self._log(f"{run.run_dir.id}: no pictures ({type(error).__name__}: {error})")
        run.drawn_end = end

    def _draw_in_parallel(self, ended_runs: list[tuple[_FollowedRun, float]]) -> bool:
        """Draw in several processes, if many runs have ended at once and there are cores to spare beside the training.

        False if there are too few runs or cores, or if none of the runs could be drawn.
        """
        ended = [(run, end) for run, end in ended_runs if end]
        count = min(len(ended) // 2, MAX_DRAWING_PROCESSES, num_cores() // 2 - 1)
        if count < 2:
            return False
        ended = ended[: 3 * count]  # a few seconds of work for each: `finish_runs` has to see progress
        try:
            for first in range(count):
                folders = [str(run.run_dir.path) for run, _ in ended[first::count]]
                command = [sys.executable, "-m", "cifar.sidecar", "--draw", str(os.getpid()), *folders]
                no_output = subprocess.DEVNULL  # a run that fails is drawn again in this process, which reports the error
                _drawing_processes.append(subprocess.Popen(command, stdin=no_output, stdout=no_output, stderr=no_output))
            succeeded = [process.wait() == 0 for process in _drawing_processes]
        except OSError:  # no more processes can be started
            for process in _drawing_processes:
                process.kill()
                process.wait()
            return False
        finally:
            _drawing_processes.clear()
        for number, (run, end) in enumerate(ended):
            if succeeded[number % count]:
                run.drawn_end = end
        return any(succeeded)

    def _mirror_run(self, run: _FollowedRun, is_last: bool) -> None:
        end = run.end_time()
        if end == run.mirrored_end or (end and end == run.suspended_end and not is_last):
            return
        try:
            from cifar.integrations.wandb import artifact_settle
            from cifar.integrations.wandb.mirror import Mirror

            run.mirror = run.mirror or Mirror(run.run_dir, self._mode, self._log)
            run.mirror.sync()
            if end and end == run.drawn_end and (run.sampled_end or run.is_writer_gone):
                if run.run_dir.state in FAILURE_STATES and run.mirror.holds_rows_back() and not is_last:
                    run.mirror.suspend()  # it may be tried again, and then the rows after its checkpoint are made again
                    run.suspended_end = end
                elif run.mirror.finish(sorted((run.run_dir.path / "pictures").glob("*.png")), PATIENCE_SECONDS):
                    run.mirrored_end, run.is_waiting = end, False
                    run.is_incomplete = run.mirror.mode != self._mode  # it has turned to offline: written to a file instead
                    artifact_settle.settle(self._log)
                else:
                    run.is_incomplete, run.is_waiting = True, run.mirror.is_open
                    if run.mirror.has_given_up:
                        run.mirrored_end = end
            elif run.is_writer_gone or is_last:
                run.mirror.suspend()
                run.is_waiting = False
                with self._lock:  # the run may have gone on meanwhile
                    if not end and (is_last or run.is_writer_gone):
                        self._followed.pop(str(run.run_dir.path), None)
        except Exception as error:
            has_new_core = run.num_dead_cores < MAX_DEAD_CORES and self._replace_dead_core(run)
            if not has_new_core:
                self._log(f"{run.run_dir.id}: not mirrored to W&B ({type(error).__name__}: {error}); its record is whole")
                run.mirrored_end, run.is_incomplete, run.is_waiting = end, True, False
            with contextlib.suppress(Exception):
                run.mirror, broken = None, run.mirror
                if broken:
                    broken.suspend()

    def _replace_dead_core(self, run: _FollowedRun) -> bool:
        """If wandb-core is gone (the system may kill it), let the mirrors go on with another one. Whether that was so."""
        from cifar.integrations.wandb.mirror_process import reset_dead_core

        if not reset_dead_core():
            return False
        run.num_dead_cores += 1
        run.is_waiting = True
        self._log(f"{run.run_dir.id}: wandb-core was killed; another one is started")
        return True


def main(arguments: list[str] | None = None) -> int:
    """Follow runs until {"end": true}, or until the parent is gone. Exits by itself, with 0 if W&B has all ended runs."""
    parser = argparse.ArgumentParser(prog="python -m cifar.sidecar", description=__doc__)
    parser.add_argument("--wandb", default="auto", help="auto, online, offline or disabled")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds for each thing that is left to do at the end")
    parser.add_argument("--draw", nargs="+", default=[], help=argparse.SUPPRESS)  # the sidecar's pid, and folders
    options = parser.parse_args(arguments)
    if options.draw:
        return _draw_folders(int(options.draw[0]), options.draw[1:])
    from cifar.integrations.wandb.settings import mode_from_environment

    install_redacted_output()
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a batch system may warn every process
    signal.signal(signal.SIGTERM, lambda *_: _exit_process(143))
    os.nice(5)  # training comes first
    sidecar = Sidecar(mode_from_environment(options.wandb), lambda line: print(escape_controls(redact(line)), flush=True))

    def is_orphaned() -> bool:
        return os.getppid() != parent

    end_requested = _read_messages(sidecar, is_orphaned)
    is_complete = sidecar.finish_runs(options.grace if end_requested else ORPHAN_GRACE_SECONDS, is_orphaned)
    _exit_process(0 if is_complete else 3)
    return 0


def _draw_folders(sidecar_pid: int, folders: list[str]) -> int:
    """Draw the pictures of these runs while the sidecar that asked for them lives."""
    from cifar.report import draw_pictures

    for folder in folders:
        if os.getppid() != sidecar_pid:
            return 1
        draw_pictures(Path(folder))
    return 0


def _read_messages(sidecar: Sidecar, is_orphaned: Callable[[], bool]) -> bool:
    """Pass on the parent's messages. True at its {"end": true}, False when the parent is gone.

    The end of the input is not enough to see that: a process that the parent forked may hold the pipe open.
    """
    buffer = b""
    while not is_orphaned():
        if not select.select([0], [], [], POLL_SECONDS)[0]:
            continue
        piece = os.read(0, 65536)
        if not piece:
            break
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.get("end"):
                return True
            sidecar.receive_message(message)
    return False


def _exit_process(code: int) -> None:
    """End this process at once, after wandb-core and the drawing processes. No exit hook may wait for a server."""
    for process in list(_drawing_processes):
        process.kill()
    if mirror_process := sys.modules.get("cifar.integrations.wandb.mirror_process"):
        mirror_process.kill_core()
    finish_output()
    os._exit(code)


if __name__ == "__main__":
    main()
