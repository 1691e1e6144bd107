"""W&B's own sweep scheduler, run beside the agent: W&B tries nothing by itself in a `method: custom` sweep.

    python -m cifar.integrations.wandb.scheduler ENTITY PROJECT ID LOCK RUNS_AHEAD RUN_CAP

It is what `wandb sweep-scheduler` runs (login only), but for what `Adviser` adds. There may be one a sweep: they share no
state, and would make runs twice. So it is run where the sweep was made, by one agent at a time, who holds a lock in the
sweep's folder; the next takes over when that one goes. It ends with the end of its standard input, whoever closes that.
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
from cifar.tracking.run_dir import redact

POLL_SECONDS = 5.0  # between two looks at the sweep's runs; W&B's own default is 10
AGAIN_SECONDS = 10.0  # before another try where it failed
TRIES = 3
ORPHAN_SECONDS = 2.0  # for its step under way, once the agent is gone
LAST_SECONDS = 15.0  # that the agent waits where the sweep is over, so that W&B hears of it
BAD = ("skipped", "pruned", "diverged")


class Beside:
    """The agent's end. `look` says what has come up; `failed` is not empty once it has given up."""

    def __init__(self, place: Mapping[str, str], sweep_id: str, folder: Path, *, ahead: int, run_cap: int | None) -> None:
        words = (place["entity"], place["project"], sweep_id, str(folder / "scheduler.lock"), str(ahead), str(run_cap or 0))
        self._command = [sys.executable, "-m", "cifar.integrations.wandb.scheduler", *words]
        self._log = folder / "logs" / f"scheduler-{os.getpid()}.log"
        self._tries, self._ended, self.failed = 0, 0.0, ""
        self._start()

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        kept = {
            name: value for name, value in os.environ.items() if name not in ("CIFAR_STORAGE", "WANDB_SERVICE", "WANDB_SILENT")
        }
        self._tries, self._ended = self._tries + 1, 0.0
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**kept, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is the agent's to answer
            )  # fmt: skip

    def look(self) -> str:
        """What there is to say, or "". Starts it again where it has failed."""
        code = self._process.poll()
        if not code or self.failed:
            return ""
        if self._ended:
            if time.monotonic() - self._ended > AGAIN_SECONDS:
                self._start()
            return ""
        self._ended = time.monotonic()
        self._hang_up()
        reason = (self._log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
        said = f"W&B's sweep scheduler has ended: {redact(reason)[:300]}"
        if self._tries < TRIES:
            return f"{said}; trying again"
        self.failed = f"{said} (whole in {self._log}); mend that and run the agent again"
        return self.failed

    def close(self, *, over: bool) -> None:
        """Let it end. `over`: the sweep is, which it has to tell W&B first."""
        if over and self._log.stat().st_size:  # while another agent's is at work, ours waits for the lock without a word
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_SECONDS)
        self._hang_up()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]


class Adviser:
    """W&B's optimizer, with two things that it lacks.

    It counts no run but finished ones towards `run_cap`, and hears of a skipped one as of a failure, which teaches its search
    nothing: so TPE asks for what is too dear again and again, without end (LOG.md). Here every run counts, and one that was
    bad is told as the worst of all in everything, as without W&B.
    """

    def __init__(self, theirs: Any, run_cap: int) -> None:
        self._theirs, self._run_cap = theirs, run_cap
        self._made = self._ended = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def ask_n_runs(self, n: int) -> Sequence[Any] | None:
        n = min(n, self._run_cap - self._made) if self._run_cap else n
        found: Sequence[Any] | None = self._theirs.ask_n_runs(n) if n > 0 else []
        self._made += len(found or ())
        return found

    def should_terminate_sweep(self) -> bool:
        return bool(self._run_cap and self._ended >= self._run_cap) or bool(self._theirs.should_terminate_sweep())

    def forget_run(self, run_id: Any) -> None:
        self._made -= 1
        self._theirs.forget_run(run_id)

    def tell_existing_active_run(self, data: Any) -> Any:
        self._made += 1
        return self._theirs.tell_existing_active_run(data)

    def tell_existing_finished_run(self, data: Any) -> None:
        self._made += 1
        self._ended += 1
        self._theirs.tell_existing_finished_run(self._heard(data))

    def tell_run(self, run_id: Any, data: Any) -> None:
        self._ended += not data.state.is_alive  # that is told once
        self._theirs.tell_run(run_id, self._heard(data))

    def _heard(self, data: Any) -> Any:
        study = getattr(self._theirs, "study", None)  # Optuna's; Ax has none
        if study is None or data.state.is_alive or data.summary_metrics.get("state") not in BAD:
            return data
        finished = [trial.values for trial in study.trials if trial.state.name == "COMPLETE"]
        names, goals = self._theirs.metric_names(), self._theirs.metric_goals()
        worst = {
            name: min(column) if goal == "maximize" else max(column)
            for name, goal, column in zip(names, goals, zip(*finished, strict=True), strict=False)
        }
        ended = type(data.state).FINISHED if worst else data.state
        return replace(data, state=ended, summary_metrics={**data.summary_metrics, **worst})


def main(entity: str, project: str, sweep_id: str, lock: str, ahead: str, run_cap: str) -> int:
    """Suggest runs until the sweep, or the agent, is at its end."""
    from filelock import FileLock

    from cifar.integrations.wandb.mirror import kill_core

    def leave() -> None:
        while os.read(0, 1):  # not by sys.stdin, whose lock would hold up the end of this process
            pass
        os.kill(os.getpid(), signal.SIGINT)  # W&B's scheduler finishes its step
        time.sleep(ORPHAN_SECONDS)
        kill_core()
        os._exit(0)

    threading.Thread(target=leave, daemon=True).start()
    with FileLock(lock):
        from wandb.sdk.sweeps.scheduler import client, optimizer

        with contextlib.suppress(KeyboardInterrupt):
            client.run_scheduler(
                entity=entity,
                project=project,
                sweep_id=sweep_id,
                make_optimizer=lambda sweep: Adviser(optimizer.make_optimizer(sweep), int(run_cap)),  # type: ignore[arg-type, return-value]
                batch_size=int(ahead),
                poll_interval=POLL_SECONDS,
            )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (KeyboardInterrupt, UserError):
        sys.exit(0)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
        sys.exit(1)
