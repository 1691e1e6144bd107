"""Sweep files: what is refused and how, what the cells are, and that every distribution is the one it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cifar.config.yaml_loader import parse_yaml
from cifar.errors import UserError
from cifar.sweeps import distributions, early_stopping
from cifar.sweeps.plan import plan_sweep
from cifar.sweeps.spec import (
    Sweep,
    bind_trials,
    check_sweep,
    list_grid_cells,
    list_known_trials,
    num_trials,
    parse_sweep,
    read_sweep,
    resolve_trial,
    sample_trial,
    set_shown_metric,
)
from helpers.paths import ROOT

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
STUDY_SWEEPS = sorted((ROOT / "experiments" / "studies").glob("**/sweeps/*.yaml"))
VALID = (
    "method: grid\nmetric: {name: val/acc, goal: maximize}\nparameters:\n  model: {value: conv}\n  lr: {values: [1e-3, 1e-2]}\n"
)


def parsed(text: str) -> Sweep:
    return parse_sweep(parse_yaml(text, "sweep"), text, "sweep", "name")


def checked(text: str, **fixed: Any) -> Sweep:
    found = parsed(text)
    check_sweep(found, fixed)
    return found


@pytest.mark.parametrize("path", STUDY_SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_of_a_study_resolves(path: Path) -> None:
    read, fixed = read_sweep(path), {"test": "final"} if path.stem == "rows" else {}
    assert check_sweep(read, fixed) == "cifar10" and num_trials(read, None) > 0


def test_the_rows_of_the_frontier_are_all_in_their_sweep() -> None:
    rows = read_sweep(next(path for path in STUDY_SWEEPS if path.stem == "rows"))
    named = next(parameter.values for parameter in rows.parameters if parameter.name == "experiment")
    assert sorted(named or []) == sorted(f"frontier/{path.stem}" for path in (ROOT / "experiments" / "frontier").glob("*.yaml"))


def test_there_are_sweeps_of_studies() -> None:
    assert {"baselines_small", "baselines_large"} <= {path.stem for path in STUDY_SWEEPS}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_binds_to_the_configuration_and_opens_with_its_question(path: Path) -> None:
    read = read_sweep(path)
    assert check_sweep(read, {}) in ("auto", "cifar10") and num_trials(read, None) >= 6
    head = path.read_text().split("name:")[0]
    assert all(word in head for word in ("# Question:", "Scientific:", "Nuisance", "Fixed:"))
    content = parse_yaml(path.read_text(), "sweep")
    assert content["command"] == ["${env}", "python", "-m", "cifar", "train", "--trial", "${args_json_file}"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("method: grid", "method: gird", "write grid, random or bayes"),
        ("method: grid", "method: grid\nmax_macs: 5", "no top-level key 'max_macs'.*under 'parameters'"),
        ("method: grid", "method: grid\nrun_caps: 5", "did you mean 'run_cap'"),
        ("method: grid", "method: custom", "needs W&B's scheduler; add scheduler: {engine: optuna}"),
        ("method: grid", "method: grid\nrun_cap: 0", "above 0"),
        ("method: grid", "method: random", "run_cap: 20"),
        ("val/acc, goal: maximize", "test/acc, goal: maximize", "test set is scored once"),
        ("val/acc, goal: maximize", "vall/acc, goal: maximize", "did you mean 'val/acc'"),
        ("val/acc, goal: maximize", "val/acc", "add goal: maximize"),
        ("metric: {name: val/acc, goal: maximize}", "early_terminate: {type: hyperband, min_iter: 1}", "needs a metric"),
        ("parameters:", "early_terminate: {type: hyperband}\nparameters:", "min_iter, or max_iter and s"),
        ("parameters:", "early_terminate: {type: hyperband, min_iter: 1, etta: 2}\nparameters:", "did you mean 'eta'"),
        ("  lr:", "  lrr:", "unknown key 'lrr': did you mean 'lr'"),
        ("  lr: {values: [1e-3, 1e-2]}", "  momentum: {value: 0.9}", "'adam' does not take 'momentum'.*optimizer: {values: "),
        ("[1e-3, 1e-2]", "[1e-3, fast]", "lr = 'fast'"),
        ("{values: [1e-3, 1e-2]}", "{valuess: [1e-3]}", "'value', 'values', 'min' and 'max'"),
        ("{values: [1e-3, 1e-2]}", "{values: [1e-3], weights: [1]}", "does not take 'weights'"),
        ("{values: [1e-3, 1e-2]}", "{min: 0.0, max: 1.0}", "a grid takes"),
        ("{values: [1e-3, 1e-2]}", "{distribution: normall}", "did you mean 'normal'"),
        ("{values: [1e-3, 1e-2]}", "0.1", "write a mapping"),
        ("{values: [1e-3, 1e-2]}", "[0.1", "not valid YAML"),
        ("{value: conv}", "{value: convv}", "unknown model 'convv'"),
        ("{value: conv}", "{value: {model: conv, lr: 0.1}}", "'lr' is given twice"),
        ("{value: conv}", "{parameters: {lr: {value: 1}}}", "'lr' is given twice"),
        ("  lr:", "  val_size: {value: 0}\n  lr:", "val_size is 0"),
        ("  lr:", "  test: {value: final}\n  lr:", "do not score the test set"),
        ("  lr:", "  dataset: {values: [cifar10, stand-in]}\n  lr:", "one sweep, one dataset"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_answered_in_one_sentence(old: str, new: str, said: str) -> None:
    assert old in VALID
    checked(VALID)
    with pytest.raises(UserError, match=said) as error:
        checked(VALID.replace(old, new))
    assert "\n" not in str(error.value)


CHOSEN = (
    "method: grid\nmetric: {name: val/acc, goal: maximize}\nparameters:\n  experiment: {values: [resnet20, worksheet1]}\n"
    "  seed: {values: [0, 1]}\n  val_size: {value: 0}\n"
)


def test_what_was_chosen_before_may_score_the_test_set() -> None:
    bound = bind_trials(parsed(CHOSEN), {"test": "final"})
    assert [(c.experiment, c.seed, c.test, c.val_size) for _, c in bound] == [
        (name, seed, "final", 0) for name in ("resnet20", "worksheet1") for seed in (0, 1)
    ]
    shown = set_shown_metric(parsed(CHOSEN), {"test": "final"}).metric
    assert (shown.name, shown.goal, shown.target) == ("test/acc", "maximize", None)
    assert set_shown_metric(parsed(CHOSEN), {"test": "never"}).metric.name == "val/acc"
    checked(CHOSEN.replace("val_size: {value: 0}", "val_size: {value: 5000}"), test="never")
    with pytest.raises(UserError, match="val_size is 0"):
        checked(CHOSEN, test="never")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  val_size: {value: 0}", "  lr: {values: [0.1, 0.2]}", "a grid over experiment and seed; this file varies lr"),
        ("  val_size: {value: 0}", "  recipe: {values: [{lr: 0.1}, {lr: 0.2, epochs: 3}]}", "this file varies lr, epochs"),
        ("method: grid", "method: random\nrun_cap: 2", "method is random"),
        ("goal: maximize}", "goal: maximize, target: 0.9}", "remove early_terminate and target"),
        ("parameters:", "early_terminate: {type: hyperband, min_iter: 1}\nparameters:", "remove early_terminate and target"),
    ],
)  # fmt: skip
def test_a_sweep_that_could_choose_may_not_score_the_test_set(old: str, new: str, said: str) -> None:
    assert old in CHOSEN
    with pytest.raises(UserError, match=said) as error:
        checked(CHOSEN.replace(old, new), test="final")
    assert "\n" not in str(error.value)


def test_what_is_swept_cannot_be_fixed_as_well() -> None:
    checked(VALID, epochs=1)
    with pytest.raises(UserError, match="'lr' is swept by the file and set on the command line"):
        checked(VALID, lr=0.1)


def test_thousands_of_trials_are_checked_with_progress_and_each_is_whole() -> None:
    text = VALID.replace("model: {value: conv}", "experiment: {value: resnet20}\n  val_size: {value: 5000}")
    sweep, told = parsed(text.replace("[1e-3, 1e-2]", str(list(range(1, 451))))), list[tuple[int, int]]()
    bound = bind_trials(sweep, {}, show_progress=lambda *numbers: told.append(numbers))
    assert told == [(200, 450), (400, 450)]
    assert [(config.lr, config.model) for _, config in bound] == [(float(lr), "resnet20") for lr in range(1, 451)]
    assert all(config == resolve_trial(values, {}) for values, config in bound[::150])


def test_a_bad_end_of_a_range_is_found_before_anything_runs() -> None:
    text = "method: random\nrun_cap: 1\nparameters: {model: {value: conv}, label_smoothing: {min: 0.0, max: 1.5}}"
    with pytest.raises(UserError, match=r"label_smoothing = 1\.5: "):
        checked(text)
    text = text.replace("label_smoothing: {min: 0.0, max: 1.5}", "optimizer: {values: [adam, {optimizer: sgd, momentun: 1}]}")
    with pytest.raises(UserError, match="momentun"):
        checked(text)


@pytest.mark.parametrize("method", ["random", "bayes"])
@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("label_smoothing: {min: 0.0, max: 1.0}", ""),  # below 1: the end of the range is never drawn
        ("keep: {min: 0.0, max: 1.0}", "batch_size 128 is more than the images"),  # of a share that is near 0
        ("ema: {distribution: q_uniform, min: 0.0, max: 1.0, q: 0.25}", "ema = 1.0: "),  # rounding does draw it
        ("ema: {distribution: q_uniform, min: 0.0, max: 1.25, q: 0.5}", "ema = 1.0: "),
        ("ema: {distribution: q_uniform, min: 0.0, max: 0.75, q: 0.5}", ""),  # 0.75 alone would be rounded to 1.0
        ("cutout: {min: 0, max: 33}", "cutout = 33: "),  # a whole number: both ends are drawn
        ("crop: {values: [0, 17], probabilities: [1.0, 0.0]}", ""),  # never drawn
        ("crop: {values: [0, 17], probabilities: [0.99, 0.01]}", "crop = 17: "),
    ],
)
def test_an_end_that_is_never_drawn_is_no_error(method: str, parameter: str, said: str) -> None:
    head = f"method: {method}\nrun_cap: 3\nmetric: {{name: val/acc, goal: maximize}}\n"
    text = f"{head}parameters: {{model: {{value: conv}}, {parameter}}}"
    if not said:
        checked(text)
        return
    with pytest.raises(UserError, match=said):
        checked(text)


@pytest.mark.parametrize("spec", [{"min": 0.0, "max": 1.0}, {"min": 1.0, "max": 2.0}, {"min": -3.0, "max": 0.0}])
@pytest.mark.parametrize("u", [0.0, 2.0**-53, 1 - 2.0**-53, 1.0])
def test_a_continuous_range_is_open(spec: dict[str, float], u: float) -> None:
    assert spec["min"] < distributions.parse_parameter("x", spec).value_at(u) < spec["max"]
    if spec["min"] > 0:
        logarithmic = {"distribution": "log_uniform_values", **spec}
        assert spec["min"] < distributions.parse_parameter("x", logarithmic).value_at(u) < spec["max"]


def test_exponents_are_named_where_a_value_comes_out_wrong() -> None:
    sizes = "{distribution: q_log_uniform, min: 16, max: 128}"
    text = f"method: random\nrun_cap: 1\nparameters: {{model: {{value: conv}}, batch_size: {sizes}}}"
    with pytest.raises(UserError, match=r"batch_size .*q_log_uniform are exponents of e, .* use q_log_uniform_values"):
        checked(text)
    with pytest.raises(UserError, match="for exponents of e use 'log_uniform'"):
        distributions.parse_parameter("lr", {"distribution": "log_uniform_values", "min": -9.2, "max": -2.3})
    with pytest.raises(UserError, match=r"for one value write \{value: 3\}"):
        distributions.parse_parameter("x", {"min": 3, "max": 3})


def test_cells_are_the_product_with_mappings_merged_and_nothing_twice() -> None:
    text = """
