"""Configuration: layers merge in order, every value is checked, every mistake is answered with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar import registry
from cifar.config.resolve import explain_config, flatten_values, merge_layers, parse_pairs, resolve_config
from cifar.config.shipped import shipped_folder
from cifar.errors import UserError

EXPERIMENTS = sorted(shipped_folder("experiments").glob("*.yaml"))


def test_defaults_resolve_and_are_frozen() -> None:
    settings = resolve_config({})
    assert settings.model == "worksheet1" and settings.to_dict()["lr"] == 1e-3
    with pytest.raises(Exception, match="frozen"):
        settings.model = "x"


def test_later_layers_win_and_the_experiment_comes_first() -> None:
    layers = [{"lr": 1.0, "experiment": "worksheet1"}, {"lr": 0.5}, {"lr": 0.25, "epochs": 2}]
    settings = resolve_config(*layers)
    assert (settings.to_dict()["lr"], settings.epochs, settings.val_size) == (0.25, 2, 0)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3), max_size=4))
def test_merging_is_what_updating_is(layers: list[dict[str, int]]) -> None:
    expected: dict[str, int] = {}
    for layer in layers:
        expected.update(layer)
    assert merge_layers(*layers) == expected


def test_a_config_survives_json() -> None:
    settings = resolve_config({"experiment": "resnet20", "lr": 0.3, "probes": "none"})
    assert resolve_config(json.loads(json.dumps(settings.to_dict()))) == settings


def test_mappings_flatten_to_leaf_names() -> None:
    assert flatten_values({"optimizer": {"optimizer": "sgd", "momentum": 0.8}, "a": {"b": {"c": 1}}}) == {
        "optimizer": "sgd",
        "momentum": 0.8,
        "c": 1,
    }
    with pytest.raises(UserError, match="set twice"):
        flatten_values({"x": {"lr": 1}, "y": {"lr": 2}})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "resnt20"}, "did you mean 'resnet20'"),
    ({"lrr": 1}, "unknown key 'lrr': did you mean 'lr'"),
    ({"optimizer": "adam", "momentum": 0.9}, "optimizer 'adam' does not take 'momentum'"),
    ({"optimizer": "adam", "momentum": 0.9}, r"optimizer: \{values:"),
    ({"model": "resnet20", "depth": 56}, "model 'resnet20' does not take 'depth'"),
    ({"schedule": "constant", "final_lr": 0.1}, "schedule 'constant' does not take 'final_lr'"),
    ({"lr": "fast"}, "lr = 'fast'"),
    ({"epochs": 0}, "epochs = 0"),
    ({"epochs": 1.5}, "epochs = 1.5"),
    ({"epochs": True}, "epochs = True"),
    ({"compile": 1}, "compile = 1"),
    ({"flip": "sometimes"}, "flip = 'sometimes'"),
    ({"model": 3}, "model: expected a name"),
    ({"probes": "gradient_flaw"}, "did you mean 'gradient_flow'"),
    ({"mixup": 0.2, "cutmix": 1.0}, "alternatives"),
    ({"train_size": 50000}, "only 45000 images"),
    ({"train_size": 100, "batch_size": 128}, "more than the images"),
    ({"keep": 0.001}, "batch_size 128 is more than .*: keep 0.001 leaves 45 an epoch"),
    ({"keep": 0.5, "cutmix": 1.0}, "keep ranks images by their losses"),
    ({"keep": 0}, "keep = 0"),
    ({"augment_policy": "autoaugment"}, "augment_policy = 'autoaugment'.*'none', 'trivialaugment' or 'randaugment'"),
    ({"randaugment_magnitude": 31}, "randaugment_magnitude = 31: .*30"),
    ({"randaugment_num_ops": 0}, "randaugment_num_ops = 0"),
    ({"random_erasing": 1.5}, "random_erasing = 1.5"),
    ({"model": "resnet20", "drop_path": 1.0}, "drop_path = 1.0"),
    ({"model": "wrn", "se": -1}, "se = -1"),
    ({"model": "conv", "drop_path": 0.1}, "model 'conv' does not take 'drop_path'"),
    ({"experiment": "worksheet3"}, "did you mean 'worksheet1'|did you mean 'worksheet2'"),
]


@pytest.mark.parametrize(("values", "said"), BAD, ids=lambda value: str(value)[:40])
def test_a_mistake_is_answered(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        resolve_config(values)
    assert "\n" not in str(caught.value)


def test_a_whole_float_is_an_int() -> None:
    assert resolve_config({"batch_size": 64.0}).batch_size == 64  # JSON and W&B's server write integers so


def test_pairs() -> None:
    assert parse_pairs(["lr=1e-3", "--batch-size=64", "model=resnet20", "x=a=b"]) == {
        "lr": 1e-3,
        "batch_size": 64,
        "model": "resnet20",
        "x": "a=b",
    }
    for bad in ("lr", "=1", "a=[1"):
        with pytest.raises(UserError):
            parse_pairs([bad])


def test_explain_tells_where_each_value_comes_from() -> None:
    rows = {
        name: (value, origin)
        for name, value, origin, _ in explain_config([("A", {"experiment": "worksheet1"}), ("B", {"lr": 0.5})])
    }
    assert rows["lr"] == (0.5, "B") and rows["seed"] == (0, "default") and rows["experiment"] == ("worksheet1", "A")
    assert rows["epochs"][1].endswith("worksheet1.yaml")
    assert set(rows) == set(resolve_config({"experiment": "worksheet1", "lr": 0.5}).to_dict())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_opens_with_its_claim(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert "Claim:" in text and "MACs" in text and f"python -m cifar train --experiment {path.stem}" in text
    assert all(len(line) <= 128 for line in path.read_text().splitlines())
    settings = resolve_config({"experiment": path.stem})
    assert settings.test == "final" and settings.val_size == 0, "a run that is quoted trains on all images and scores test once"


def test_every_family_has_an_experiment() -> None:
    """A family is a file of models/; `conv` holds the networks of the quickstart only, resnet8 belongs to resnet."""
    used = {registry.models[resolve_config({"experiment": path.stem}).model].file for path in EXPERIMENTS}
    families = {entry.file for entry in registry.models}
    assert {Path(file).stem for file in families - used} <= {"conv"}


@pytest.mark.parametrize(
    "values",
    [{"seed": 10**30}, {"probes": "gradient_flow,gradient_flow"}, {"deterministic": "true"}, {"lr": "nan", "optimizer": "sgd"}],
)
def test_further_mistakes_are_answered(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        resolve_config(values)


def test_whole_numbers_are_read_as_people_write_them() -> None:
    assert parse_pairs(["a=010", "b=1:30", "c=-7", "d=0", "e=0x10"]) == {
        "a": "010",
        "b": "1:30",
        "c": -7,
        "d": 0,
        "e": 16,
    }
