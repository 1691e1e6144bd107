"""Several processes that train one network: they compute what one computes, keep one record, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar.config import resolve as configuration
from cifar.errors import UserError
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.distributed import SINGLE_PROCESS, DistributedContext, init_distributed
from helpers.paths import ROOT
from helpers.processes import find_alive, list_descendants, wait_until
from helpers.run_configs import RECIPES
from helpers.weights import hash_run

TINY: dict[str, Any] = {
    "dataset": "stand-in", "epochs": 2, "batch_size": 64, "train_size": 256, "val_size": 200, "probe_every": 2,
    "threads": 1, "device": "cpu", "optimizer": "sgd", "lr": 0.02, "mixup": 0.2, "cutout": 8, "label_smoothing": 0.1,
}  # fmt: skip
PLAIN: dict[str, Any] = {**TINY, "model": "worksheet1"}  # without BatchNorm
NORMED: dict[str, Any] = {**TINY, "model": "conv", "width": 8, "ema": 0.9}
PAIRS = [f"{key}={value}" for key, value in NORMED.items()]
TOGETHER = """
import json, sys
from pathlib import Path
from cifar.config.resolve import resolve_config
from cifar.training import run
from cifar.training.distributed import init_distributed
with init_distributed() as context:
    for name, values in json.loads(sys.argv[1]).items():
        settings = resolve_config(values)
        metadata = run.RunMetadata(run_id=f"{name}-{context.rank}")  # each rank has a run of its own, to compare them
        run.train_run(settings, run.create_run(settings, Path(sys.argv[2]), metadata), context=context)
