"""The companion process of a worker: mirrors its records to W&B, and draws a run's pictures when it has ended.

    python -m cifar.sidecar --wandb auto

It reads JSON lines from its parent: {"run": FOLDER} follow this one, {"close": FOLDER} its trial is gone, {"end": true}
finish what has ended. Slow, full or dead, W&B holds up this process only. It is never left behind: where the input ends
without {"end": true}, the parent was killed, and this process and its wandb-core are gone within three seconds.
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
from cifar.system.devices import cores
from cifar.tracking.run_dir import END_STATES, Record, redact

if TYPE_CHECKING:
    from cifar.integrations.wandb.mirror import Mirror
    from cifar.integrations.wandb.settings import Mode

POLL_SECONDS = 0.5
ORPHAN_SECONDS = 1.5  # for tidying up after the parent was killed
KNOCK_SECONDS, SILENT_SECONDS = 1.0, 3.0  # at the end: for a server to say anything; in all, name service included
DRAWERS = 8  # processes at most, and one for two cores
MARGIN_SECONDS = 3.0  # that the parent waits beyond the companion's own graces


_drawers: list[subprocess.Popen[bytes]] = []  # of this process


class Follower:
    """The parent's end of the companion process. No call but `end` waits, and nothing it does can fail the caller."""

    def __init__(self, mode: str = "auto", *, log: Path | None = None, grace: float = 20.0) -> None:
        self._grace = grace
        self._known: set[Path] = set()
        command = [sys.executable, "-m", "cifar.sidecar", "--wandb", mode, "--grace", str(grace)]
        with contextlib.ExitStack() as files:
            output = files.enter_context(open(log, "ab")) if log else subprocess.DEVNULL
            # A session of its own: Ctrl-C is the parent's to answer, the companion follows it to its end.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, bufsize=0, start_new_session=True
            )
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def follow(self, folder: Path) -> None:
        """Mirror this record from now on. Also says that a known one goes on."""
        self._known.add(Path(folder))
        self._tell(run=str(Path(folder).resolve()))

    def close(self, folder: Path) -> None:
        """The process that wrote this record is gone, whatever its status says."""
        self._tell(close=str(Path(folder).resolve()))

    def end(self, timeout: float | None = None) -> bool:
        """Let it finish, within `timeout` seconds (default: a grace for each run that makes progress; with a server that
        does not answer, hardly longer than the pictures take). True if W&B has all that has ended; else `push` sends it."""
        self._tell(end=True)
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            most = self._grace * (1 + 2 * len(self._known)) + MARGIN_SECONDS  # it ends itself as soon as nothing goes on
            return self._process.wait(most if timeout is None else timeout) == 0
        except subprocess.TimeoutExpired:
            self._process.terminate()  # it ends its wandb-core, then itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            self._process.kill()
            self._process.wait()
            return False

    def _tell(self, **message: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # the companion may be gone, or stuck with a full pipe
            os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]


class _Followed:
    """One record in the companion process. A record may end more than once (a failed run is resumed): ends have stamps."""

    def __init__(self, folder: str) -> None:
        self.record = Record(Path(folder))
        self.mirror: Mirror | None = None
        self.closed = False  # its writer is gone
        self.drawn = 0.0  # the end that has its pictures
        self.settled = -1.0  # the end that W&B has, or would not take; 0.0: it failed on the open record
        self.lost = False  # W&B did not take it

    def end(self) -> float:
        """When the record came to an end; 0.0 while it is open, or its status cannot be read."""
        status: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, UserError):
            status = self.record.read("status")
        return float(status["time"]) if status.get("state") in END_STATES else 0.0