method: grid
parameters:
  seed: {values: [0, 1, 0]}
  optimizer: {values: [{optimizer: sgd, momentum: 0.9}, adam]}
  nested: {parameters: {deeper: {parameters: {lr: {values: [1e-5]}}}, width: {distribution: int_uniform, min: 4, max: 5}}}
  model: {value: conv}
"""
    found = parsed(text)
    cells = list_grid_cells(found)
    assert len(cells) == 2 * 2 * 2 and all(cells.count(cell) == 1 for cell in cells)
    assert cells[0] == {"seed": 0, "optimizer": "sgd", "momentum": 0.9, "lr": 1e-5, "width": 4, "model": "conv"}
    assert cells[2] == {"seed": 0, "optimizer": "adam", "lr": 1e-5, "width": 4, "model": "conv"}
    assert found.swept_keys == ["seed", "optimizer", "momentum", "width"]
    assert list_grid_cells(parsed(f"{text}run_cap: 3")) == cells[:3]
    with pytest.raises(UserError, match="over 10,000 values"):
        parsed(text.replace("max: 5", "max: 50000000"))


def test_the_kth_suggestion_depends_on_the_seed_and_k_alone() -> None:
    text = "method: random\nparameters: {model: {value: conv}, lr: {min: 0.0, max: 1.0}, seed: {values: [0, 1, 2]}}"
    found, more = parsed(text), parsed(text.replace("lr:", "weight_decay: {min: 0.0, max: 1.0}, lr:"))
    backwards = [sample_trial(found, k, 7) for k in reversed(range(20))][::-1]
    assert backwards == list_known_trials(found, 7, count=20) == list_known_trials(found, 7, count=30)[:20]
    assert [values["lr"] for values in backwards] == [values["lr"] for values in list_known_trials(more, 7, count=20)]
    assert len({values["lr"] for values in backwards}) == 20 != backwards.count(backwards[0])
    assert backwards != list_known_trials(found, 8, count=20)
    assert backwards[0]["lr"] == 0.6599617135681635  # whatever the machine or Python's version


def test_a_dry_run_prices_every_trial_and_skips_what_is_over_the_budget() -> None:
    text = VALID.replace("{value: conv}", "{values: [conv4, worksheet1]}").replace("  lr:", "  max_macs: {value: 1e6}\n  lr:")
    plan = plan_sweep(parsed(text), {"dataset": "stand-in", "epochs": 2})
    assert [(p.model, p.is_skipped, p.epochs) for p in plan] == [("conv4", False, 2)] * 2 + [("worksheet1", True, 2)] * 2
    assert plan[2].macs == 6_654_464 and plan[0].seconds > 0 == plan[2].seconds
    halved = plan_sweep(parsed(text.replace("1e6}", "1e6}\n  keep: {values: [1.0, 0.5]}")), {"dataset": "stand-in"})
    of = {(p.model, p.values["keep"], p.values["lr"]): p.seconds for p in halved}
    assert all(of[model, 0.5, lr] == pytest.approx(of[model, 1.0, lr] / 2) for model, _, lr in of)


# -- distributions -----------------------------------------------------------------------------------------------------

log, exp = math.log, math.exp
ORACLES: list[tuple[dict[str, Any], Any]] = [
    ({"min": 2.0, "max": 5}, stats.uniform(2, 3)),
    ({"distribution": "uniform", "min": 2, "max": 5}, stats.uniform(2, 3)),
    ({"distribution": "log_uniform", "min": -3, "max": 1}, stats.loguniform(exp(-3), exp(1))),
    ({"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1}, stats.loguniform(1e-4, 0.1)),
    ({"distribution": "inv_log_uniform_values", "min": 1e-4, "max": 0.1}, stats.loguniform(1e-4, 0.1)),
    ({"distribution": "inv_log_uniform", "min": -1, "max": 3}, stats.loguniform(exp(-3), exp(1))),
    ({"distribution": "normal"}, stats.norm()),
    ({"distribution": "normal", "mu": 3, "sigma": 0.5}, stats.norm(3, 0.5)),
    ({"distribution": "log_normal", "mu": -1.0, "sigma": 0.5}, stats.lognorm(0.5, scale=exp(-1))),
    ({"distribution": "beta", "a": 2, "b": 5}, stats.beta(2, 5)),
    ({"distribution": "beta", "a": 0.5, "b": 0.5}, stats.beta(0.5, 0.5)),
    ({"min": 2, "max": 5}, stats.randint(2, 6)),
]


@pytest.mark.parametrize(
    ("spec", "oracle"), ORACLES, ids=lambda value: value.get("distribution", "bare") if isinstance(value, dict) else ""
)
@settings(max_examples=40, deadline=None)
@given(u=st.floats(1e-6, 1 - 1e-6))
def test_a_value_is_the_scipy_quantile(spec: dict[str, Any], oracle: Any, u: float) -> None:
    assert distributions.parse_parameter("x", spec).value_at(u) == pytest.approx(oracle.ppf(u), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(u=st.floats(0, 1), q=st.sampled_from([0.5, 2, 3.0]))
def test_a_quantized_value_is_the_nearest_multiple(u: float, q: float) -> None:
    plain = {"uniform": {"min": 1, "max": 30}, "log_uniform_values": {"min": 1, "max": 30}, "normal": {"mu": 5, "sigma": 3},
             "log_uniform": {"min": 0, "max": 3}, "log_normal": {}, "beta": {"a": 2, "b": 3}}  # fmt: skip
    for name, options in plain.items():
        u_in = min(max(u, 1e-6), 1 - 1e-6)
        value = distributions.parse_parameter("x", {"distribution": f"q_{name}", "q": q, **options}).value_at(u_in)
        smooth = distributions.parse_parameter("x", {"distribution": name, **options}).value_at(u_in)
        assert abs(value - smooth) <= q / 2 + 1e-9 and math.isclose(value / q, round(value / q))
        assert isinstance(value, int) == isinstance(q, int)


def test_listed_values_come_with_their_probabilities() -> None:
    even = distributions.parse_parameter("x", {"values": ["a", "b", "c"]})
    odd = distributions.parse_parameter("x", {"values": ["a", "b", "c"], "probabilities": [0.1, 0.0, 0.9]})
    draws = [(i + 0.5) / 1000 for i in range(1000)]
    assert [[p.value_at(u) for u in draws].count(v) for p in (even, odd) for v in "abc"] == [333, 334, 333, 100, 0, 900]
    assert even.value_at(0.0) == "a" and even.value_at(1.0) == odd.value_at(1.0) == "c"


def test_a_grid_takes_whole_and_quantized_ranges_as_wandb_does() -> None:
    assert distributions.parse_parameter("x", {"min": 2, "max": 5}).grid_values == [2, 3, 4, 5]
    assert distributions.parse_parameter("x", {"distribution": "q_uniform", "min": 0, "max": 10, "q": 4}).grid_values == [
        0,
        4,
        8,
    ]
    assert distributions.parse_parameter("x", {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}).grid_values == [
        0,
        0.25,
        0.5,
        0.75,
    ]
    assert distributions.parse_parameter("x", {"distribution": "normal"}).grid_values is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"min": 3, "max": 3}, "not less than"),
        ({"min": "a", "max": 3}, "not a number"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 3}, "whole numbers"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 3}, "above 0"),
        ({"distribution": "log_uniform", "min": 0, "max": 3000}, "log_uniform_values"),
        ({"distribution": "normal", "sigma": -1}, "sigma"),
        ({"distribution": "q_normal", "q": 0}, "q is above 0"),
        ({"distribution": "beta", "a": 0}, "a is above 0"),
        ({"distribution": "uniform", "min": 0}, "needs 'max'"),
        ({"values": []}, "at least one"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "their sum is 1"),
        ({"values": [1, 2], "probabilities": [1.0]}, "one number for each"),
    ],
)
def test_a_wrong_parameter_is_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        distributions.parse_parameter("x", spec)


# -- hyperband ---------------------------------------------------------------------------------------------------------


def test_bands_are_those_of_wandbs_documentation() -> None:
    by_min = early_stopping.parse_early_terminate({"type": "hyperband", "min_iter": 3})  # eta 3: 3, 9, 27, 81
    assert early_stopping.Hyperband(min_iter=1, eta=1.01).rung_epochs(50) == [1, 2]  # W&B makes a hundred bands: 1.01^99 is 2.7
    assert early_stopping.Hyperband(max_iter=27, s=10**12).rung_epochs(27) == [1, 3, 9], "those below one epoch end the list"
    assert by_min.rung_epochs(100) == [3, 9, 27, 81] and by_min.rung_epochs(81) == [3, 9, 27] and by_min.rung_epochs(3) == []
    by_max = early_stopping.parse_early_terminate({"type": "hyperband", "max_iter": 27, "s": 2})  # 27/3, 27/9
    assert by_max.rung_epochs(27) == [3, 9] and by_max.rung_epochs(5) == [3]
    assert early_stopping.parse_early_terminate({"type": "hyperband", "min_iter": 2, "eta": 1.5}).rung_epochs(12) == [
        2,
        3,
        4,
        6,
        10,
    ]
    assert (
        by_min.strict and not early_stopping.parse_early_terminate({"type": "hyperband", "min_iter": 3, "strict": False}).strict
    )


def test_a_run_goes_on_where_it_is_among_the_best_third_of_those_that_got_there() -> None:
    rule = early_stopping.parse_early_terminate({"type": "hyperband", "min_iter": 3})
    assert rule.should_continue(0.9, 0.9, [0.9])  # the first one always
    assert not rule.should_continue(0.9, 0.1, [0.5, 0.9])
    assert rule.should_continue(0.5, 0.5, [0.5, 0.9])
    assert rule.should_continue(0.6, 0.6, [0.9, 0.5, 0.6]) and not rule.should_continue(0.7, 0.7, [0.9, 0.5, 0.6, 0.7])
    lenient = early_stopping.parse_early_terminate({"type": "hyperband", "min_iter": 3, "strict": False})
    assert lenient.should_continue(0.9, 0.5, [0.5, 0.9])  # judged by its best epoch


def test_early_termination_refuses_what_has_no_band() -> None:
    for spec, said in [
        ({"type": "median"}, "type: hyperband"),
        ({"type": "hyperband", "max_iter": 9}, "max_iter and s"),
        ({"type": "hyperband", "max_iter": 2, "s": 3}, "below one epoch"),
        ({"type": "hyperband", "min_iter": 0}, "at least 1"),
        ({"type": "hyperband", "min_iter": 3, "eta": 1}, "above 1"),
        ({"type": "hyperband", "min_iter": 3, "strict": "yes"}, "true or false"),
    ]:
        with pytest.raises(UserError, match=said):
            early_stopping.parse_early_terminate(spec)


def test_a_range_can_be_merged_into_another() -> None:
    found = parsed(
        "method: random\nrun_cap: 2\nparameters:\n  model: {value: conv4}\n  epochs: {value: 0x10}\n"
        "  lr: &range {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}\n"
        "  weight_decay: {<<: *range, max: 1.0e-2}\n  batch_size: {<<: {min: 32}, max: 1_00}\n"
    )
    by_name = {parameter.name: parameter for parameter in found.parameters}
    assert by_name["weight_decay"].options == {"min": 1e-4, "max": 1e-2} and by_name["lr"].options["max"] == 0.1
    assert by_name["weight_decay"].distribution == "log_uniform_values" and by_name["epochs"].values == [16]
    assert (by_name["batch_size"].distribution, by_name["batch_size"].options) == ("int_uniform", {"min": 32, "max": 100})


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("{values: [" + "0.5, " * 10_000 + "1]}", "10,001 values are more than"),
        ("{distribution: [a]}", "unknown distribution"),
        ("{distribution: log_normal, mu: 1000}", "beyond all numbers"),
        ("{distribution: log_normal, mu: 0, sigma: 100}", "beyond all numbers"),
        ("{distribution: q_log_normal, mu: 0, q: 1.0e-320}", "beyond all numbers"),
        ("{distribution: uniform, min: -1.0e+308, max: 1.0e+308}", "far too large"),
        ("{min: 0.1, max: .inf}", "not a number"),
        ("{min: 0, max: " + "9" * 301 + "}", "digits"),
        ("{value: 2020-13-45}", "kind"),
        ("{distribution: {a: 1}, min: 0, max: 1}", "unknown distribution"),
    ],
)
def test_values_without_a_bound_are_refused(parameter: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parsed("method: random\nrun_cap: 2\nparameters: {model: {value: conv4}, lr: " + parameter + "}")


@pytest.mark.parametrize("run_cap", [10_001, 999_999_999_999, 10**299])
def test_more_trials_than_can_be_made_are_refused(run_cap: int) -> None:
    found = parsed(f"method: random\nrun_cap: {run_cap}\nparameters: {{model: {{value: conv4}}, lr: {{min: 0.1, max: 0.2}}}}")
    with pytest.raises(UserError, match="at most 10,000 trials"):
        list_known_trials(found)
    grid = parsed(f"method: grid\nrun_cap: {run_cap}\nparameters: {{model: {{value: conv4}}, lr: {{values: [0.1, 0.2]}}}}")
    assert len(list_known_trials(grid)) == 2
