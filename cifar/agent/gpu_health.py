"""Which of an agent's GPUs can be used. One whose workers fail is set aside, and its trials are done on the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cifar.states import FAILURE_STATES

MAX_FAULTS = 2  # of a GPU, with no trial in between that came to its end
WORKING_STATES = ("finished", "pruned", "diverged")  # ends of trials that a working GPU has trained


@dataclass
class Fault:
    """One failure that may be the GPU's. `cells`: of the trials that it ended; none if it was the GPU's for certain."""

    reason: str
    weight: int = 1
    cells: set[int] = field(default_factory=set)


class GpuHealth:
    """The faults of each GPU. With fewer than two GPUs there is no other one to go to: nothing is recorded then.

    gpus: the GPU of each worker slot, as nvidia-smi counts; "" for a worker without one. Several slots may share a GPU.
    """

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        self._gpus = list(gpus) if len(set(gpus)) > 1 else [""] * len(gpus)
        self._faults: dict[str, dict[str, Fault]] = {gpu: {} for gpu in self._gpus if gpu}
        self._failed_on: dict[int, set[str]] = {}  # cell -> the GPUs on which its trial has failed alone
        self._told: set[str] = set()  # the GPUs that were said to be set aside

    def name_gpu(self, slot: int) -> str:
        """ "GPU 2", or empty where there are not several GPUs."""
        return f"GPU {self._gpus[slot]}" if slot < len(self._gpus) and self._gpus[slot] else ""

    def is_set_aside(self, gpu: str) -> bool:
        return sum(fault.weight for fault in self._faults.get(gpu, {}).values()) >= MAX_FAULTS

    @property
    def num_usable(self) -> int:
        """GPUs that are not set aside."""
        return sum(not self.is_set_aside(gpu) for gpu in self._faults)

    def usable_slots(self, slots: Iterable[int]) -> list[int]:
        """Those of the slots whose GPU is not set aside."""
        return [slot for slot in slots if slot >= len(self._gpus) or not self.is_set_aside(self._gpus[slot])]

    def slots_for(self, cell: int, free: Sequence[int]) -> list[int]:
        """Those of the free slots in which a cell's trial may start.

        Not where it has failed, while there is a usable GPU where it has not: it waits for that one.
        """
        failed = self._failed_on.get(cell, set())
        if all(gpu in failed or self.is_set_aside(gpu) for gpu in self._faults):
            return list(free)
        return [slot for slot in free if self._gpus[slot] not in failed]

    def judge_event(self, slot: int, pid: int, cell: int, event: dict[str, Any]) -> dict[str, Any]:
        """Take note of how a trial ended -> the event, changed where not the trial but its GPU is at fault.

        May be told the same event again.
        """
        gpu = self._gpus[slot] if slot < len(self._gpus) else ""
        if not gpu:
            return event
        cause, is_apart = event.get("cause", ""), bool(event.get("apart"))
        is_taken = bool(event.get("taken")) and self._gpus.count(gpu) == 1  # else our own workers may have the memory
        if is_taken or (cause == "device" and event.get("halt")):
            self._faults[gpu][f"process {pid}"] = Fault(event["reason"], weight=MAX_FAULTS if is_taken else 1)
            return {**{key: value for key, value in event.items() if key not in ("halt", "apart")}, "state": "interrupted"}
        if cause and (is_apart or event["state"] in FAILURE_STATES):
            if not is_apart:
                self._failed_on.setdefault(cell, set()).add(gpu)
            key = f"process {pid}" if is_apart else f"cell {cell}"
            self._faults[gpu].setdefault(key, Fault(event["reason"])).cells.add(cell)
            if not is_apart:
                self._excuse(gpu, cell)
        elif event["state"] in WORKING_STATES:
            self._faults[gpu].clear()
        return event

    def _excuse(self, gpu: str, cell: int) -> None:
        """A trial that has failed alone explains the pack that failed with it. One that fails on two GPUs explains both."""
        key, num_failed_on = f"cell {cell}", len(self._failed_on[cell])
        for faults in self._faults.values():
            for name in [name for name, fault in faults.items() if cell in fault.cells and name != key]:
                del faults[name]
            if num_failed_on > 1:
                faults.pop(key, None)

    def pop_messages(self) -> list[str]:
        """A sentence for each GPU that was set aside since the last call, or is used again."""
        messages = []
        for gpu, faults in self._faults.items():
            if self.is_set_aside(gpu) and gpu not in self._told:
                self._told.add(gpu)
                others = ", the other GPUs do its trials" if self.num_usable else ""
                messages.append(f"GPU {gpu} is set aside{others}: {list(faults.values())[-1].reason}")
            elif gpu in self._told and not self.is_set_aside(gpu):
                self._told.discard(gpu)
                messages.append(f"GPU {gpu} is used again: what failed there failed on another GPU too")
        return messages

    def describe(self) -> list[str]:
        """A sentence for each GPU that is set aside."""
        return [
            f"GPU {gpu} was set aside: {list(faults.values())[-1].reason}"
            for gpu, faults in self._faults.items()
            if self.is_set_aside(gpu)
        ]

    def halt_reason(self) -> str:
        """Why the agent has to stop; "" while a GPU is left."""
        if not self._faults or self.num_usable:
            return ""
        return "stopped: no GPU is left that works; go on with another agent once they are free or mended"


def list_gpus(environments: Sequence[Mapping[str, str]], option: str) -> list[str]:
    """The GPU of each worker by its environment; "" where `--gpus` was not given."""
    return [environment.get("CUDA_VISIBLE_DEVICES", "") if option else "" for environment in environments]
