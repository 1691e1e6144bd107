"""The keys by which trials are told apart: those in which all cells differ, old and new, wherever they are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifar.agent.dashboard import name_trial
from cifar.cli.app import main
from cifar.config.yaml_loader import parse_yaml
from cifar.report.aggregate import compare_runs
from cifar.report.load import load_run
from cifar.sweeps import spec
from cifar.sweeps.local import LocalBackend
from cifar.sweeps.plan import plan_sweep
from helpers import fake_runs
from helpers.local_sweeps import METRIC, claim_trial, create_local_sweep

HEAD = f"method: grid\n{METRIC}parameters:\n  model: {{value: conv}}\n"


def list_keys(parameters: str, head: str = "method: grid", **fixed: Any) -> list[str]:
    text = f"{head}\n{METRIC}parameters: {{{parameters}}}\n"
    sweep = spec.parse_sweep(parse_yaml(text, "sweep"), text, "sweep", "a sweep")
    return spec.list_swept_keys(sweep, spec.list_known_trials(sweep), fixed)


@pytest.mark.parametrize(
    ("parameters", "keys"),
    [
        ("model: {value: conv}, seed: {values: [0, 1]}, lr: {values: [0.1]}", ["seed"]),
        # mappings: keys that are the same in all of them are not swept; conditional keys are
        ("model: {values: [{model: conv, width: 8, epochs: 12}, {model: conv, width: 2, epochs: 30}]}", ["width", "epochs"]),
        ("optimizer: {values: [{optimizer: sgd, momentum: 0.9}, adam]}", ["optimizer", "momentum"]),
        ("model: {values: [{model: conv, width: 8}, {model: conv, width: 8, depth: 2}]}", ["depth"]),
        # a key that some cells leave out has its default there
        ("optimizer: {values: [sgd, {optimizer: sgd, nesterov: true}]}", []),
        ("optimizer: {values: [sgd, {optimizer: sgd, nesterov: false}]}", ["nesterov"]),
        ("optimizer: {values: [{optimizer: sgd, lr: 0.1, weight_decay: 0.0}, {optimizer: adam, lr: 0.1}]}", ["optimizer"]),
        ("capture: {values: [true, true]}", []),
        ("batch_size: {values: [128, 128.0]}", []),
    ],
)
def test_a_grid_sweeps_the_keys_in_which_its_cells_differ(parameters: str, keys: list[str]) -> None:
    assert list_keys(parameters) == keys


def test_a_cap_and_a_fixed_value_leave_fewer() -> None:
    assert list_keys("lr: {values: [0.1, 0.2]}, seed: {values: [0, 1]}", "method: grid\nrun_cap: 2") == ["seed"]
    assert list_keys("seed: {values: [0, 1]}, lr: {values: [0.1]}", lr=0.5) == ["seed"]


def test_a_search_also_has_what_it_may_yet_try() -> None:
    assert list_keys("lr: {min: 0.1, max: 0.2}", "method: random\nrun_cap: 1") == ["lr"]
    assert list_keys("lr: {min: 0.1, max: 0.2}, crop: {values: [4]}", "method: bayes\nrun_cap: 3") == ["lr"]
    never = "crop: {values: [0, 4], probabilities: [0.0, 1.0]}"
    assert list_keys(f"lr: {{min: 0.1, max: 0.2}}, {never}", "method: random\nrun_cap: 3") == ["lr"]


@pytest.mark.parametrize(
    ("new", "keys", "added"),
    [
        ("  seed: {values: [0]}\n  lr: {values: [0.5]}\n", ["lr", "seed"], 1),  # each has one value in the new file
        ("  seed: {values: [0, 1]}\n  lr: {value: 0.1}\n  crop: {values: [4, 0]}\n", ["seed", "crop"], 2),
        ("  seed: {values: [0, 1]}\n  lr: {values: [0.1]}\n  label_smoothing: {value: 0.0}\n", ["seed"], 0),
        ("  optimizer: {value: {optimizer: sgd, momentum: 0.5, lr: 0.1}}\n", ["seed", "optimizer", "momentum"], 1),
    ],
)  # fmt: skip
def test_old_and_new_cells_count_after_extend(runs: Path, tmp_path: Path, new: str, keys: list[str], added: int) -> None:
    backend = create_local_sweep(runs, HEAD + "  seed: {values: [0, 1]}\n  lr: {values: [0.1]}\n")
    assert backend.list_swept_keys() == ["seed"]
    (tmp_path / "new.yaml").write_text(HEAD + new)
    assert backend.extend_sweep(tmp_path / "new.yaml") == added
    for opened in (backend, LocalBackend(backend.id, runs)):  # an agent that has it open already, and a new one
        assert sorted(opened.list_swept_keys()) == sorted(keys)
        names = {name_trial(cell["values"], opened.list_swept_keys()) for cell in opened.list_cells()}
        assert len(names) == 2 + added


def test_status_and_dry_run_show_defaults_of_keys_that_a_cell_leaves_out(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = create_local_sweep(runs, HEAD + "  seed: {values: [0]}\n")
    (tmp_path / "new.yaml").write_text(HEAD + "  seed: {values: [0]}\n  label_smoothing: {values: [0.0, 0.25]}\n")
    assert main(["sweeps", "extend", backend.id, str(tmp_path / "new.yaml")]) == 0
    capsys.readouterr()
    assert main(["sweeps", "status", backend.id]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["cell", "run", "label_smoothing", "state"]
    assert [line.split()[2] for line in lines[1:3]] == ["0", "0.25"]
    text = HEAD.replace("{value: conv}", "{values: [{model: conv, width: 4}, {model: conv, width: 4, depth: 2}]}")
    plan = plan_sweep(spec.parse_sweep(parse_yaml(text, "sweep"), text), {"dataset": "stand-in", "max_macs": 1.0})
    assert [trial.values for trial in plan] == [{"depth": 1}, {"depth": 2}]


def test_a_search_goes_on_knowing_a_cell_that_is_tried_again(runs: Path) -> None:
    """Its parameters, as the search knows them, come along, so that the new result teaches it."""
    text = f"method: bayes\n{METRIC}parameters:\n  model: {{value: conv}}\n  lr: {{min: 0.1, max: 0.2}}\n"
    backend = create_local_sweep(runs, text, count=3)
    backend.finish_trial(claim_trial(backend), "failed", retry=False)
    before = backend._list_trials()[0]
    assert backend.retry_cells() == 1
    after = backend._list_trials()[0]
    assert after.number != before.number and after.params == before.params and after.params
    again = claim_trial(backend)
    assert (again.cell, again.attempt) == (0, 2) and again.values == before.user_attrs["values"]


def test_a_report_labels_what_a_later_file_has_changed(tmp_path: Path) -> None:
    """lr was fixed at 0.1 when the first runs were made, so their label has to say it beside the others'."""
    fake_runs.write(tmp_path, "s-000", model="conv", lr=0.1, sweep="s", cell=0, swept=("seed",))
    record = fake_runs.write(tmp_path, "s-001", model="conv", lr=0.2, sweep="s", cell=1, swept=("lr", "seed"))
    record.write_json("run", {**record.read_json("run"), "sweep_keys": ["lr", "seed"]})
    points = compare_runs([load_run(tmp_path / name) for name in ("s-000", "s-001")]).points
    assert {point.label for point in points} == {"lr=0.1", "lr=0.2"}
    # a key that only some cells of one file give is left out of the labels of the others
    fake_runs.write(tmp_path, "t-000", model="conv", lr=0.1, depth=1, sweep="t", cell=0, swept=("lr",))
    fake_runs.write(tmp_path, "t-001", model="conv", lr=0.2, depth=2, sweep="t", cell=1, swept=("lr", "depth"))
    for name in ("t-000", "t-001"):
        path = tmp_path / name / "run.json"
        path.write_text(path.read_text().replace('"swept"', '"sweep_keys": ["lr", "depth"], "swept"'))
    points = compare_runs([load_run(tmp_path / name) for name in ("t-000", "t-001")]).points
    assert [point.label for point in points] == ["lr=0.1", "lr=0.2"]
