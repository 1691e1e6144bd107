"""One run from its configuration to its record: what it leaves behind, how it ends, and that it goes on bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifar.config import resolve as configuration
from cifar.errors import UserError
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.loop import RunHooks
from helpers.run_configs import FULL, TINY
from helpers.weights import hash_run


def trained(runs: Path, values: dict[str, Any], run_id: str = "", hooks: RunHooks | None = None) -> RunDir:
    config = configuration.resolve_config(values)
    record = run.create_run(config, runs, run.RunMetadata(run_id=run_id))
    run.train_run(config, record, hooks=hooks)
    return record


def test_a_finished_run_leaves_its_whole_record(runs: Path) -> None:
    record = trained(runs, {**TINY, "test": "final", "tta": "flip"})
    assert record.state == "finished"
    names = {path.name for path in record.path.iterdir()}
    assert {
        "run.json",
        "config.json",
        "environment.json",
        "labels.json",
        "metrics.jsonl",
        "summary.json",
        "weights.pt",
    } <= names
    assert "checkpoint.pt" not in names and not [name for name in names if name.startswith(".")]
    rows, labels = list(record.read_rows()), record.read_json("labels")
    assert len(rows) == 2
    for key in rows[-1]:
        assert key in ("epoch", "step") or key.split("/")[0] in labels or key in labels, key
    summary, about = record.read_json("summary"), record.read_json("run")
    assert summary["val/acc"] == rows[-1]["val/acc"] and summary["test/views"] == 2
    assert about["dataset"] == "stand-in" and not about["official"] and "stand-in" in about["name"]
    assert configuration.resolve_config(record.read_json("config")).to_dict() == record.read_json("config")
    predictions = np.load(record.path / "predictions.npz")
    assert str(predictions["split"]) == "test" and len(predictions["label"]) == 10000
    assert (predictions["label"] == predictions["predicted"]).mean() == pytest.approx(summary["test/acc_one_view"])
    worst = predictions["worst_index"]
    assert (predictions["label"][worst] != predictions["predicted"][worst]).all()


@pytest.mark.slow  # three evaluations of 10,000 images, with six views
def test_unsure_images_alone_get_all_views_and_the_plain_figure_stands_beside(runs: Path) -> None:
    values = {**TINY, "epochs": 1, "test": "final", "tta": "flip+shift"}
    plain = trained(runs, values).read_json("summary")
    unsure = trained(runs, {**values, "tta_share": 0.2, "eval_batch_size": 500}).read_json("summary")
    assert plain["test/views"] == 6 and unsure["test/views"] == 3 and "test/acc_all_views" not in plain
    assert unsure["test/acc_all_views"] == pytest.approx(plain["test/acc"], abs=3e-4)
    assert unsure["test/acc_one_view"] == pytest.approx(plain["test/acc_one_view"], abs=3e-4)
    assert unsure["test/acc"] != unsure["test/acc_one_view"]


def test_without_a_cut_there_are_no_validation_rows_and_the_test_set_is_not_touched(runs: Path) -> None:
    record = trained(runs, {**TINY, "val_size": 0, "epochs": 1})
    assert not [key for row in record.read_rows() for key in row if key.startswith(("val/", "test/"))]
    assert not [key for key in record.read_json("summary") if key.startswith(("val/", "test/"))]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(runs: Path) -> None:
    first, second = trained(runs, FULL), trained(runs, FULL)
    assert hash_run(first) == hash_run(second)
    assert hash_run(first) != hash_run(trained(runs, {**FULL, "seed": 1}))


def test_probes_change_nothing_in_a_run(runs: Path) -> None:
    watched, bare = trained(runs, {**FULL, "probe_every": 1}), trained(runs, {**FULL, "probes": "none"})
    assert hash_run(watched)[0] == hash_run(bare)[0]
    for row, plain in zip(watched.read_rows(), bare.read_rows(), strict=True):
        assert {k: row[k] for k in plain if not k.startswith("system/")} == {
            k: v for k, v in plain.items() if not k.startswith("system/")
        }


def test_frozen_parameters_are_skipped_in_steps_without_probes(runs: Path) -> None:
    values = {**TINY, "model": "airbench94", "optimizer": "muon", "whiten_until": 0.4, "epochs": 3}
    watched, bare = trained(runs, {**values, "probe_every": 1}), trained(runs, {**values, "probes": "none"})
    assert hash_run(watched)[0] == hash_run(bare)[0], "with a learning rate of zero gradients change nothing"


@pytest.mark.slow
def test_a_run_that_compiles_nothing_does_not_import_the_compiler(runs: Path) -> None:
    code = "import sys; from cifar.cli.app import main; print(main(sys.argv[1:]), 'torch._dynamo' in sys.modules)"
    pairs = [f"{key}={value}" for key, value in TINY.items()]
    command = [sys.executable, "-c", code, "train", *pairs, "max_steps=1", "--wandb", "disabled"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("optimizer", "keep"),
    [
        ("sgd", 1.0),
        ("adam", 1.0),
        ("muon", 0.7),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("sgd", 0.7), ("adam", 0.7), ("muon", 1.0))),
        *(pytest.param("adamw", keep, marks=pytest.mark.slow) for keep in (1.0, 0.7)),
    ],
)
def test_a_run_that_is_interrupted_at_any_step_goes_on_bit_for_bit(runs: Path, optimizer: str, keep: float) -> None:
    values = {key: value for key, value in FULL.items() if key != "lr"} | {"optimizer": optimizer, "keep": keep}
    values |= {"mixup": 0.0} if keep < 1 else {}
    whole = trained(runs, values)
    config = configuration.resolve_config(values)
    record = run.create_run(config, runs)
    rng, pieces = random.Random(optimizer), 0
    while record.read_json("status").get("state") != "finished":
        left = rng.randint(1, 6 if keep == 1 else 3)

        def stop() -> str | None:
            nonlocal left
            left -= 1
            return "interrupted" if left == 0 else None

        run.train_run(config, record, hooks=RunHooks(poll_stop=stop))
        pieces += 1
    assert pieces > 2
    assert hash_run(record) == hash_run(whole)


def test_a_run_that_is_killed_after_its_last_epoch_only_ends(runs: Path) -> None:
    """Its checkpoint is that of an epoch that does not come any more."""
    killed = RunDir(runs / "killed")

    def on_epoch(row: dict[str, Any]) -> bool:
        if row["epoch"] == FULL["epochs"]:  # what a kill at this moment would leave
            shutil.copytree(runs / "whole", killed.path)
        return True

    whole = trained(runs, {**FULL, "checkpoint_every": 3}, "whole", RunHooks(should_continue=on_epoch))
    assert (killed.path / "checkpoint.pt").exists() and killed.state == "running"
    config = configuration.resolve_config(killed.read_json("config"))
    state = run.train_run(config, killed, hooks=RunHooks(should_continue=lambda row: pytest.fail("trains on")))
    assert state == killed.state == "finished" and hash_run(killed) == hash_run(whole)
    assert killed.read_json("summary")["epochs"] == FULL["epochs"] and not (killed.path / "checkpoint.pt").exists()


def test_a_run_that_is_killed_while_it_is_pruned_trains_no_further(runs: Path) -> None:
    killed = RunDir(runs / "killed")
    steps = json.loads((trained(runs, {**FULL, "epochs": 1}, "one").path / "metrics.jsonl").read_text().splitlines()[0])["step"]

    def on_epoch(row: dict[str, Any]) -> bool:
        if row["epoch"] == 2:  # what a kill between the answer and its writing would leave
            shutil.copytree(runs / "whole", killed.path)
        return bool(row["epoch"] != 2)

    whole = trained(runs, {**FULL, "epochs": 3, "checkpoint_every": steps}, "whole", RunHooks(should_continue=on_epoch))
    assert whole.state == "pruned" and killed.state == "running"
    asked: list[int] = []
    config = configuration.resolve_config(killed.read_json("config"))
    hooks = RunHooks(should_continue=lambda row: bool(asked.append(row["epoch"])))
    state = run.train_run(config, killed, hooks=hooks)
    assert state == killed.state == "pruned" and asked == [2]
    assert (
        list(killed.read_rows()) == list(whole.read_rows())
        and killed.read_json("status")["reason"] == whole.read_json("status")["reason"]
    )


def test_a_non_finite_loss_ends_the_run_as_diverged(runs: Path) -> None:
    record = trained(runs, {**TINY, "optimizer": "sgd", "lr": 1e30})
    status = record.read_json("status")
    assert status["state"] == "diverged" and "loss" in status["reason"]
    assert record.read_json("summary") == {}


def test_a_model_over_the_budget_is_skipped_before_it_costs_anything(runs: Path) -> None:
    record = trained(runs, {**TINY, "max_macs": 1000.0})
    assert record.state == "skipped" and "budget" in record.read_json("status")["reason"]
    assert not list(record.read_rows())


def test_should_continue_can_prune(runs: Path) -> None:
    record = trained(runs, {**TINY, "epochs": 3}, hooks=RunHooks(should_continue=lambda row: row["epoch"] < 2))
    assert record.state == "pruned" and len(list(record.read_rows())) == 2


def test_an_exception_becomes_the_status(runs: Path) -> None:
    def broken(row: dict[str, Any]) -> bool:
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError):
        trained(runs, TINY, "broken", RunHooks(should_continue=broken))
    record = RunDir(runs / "broken")
    assert record.state == "failed" and "planted" in record.read_json("status")["reason"]
    assert "planted" in (record.path / "traceback.txt").read_text()


@pytest.mark.parametrize("values", [{"cutmix": 1.0}, {"ema": 0.9}, {"flip": "alternating", "crop_padding": "reflect"}])
def test_every_ingredient_trains(runs: Path, values: dict[str, Any]) -> None:
    assert trained(runs, {**TINY, "epochs": 1, **values}).state == "finished"


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def start(record: RunDir) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cifar", "train", "--wandb", "disabled", "--resume", record.id]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def wait_for(path: Path, size: int, process: subprocess.Popen[bytes]) -> None:
    while (not path.exists() or path.stat().st_size <= size) and process.poll() is None:
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_nine_at_random_times(runs: Path) -> None:
    """Seven kills of one run: before the first checkpoint, between a row and its checkpoint, and at random times."""
    values = {**FULL, "epochs": 5, "train_size": 2048, "checkpoint_every": 9, "model": "resnet20", "width": 4}
    whole = trained(runs, values)
    config = configuration.resolve_config(values)
    record = run.create_run(config, runs, run.RunMetadata(run_id="killed"))
    metrics, checkpoint = record.path / "metrics.jsonl", record.path / "checkpoint.pt"
    rng, torn, kills = random.Random(), 0, 0

    process = start(record)
    while record.read_json("status").get("state") != "running":
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)  # before the first checkpoint
    process.wait()
    kills += 1
    while record.state != "finished":
        process = start(record)
        if kills in (1, 4):  # between a metrics row and the checkpoint that knows of it
            wait_for(metrics, record.metrics_bytes(), process)
        elif kills < 7:
            known = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == known):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
        else:
            process.wait()
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if checkpoint.exists():
            torn += torch.load(checkpoint, weights_only=True)["metrics_bytes"] < record.metrics_bytes()
    assert kills >= 7 and torn >= 1, (kills, torn)
    assert hash_run(record) == hash_run(whole)


# -- what cannot be gone on with ---------------------------------------------------------------------------------------


def begun(runs: Path) -> RunDir:
    """A run that was interrupted in its second epoch."""
    config = configuration.resolve_config({**FULL, "epochs": 3})
    record, steps = run.create_run(config, runs), iter(range(100))
    run.train_run(config, record, hooks=RunHooks(poll_stop=lambda: "interrupted" if next(steps) == 10 else None))
    assert len(list(record.read_rows())) == 1 and record.state == "interrupted"
    return record


def emptied(record: RunDir) -> None:
    (record.path / "checkpoint.pt").write_bytes(b"")


def flipped(record: RunDir) -> None:
    path = record.path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def not_ours(record: RunDir) -> None:
    torch.save({"weights": torch.zeros(3)}, record.path / "checkpoint.pt")


def no_mapping(record: RunDir) -> None:
    torch.save([1, 2], record.path / "checkpoint.pt")


def cut_short(record: RunDir) -> None:
    (record.path / "metrics.jsonl").write_bytes(b"")


def scribbled_on(record: RunDir) -> None:
    path = record.path / "metrics.jsonl"
    path.write_bytes(b"XXXX" + path.read_bytes()[4:])


@pytest.mark.parametrize("damage", [emptied, flipped, not_ours, no_mapping, cut_short, scribbled_on])
def test_damage_is_named_before_training_and_nothing_is_lost(runs: Path, damage: Any) -> None:
    record = begun(runs)
    damage(record)
    before = {path.name: path.read_bytes() for path in record.path.iterdir()}
    with pytest.raises(UserError, match=r"delete|restore"):
        run.train_run(configuration.resolve_config(record.read_json("config")), record)
    assert {path.name: path.read_bytes() for path in record.path.iterdir()} == before


def test_a_run_that_cannot_begin_leaves_no_folder(runs: Path) -> None:
    config = configuration.resolve_config({**TINY, "device": "cuda:99"})
    record = run.create_run(config, runs)
    with pytest.raises(UserError, match="cannot be used"):
        run.train_run(config, record)
    assert not record.path.exists()
