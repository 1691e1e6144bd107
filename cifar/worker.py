"""A worker process: trains the trials that its supervisor sends, one after the other, and says how they go.

    python -m cifar.worker        # started by cifar/agent.py

JSON lines in:  {"trial": {...}}   {"run_id", "stop": "interrupted", "when": "epoch" | "step"}   {"go": true}
JSON lines out: {"event": "started" | "progress" | "epoch" | "ended", "run_id", ...}
The end of standard input means that the supervisor is gone: the worker ends at once, wherever it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar.config import Settings
    from cifar.record import Record
    from cifar.track import Sink

PROGRESS_SECONDS = 0.5
MACHINE = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE)  # not the trial's
DONE = ("finished", "diverged", "pruned", "skipped")  # only the news of it did not get through


class Worker:
    """The two pipes to the supervisor, and the trial in hand."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what a plug-in prints goes to the log, not between our lines
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.run_id = ""
        self.settings: Settings | None = None
        self.stops: dict[str, tuple[str, str]] = {}  # run -> (state it is asked to end in, "step" | "epoch"); may come early
        self.step = self.steps = 0  # of the epoch; no step taken yet
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a batch system may tell every process
            signal.signal(number, lambda *_: self.stops.update({self.run_id: ("preempted", "step")}))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "stop" in message:
                begun = self.step and message["run_id"] == self.run_id  # else there is no epoch to finish
                self.stops[message["run_id"]] = message["stop"], message.get("when", "step") if begun else "step"
            else:
                self.inbox.put(message)
        os._exit(3)

    def say(self, event: str, **content: Any) -> None:
        self.out.write(json.dumps({"event": event, "run_id": self.run_id, **content}) + "\n")

    def work(self) -> None:
        """Trials until the supervisor goes away, or one fails: after that a fresh process is the safe one."""
        import cifar.run  # noqa: F401 (seconds of imports, while the first trial is being claimed)

        while True:
            trial = self.inbox.get()["trial"]
            self.run_id, self.step = trial["run_id"], 0
            try:
                ended = self._train(trial)
                self.stops.pop(self.run_id, None)
                self.say("ended", **ended)
            except Exception as error:
                with contextlib.suppress(OSError):  # the log may be on the full disk
                    traceback.print_exc()
                self.say("ended", **self._failure(trial, error))
                return

    def _failure(self, trial: dict[str, Any], error: Exception) -> dict[str, Any]:
        from cifar.errors import UserError
        from cifar.run import out_of_memory
        from cifar.space import is_full

        if is_full(error):
            return {"state": "interrupted", "reason": "no space left on the disk", "full": True}
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in MACHINE):
            return {"state": "interrupted", "reason": str(error), "halt": True}  # every value was checked before
        whole = Path(trial["runs"]) / trial["run_id"] / "traceback.txt"
        memory = out_of_memory(error, self.settings) if self.settings else ""
        cause = "memory" if memory else "device" if str(error).startswith("CUDA error") else ""
        return {
            "state": "killed" if memory else "failed",
            "reason": memory or f"{type(error).__name__}: {error}",
            "cause": cause,
            "whole": str(whole) if whole.exists() else "",
        }

    def _train(self, trial: dict[str, Any]) -> dict[str, Any]:
        from cifar import config, run
        from cifar.hyperband import Hyperband
        from cifar.record import Record

        settings = self.settings = config.resolve(trial["values"])
        runs, metric = Path(trial["runs"]), trial["metric"]
        record = Record(runs / self.run_id)
        state = record.read("status").get("state", "")
        if state not in DONE:
            swept = [key for key in trial["swept"] if key in config.flatten(trial["values"])]
            place = {"sweep": trial["sweep"], "cell": trial["cell"], **trial["place"]}
            record = run.create(settings, runs, run_id=self.run_id, swept=swept, **place)
        macs = record.read("run")["cost"]["macs"]
        self.say("started", folder=str(record.path), epochs=settings.epochs, macs=macs, pid=os.getpid())
        if state not in DONE:
            rungs = Hyperband(**trial["early"]).rungs(settings.epochs) if trial["early"] else []
            run.train(
                settings,
                record,
                data_dir=Path(trial["data_dir"]) if trial["data_dir"] else None,
                sinks=[_progress(self)],
                on_epoch=self._judge(record, metric, rungs),
                stop=self._stop,
            )
        rows = list(record.rows())
        known = {**record.read("run")["cost"], **(rows[-1] if rows else {}), **record.read("summary")}
        status = record.read("status")
        objectives = [known.get(name) for name in trial["objectives"]]
        ended = {"state": status["state"], "value": known.get(metric), "reason": status.get("reason", "")}
        return {**ended, "objectives": objectives}

    def _stop(self) -> str | None:
        """The state to end in, asked after each step."""
        state, when = self.stops.get(self.run_id, (None, "step"))
        return state if when == "step" or self.step == self.steps else None

    def _judge(self, record: Record, metric: str, rungs: list[int]) -> Callable[[dict[str, Any]], bool]:
        """Tells of each epoch; at a rung, or where a run goes on behind one, the supervisor decides whether it goes on."""
        judged: list[int] = []

        def on_epoch(row: dict[str, Any]) -> bool:
            values = {r["epoch"]: r[metric] for r in record.rows() if metric in r} if rungs else {}
            passed = [rung for rung in rungs if rung in values]
            ask = {"history": {rung: values[rung] for rung in passed}, "values": list(values.values())}
            speed = row["system/images_per_second"]
            new, judged[:] = passed != judged, passed
            self.say("epoch", epoch=row["epoch"], value=row.get(metric), images_per_second=speed, ask=ask if new else None)
            return bool(self.inbox.get()["go"]) if new else True

        return on_epoch


def _progress(worker: Worker) -> Sink:
    from cifar import track

    class Progress(track.Sink):
        def start(self, run: Any, *, epochs: int, steps: int) -> None:
            self.steps, self.told = epochs * steps, 0.0
            worker.steps = steps

        def step(self, epoch: int, step: int) -> None:
            worker.step = step
            if time.monotonic() - self.told > PROGRESS_SECONDS:
                self.told = time.monotonic()
                worker.say("progress", fraction=((epoch - 1) * worker.steps + step) / self.steps)

    return Progress()


if __name__ == "__main__":
    Worker().work()
