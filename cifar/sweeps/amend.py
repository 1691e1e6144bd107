"""Changes to a local sweep that has been made: cells offered once more, and new cells beside those there are."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from cifar.errors import UserError
from cifar.sweeps import spec as sweeps
from cifar.sweeps import storage
from cifar.sweeps.local import Local
from cifar.tracking.run_dir import Record, write_atomic

AGAIN = ("failed", "killed", "diverged")


def retry(backend: Local) -> int:
    """Offer the failed, killed and diverged cells once more, with the same run ids -> how many.

    A run goes on from its checkpoint where there is one; one that diverged starts anew.
    """
    with storage.locked(backend._storage, backend.id):
        again = [cell for cell in backend.cells() if cell["state"] in AGAIN]
        for cell in again:
            record = Record(backend.runs / cell["run_id"])
            if record.path.exists():  # elsewhere, if the runs are not shared
                if cell["state"] == "diverged":
                    (record.path / "checkpoint.pt").unlink(missing_ok=True)
                    record.cut_metrics(0)
                record.set_status("interrupted", reason="to be tried again")
            backend.offer(cell["cell"], cell["values"], attempt=cell["attempt"])
        if again:
            backend.reopen()
    return len(again)


def extend(backend: Local, file: Path) -> int:
    """Add the cells of another grid that are not there yet -> how many. Whatever is done or under way stays.

    Two cells are the same if their whole configurations are, so a parameter may be added with its default among its values.
    """
    new, fixed = sweeps.read(file), backend.info["fixed"]
    if backend.sweep.method != "grid" or new.method != "grid":
        raise UserError(f"a {backend.sweep.method} sweep is not extended by a {new.method} one: both have to be method: grid")
    if new.metric != backend.sweep.metric:
        raise UserError(f"{file}: metric is {new.metric.name} ({new.metric.goal}); the sweep's is {backend.sweep.metric.name}")
    sweeps.check(new, fixed, backend.info["sweep_seed"])
    with storage.locked(backend._storage, backend.id):
        known = backend.cells()
        there = {_key(cell["values"], backend) for cell in known}
        added = [values for values in sweeps.cells(new) if _key(values, backend) not in there]
        if not added:
            return 0
        for cell, values in enumerate(added, start=len(known)):
            backend.offer(cell, values)
        old = backend.folder / f"sweep-{len(list(backend.folder.glob('sweep*.yaml')))}.yaml"
        with contextlib.suppress(FileExistsError):
            old.hardlink_to(backend.folder / "sweep.yaml")
        backend.info["cells"] = len(known) + len(added)
        write_atomic(backend.folder / "sweep.yaml", new.text.encode())
        write_atomic(backend.folder / "sweep.json", json.dumps(backend.info, indent=1).encode())
        backend.publish(new.text)
        backend.reopen()
    return len(added)


def _key(values: dict[str, object], backend: Local) -> str:
    return repr(sorted(sweeps.bind(values, backend.info["fixed"]).flat().items(), key=lambda item: item[0]))
