"""A worker process: trains the trials that its supervisor sends, one after the other or side by side, and says how they go.

    python -m cifar.agent.worker        # started by cifar/agent.py

JSON lines in:  {"environment": {...}, "log": FILE}, first, if it was started early   {"trials": [{...}]}
                {"run_id", "stop": "interrupted", "when": "epoch" | "step"}   {"run_id", "go": true}
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
    from cifar.config.resolve import Settings
    from cifar.tracking.run_dir import Record
    from cifar.training.callbacks import Sink
    from cifar.training.loop import Running

PROGRESS_SECONDS = 0.5
MACHINE = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE)  # not the trial's


class Worker:
    """The two pipes to the supervisor, and the trials in hand."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what a plug-in prints goes to the log, not between our lines
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.trials: dict[str, dict[str, Any]] = {}  # by run, until they have ended
        self.settings: Settings | None = None
        self.stops: dict[str, tuple[str, str]] = {}  # run -> (state it is asked to end in, "step" | "epoch"); may come early
        self.step = self.steps = 0  # of the epoch; no step taken yet
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a batch system may tell every process
            signal.signal(number, lambda *_: self.stops.update(dict.fromkeys([*self.trials], ("preempted", "step"))))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "log" in message:
                self._taken(message)
            elif "stop" in message:
                begun = self.step and message["run_id"] in self.trials  # else there is no epoch to finish
                self.stops[message["run_id"]] = message["stop"], message.get("when", "step") if begun else "step"
            else:
                self.inbox.put(message)
        os._exit(3)

    def _taken(self, message: dict[str, Any]) -> None:
        """A process that was started early has got its place. PyTorch asks for its GPUs at the first use of one."""
        os.environ.update(message["environment"])
        try:
            log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError:
            os._exit(1)  # the supervisor sees to it
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)

    def say(self, event: str, run_id: str, **content: Any) -> None:
        self.out.write(json.dumps({"event": event, "run_id": run_id, **content}) + "\n")

    def work(self) -> None:
        """Trials until the supervisor goes away, or one fails: after that a fresh process is the safe one."""
        import cifar.training.run  # noqa: F401 (seconds of imports, while the first trial is being claimed)
        from cifar.system.devices import any_gpu

        if any_gpu():
            import torch._dynamo  # noqa: F401 (a compiler is for GPUs; 1.3 s)

        while True:
            self.trials, self.step = {trial["run_id"]: trial for trial in self.inbox.get()["trials"]}, 0
            together = len(self.trials)
            try:
                self._train()
            except Exception as error:
                with contextlib.suppress(OSError):  # the log may be on the full disk
                    traceback.print_exc()
                for run_id, trial in self.trials.items():
                    self.say("ended", run_id, **self._failure(trial, error, together))
                return

    def ended(self, run_id: str) -> None:
        """A run's record says how it ended."""
        from cifar.tracking.run_dir import Record

        trial = self.trials.pop(run_id)
        self.stops.pop(run_id, None)
        self.say("ended", run_id, **Record(Path(trial["runs"]) / run_id).outcome(trial["metric"], trial["objectives"]))

    def _failure(self, trial: dict[str, Any], error: Exception, together: int) -> dict[str, Any]:
        from cifar.errors import UserError
        from cifar.system.disk import is_full
        from cifar.training.run import out_of_memory

        if is_full(error):
            return {"state": "interrupted", "reason": "no space left on the disk", "full": True}
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in MACHINE):
            return {"state": "interrupted", "reason": str(error), "halt": True}  # every value was checked before
        whole = Path(trial["runs"]) / trial["run_id"] / "traceback.txt"
        memory = out_of_memory(error, self.settings) if self.settings else ""
        cause = "memory" if memory else "device" if str(error).startswith("CUDA error") else ""
        if together > 1:  # which of them is at fault shows when each is alone
            why = memory or f"{type(error).__name__}: {error}"
            return {"state": "interrupted", "reason": f"side by side with {together - 1} others: {why}", "apart": together}
        return {
            "state": "killed" if memory else "failed",
            "reason": memory or f"{type(error).__name__}: {error}",
            "cause": cause,
            "whole": str(whole) if whole.exists() else "",
        }

    def _train(self) -> None:
        from cifar.tracking.run_dir import DONE_STATES, Record
        from cifar.training import run

        trials = list(self.trials.values())
        live = []
        for trial in trials:
            if Record(Path(trial["runs"]) / trial["run_id"]).read("status").get("state", "") in DONE_STATES:
                self._started(Record(Path(trial["runs"]) / trial["run_id"]), trial)
                self.ended(trial["run_id"])
            else:
                live.append(self._running(trial))
        data_dir = Path(trials[0]["data_dir"]) if trials[0]["data_dir"] else None
        begun = [one for one in live if (one.record.path / "checkpoint.pt").exists()]  # each somewhere else in its epochs
        fresh = [one for one in live if one not in begun]
        for together in ([fresh] if fresh else []) + [[one] for one in begun]:
            if asked := self.stops.get(together[0].record.id):  # before it was begun here: it stays as it is
                for one in together:
                    self.trials.pop(one.record.id)
                    self.say("ended", one.record.id, state=asked[0], reason="asked to end before it went on")
                continue
            run.train_together(together, data_dir=data_dir, ahead=trials[0]["ahead"])

    def _running(self, trial: dict[str, Any]) -> Running:
        """A run that is about to be trained, with what it tells and asks."""
        from cifar.config import resolve as config
        from cifar.sweeps.early_stopping import Hyperband
        from cifar.training import run
        from cifar.training.loop import Running

        settings = self.settings = config.resolve(trial["values"])
        swept = [key for key in trial["swept"] if key in config.flatten(trial["values"])]
        place = {"sweep": trial["sweep"], "cell": trial["cell"], **trial["place"]}
        record = run.create(settings, Path(trial["runs"]), run_id=trial["run_id"], swept=swept, **place)
        self._started(record, trial)
        rungs = Hyperband(**trial["early"]).rungs(settings.epochs) if trial["early"] else []
        return Running(
            settings,
            record,
            sinks=[_progress(self, trial["run_id"])],
            on_epoch=self._judge(record, trial["metric"], rungs),
            stop=lambda: self._stop(trial["run_id"]),
        )

    def _started(self, record: Record, trial: dict[str, Any]) -> None:
        macs, epochs = record.read("run")["cost"]["macs"], record.read("config")["epochs"]
        self.say("started", record.id, folder=str(record.path), epochs=epochs, macs=macs, pid=os.getpid())

    def _stop(self, run_id: str) -> str | None:
        """The state to end in, asked after each step."""
        if not self.stops:
            return None
        state, when = self.stops.get(run_id, (None, "step"))
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
            self.say(
                "epoch", record.id, epoch=row["epoch"], value=row.get(metric), images_per_second=speed, ask=ask if new else None
            )
            return self._answer(record.id) if new else True

        return on_epoch

    def _answer(self, run_id: str) -> bool:
        """The supervisor's word on a run at its rung. Nothing else comes while trials are in hand."""
        answer = self.inbox.get()
        assert answer["run_id"] == run_id, answer
        return bool(answer["go"])


def _progress(worker: Worker, run_id: str) -> Sink:
    from cifar.training import callbacks as track

    class Progress(track.Sink):
        def start(self, run: Any, *, epochs: int, steps: int) -> None:
            self.steps, self.told = epochs * steps, 0.0
            worker.steps = steps

        def step(self, epoch: int, step: int) -> None:
            worker.step = step
            if time.monotonic() - self.told > PROGRESS_SECONDS:
                self.told = time.monotonic()
                worker.say("progress", run_id, fraction=((epoch - 1) * worker.steps + step) / self.steps)

        def end(self, state: str, reason: str, summary: Any) -> None:
            worker.ended(run_id)

    return Progress()


if __name__ == "__main__":
    Worker().work()
