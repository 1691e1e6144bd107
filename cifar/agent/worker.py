"""A worker process: trains the trials that the agent sends, one after the other or side by side, and reports their progress.

    python -m cifar.agent.worker        # started by cifar/agent/worker_process.py

JSON lines in:  {"environment": {...}}, first, if it was started early   {"trials": [{...}]}
                {"run_id", "stop": "interrupted", "when": "epoch" | "step"}   {"run_id", "go": true}   {"printed": [LINE]}
JSON lines out: {"event": "started" | "progress" | "epoch" | "ended", "run_id", ...}
The end of standard input means that the agent is gone: the worker ends at once, whatever it is doing.
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

from cifar.system.redact import redact
from cifar.system.redacted_streams import frame_output, install_redacted_output
from cifar.system.user_code import pass_interrupt

if TYPE_CHECKING:
    from cifar.config.schema import Settings
    from cifar.system.ownership import OwnershipError
    from cifar.tracking.run_dir import RunDir
    from cifar.training.callbacks import RunCallback
    from cifar.training.loop import RunLoop

PROGRESS_SECONDS = 0.5  # between two progress events
# Errors of the machine and not of the trial: the agent starts no more trials.
MACHINE_ERRNOS = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EAGAIN)


class Worker:
    """The two pipes to the agent, and the trials that are being trained."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what a plug-in prints goes to the log, not between our lines
        install_redacted_output()
        frame_output()
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.trials: dict[str, dict[str, Any]] = {}  # by run id, until they have ended
        self.settings: Settings | None = None
        # run id -> (state to end in, "step" | "epoch"); a request may come before its run is started
        self.stop_requests: dict[str, tuple[str, str]] = {}
        self.step_index = self.steps_per_epoch = 0  # in the epoch; 0: no step is done yet
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent handles Ctrl-C
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a batch system may send these to every process
            signal.signal(number, lambda *_: self.stop_requests.update(dict.fromkeys([*self.trials], ("preempted", "step"))))
        threading.Thread(target=self._read_messages, daemon=True).start()

    def _read_messages(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "environment" in message:
                os.environ.update(message["environment"])  # started early; PyTorch reads the GPU variables at first use
            elif "printed" in message:  # past Python, which the agent finds in the log
                if console := sys.modules.get("cifar.training.console"):  # else no run has begun
                    console.write_foreign_output(message["printed"])
            elif "stop" in message:
                has_begun = self.step_index and message["run_id"] in self.trials  # else there is no epoch to finish
                when = message.get("when", "step") if has_begun else "step"
                self.stop_requests[message["run_id"]] = message["stop"], when
            else:
                self.inbox.put(message)
        os._exit(3)

    def send_event(self, event: str, run_id: str, **content: Any) -> None:
        if "reason" in content:
            content["reason"] = redact(content["reason"])
        self._out.write(json.dumps({"event": event, "run_id": run_id, **content}) + "\n")

    def train_until_closed(self) -> None:
        """Train trials until the agent goes away or a trial fails. After a failure only a new process is safe."""
        import cifar.training.run  # noqa: F401 (takes seconds, while the agent claims the first trial)
        from cifar.system.devices import has_gpu

        if has_gpu():
            import torch._dynamo  # noqa: F401 (1.3 s; compiled code is for GPUs)

        while True:
            self.trials, self.step_index = {trial["run_id"]: trial for trial in self.inbox.get()["trials"]}, 0
            pack_size = len(self.trials)
            try:
                self._train_trials()
            except BaseException as error:
                pass_interrupt(error)
                with contextlib.suppress(OSError):  # the log may be on the full disk
                    traceback.print_exc()
                for run_id, trial in self.trials.items():
                    self.send_event("ended", run_id, **self._describe_failure(trial, error, pack_size))
                return

    def send_ended(self, run_id: str) -> None:
        """Report the end of a run as it stands in its folder."""
        from cifar.tracking.run_dir import RunDir

        trial = self.trials.pop(run_id)
        self.stop_requests.pop(run_id, None)
        outcome = RunDir(Path(trial["runs"]) / run_id).read_outcome(trial["metric"], trial["objectives"])
        self.send_event("ended", run_id, **outcome)

    def _describe_failure(self, trial: dict[str, Any], error: BaseException, pack_size: int) -> dict[str, Any]:
        """The content of the event "ended" of a trial whose training has raised an error."""
        from cifar.errors import DeviceError, PartError, UserError, is_out_of_threads
        from cifar.states import pack_failure_reason
        from cifar.system.disk import is_caused_by_full_disk
        from cifar.system.ownership import OwnershipError
        from cifar.system.user_code import describe_failure, read_error_text
        from cifar.training.run import describe_out_of_memory, is_gpu_taken

        if is_caused_by_full_disk(error):
            return {"state": "interrupted", "reason": "no space left on the disk", "full": True}
        if isinstance(error, OwnershipError):
            return _describe_ownership(trial, error)
        if isinstance(error, DeviceError):  # another GPU of the agent may train the trial
            return {"state": "interrupted", "reason": str(error), "cause": "device", "halt": True}
        is_of_machine = is_out_of_threads(error) or (isinstance(error, OSError) and error.errno in MACHINE_ERRNOS)
        if is_of_machine or (isinstance(error, UserError) and not isinstance(error, PartError)):
            # Every value was checked before, so it is the machine that is at fault: the agent starts no more trials ("halt").
            return {"state": "interrupted", "reason": str(error), "halt": True}
        traceback_path = Path(trial["runs"]) / trial["run_id"] / "traceback.txt"
        memory = describe_out_of_memory(error, self.settings) if self.settings else ""
        cause = "memory" if memory else "device" if read_error_text(error).startswith("CUDA error") else ""
        reason = memory or (str(error) if isinstance(error, PartError) else describe_failure(error))
        about = {"cause": cause, "taken": is_gpu_taken(error)}
        if pack_size > 1:  # which of them is at fault shows when each is trained alone
            return {"state": "interrupted", "reason": pack_failure_reason(reason, pack_size), "apart": pack_size, **about}
        return {
            "state": "killed" if memory else "failed",
            "reason": reason,
            **about,
            "whole": str(traceback_path) if traceback_path.exists() else "",
        }

    def _train_trials(self) -> None:
        from cifar.states import CONCLUSIVE_STATES
        from cifar.tracking.run_dir import RunDir
        from cifar.training import run

        trials = list(self.trials.values())
        to_train = []
        for trial in trials:
            run_dir = RunDir(Path(trial["runs"]) / trial["run_id"])
            if damage := _find_damage(run_dir):  # of its folder, which other trials have nothing to do with
                self.trials.pop(trial["run_id"])
                self.send_event("ended", trial["run_id"], state="failed", reason=damage)
            elif run_dir.read_json("status").get("state", "") in CONCLUSIVE_STATES:
                self._send_started(run_dir, trial)
                self.send_ended(trial["run_id"])
            else:
                to_train.append(self._prepare_run(trial))
        data_dir = Path(trials[0]["data_dir"]) if trials[0]["data_dir"] else None
        resumed = [loop for loop in to_train if (loop.run_dir.path / "checkpoint.pt").exists()]
        fresh = [loop for loop in to_train if loop not in resumed]
        # resumed runs are trained alone, since each is at another epoch
        for group in ([fresh] if fresh else []) + [[loop] for loop in resumed]:
            if request := self.stop_requests.get(group[0].run_dir.id):  # before it was started here: nothing changes on disk
                for loop in group:
                    self.trials.pop(loop.run_dir.id)
                    self.send_event("ended", loop.run_dir.id, state=request[0], reason="asked to end before it went on")
                continue
            run.train_runs(group, data_dir=data_dir, num_planned_runs=trials[0]["ahead"])

    def _prepare_run(self, trial: dict[str, Any]) -> RunLoop:
        """Make the run's folder if it is not there, and the run with its callbacks."""
        from cifar.config.resolve import flatten_values, resolve_config
        from cifar.errors import PartError
        from cifar.sweeps.early_stopping import Hyperband
        from cifar.training import run
        from cifar.training.loop import RunHooks, RunLoop

        settings = self.settings = resolve_config(trial["values"])
        if trial["gpu"]:
            _require_gpu(settings)
        swept = [key for key in trial["swept"] if key in flatten_values(trial["values"])]
        metadata = run.RunMetadata(
            run_id=trial["run_id"],
            swept=swept,
            sweep_keys=trial["swept"],
            sweep=trial["sweep"],
            cell=trial["cell"],
            description=trial["description"],
            **trial["place"],
        )
        try:
            run_dir = run.create_run(settings, Path(trial["runs"]), metadata, find_run=_find_run)
        except PartError as error:
            if len(self.trials) == 1:  # those of a pack are tried again, each alone
                self._send_started(run.record_refused_run(settings, Path(trial["runs"]), metadata, str(error)), trial)
            raise
        self._send_started(run_dir, trial)
        rungs = Hyperband(**trial["early"]).rung_epochs(settings.epochs) if trial["early"] else []
        hooks = RunHooks(
            callbacks=[_make_progress_callback(self, trial["run_id"])],
            should_continue=self._make_epoch_callback(run_dir, trial["metric"], rungs),
            poll_stop=lambda: self._requested_state(trial["run_id"]),
        )
        return RunLoop(settings, run_dir, hooks)

    def _send_started(self, run_dir: RunDir, trial: dict[str, Any]) -> None:
        macs, epochs = run_dir.read_json("run")["cost"]["macs"], run_dir.read_json("config")["epochs"]
        self.send_event("started", run_dir.id, folder=str(run_dir.path), epochs=epochs, macs=macs, pid=os.getpid())

    def _requested_state(self, run_id: str) -> str | None:
        """The state that a run is asked to end in, or None. Called after each step."""
        if not self.stop_requests:
            return None
        state, when = self.stop_requests.get(run_id, (None, "step"))
        return state if when == "step" or self.step_index == self.steps_per_epoch else None

    def _make_epoch_callback(self, run_dir: RunDir, metric: str, rung_epochs: list[int]) -> Callable[[dict[str, Any]], bool]:
        """A callback that reports each epoch -> whether the run goes on.

        The agent decides that at a rung, and at the first epoch here of a run that was resumed after one.
        """
        judged: list[int] = []

        def on_epoch(row: dict[str, Any]) -> bool:
            values = {r["epoch"]: r[metric] for r in run_dir.read_rows() if metric in r} if rung_epochs else {}
            passed = [rung for rung in rung_epochs if rung in values]
            ask = {"history": {rung: values[rung] for rung in passed}, "values": list(values.values())}
            speed = row["system/images_per_second"]
            is_new, judged[:] = passed != judged, passed
            content = {"epoch": row["epoch"], "value": row.get(metric), "images_per_second": speed}
            self.send_event("epoch", run_dir.id, **content, ask=ask if is_new else None)
            return self._wait_for_decision(run_dir.id) if is_new else True

        return on_epoch

    def _wait_for_decision(self, run_id: str) -> bool:
        """The agent's answer for a run at a rung. Nothing else is in the inbox while trials are being trained."""
        answer = self.inbox.get()
        assert answer["run_id"] == run_id, answer
        return bool(answer["go"])


def _find_run(name: str, runs_dir: Path) -> RunDir:
    """A run that a trial names as its teacher. The import is for those alone."""
    from cifar.integrations.wandb.artifact_download import find_run

    return find_run(name, runs_dir)


def _describe_ownership(trial: dict[str, Any], error: OwnershipError) -> dict[str, Any]:
    """The content of the event "ended" of a trial whose run, or one beside it, is another process's or was deleted."""
    from cifar.system.ownership import OwnershipLostError

    is_its_own = error.folder.name == trial["run_id"]
    if is_its_own and isinstance(error, OwnershipLostError) and error.is_removed:
        return {"state": "failed", "reason": str(error), "cause": "", "whole": ""}
    if isinstance(error, OwnershipLostError) and not is_its_own:
        return {"state": "interrupted", "reason": f"side by side with {error.folder.name}, which was lost"}
    return {"state": "interrupted", "reason": str(error), "held": True}  # held: the trial waits until its run is free


def _require_gpu(settings: Settings) -> None:
    """Raise DeviceError if the GPU that the agent chose cannot be used: the trial must not be trained on the CPU instead."""
    from cifar.errors import DeviceError
    from cifar.training.trainer import resolve_device

    if settings.device == "auto" and resolve_device("auto").type == "cpu":
        raise DeviceError("PyTorch cannot use this GPU; see what nvidia-smi says of it")


def _find_damage(run_dir: RunDir) -> str:
    """What is wrong with the folder of a run that was begun before; "" if nothing is, or if there is none."""
    from cifar.errors import UserError

    try:
        if (run_dir.path / "run.json").exists():
            run_dir.check_resumable()
    except UserError as error:
        return str(error)
    return ""


def _make_progress_callback(worker: Worker, run_id: str) -> RunCallback:
    from cifar.training.callbacks import RunCallback

    class ProgressCallback(RunCallback):
        def on_run_start(self, run: Any, *, epochs: int, steps: int) -> None:
            self.num_steps, self.last_sent = epochs * steps, 0.0
            worker.steps_per_epoch = steps

        def on_step_end(self, epoch: int, step: int) -> None:
            worker.step_index = step
            if time.monotonic() - self.last_sent > PROGRESS_SECONDS:
                self.last_sent = time.monotonic()
                worker.send_event("progress", run_id, fraction=((epoch - 1) * worker.steps_per_epoch + step) / self.num_steps)

        def on_run_end(self, state: str, reason: str, summary: Any) -> None:
            worker.send_ended(run_id)

    return ProgressCallback()


if __name__ == "__main__":
    Worker().train_until_closed()
