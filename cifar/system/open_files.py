"""How many files this process may have open. Pipes, sockets and databases count too."""

from __future__ import annotations

import contextlib

from cifar.errors import UserError

FILES_OF_AGENT = 26  # 14 were open at a time; drawing, imports and what was open at the start take some more (measured)
FILES_OF_WORKER = 6  # the three pipes to it and its log stay; starting it takes two more


def require_open_files(num_workers: int) -> None:
    """Make sure that an agent with so many workers can open its files. Else it would fail anywhere in its work.

    Raises the process's own limit where the system lets it. Raises UserError where that is not enough.
    """
    import resource

    needed = FILES_OF_AGENT + FILES_OF_WORKER * num_workers
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return
    if most == resource.RLIM_INFINITY or most >= needed:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
            return
    workers, advice = ("one worker", "") if num_workers == 1 else (f"{num_workers} workers", ", or take fewer --workers")
    raise UserError(
        f"too many open files: this process may have {limit}, and an agent with {workers} needs {needed}; "
        f"see `ulimit -n`{advice}"
    )