class Companion:
    """Two threads, so that pictures are drawn while W&B hangs: one draws, one mirrors."""

    def __init__(self, mode: Mode, say: Callable[[str], None]) -> None:
        self._mode, self._say = mode, say
        self._followed: dict[str, _Followed] = {}
        self._hearing = threading.Lock()
        self._ending = threading.Event()
        self._silent: bool | None = None  # not asked yet
        self._drawer = threading.Thread(target=self._keep_drawing, daemon=True)
        self._threads = [self._drawer]
        if mode != "disabled":
            all_drawn = lambda: not self._drawer.is_alive()  # noqa: E731
            self._threads.append(threading.Thread(target=self._keep_mirroring, args=(all_drawn,), daemon=True))
        for thread in self._threads:
            thread.start()

    def hear(self, message: dict[str, str]) -> None:
        if folder := message.get("run"):
            with self._hearing:
                each = self._followed.setdefault(folder, _Followed(folder))
                each.closed, each.settled = False, -1.0
        elif (folder := message.get("close")) and folder in self._followed:
            self._followed[folder].closed = True

    def end(self, seconds: float, orphaned: Callable[[], bool]) -> bool:
        """Finish what has ended, `seconds` from one progress to the next. True if W&B has all that has ended."""
        deadline, patience = time.monotonic() + seconds, time.monotonic() + SILENT_SECONDS
        self._ending.set()
        if self._mode == "online":
            threading.Thread(target=self._knock, daemon=True).start()  # a name server can be silent for long
        before: list[tuple[float, float]] = []
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:
            time.sleep(0.05)
            done = [(each.drawn, each.settled) for each in list(self._followed.values())]
            if orphaned():
                deadline = min(deadline, time.monotonic() + ORPHAN_SECONDS)
            elif done != before:
                before, deadline = done, time.monotonic() + seconds
            silent = self._silent or (self._silent is None and time.monotonic() > patience)
            if silent and not self._drawer.is_alive() and self._needs_server():
                self._say("W&B does not answer; the records have everything, and `python -m cifar push` sends it")
                return False
        late = any(thread.is_alive() for thread in self._threads)
        if late:
            self._say("the pictures or W&B took too long; the records have everything, and `python -m cifar push` sends it")
        return not late and not any(each.lost for each in self._followed.values())

    def _knock(self) -> None:
        """Does the server say anything? wandb's own calls do not tell: they try again for minutes."""
        from cifar.integrations.wandb.mirror import answers

        self._silent = not (answers(KNOCK_SECONDS) or answers(KNOCK_SECONDS))

    def _needs_server(self) -> bool:
        """Whether a run that is not with W&B yet still goes there, and not into a file."""
        if self._mode != "online":
            return False
        return any(each.mirror is None or each.mirror.mode == "online" for each in list(self._followed.values()))

    def _keep_drawing(self) -> None:
        last = False
        while not last:
            last = self._ending.is_set()
            while waiting := [(each, end) for each in list(self._followed.values()) if (end := each.end()) != each.drawn]:
                if not self._draw_many(waiting):
                    self._draw(*waiting[0])  # and look again: more may have ended meanwhile
            self._rest()

    def _keep_mirroring(self, is_last: Callable[[], bool]) -> None:
        last = False
        while not last:
            last = is_last()
            for each in list(self._followed.values()):
                self._mirror(each, last)
            self._rest()

    def _rest(self) -> None:
        self._ending.wait(POLL_SECONDS)
        if self._ending.is_set():
            time.sleep(0.02)

    def _draw(self, each: _Followed, end: float) -> None:
        try:
            if end:
                from cifar.report import pictures

                pictures(each.record.path)
        except Exception as error:
            self._say(f"{each.record.id}: no pictures ({type(error).__name__}: {error})")
        each.drawn = end

    def _draw_many(self, waiting: list[tuple[_Followed, float]]) -> bool:
        """Where many runs have ended at once, and cores are left beside the training's, draw in processes of their own.

        False where that does not pay, or none of them could be drawn.
        """
        ended = [(each, end) for each, end in waiting if end]
        count = min(len(ended) // 2, DRAWERS, cores() // 2 - 1)
        if count < 2:
            return False
        ended = ended[: 3 * count]  # each is done in seconds: `end` waits from one progress to the next
        try:
            for first in range(count):
                folders = [str(each.record.path) for each, _ in ended[first::count]]
                command = [sys.executable, "-m", "cifar.sidecar", "--draw", str(os.getpid()), *folders]
                quiet = subprocess.DEVNULL  # what goes wrong is tried again here, and said
                _drawers.append(subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet))
            done = [drawer.wait() == 0 for drawer in _drawers]
        except OSError:  # no more processes
            for drawer in _drawers:
                drawer.kill()
                drawer.wait()
            return False
        finally:
            _drawers.clear()
        for number, (each, end) in enumerate(ended):
            if done[number % count]:
                each.drawn = end
        return any(done)

    def _mirror(self, each: _Followed, last: bool) -> None:
        end = each.end()
        if end == each.settled:
            return
        try:
            from cifar.integrations.wandb.mirror import Mirror

            each.mirror = each.mirror or Mirror(each.record, self._mode, self._say)
            each.mirror.sync()
            if end and end == each.drawn:
                if each.mirror.finish(sorted((each.record.path / "pictures").glob("*.png"))):
                    each.settled, each.lost = end, each.mirror.mode != self._mode  # written to a file in its stead
            elif each.closed or last:
                each.mirror.leave()
                with self._hearing:  # while that took its time, the run may have gone on
                    if not end and (last or each.closed):
                        self._followed.pop(str(each.record.path), None)
        except Exception as error:
            self._say(f"{each.record.id}: not mirrored to W&B ({type(error).__name__}: {error}); its record is whole")
            each.settled, each.lost = end, True
            with contextlib.suppress(Exception):
                each.mirror, broken = None, each.mirror
                if broken:
                    broken.leave()


