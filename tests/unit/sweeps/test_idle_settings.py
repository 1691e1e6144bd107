"""Settings that can never act are said in one sentence each, and only those."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cifar.cli.app import main
from cifar.config.yaml_loader import parse_yaml
from cifar.sweeps import spec
from cifar.sweeps.idle_settings import find_idle_settings
from helpers.paths import ROOT

METRIC = "metric: {name: val/acc, goal: maximize}\n"
LR = "lr: {values: [1e-4, 1e-3]}"
SWEEPS = [*sorted((ROOT / "sweeps").glob("*.yaml")), *sorted((ROOT / "experiments" / "studies").glob("**/sweeps/*.yaml"))]


def list_notes(head: str, parameters: str, *, fixed: dict[str, Any] | None = None, is_hosted: bool = False) -> list[str]:
    text = f"{head}\n" + ("" if "metric" in head else METRIC) + f"parameters: {{{parameters}}}\n"
    sweep = spec.parse_sweep(parse_yaml(text, "sweep"), text, "sweep", "a sweep")
    trials = spec.bind_trials(sweep, fixed or {})
    return find_idle_settings(sweep, trials, fixed=fixed or {}, is_hosted=is_hosted)


def hyperband(**options: Any) -> str:
    return f"early_terminate: {{type: hyperband, {', '.join(f'{name}: {value}' for name, value in options.items())}}}"


@pytest.mark.parametrize(
    ("options", "parameters", "said"),
    [
        # the case of issue 14, and others of its kind: bands that no run comes to
        ({"min_iter": 20}, "epochs: {value: 3}, " + LR, "no trial is ever judged: .* after epoch 20.* have 3 epochs"),
        ({"min_iter": 3}, "epochs: {value: 3}, " + LR, "no trial is ever judged"),  # the last one never counts
        ({"max_iter": 81, "s": 1}, "epochs: {value: 20}, " + LR, "no trial is ever judged: .* after epoch 27"),
        ({"min_iter": 5}, "epochs: {values: [3, 4, 30]}", "trials of 3 or 4 epochs are never judged: .* after epoch 5"),
        ({"min_iter": 8}, "model: {values: [{model: conv4, epochs: 8}, {model: conv8, epochs: 9}]}", "trials of 8 epochs"),
        ({"max_iter": 81, "s": 4}, "epochs: {value: 20}, " + LR, "band after epoch 27 acts on no trial"),
        ({"max_iter": 9, "s": 5}, "epochs: {value: 9}, " + LR, "s is 5, but only 2 bands come"),
        ({"max_iter": 5, "s": 3}, "epochs: {value: 9}, " + LR, "s is 3, but only 1 band comes"),
        ({"max_iter": 9, "s": 10**8}, "epochs: {value: 9}, " + LR, "s is 100000000, but only 2 bands"),
        ({"max_iter": 9, "s": 10**250, "eta": 2.5}, "epochs: {value: 9}, " + LR, "s is 10+…, but only 2 bands"),
        ({"min_iter": 10**250}, "epochs: {value: 9}, " + LR, "no trial is ever judged: .* after epoch 10+…, and trials"),
        ({"min_iter": 1, "s": 3}, "epochs: {value: 9}, " + LR, "s is not used beside min_iter"),
        ({"min_iter": 1, "max_iter": 9, "s": 2}, "epochs: {value: 9}, " + LR, "min_iter is not used beside"),
        ({"min_iter": 1, "eta": 2}, "epochs: {value: 9}, " + LR, "no trial is ever ended: the best 1/2 of 2 trials"),
        ({"min_iter": 1}, "epochs: {value: 9}", "no trial is ever ended: the best 1/3 of 1 trial "),
    ],
)  # fmt: skip
def test_bands_that_never_act_are_said(options: dict[str, Any], parameters: str, said: str) -> None:
    (note,) = list_notes(f"method: grid\n{hyperband(**options)}", parameters)
    assert re.search(said, note), note


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"min_iter": 2}, "epochs: {value: 3}, " + LR),
        ({"max_iter": 9, "s": 2}, "epochs: {value: 9}, " + LR),
        ({"min_iter": 3}, "epochs: {values: [4, 30]}"),
        ({"min_iter": 1, "eta": 2}, "epochs: {value: 9}, lr: {values: [1e-4, 1e-3, 1e-2]}"),
    ],
)
def test_bands_that_act_are_not_said(options: dict[str, Any], parameters: str) -> None:
    assert list_notes(f"method: grid\n{hyperband(**options)}", parameters) == []


def test_epochs_of_a_search_count_at_both_ends() -> None:
    head = f"method: bayes\nrun_cap: 9\n{hyperband(min_iter=5)}"
    (note,) = list_notes(head, "epochs: {min: 2, max: 40}")
    assert "trials of 2 epochs are never judged" in note
    (note,) = list_notes(head, "epochs: {min: 2, max: 5}, lr: {min: 0.1, max: 0.2}")
    assert "no trial is ever judged" in note and "2 to 5 epochs" in note
    assert list_notes(head, "epochs: {min: 6, max: 40}") == []


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        (
            "lr: {distribution: q_log_uniform_values, min: 1e-4, max: 0.1, q: 1}",
            "q = 1 leaves one value of the range from 0.0001 to 0.1",
        ),
        ("label_smoothing: {distribution: q_uniform, min: 0.0, max: 0.2, q: 0.5}", "q = 0.5 leaves one value .*: 0"),
        ("weight_decay: {distribution: q_uniform, min: 0.9, max: 1.1, q: 1.0}", "leaves one value .*: 1"),
        (
            "lr: {distribution: q_log_normal, mu: -7, sigma: 0.5}",
            "q = 1 leaves one value of the range: 0",
        ),
        (
            "lr: {distribution: log_uniform, min: 0.0001, max: 0.1}",
            r"exponents of e, so values go from 1 to 1.105; .* log_uniform_values",
        ),
        ("lr: {distribution: log_uniform, min: 0.001, max: 1}", "exponents of e, so values go from 1.001 to 2.718"),
        ("lr: {distribution: inv_log_uniform, min: 0.0001, max: 0.1}", "exponents of e, so values go from 0.9048 to 0.9999"),
        ("lr: {distribution: q_log_uniform, min: 0.001, max: 0.1, q: 0.01}", "exponents of e, so values go from 1 to 1.1"),
        ("lr: {distribution: log_normal, mu: 0.001}", r"half of the values are above 1.001; .* write mu: -6.908"),
        ("lr: {values: [0.1, 0.2, 0.3], probabilities: [0.5, 0.5, 0.0]}", "parameters.lr: 0.3 has probability 0: never drawn"),
        ("lr: {values: [0.1, 0.2, 0.1]}", "parameters.lr: 0.1 stands there more than once; each is drawn as often"),
        ("seed: {values: [3]}", "a single seed makes no repeats"),
        ("lr: {distribution: normal, mu: 0.1, sigma: 0}", "parameters.lr: normal draws one value only: 0.1"),
        ("lr: {distribution: log_normal, mu: -1000, sigma: 1}", "parameters.lr: log_normal draws one value only: 0"),
    ],
)
def test_ranges_and_lists_that_are_not_what_they_seem_are_said(parameter: str, said: str) -> None:
    (note,) = list_notes("method: random\nrun_cap: 1", f"model: {{value: conv}}, {parameter}")
    assert re.search(said, note), note


@pytest.mark.parametrize(
    "parameter",
    [
        "lr: {distribution: log_uniform, min: -9.2, max: -2.3}",
        "lr: {distribution: log_uniform, min: 0, max: 0.1}",
        "weight_decay: {distribution: log_uniform, min: 0.5, max: 3}",
        "lr: {distribution: log_uniform_values, min: 1e-4, max: 0.1}",
        "lr: {distribution: log_normal, mu: -7}",
        "label_smoothing: {distribution: q_uniform, min: 0.0, max: 0.2, q: 0.1}",
        "label_smoothing: {distribution: q_uniform, min: 0.0, max: 0.9, q: 0.9}",
        "lr: {values: [0.1, 0.2], probabilities: [0.999, 0.001]}",
        "label_smoothing: {min: 0.0, max: 1.0}",
        "seed: {value: 3}, lr: {min: 0.1, max: 0.2}",
    ],
)
def test_what_acts_is_not_said(parameter: str) -> None:
    assert list_notes("method: random\nrun_cap: 1", f"model: {{value: conv}}, {parameter}") == []


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("{name: val/loss, goal: maximize}", "val/loss is maximized"),
        ("{name: system/images_per_second}", "is minimized, W&B's default"),
        ("{name: val/acc, goal: maximize, target: 95}", "target 95 is never met: an accuracy is a fraction of 1; write 0.95"),
        ("{name: val/loss, target: -1}", "target -1 is never met"),
        ("{name: val/acc, goal: maximize, target: 0}", "target 0 is met by every trial: the first one ends the sweep"),
        ("{name: best/val/acc, goal: maximize, target: -0.5}", "target -0.5 is met by every trial"),
        ("{name: gradient_norm/nolayer}", "gradient_norm/nolayer is never measured: "),
        ("{name: gradient_norm}", "measured for each layer; write gradient_norm/LAYER"),
        ("{name: val/acc, goal: maximize, impute: worst}", "impute is read by W&B's Bayesian search only"),
    ],
)
def test_a_metric_that_says_nothing_is_said(metric: str, said: str) -> None:
    parameters = "model: {value: conv4}, lr: {values: [0.1, 0.2]}"
    (note,) = list_notes(f"method: grid\nmetric: {metric}", parameters)
    assert said in note


def test_a_metric_of_a_probe_that_is_off_is_said() -> None:
    head = "method: grid\nmetric: {name: gradient_norm/head}"
    (note,) = list_notes(head, "model: {value: conv4}, probes: {value: none}, lr: {values: [0.1, 0.2]}")
    assert "no trial has it on" in note
    (note,) = list_notes(head, "model: {value: conv4}, probes: {values: [none, all]}")
    assert "1 of 2 trials do not have it on" in note
    together = "method: grid\nmetric: {name: train/gradient_norm}"
    (note,) = list_notes(together, "model: {value: conv4}, probes: {value: weight_updates}, lr: {values: [0.1, 0.2]}")
    assert "train/gradient_norm is never measured where its probe gradient_flow is off" in note
    assert list_notes(together, "model: {value: conv4}, lr: {values: [0.1, 0.2]}") == []


def test_keys_without_effect_are_said_once() -> None:
    assert list_notes("method: grid", "tta: {values: [none, flip]}, lr: {values: [0.1, 0.2]}") == [
        "tta has no effect: it is for the test set, which no trial of a sweep scores",
    ]
    chosen = "experiment: {values: [worksheet1, resnet20]}, seed: {values: [0, 1]}"
    assert list_notes("method: grid", chosen, fixed={"test": "final", "tta": "flip"}) == []
    assert list_notes("method: grid", "lr: {values: [0.1, 0.2]}", fixed={"crop": 0, "crop_padding": "reflect"}) == [
        "crop_padding has no effect: crop is 0"
    ]
    optimizer = "optimizer: {values: [{optimizer: sgd, momentum: 0.0}]}, nesterov: {values: [true, false]}"
    assert list_notes("method: grid", optimizer) == ["nesterov has no effect: momentum is 0"]
    (note,) = list_notes("method: grid", "crop: {values: [0, 4]}, crop_padding: {values: [zero, reflect]}")
    assert note == "crop_padding has no effect in 2 of 4 trials: there crop is 0"


def test_the_number_of_trials_is_compared_with_what_there_is() -> None:
    assert list_notes("method: grid\nrun_cap: 9", "lr: {values: [0.1, 0.2]}") == ["run_cap is 9, but the grid has 2 cells"]
    assert list_notes("method: grid\nrun_cap: 2", "lr: {values: [0.1, 0.2]}") == []
    (note,) = list_notes("method: random\nrun_cap: 9", "lr: {values: [0.1, 0.2]}, crop: {min: 0, max: 1}")
    assert note.startswith("9 trials are asked for, but there are 4 different ones")
    notes = list_notes("method: random\nrun_cap: 9", "lr: {distribution: normal, mu: 0.1, sigma: 0}")
    assert len(notes) == 2 and "nothing is swept" in notes[1]
    (note,) = list_notes("method: bayes\nrun_cap: 9", "lr: {value: 0.1}")
    assert "nothing is swept" in note
    assert list_notes("method: random\nrun_cap: 4", "lr: {values: [0.1, 0.2]}, crop: {min: 0, max: 1}") == []


def test_cells_that_are_one_configuration_are_said() -> None:
    (note,) = list_notes("method: grid", "optimizer: {values: [adam, {optimizer: adam}, sgd]}, seed: {values: [0, 1]}")
    assert note == "2 of the cells repeat the whole configuration of another one: 0 and 2, 1 and 3"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_shipped_files_have_no_idle_setting(path: Path) -> None:
    sweep, fixed = spec.read_sweep(path), {"test": "final"} if path.stem == "rows" else {}
    assert find_idle_settings(sweep, spec.bind_trials(sweep, fixed), fixed=fixed) == []


def test_a_dry_run_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "late.yaml").write_text(
        "method: grid\nmetric: {name: val/acc, goal: maximize}\nearly_terminate: {type: hyperband, min_iter: 20}\n"
        "parameters: {model: {value: conv4}, epochs: {value: 3}, lr: {values: [1.0e-4, 1.0e-3]}}\n"
    )
    assert main(["sweep", str(tmp_path / "late.yaml"), "--dry-run", "--dataset", "stand-in"]) == 0
    assert capsys.readouterr().out.count("note: early_terminate: no trial is ever judged") == 1
