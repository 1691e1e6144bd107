"""Runs W&B's sweep scheduler as a process beside the agent. In a `method: custom` sweep W&B itself suggests no trials.

    python -m cifar.integrations.wandb.scheduler ENTITY PROJECT ID LOCK RUNS_AHEAD RUN_CAP

It runs the same code as `wandb sweep-scheduler`, plus `OptimizerProxy`. A sweep can have one scheduler only: two would share no
state and create runs twice. So it runs where the sweep was created, started by one agent at a time, which holds a lock in the
sweep's folder. When that agent ends, the next one takes over. The process ends when its standard input ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifar.errors import UserError
from cifar.states import WORST_RESULT_STATES
from cifar.system.redact import redact
from cifar.system.redacted_streams import finish_output, install_redacted_output

POLL_SECONDS = 5.0  # how often it asks for the sweep's runs; W&B's default is 10
RETRY_SECONDS = 10.0  # after a failure, before it is started again
MAX_TRIES = 3
ORPHAN_GRACE_SECONDS = 2.0  # to finish its current step when the agent is gone
FINAL_WAIT_SECONDS = 15.0  # how long the agent waits at the end of a sweep, so that the scheduler can tell W&B


class SchedulerProcess:
    """The process as the agent sees it. `failure` says why it was given up; "" while it works."""

    def __init__(self, target: Mapping[str, str], sweep_id: str, folder: Path, *, runs_ahead: int, run_cap: int | None) -> None:
        arguments = (
            target["entity"],
            target["project"],
            sweep_id,
            str(folder / "scheduler.lock"),
            str(runs_ahead),
            str(run_cap or 0),
        )
        self._command = [sys.executable, "-m", "cifar.integrations.wandb.scheduler", *arguments]
        self._log = folder / "logs" / f"scheduler-{os.getpid()}.log"
        self._num_tries, self._ended_at, self.failure = 0, 0.0, ""
        self._start()

    def _start(self) -> None:
        package_root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("CIFAR_STORAGE", "WANDB_SERVICE", "WANDB_SILENT")
        }
        self._num_tries, self._ended_at = self._num_tries + 1, 0.0
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**environment, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C must reach the agent only
            )  # fmt: skip

    def poll(self) -> str:
        """A message for the user, or "". Starts the process again if it has failed."""
        code = self._process.poll()
        if not code or self.failure:
            return ""
        if self._ended_at:
            if time.monotonic() - self._ended_at > RETRY_SECONDS:
                self._start()
            return ""
        self._ended_at = time.monotonic()
        self._close_stdin()
        reason = (self._log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
        message = f"W&B's sweep scheduler has ended: {redact(reason)[:300]}"
        if self._num_tries < MAX_TRIES:
            return f"{message}; trying again"
        self.failure = f"{message} (the whole log is {self._log}); correct that and run the agent again"
        return self.failure

    def close(self, *, is_sweep_over: bool) -> None:
        """Let it end. If the sweep is over, the scheduler has to tell W&B first.

        An empty log means that it waits for the lock, because another agent's scheduler works.
        """
        if is_sweep_over and self._log.stat().st_size:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(FINAL_WAIT_SECONDS)
        self._close_stdin()

    def _close_stdin(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]


class OptimizerProxy:
    """Wraps W&B's optimizer and corrects two things.

    W&B's optimizer counts only finished runs towards `run_cap`. And a skipped run is a failure for it, from which its search
    learns nothing: TPE suggests too expensive networks again and again, without end (LOG.md). Here every run counts, and a bad
    run gets the worst value of all runs in each objective, as in a sweep without W&B.
    """

    def __init__(self, optimizer: Any, run_cap: int) -> None:
        self._optimizer, self._run_cap = optimizer, run_cap
        self._num_made = self._num_ended = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def ask_n_runs(self, n: int) -> Sequence[Any] | None:
        n = min(n, self._run_cap - self._num_made) if self._run_cap else n
        found: Sequence[Any] | None = self._optimizer.ask_n_runs(n) if n > 0 else []
        self._num_made += len(found or ())
        return found

    def should_terminate_sweep(self) -> bool:
        return bool(self._run_cap and self._num_ended >= self._run_cap) or bool(self._optimizer.should_terminate_sweep())

    def forget_run(self, run_id: Any) -> None:
        self._num_made -= 1
        self._optimizer.forget_run(run_id)

    def tell_existing_active_run(self, data: Any) -> Any:
        self._num_made += 1
        return self._optimizer.tell_existing_active_run(data)

    def tell_existing_finished_run(self, data: Any) -> None:
        self._num_made += 1
        self._num_ended += 1
        self._optimizer.tell_existing_finished_run(self._with_worst_values(data))

    def tell_run(self, run_id: Any, data: Any) -> None:
        self._num_ended += not data.state.is_alive  # W&B tells the end of a run once
        self._optimizer.tell_run(run_id, self._with_worst_values(data))

    def _with_worst_values(self, data: Any) -> Any:
        """The run with the worst values so far if its result is bad (diverged, pruned, skipped); else unchanged."""
        study = getattr(self._optimizer, "study", None)  # Optuna's; Ax has none
        if study is None or data.state.is_alive or data.summary_metrics.get("state") not in WORST_RESULT_STATES:
            return data
        finished = [trial.values for trial in study.trials if trial.state.name == "COMPLETE"]
        names, goals = self._optimizer.metric_names(), self._optimizer.metric_goals()
        worst = {
            name: min(column) if goal == "maximize" else max(column)
            for name, goal, column in zip(names, goals, zip(*finished, strict=True), strict=False)
        }
        ended = type(data.state).FINISHED if worst else data.state
        return replace(data, state=ended, summary_metrics={**data.summary_metrics, **worst})


def main(entity: str, project: str, sweep_id: str, lock: str, runs_ahead: str, run_cap: str) -> int:
    """Suggest runs until the sweep or the agent ends."""
    from filelock import FileLock

    from cifar.integrations.wandb.mirror_process import kill_core

    def exit_with_agent() -> None:
        while os.read(0, 1):  # os.read, because the lock of sys.stdin would delay the end of this process
            pass
        os.kill(os.getpid(), signal.SIGINT)  # W&B's scheduler finishes its step
        time.sleep(ORPHAN_GRACE_SECONDS)
        kill_core()
        finish_output()
        os._exit(0)

    install_redacted_output()
    threading.Thread(target=exit_with_agent, daemon=True).start()
    with FileLock(lock):
        from wandb.sdk.sweeps.scheduler import client, optimizer

        with contextlib.suppress(KeyboardInterrupt):
            client.run_scheduler(
                entity=entity,
                project=project,
                sweep_id=sweep_id,
                make_optimizer=lambda sweep: OptimizerProxy(optimizer.make_optimizer(sweep), int(run_cap)),  # type: ignore[arg-type, return-value]
                batch_size=int(runs_ahead),
                poll_interval=POLL_SECONDS,
            )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (KeyboardInterrupt, UserError):
        sys.exit(0)
    except Exception as error:
        print(redact(f"{type(error).__name__}: {error}".replace("\n", " ")), flush=True)
        sys.exit(1)