def main(arguments: list[str] | None = None) -> int:
    """Follow until told to end, or until the parent is gone. Exits by itself, with 0 if W&B has all that has ended."""
    parser = argparse.ArgumentParser(prog="python -m cifar.sidecar", description=__doc__)
    parser.add_argument("--wandb", default="auto", help="auto, online, offline or disabled")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds for each thing that is left to do at the end")
    parser.add_argument("--draw", nargs="+", default=[], help=argparse.SUPPRESS)  # the companion's pid, and folders
    options = parser.parse_args(arguments)
    if options.draw:
        return _draw_all(int(options.draw[0]), options.draw[1:])
    from cifar.integrations.wandb.settings import mode_from_environment

    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a batch system may warn every process
    signal.signal(signal.SIGTERM, lambda *_: _leave(143))
    os.nice(5)  # training comes first
    companion = Companion(mode_from_environment(options.wandb), lambda line: print(redact(line), flush=True))

    def orphaned() -> bool:
        return os.getppid() != parent

    told = _listen(companion, orphaned)
    whole = companion.end(options.grace if told else ORPHAN_SECONDS, orphaned)
    _leave(0 if whole else 3)
    return 0


def _draw_all(companion: int, folders: list[str]) -> int:
    """The pictures of these runs, as long as the companion lives that asked for them."""
    from cifar.report import pictures

    for folder in folders:
        if os.getppid() != companion:
            return 1
        pictures(Path(folder))
    return 0


def _listen(companion: Companion, orphaned: Callable[[], bool]) -> bool:
    """Hand on what the parent says. True at its {"end": true}, False when it is gone.

    The end of the input says so too, but a process that the parent forked may hold the pipe open.
    """
    heard = b""
    while not orphaned():
        if not select.select([0], [], [], POLL_SECONDS)[0]:
            continue
        piece = os.read(0, 65536)
        if not piece:
            break
        *lines, heard = (heard + piece).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.get("end"):
                return True
            companion.hear(message)
    return False


def _leave(code: int) -> None:
    """End this process now, wandb-core and what draws first; no exit hook may wait for a server."""
    for drawer in list(_drawers):
        drawer.kill()
    if mirror := sys.modules.get("cifar.integrations.wandb.mirror"):
        mirror.kill_core()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
