"""The energy of a GPU is what its counter says, or unknown: never that of somebody else. NVML has a stand-in here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cifar.system import energy
from cifar.system.energy import ALONE_VARIABLE, EnergyMeter

UUID = "GPU-5f3c0000-1111-2222-3333-444444444444"
OTHER = UUID.replace("5f3c", "aaaa")
COMES = "import sys; from cifar.system.energy import announce_use; announce_use(sys.argv[1]); print('there', flush=True)"


class Card:
    """As much of NVML as a meter asks for. `processes`: those that the driver lists."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules: dict[str, int | None] = {UUID: 5_000_000}
        self.processes: list[int] | None = [os.getpid()]
        self.is_cut = False

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.millijoules:
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetIndex(self, handle: str) -> int:
        return list(self.millijoules).index(handle)

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if not self.is_cut:
            raise self.NVMLError("not supported")
        return [1, 1]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if (value := self.millijoules[handle]) is None:
            raise self.NVMLError("not supported")
        return value

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        if self.processes is None:
            raise self.NVMLError("not supported")
        return [SimpleNamespace(pid=pid) for pid in self.processes]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Card:
    found = Card()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(ALONE_VARIABLE, raising=False)
    monkeypatch.setattr(energy, "_announced", {})  # a cache folder of its own for each test
    return found


@pytest.fixture
def meter(card: Card) -> EnergyMeter:
    return EnergyMeter([UUID])


@contextlib.contextmanager
def another_process(uuid: str) -> Iterator[None]:
    """A process of ours that computes on this GPU, as long as this is open."""
    command = [sys.executable, "-c", f"{COMES}; input()", uuid]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdin
        assert child.stdout.readline() == b"there\n"
        yield
        child.stdin.write(b"\n")
        child.stdin.close()


def test_it_is_the_difference_of_the_counter_in_joules(card: Card, meter: EnergyMeter) -> None:
    assert meter.read() == 0.0
    card.millijoules[UUID] = 5_012_345
    assert meter.read() == pytest.approx(12.345) and not meter.problem


def test_several_gpus_add_up(card: Card) -> None:
    card.millijoules[OTHER] = 1_000
    with another_process(OTHER):  # the other rank of the same training
        meter = EnergyMeter([UUID, OTHER])
        card.millijoules = {UUID: 5_001_000, OTHER: 3_500}
        assert meter.read() == pytest.approx(1.0 + 2.5)
        card.millijoules[OTHER] = None
        assert meter.read() is None and "no energy counter" in meter.problem


def test_a_third_process_on_the_gpu_of_another_rank_is_seen(card: Card) -> None:
    card.millijoules[OTHER] = 1_000
    with another_process(OTHER):
        meter = EnergyMeter([UUID, OTHER])
        assert meter.read() == 0.0
        with another_process(OTHER):
            pass
        assert meter.read() is None and "another process" in meter.problem


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"processes": [os.getpid(), 99]}, "another process"),
        ({"processes": []}, f"{ALONE_VARIABLE}=on"),
        ({"processes": None}, f"{ALONE_VARIABLE}=on"),
        ({"is_cut": True}, "no energy counter"),
        ({"millijoules": {UUID: None}}, "no energy counter"),
        ({"millijoules": {}}, "NVML"),
    ],
)
@pytest.mark.parametrize("is_from_the_start", [True, False])
def test_what_cannot_be_known_is_not_guessed(card: Card, change: dict[str, Any], why: str, is_from_the_start: bool) -> None:
    if not is_from_the_start and change == {"millijoules": {}}:
        pytest.skip("the card is not lost in between")
    before = None if is_from_the_start else EnergyMeter([UUID])
    vars(card).update(change)
    meter = before or EnergyMeter([UUID])
    assert meter.read() is None and why in meter.problem
    vars(card).update(processes=[os.getpid()], is_cut=False, millijoules={UUID: 6_000_000})
    assert meter.read() is None, "a part of it stays unknown"


def test_a_counter_that_was_set_back_is_no_energy(card: Card, meter: EnergyMeter) -> None:
    card.millijoules[UUID] = 100
    assert meter.read() is None and "set back" in meter.problem


def test_a_process_of_another_name_space_is_this_one(card: Card) -> None:
    card.processes = [1]  # one is listed, and this process computes there: they are the same
    meter = EnergyMeter([UUID])
    assert meter.read() == 0.0


def test_where_processes_are_hidden_the_user_may_say_that_there_are_none(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    card.processes = []
    monkeypatch.setenv(ALONE_VARIABLE, "on")
    with another_process(UUID):
        assert EnergyMeter([UUID]).read() is None, "but our own workers are seen"
    assert EnergyMeter([UUID]).read() == 0.0


def test_one_that_came_and_went_between_two_readings_was_there(meter: EnergyMeter) -> None:
    with another_process(UUID):
        pass
    assert meter.read() is None and "another process" in meter.problem


def test_one_that_was_killed_is_not_there(card: Card) -> None:
    subprocess.run([sys.executable, "-c", f"{COMES}; import os; os.kill(os.getpid(), 9)", UUID], check=False)
    assert EnergyMeter([UUID]).read() == 0.0


def test_a_cache_that_cannot_be_written_to_hinders_nothing(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    meter = EnergyMeter([UUID])
    assert meter.read() == 0.0
