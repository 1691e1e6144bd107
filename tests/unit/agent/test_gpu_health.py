"""Which GPUs an agent goes on using, over the ends of trials that point at a GPU, at a trial, or at neither."""

from __future__ import annotations

from typing import Any

from cifar.agent.gpu_health import GpuHealth, list_gpus

KILLED = {"state": "killed", "cause": "SIGKILL", "reason": "killed"}
MEMORY = {"state": "killed", "cause": "memory", "reason": "out of GPU memory"}
TAKEN = {**MEMORY, "taken": True, "reason": "others have it"}
UNUSABLE = {"state": "interrupted", "cause": "device", "halt": True, "reason": "no such device"}
BUG = {"state": "failed", "cause": "", "reason": "a bug"}
FINISHED = {"state": "finished", "reason": ""}


def health(*ends: tuple[int, int, dict[str, Any]], gpus: str = "0 1 2") -> GpuHealth:
    """After these ends of trials: (slot, cell, event). Every failing worker is a process of its own."""
    found = GpuHealth(gpus.split())
    for pid, (slot, cell, event) in enumerate(ends):
        for _ in range(2):  # an event may come again, where the disk was full
            found.judge_event(slot, pid, cell, dict(event))
    return found


def aside(*ends: tuple[int, int, dict[str, Any]], gpus: str = "0 1 2") -> list[int]:
    return [slot for slot in range(len(gpus.split())) if slot not in health(*ends, gpus=gpus).usable_slots(range(3))]


def test_a_gpu_that_fails_twice_with_no_trial_done_in_between_is_set_aside() -> None:
    assert aside((1, 0, KILLED)) == [] and aside((1, 0, KILLED), (1, 1, MEMORY)) == [1]
    assert aside((1, 0, KILLED), (1, 5, FINISHED), (1, 1, KILLED)) == []
    assert aside((1, 0, KILLED), (0, 5, FINISHED), (1, 1, KILLED)) == [1]
    assert aside((1, 0, BUG), (1, 1, BUG), (1, 2, BUG)) == []
    assert aside((1, 0, UNUSABLE), (1, 0, UNUSABLE)) == [1] and aside((1, 0, TAKEN)) == [1]


def test_a_trial_that_fails_on_two_gpus_is_at_fault_itself() -> None:
    assert aside((1, 0, MEMORY), (0, 0, MEMORY), (1, 1, MEMORY), (2, 1, MEMORY), (0, 2, MEMORY)) == []
    found = health((1, 0, MEMORY), (1, 1, MEMORY))
    assert found.pop_messages() == ["GPU 1 is set aside, the other GPUs do its trials: out of GPU memory"]
    assert found.pop_messages() == [] and found.describe() == ["GPU 1 was set aside: out of GPU memory"]
    found.judge_event(2, 9, 0, dict(MEMORY))
    assert found.usable_slots(range(3)) == [0, 1, 2] and "GPU 1 is used again" in found.pop_messages()[0]
    pack = {**MEMORY, "state": "interrupted", "apart": 2}
    assert aside((1, 0, pack), (2, 0, MEMORY), (1, 3, MEMORY)) == []  # the pack had a trial that fails alone
    assert aside((1, 0, pack), (2, 4, MEMORY), (1, 3, MEMORY)) == [1]


def test_a_trial_that_failed_waits_for_another_gpu_while_there_is_one() -> None:
    found = health((1, 7, KILLED))
    assert found.slots_for(7, [0, 1]) == [0] and found.slots_for(7, [1]) == [] and found.slots_for(8, [1]) == [1]
    found = health((1, 7, KILLED), (0, 7, KILLED), (2, 7, KILLED))
    assert found.slots_for(7, [1]) == [1]
    found = health((1, 7, KILLED), gpus="0 1 0 1")  # two workers on each
    assert found.slots_for(7, [1, 2, 3]) == [2]
    found = health((0, 1, UNUSABLE), (0, 1, UNUSABLE), (1, 7, KILLED), gpus="0 1")
    assert found.slots_for(7, [1]) == [1]  # no other is left


def test_what_the_gpu_did_is_no_failure_of_the_trial() -> None:
    found = GpuHealth(["0", "3"])
    changed = found.judge_event(1, 5, 0, {**UNUSABLE, "apart": 16})
    assert changed["state"] == "interrupted" and "halt" not in changed and "apart" not in changed
    assert found.name_gpu(1) == "GPU 3" and not found.halt_reason()
    assert found.judge_event(1, 5, 0, dict(TAKEN))["state"] == "interrupted"
    assert found.judge_event(0, 6, 0, dict(UNUSABLE))["state"] == "interrupted" and found.num_usable == 1
    found.judge_event(0, 7, 0, dict(UNUSABLE))
    assert "no GPU is left" in found.halt_reason() and found.usable_slots([0, 1]) == []
    shared = GpuHealth(["0", "1", "0", "1"])  # the memory may be that of our own other worker
    assert shared.judge_event(1, 5, 0, dict(TAKEN)) == TAKEN and shared.num_usable == 2


def test_without_several_gpus_nothing_changes() -> None:
    assert list_gpus([{}, {}], "") == ["", ""] and list_gpus([{"CUDA_VISIBLE_DEVICES": "2"}], "2") == ["2"]
    for gpus in ([], ["", ""], ["2"], ["2", "2"]):
        found = GpuHealth(gpus)
        for pid in range(4):
            assert found.judge_event(0, pid, pid, dict(UNUSABLE)) == UNUSABLE
        assert found.usable_slots([0, 1]) == [0, 1] and found.slots_for(0, [0]) == [0] and not found.name_gpu(0)
        assert not found.halt_reason() and not found.pop_messages() and not found.describe()
