"""Runs of earlier versions are seeds of the same point as runs of now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifar.config.resolve import resolve_config
from cifar.report.aggregate import compare_runs
from cifar.report.load import RunLoader
from helpers.fake_runs import write

VALUES = {"model": "resnet8", "optimizer": "muon", "lr": 0.1, "epochs": 2}
# What a config.json of this network did not have before these settings came.
NEWER_KEYS = (
    "random_erasing", "augment_policy", "randaugment_num_ops", "randaugment_magnitude", "contrast", "brightness", "teacher",
    "distill_weight", "distill_temperature", "tta_share", "eval_batch_size", "cudnn_trials", "drop_path", "se", "ns_together",
)  # fmt: skip


def write_run(runs: Path, seed: int, without: tuple[str, ...] = (), **changes: Any) -> None:
    config = resolve_config({**VALUES, "seed": seed, **changes}).to_dict()
    record = write(runs, f"run{seed}", model="resnet8", seed=seed, epochs=2, layers=1, accuracy=0.5 + 0.1 * seed)
    assert set(without) <= set(config)
    record.write_json("config", {key: value for key, value in config.items() if key not in without})


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_run_of_before_and_one_of_now_are_one_point(tmp_path: Path, is_cached: bool) -> None:
    write_run(tmp_path, 0, NEWER_KEYS)
    write_run(tmp_path, 1)
    write_run(tmp_path, 2, (*NEWER_KEYS, "keep", "capture", "histograms"))
    for _ in range(1 + is_cached):  # the second time it comes from the cache
        loader = RunLoader(min_cached=1 if is_cached else 99, settle_seconds=-1.0)
        runs = [run for _, run in loader.load_all(sorted(tmp_path.glob("run*"))) if not isinstance(run, Exception)]
        (point,) = compare_runs(runs).points
        assert point.num_seeds == 3 and point.accuracies == pytest.approx((0.5, 0.6, 0.7))
        assert list(point.values) == ["model"]
    assert (tmp_path / ".cache" / "runs.npz").exists() == is_cached


@pytest.mark.parametrize("changes", [{"se": 4}, {"random_erasing": 0.25}, {"ns_together": True}, {"cudnn_trials": 0}])
def test_a_new_setting_that_is_used_makes_another_point(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_run(tmp_path, 0, NEWER_KEYS)
    write_run(tmp_path, 1, **changes)
    runs = [run for _, run in RunLoader().load_all(sorted(tmp_path.glob("run*"))) if not isinstance(run, Exception)]
    points = sorted(compare_runs(runs).points, key=lambda point: point.mean)
    ((key, value),) = changes.items()
    default = resolve_config(VALUES).to_dict()[key]
    assert [point.values[key] for point in points] == [default, value], "the run of before has the default, and not nothing"
