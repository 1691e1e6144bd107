"""The energy of a GPU is what its counter says, or unknown: never that of somebody else. NVML has a stand-in here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cifar.system.energy import ALONE_VARIABLE, EnergyMeter, GpuPresence

UUID = "GPU-5f3c0000-1111-2222-3333-444444444444"


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
    return found


@pytest.fixture
def meter(card: Card) -> Iterator[EnergyMeter]:
    found = EnergyMeter([UUID])
    yield found
    found.close()


def test_it_is_the_difference_of_the_counter_in_joules(card: Card, meter: EnergyMeter) -> None:
    assert meter.read() == 0.0
    card.millijoules[UUID] = 5_012_345
    assert meter.read() == pytest.approx(12.345) and not meter.problem


def test_several_gpus_add_up(card: Card) -> None:
    other = UUID.replace("5f3c", "aaaa")
    card.millijoules[other] = 1_000
    meter = EnergyMeter([UUID, other])
    card.millijoules = {UUID: 5_001_000, other: 3_500}
    assert meter.read() == pytest.approx(1.0 + 2.5)
    card.millijoules[other] = None
    assert meter.read() is None and "no energy counter" in meter.problem
    meter.close()


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
    meter.close()


def test_a_counter_that_was_set_back_is_no_energy(card: Card, meter: EnergyMeter) -> None:
    card.millijoules[UUID] = 100
    assert meter.read() is None and "set back" in meter.problem


def test_a_process_of_another_name_space_is_this_one(card: Card) -> None:
    card.processes = [1]  # one is listed, and this process computes there: they are the same
    meter = EnergyMeter([UUID])
    assert meter.read() == 0.0
    meter.close()


def test_where_processes_are_hidden_the_user_may_say_that_there_are_none(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    card.processes = []
    monkeypatch.setenv(ALONE_VARIABLE, "on")
    meter, second = EnergyMeter([UUID]), EnergyMeter([UUID])
    assert meter.read() is None and second.read() is None, "but our own workers are seen"
    meter.close()
    second.close()
    third = EnergyMeter([UUID])
    assert third.read() == 0.0
    third.close()


def test_one_that_came_and_went_between_two_readings_was_there(meter: EnergyMeter) -> None:
    code = f"from cifar.system.energy import GpuPresence; p = GpuPresence({UUID!r}); print(p.has_company()); p.leave()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert meter.read() is None and "another process" in meter.problem


def test_one_that_was_killed_is_not_there(card: Card) -> None:
    code = f"import os; from cifar.system.energy import GpuPresence; p = GpuPresence({UUID!r}); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    presence = GpuPresence(UUID)
    assert not presence.has_company()
    presence.leave()


def test_a_cache_that_cannot_be_written_to_hinders_nothing(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    meter = EnergyMeter([UUID])
    assert meter.read() == 0.0
    meter.close()