"""
CODES = """
import os, sys
from pathlib import Path
from cifar.cli.app import main
code = main([word.replace("RANK", os.environ["RANK"]) for word in sys.argv[2:]])
Path(sys.argv[1] + os.environ["RANK"]).write_text(str(code))
sys.exit(code)
"""


def started(*arguments: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """`count` processes as torchrun starts them; without it, none is ended because another one is."""
    for port in random.sample(range(20_000, 32_000), 50):  # below those that a client may be given until rank 0 listens
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            break
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip


def ended(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    said = [process.communicate(timeout=200)[0] for process in processes]
    return [process.returncode for process in processes], said


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}  # a script does not look in the folder it is started from
    return subprocess.Popen(command, cwd=ROOT, env=ours, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def only(runs: Path) -> RunDir:
    (record,) = [RunDir(path.parent) for path in runs.glob("*/run.json")]
    return record


def weights(record: RunDir) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(record.path / "weights.pt", weights_only=True)
    return found


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_and_their_weights_stay_equal_bit_for_bit(runs: Path) -> None:
    sharded = {**PLAIN, "mixup": 0.0, "augment_policy": "trivialaugment"}  # each rank makes its own images alone
    together = {"plain": PLAIN, "normed": NORMED, "sharded": sharded, "recipes": RECIPES}
    codes, said = ended(started("-c", TOGETHER, json.dumps(together), str(runs)))
    assert codes == [0, 0], said
    for name in together:
        assert hash_run(RunDir(runs / f"{name}-0")) == hash_run(RunDir(runs / f"{name}-1"))
    for name in ("plain", "sharded"):
        settings = configuration.resolve_config(together[name])
        alone, record = run.create_run(settings, runs), RunDir(runs / f"{name}-0")
        run.train_run(settings, alone)
        for layer, value in weights(record).items():
            one = weights(alone)[layer]
            assert (value - one).norm() <= 1e-5 * one.norm(), layer
        for two, single in zip(record.read_rows(), alone.read_rows(), strict=True):
            for key in [key for key in single if not key.startswith("system/")]:
                assert two[key] == pytest.approx(single[key], rel=1e-3, abs=1e-6), key
            assert two["train/acc"] == single["train/acc"]  # every image of the epoch counted once


def test_shards_make_the_whole_batch_and_a_single_process_changes_nothing() -> None:
    images, labels = torch.randn(12, 3, 4, 4), torch.arange(12)
    for size in (1, 2, 3, 4):
        shares = [DistributedContext(rank, size).shard_batch(images, labels) for rank in range(size)]
        assert all(len(part) == 12 // size for share in shares for part in share)
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)
    with init_distributed() as context:
        assert context is SINGLE_PROCESS and context.shard_batch(images)[0] is images and context.describe() == {}


def test_processes_that_cannot_meet_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="torchrun"), init_distributed():
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["seed=RANK", "epochs=3"], ["seed: 0, 1", "same values"]),
        (["batch_size=63"], ["batch_size 63", "batch_size=62 or 64"]),
        (["device=cuda:0"], ["device=cuda:0", "device=cuda"]),
        (["keep=0.5", "mixup=0"], ["keep=0.5", "without torchrun"]),
    ],
)
def test_what_ranks_cannot_do_together_is_refused_on_all_of_them(
    runs: Path, tmp_path: Path, pairs: list[str], words: list[str]
) -> None:
    codes, said = ended(started("-c", CODES, str(tmp_path / "code"), "train", *PAIRS, *pairs, "--wandb", "disabled"))
    assert codes == [2, 2], said
    for text in said:
        assert "Traceback" not in text and all(word in text for word in words), text
    assert not list(runs.glob("*"))


@pytest.mark.slow
def test_torchrun_makes_one_record_and_one_wandb_run(runs: Path) -> None:
    process = torchrun("-m", "cifar", "train", *PAIRS, "--wandb", "offline")
    (code,), (said,) = ended([process])
    record = only(runs)
    assert code == 0 and record.state == "finished", said
    assert [row["epoch"] for row in record.read_rows()] == [1, 2] and said.count("epoch   1/2") == 1
    assert said.count(f"folder    {record.path}") == 1 and record.read_json("environment")["ranks"] == 2
    assert len(list(runs.rglob("*.wandb"))) == 1 and list(record.path.glob("pictures/*.png"))
    assert [path.name for path in runs.iterdir()] == [record.id]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs here: captured steps of several GPUs are NOT checked")
@pytest.mark.parametrize("model", ["worksheet1", "resnet20"])  # without and with BatchNorm
def test_captured_steps_of_two_gpus_are_those_that_are_not_captured(
    runs: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_CAPTURE_RANKS", "on")
    values = {**TINY, "model": model, "device": "cuda", "epochs": 3, "precision": "fp32", "deterministic": "true"}
    found = {}
    for capture in ("true", "false"):
        for mixup in ("0.2", "0"):  # the whole batch, and a shard of it alone
            folder = tmp_path / f"{capture}-{mixup}"
            pairs = [f"{key}={value}" for key, value in {**values, "capture": capture, "mixup": mixup}.items()]
            process = torchrun("-m", "cifar", "train", *pairs, "--runs-dir", str(folder), "--wandb", "disabled")
            (code,), (said,) = ended([process])
            assert code == 0, said
            step = only(folder).read_json("environment")["step"]
            assert step["captured"] is (capture == "true"), step["not_captured_because"]
            found[capture, mixup] = weights(only(folder))
    for mixup in ("0.2", "0"):
        for name, value in found["true", mixup].items():
            other = found["false", mixup][name].float()
            assert (value.float() - other).norm() <= 1e-4 * other.norm() + 1e-6, name


@pytest.mark.slow
def test_a_signal_to_torchrun_writes_a_checkpoint_and_the_run_goes_on_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    long = [*PAIRS, "epochs=40", "--wandb", "disabled"]
    process = torchrun("-m", "cifar", "train", *long)
    assert ended([process])[0] == [0]
    whole = hash_run(only(runs))
    again = tmp_path / "again"
    script = tmp_path / "codes.py"
    script.write_text(CODES)
    process = torchrun(str(script), str(tmp_path / "code"), "train", *long, "--runs-dir", str(again))
    wait_until(lambda: [path for path in again.glob("*/metrics.jsonl") if path.stat().st_size])
    children = list_descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    ended([process])
    record = only(again)
    assert record.state == "preempted" and (record.path / "checkpoint.pt").exists() and not find_alive(children)
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert 0 < len(list(record.read_rows())) < 40
    process = torchrun("-m", "cifar", "train", "--resume", record.id, "--runs-dir", str(again), "--wandb", "disabled")
    (code,), (said,) = ended([process])
    assert code == 0 and hash_run(record) == whole, said


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_run_may_go_on(runs: Path) -> None:
    processes = started("-m", "cifar", "train", *PAIRS, "epochs=1000", "checkpoint_every=2", "--wandb", "disabled")
    wait_until(lambda: [path for path in runs.glob("*/checkpoint.pt") if path.stat().st_size])
    processes[1].kill()
    codes, said = ended(processes)
    record = only(runs)
    assert codes == [2, -signal.SIGKILL] and "another process of this run is gone" in said[0] and "Traceback" not in said[0]
    assert record.state == "interrupted" and (record.path / "checkpoint.pt").exists()
    codes, said = ended(started("-m", "cifar", "train", "--resume", record.id, "epochs=3"))
    assert codes == [2, 2] and all("keeps its values" in text for text in said), said
