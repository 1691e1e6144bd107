"""A recorded configuration is completed with what this version would have written for the same run."""

from __future__ import annotations

from typing import Any

import pytest

from cifar import registry
from cifar.config.recorded import LATER_SETTINGS, fill_config
from cifar.config.resolve import resolve_config

# Keys of parts that are newer than the first version, with what was done before they were there.
LATER_KEYS = {"drop_path": 0.0, "se": 0, "ns_together": False}
# Parts that came with the key, so that no run of them lacks it.
NEW_PARTS = {
    "bottleneck_resnet", "resnet164", "se_resnet20", "se_resnet56", "se_resnet110", "se_resnet164", "efficientnet",
    "efficientnet_b0", "darts", "darts_v2", "fairdarts_a", "mobilenet_v3", "mobilenet_v3_large", "mobilenet_v3_small",
}  # fmt: skip


def test_settings_that_came_later_have_the_value_that_changes_nothing() -> None:
    assert LATER_SETTINGS == {
        "keep": 1.0, "histograms": "on", "capture": True, "random_erasing": 0.0, "augment_policy": "none",
        "randaugment_num_ops": 2, "randaugment_magnitude": 9, "contrast": 0.0, "brightness": 0.0, "teacher": "",
        "distill_weight": 0.5, "distill_temperature": 4.0, "tta_share": 1.0, "eval_batch_size": 0, "cudnn_trials": 10,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_each_part_gets_the_keys_that_it_takes_and_no_others(kind: str) -> None:
    entries = registry.models if kind == "model" else registry.optimizers
    for entry in entries:
        if entry.is_plugin or entry.name in NEW_PARTS:
            continue
        found = {key: value for key, value in fill_config({kind: entry.name}).items() if key in LATER_KEYS}
        wanted = {key: value for key, value in LATER_KEYS.items() if key in entry.keys}
        assert found == wanted == {key: entry.keys[key].default for key in wanted}, entry.name


@pytest.mark.parametrize(
    "values", [{"model": "resnet8", "optimizer": "muon"}, {"model": "airbench94", "optimizer": "sgd"}, {"model": "wrn_16_4"}]
)
def test_an_earlier_record_is_completed_to_the_same_configuration(values: dict[str, Any]) -> None:
    config = resolve_config(values).to_dict()
    earlier = {key: value for key, value in config.items() if key not in {*LATER_SETTINGS, *LATER_KEYS}}
    assert len(earlier) < len(config) and fill_config(earlier) == config
    assert list(fill_config(config).items()) == list(config.items()), "what is there stays, in its order"


def test_values_that_are_there_win_and_old_ways_of_writing_become_the_new_one() -> None:
    values = {"model": "resnet8", "keep": 0.5, "se": 16, "compile": False, "histograms": True}
    filled = fill_config(values)
    assert filled | {"keep": 0.5, "se": 16, "drop_path": 0.0, "compile": "off", "histograms": "on"} == filled
    assert values["compile"] is False


def test_what_no_run_lacks_is_not_made_up() -> None:
    assert not {"model", "optimizer", "epochs", "lr", "batch_size"} & fill_config({}).keys()
