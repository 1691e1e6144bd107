"""A process that compiles one network ahead for an agent's workers.

    python -m cifar.agent.preparer        # started by cifar/agent/compile_ahead.py

A JSON line in: {"values": {...}, "data_dir", "ahead", "gpu_share"}. A JSON line out: {"answer", "reason"}; the answers are
those of `training.compile_ahead`, and "failed". The end of standard input means that the agent is gone, or has no use for it
any more: the process ends at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from cifar.system.redact import redact

NICENESS = 2  # workers come first, but one may wait for us while others' programs keep the cores busy


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a plug-in prints does not get between our lines
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent ends us
    os.nice(NICENESS)
    task = json.loads(sys.stdin.readline() or "null")
    threading.Thread(target=_end_with_agent, daemon=True).start()
    if task:
        out.write(json.dumps(_answer(task)) + "\n")
        os._exit(0)  # PyTorch takes seconds to leave, and the memory is wanted


def _end_with_agent() -> None:
    while sys.stdin.read(4096):
        pass
    os._exit(3)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    from cifar.system.user_code import describe_failure

    try:
        from cifar.config.resolve import resolve_config
        from cifar.training.compile_ahead import compile_ahead

        data_dir = Path(task["data_dir"]) if task["data_dir"] else None
        answer = compile_ahead(resolve_config(task["values"]), data_dir, task["ahead"], task["gpu_share"])
        return {"answer": answer, "reason": ""}
    except BaseException as error:
        return {"answer": "failed", "reason": redact(describe_failure(error))}


if __name__ == "__main__":
    main()
