"""Compiling ahead: what comes next, how many processes there is room for, and which trial a free worker had better get."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cifar.agent.compile_ahead import CompileAhead, check_compile_ahead_option, count_preparers
from cifar.agent.packing import pack_size_on_gpu
from cifar.config.resolve import resolve_config
from cifar.errors import UserError
from cifar.sweeps.local import LocalBackend
from cifar.system.memory import available_bytes
from cifar.training.compile_cache import FOLDER_VARIABLE, mark_compiled, step_key
from helpers.local_sweeps import METRIC, claim_trial, create_local_sweep

GIB = 2**30
NETWORKS = f"""
method: grid
{METRIC}
parameters:
  seed: {{values: [0, 1]}}
  model: {{values: [conv4, conv8, conv32]}}
  compile: {{value: "on"}}
  device: {{value: cpu}}
"""
SEARCH = NETWORKS.replace("grid", "bayes").replace("values: [0, 1]", "min: 0, max: 9") + "run_cap: 4\n"


def train_as(backend: LocalBackend, values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, **backend.info["fixed"]}


def look_ahead(backend: LocalBackend, option: str = "2") -> CompileAhead:
    return CompileAhead(backend, option, [{}], data_dir=None, training_values=lambda values: train_as(backend, values))


def key_of(backend: LocalBackend, values: Mapping[str, Any]) -> str:
    return step_key(resolve_config(train_as(backend, values)), "cpu")


@pytest.fixture
def backend(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalBackend:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "inductor"))
    return create_local_sweep(runs, NETWORKS)


def test_what_is_seen_ahead_is_what_will_be_claimed(backend: LocalBackend) -> None:
    seen = backend.peek_values(4)
    assert seen == [claim_trial(backend).values for _ in range(4)]
    assert len(backend.peek_values(100) or ()) == 2  # and looking has claimed nothing
    assert backend.peek_values(100) == [claim_trial(backend).values for _ in range(2)]
    assert backend.peek_values(100) == []


def test_a_trial_that_was_given_back_is_seen_in_its_place(backend: LocalBackend) -> None:
    first, _ = claim_trial(backend), claim_trial(backend)
    backend.finish_trial(first, "interrupted")
    assert (backend.peek_values(1) or [])[0] == first.values


@pytest.mark.parametrize("cancel", [False, True])
def test_a_sweep_that_was_stopped_shows_nothing(backend: LocalBackend, cancel: bool) -> None:
    backend.stop_sweep(cancel=cancel)
    assert backend.peek_values(4) is None
    ahead = look_ahead(backend)
    ahead.update(99, [])
    assert not ahead.running


def test_a_search_shows_only_what_it_has_suggested(runs: Path) -> None:
    search = create_local_sweep(runs, SEARCH)
    assert search.peek_values(4) == []
    given_back = claim_trial(search)
    search.finish_trial(given_back, "interrupted")
    assert search.peek_values(4) == [given_back.values]
    assert look_ahead(search).prefer([given_back.values], 1) is None  # its order is a contract


def test_a_free_worker_gets_what_is_compiled_then_what_nobody_compiles(backend: LocalBackend) -> None:
    ahead, trials = look_ahead(backend), backend.peek_values(6) or []
    assert [trial["model"] for trial in trials] == ["conv4", "conv8", "conv32"] * 2
    assert ahead.prefer([], 1) is None  # at the beginning: the first
    claimed = claim_trial(backend)
    assert ahead.prefer([claimed.values], 1) is None  # the next is conv8, which nobody compiles
    other = claim_trial(backend)
    third = ahead.prefer([claimed.values, other.values], 1)
    assert third is None  # conv32
    last = claim_trial(backend)
    mark_compiled(key_of(backend, other.values))
    wanted = ahead.prefer([claimed.values, last.values], 1)
    assert callable(wanted)
    assert [wanted(trial) for trial in backend.peek_values(9) or ()] == [False, True, False]
    chosen = backend.claim_trial("me", trial_filter=wanted)
    assert chosen not in (None, "wait") and chosen.values["model"] == "conv8"


def test_every_cell_is_claimed_once_whatever_is_preferred(backend: LocalBackend) -> None:
    ahead, claimed = look_ahead(backend), []
    mark_compiled(key_of(backend, (backend.peek_values(3) or [])[2]))
    while True:
        wanted = ahead.prefer([trial.values for trial in claimed[-1:]], 1)
        assert wanted != "wait"  # no process of ours compiles anything
        trial = backend.claim_trial("me", trial_filter=wanted)
        if not trial or trial == "wait":
            break
        claimed.append(trial)
    assert sorted(trial.cell for trial in claimed) == list(range(6))


def test_seeds_and_rates_share_a_step_and_other_networks_do_not() -> None:
    base = {"model": "conv4", "dataset": "stand-in", "compile": "on", "optimizer": "sgd", "lr": 0.1}
    same = [base, {**base, "seed": 5}, {**base, "lr": 0.3, "epochs": 99}]
    other = [{**base, "batch_size": 64}, {**base, "model": "conv8"}, {**base, "momentum": 0.0}, {**base, "probes": "none"}]
    keys = [step_key(resolve_config(values), "a GPU") for values in same]
    assert len(set(keys)) == 1
    others = [step_key(resolve_config(values), "a GPU") for values in other]
    assert len({*keys, *others, step_key(resolve_config(base), "another GPU")}) == 6


def test_how_many_processes_there_is_room_for() -> None:
    # 16 cores: 2 for the worker, 2 for the agent, 2 for each of 6; 40 % of 140 GiB are room for 14 of 4 GiB
    assert count_preparers(16, 1, 100 * GIB, [140 * GIB]) == 6
    assert count_preparers(64, 4, 400 * GIB, [140 * GIB] * 4) == 16  # the most
    assert count_preparers(16, 1, 13 * GIB, [140 * GIB]) == 2  # memory for three processes, one of them the worker
    assert count_preparers(16, 1, None, [24 * GIB]) == 2
    assert count_preparers(16, 1, None, [9 * GIB]) == 0  # GPU memory is short
    assert count_preparers(4, 1, None, [140 * GIB]) == 0  # no core to spare
    assert count_preparers(2, 4, None, [140 * GIB]) == 0
    assert count_preparers(16, 1, None, []) == 0  # no GPU


def test_options_in_words() -> None:
    for right in ("auto", "off", "1", "256"):
        check_compile_ahead_option(right)
    for wrong in ("0", "on", "", "-1", "1.5", "257"):
        with pytest.raises(UserError, match="auto, off"):
            check_compile_ahead_option(wrong)


def test_no_look_is_taken_where_it_is_off_and_where_there_is_no_gpu(backend: LocalBackend) -> None:
    for option, trial in itertools.product(("off", "auto"), backend.peek_values(1) or ()):
        ahead = look_ahead(backend, option)
        ahead.update(99, [])
        assert not ahead.running and ahead.prefer([trial], 1) is None


def test_what_memory_is_left(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000 kB\nMemAvailable:   3000 kB\n")
    assert available_bytes(meminfo, tmp_path) == 3000 * 1024
    for name, text in (
        ("memory.max", "2000000\n"),
        ("memory.current", "1500000\n"),
        ("memory.stat", "anon 9\ninactive_file 300000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert available_bytes(meminfo, tmp_path) == 800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 3000 * 1024
    assert available_bytes(tmp_path / "absent", tmp_path / "absent") is None


def test_how_many_trials_fill_a_gpu() -> None:
    # ResNet-20 has 40.8 million multiply-adds an image: 5.2, 10.4 and 20.9 thousand million at batch sizes 128, 256 and 512
    def size(**values: Any) -> tuple[int, str]:
        return pack_size_on_gpu({"dataset": "stand-in", "optimizer": "sgd", **values})

    assert [size(model="resnet20", batch_size=batch) for batch in (128, 256)] == [
        (3, ""),
        (1, size(model="resnet20", batch_size=256)[1]),
    ]
    number, reason = size(model="resnet20", batch_size=512)
    assert number == 1 and "21 GMACs leaves a GPU no room" in reason
    assert size(model="conv4") == (16, "")
    assert size(model="conv4", device="cpu")[1] == "on a CPU they would take turns"
