"""The benchmarks: their statistics against oracles, the peers do the same task, and every command runs at toy size."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import __main__ as bench
from benchmarks import fleet_profile, many_gpus, replay, stats, table, trials
from benchmarks.common import Missing, Peer, Result, number
from benchmarks.peers import airbench
from cifar import data
from helpers.paths import ROOT

ABOUT = {
    "device": "a device", "cores": 2, "versions": {"torch": "2.11"}, "official": True, "date": "2026-01-01", "smoke": False,
    "command": "python -m benchmarks.thing",
}  # fmt: skip


# -- statistics --------------------------------------------------------------------------------------------------------


def test_a_description_is_that_of_the_standard_library() -> None:
    values = [3.0, 1.0, 2.0, 10.0, 4.0, 4.5, 0.5]
    found = stats.describe(values)
    assert found["n"] == 7 and found["median"] == statistics.median(values) and found["range"] == [0.5, 10.0]
    assert found["std"] == pytest.approx(statistics.stdev(values))
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    assert found["spread"] == pytest.approx([quartiles[0], quartiles[2]])
    assert stats.describe([2.0])["std"] is None


@pytest.mark.parametrize("n", [5, 9, 21])
def test_the_interval_of_a_median_is_that_of_all_resamples(n: int) -> None:
    """Of an odd number of values, the chance of a resample's median at or below the k-th is a binomial tail, exactly."""

    def below(k: int) -> float:
        share = k / n
        return sum(math.comb(n, j) * share**j * (1 - share) ** (n - j) for j in range((n + 1) // 2, n + 1))

    values = sorted(np.random.default_rng(n).lognormal(size=n).tolist())
    low = next(value for k, value in enumerate(values, 1) if below(k) >= 0.025)
    high = next(value for k, value in enumerate(values, 1) if below(k) >= 0.975)
    assert stats.median_interval(values) == pytest.approx((low, high))
    assert stats.median_interval(values[:1]) is None


def test_a_drift_that_both_of_a_pair_share_does_not_show() -> None:
    drift = [1.0, 5.0, 2.0, 9.0]
    found = stats.ratio([3 * d for d in drift], drift)
    assert found["ratio"] == pytest.approx(3) and found["interval"] == pytest.approx([3, 3]) and found["n"] == 4
    apart = stats.ratio([8.0, 9.0, 10.0], [3.0])
    assert apart["ratio"] == 3 and apart["interval"] is None


def test_numbers_have_three_digits_and_percents_four() -> None:
    assert [number(v) for v in (94.062, 0.01234, 1.5, 1234.5, 0.0, 123.4)] == ["94.06", "0.0123", "1.50", "1,234", "0", "123"]


# -- claims and the table ----------------------------------------------------------------------------------------------


def result(**about: Any) -> Result:
    return Result("4", "thing", "what it is", {**ABOUT, **about})


def test_a_claim_compares_the_right_way_round() -> None:
    found = result()
    ours = found.add("ours", "time", "s", [1.0, 1.0, 1.0])
    peer = found.add("theirs", "time", "s", [3.0, 4.0, 5.0])
    found.claim("times faster", ours, peer, at_least=4.0)
    found.claim("time, ours / theirs", ours, peer, inverse=True, at_most=0.2)
    found.claim("time", ours, at_most=0.5)
    found.claim("time beside theirs", ours, peer, ratio=False, at_most=1.0)
    assert [claim.get("ratio") for claim in found.claims] == [4.0, 0.25, None, None]
    assert [claim["met"] for claim in found.claims] == [True, False, False, True]
    assert [claim["wanted"] for claim in found.claims] == ["≥ 4", "≤ 0.2", "≤ 0.5 s", "≤ 1 s"]
    toy = result(smoke=True)
    toy.claim("time", toy.add("ours", "time", "s", [1.0]), at_most=0.5)
    assert "met" not in toy.claims[0]


def test_the_table_shows_ratios_what_is_not_met_and_what_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row, bound in (("10", 1.0), ("4", 3.0)):
        found = result()
        found.row = row
        found.skip("a peer", "it is not here")
        ours, peer = found.add("ours", "time", "s", [1.0, 1.1]), found.add("theirs", "time", "s", [2.0, 2.2])
        found.claim(f"row {row}", ours, peer, at_least=bound)
        (tmp_path / f"{row}.json").write_text(json.dumps(found.as_dict()))
    (tmp_path / "warm_worker.json").write_text("{}")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.main(["--results", str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[1] for line in lines] == ["row 4", "row 10"]
    assert "| 2.00 (2.00–2.00) | ≥ 3 (**not met**) |" in lines[0] and "| ≥ 1 |" in lines[1]
    assert "a peer (row 4: it is not here)" in text and "a device" in text
    page.write_text("no place for it")
    assert table.main(["--results", str(tmp_path), "--into", str(page)]) == 2
    assert table.BEGIN in capsys.readouterr().err and page.read_text() == "no place for it"


# -- the peers do the same work ----------------------------------------------------------------------------------------


def all_views(image: torch.Tensor, normalize: str) -> torch.Tensor:
    """(3, 32, 32) uint8 -> every flip and crop of it as our loader makes them, (162, 3, 32, 32)."""
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    crops = [padded[:, y : y + 32, x : x + 32] for y, x in itertools.product(range(9), range(9))]
    return data.normalize(torch.stack([*crops, *(crop.flip(-1) for crop in crops)]), normalize)


def offsets(chosen: list[int]) -> tuple[set[int], set[int]]:
    """Rows and columns of the crops among `all_views`."""
    return {index % 81 // 9 for index in chosen}, {index % 9 for index in chosen}


def test_the_notebooks_images_are_ours() -> None:
    from benchmarks.peers import notebook  # torchvision takes seconds

    images = torch.from_numpy(data.load_dataset("stand-in", None).train_images[:3].copy())
    pictures = notebook.Pictures(images.numpy(), np.arange(3), notebook.AUGMENTED)
    torch.manual_seed(0)
    chosen = []
    for index, image in enumerate(images):
        views = all_views(image, "half")
        drawn = [(views - pictures[index][0]).abs().amax((1, 2, 3)) for _ in range(40)]
        assert all(distance.min() < 1e-6 for distance in drawn)
        chosen += [int(distance.argmin()) for distance in drawn]
    assert offsets(chosen) == (set(range(9)), set(range(9))) and min(chosen) < 81 <= max(chosen)


def test_images_on_the_device_are_flipped_and_cropped_like_ours() -> None:
    from benchmarks.peers import standard

    images = torch.from_numpy(data.load_dataset("stand-in", None).train_images[:128].copy())
    batches = standard.FromDevice(images, torch.arange(128), 64)
    torch.manual_seed(0)
    seen = [(image, int(label)) for inputs, labels in batches for image, label in zip(inputs, labels, strict=True)]
    assert sorted(label for _, label in seen) == list(range(128))
    chosen = []
    for image, label in seen:
        distance = (all_views(images[label], "dataset") - image).abs().amax((1, 2, 3))
        assert distance.min() < 1e-4
        chosen.append(int(distance.argmin()))
    assert offsets(chosen) == (set(range(9)), set(range(9))) and min(chosen) < 81 <= max(chosen)


SMALL = ["--dataset", "stand-in", "--device", "cpu", "--train-size", "256", "--batch-size", "32", "--width", "8", "--workers"]


def make_notebook() -> Any:
    from benchmarks.peers import notebook

    return notebook.Notebook(notebook.parse([*SMALL, "0", "--lr", "3e-3"]))


def make_standard() -> Any:
    from benchmarks.peers import standard

    return standard.Standard(standard.parse([*SMALL, "0", "--feed", "device", "--model", "worksheet1", "--lr", "0.05"]))


@pytest.mark.parametrize("make", [make_notebook, make_standard], ids=["notebook", "standard"])
def test_a_peer_trains(make: Any) -> None:
    torch.manual_seed(0)
    epoch = make().epoch
    rows = [epoch() for _ in range(8)]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.02 and rows[0]["loss"] == pytest.approx(math.log(10), abs=0.3)
    assert all(row["images"] == 256 and row["seconds"] > 0 for row in rows)


AIRBENCH = """
import sys
code = open(sys.argv[0]).read()
def print_training_details(variables, is_final_entry=False):
    raise AssertionError("the driver listens instead")
class CifarNet:
    def cuda(self): return self
    def to(self, **more): return self
    def compile(self, **more): self.compiled = more
def main(run, model):
    time_seconds, val_acc, tta_val_acc = (9.0 if run == "warmup" else 1.0 + run), 0.5, 0.75
    print_training_details(locals(), is_final_entry=False)
    time_seconds += 0.5
    print_training_details(locals(), is_final_entry=True)
    return tta_val_acc
if __name__ == "__main__":
    raise AssertionError("its own 200 runs")
"""


def test_airbench_is_driven_from_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "airbench94_muon.py").write_text(AIRBENCH)
    monkeypatch.setenv("AIRBENCH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["x"])
    runs = airbench.Runs("94", airbench.checkout("94"))
    assert [runs.once() for _ in range(2)] == [{"seconds": s, "acc": 0.75, "acc_one_view": 0.5} for s in (1.5, 2.5)]
    with pytest.raises(FileNotFoundError, match=r"airbench96_faster\.py does not exist"):
        airbench.checkout("96")


def test_airbench95_makes_its_network_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "legacy").mkdir()
    own_network = AIRBENCH.replace("def main(run, model):", "def main(run):").replace("time_seconds", "total_time_seconds")
    (tmp_path / "legacy" / "airbench95.py").write_text(own_network)
    monkeypatch.setenv("AIRBENCH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["x"])
    runs = airbench.Runs("95", airbench.checkout("95"))
    assert runs.last["seconds"] == 9.5  # its warm-up
    assert [runs.once()["seconds"] for _ in range(2)] == [1.5, 2.5]


@pytest.mark.slow
def test_airbench_reads_our_images(tmp_path: Path) -> None:
    airbench.write_images(tmp_path / "cifar10", "stand-in")
    arrays = data.load_dataset("stand-in", None)
    found = torch.load(tmp_path / "cifar10" / "test.pt", weights_only=True)
    assert found["images"].shape == (10000, 32, 32, 3) and found["images"].dtype == torch.uint8 and len(found["classes"]) == 10
    assert (found["images"][7].permute(2, 0, 1).numpy() == arrays.test_images[7]).all()
    assert (found["labels"].numpy() == arrays.test_labels).all()


def test_a_peer_that_cannot_run_is_named_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRBENCH", raising=False)
    with pytest.raises(Missing, match="airbench ended: AIRBENCH is not set; clone https"):
        Peer("benchmarks.peers.airbench", "94")


# -- parts of single benchmarks ----------------------------------------------------------------------------------------


def test_the_sweep_of_trials_has_as_many_cells_as_are_asked_for(tmp_path: Path) -> None:
    options = argparse.Namespace(dataset="stand-in", device="cpu", smoke=False, set=[])
    for count in (2, 4, 8, 16, 32, 64):
        swept = yaml.safe_load(trials.sweep_file(tmp_path, options, count).read_text())["parameters"]
        sizes = [len(swept[key]["values"]) for key in ("lr", "weight_decay", "seed")]
        assert math.prod(sizes) == count, sizes


class Moment(float):
    """An event at a known millisecond."""

    def elapsed_time(self, other: float) -> float:
        return other - self


def test_idle_time_is_between_replays_of_one_epoch() -> None:
    events = [(Moment(b), Moment(e)) for b, e in ((0, 1), (1.5, 2.5), (100, 101), (101.25, 103))]
    busy, idle = replay.busy_and_idle(events, per_epoch=2)
    assert busy == pytest.approx([1000, 1000, 1000, 1750]) and idle == pytest.approx([500, 250])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_each_gpu_has_64_trials_of_a_sweep_and_they_differ(count: int, tmp_path: Path) -> None:
    options = argparse.Namespace(dataset="stand-in", device="cpu", smoke=False, set=["compile=off"])
    text = yaml.safe_load(trials.sweep_file(tmp_path, options, 64 * count).read_text())
    swept = {key: each["values"] for key, each in text["parameters"].items() if "values" in each}
    cells = set(itertools.product(*swept.values()))
    assert len(cells) == 64 * count and list(swept) == ["lr", "weight_decay", "seed"]
    assert swept["seed"] == list(range(4 * count))


def test_the_gpus_of_a_benchmark_are_those_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, found in ((None, ["0", "1"]), ("", ["0", "1"]), ("3,1,2", ["3", "1"]), ("GPU-5f,GPU-6a", ["0", "1"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert many_gpus.choose_gpus(2) == found


@pytest.mark.slow
def test_cpu_seconds_are_counted_by_kind_of_process() -> None:
    burn = "import time\nwhile time.process_time() < {}: pass"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn.format(1.5)!r}, 'cifar.sidecar', '--draw'])"
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.DEVNULL)
    watch = fleet_profile.Watch(process.pid)
    assert process.wait() == 0
    found = watch.end()
    assert set(found) == {"agent", "pictures"} and found["agent"] < 0.8 <= found["pictures"] < 2.0


def test_files_are_written_again_and_nothing_is_left(tmp_path: Path) -> None:
    for name in ("a", "b", "sweeps"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "run.json").touch()
    assert fleet_profile.write_again(tmp_path) > 0 and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "sweeps"]


# -- every command -----------------------------------------------------------------------------------------------------


def test_every_benchmark_is_in_the_list() -> None:
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "parser_of(" in path.read_text()} - {"common"}
    assert modules == {row.arguments.split()[0] for row in bench.ROWS}
    assert {row.number for row in bench.ROWS} == {*map(str, range(1, 12)), "curves"}


@pytest.mark.slow
@pytest.mark.parametrize("row", bench.ROWS, ids=lambda row: row.arguments)
def test_a_command_runs_at_toy_size_and_writes_its_json(row: bench.Row, tmp_path: Path) -> None:
    module, *arguments = shlex.split(row.arguments)
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--smoke", "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "AIRBENCH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["row"] == row.number and found["smoke"] and found["dataset"] == "stand-in" and not found["official"]
    assert found["device"] and found["versions"]["torch"] and "git" in found
    for each in found["measured"]:
        assert each["n"] == len(each["values"]) >= 1 and len(each["spread"]) == 2 and each["who"] and each["what"]
        assert all(math.isfinite(value) for value in each["values"])
    assert bool(found["claims"]) == (row.number != "10")  # it has nothing to measure without a GPU
    assert bool(found["skipped"]) == (row.number in ("1", "2", "3", "6", "10")) or row.number == "6"
    for each in found["skipped"]:
        assert each["who"] and each["why"] and each["why"] in done.stdout
    assert found["claims"] == [] or found["claims"][0]["what"] in table.markdown([found])
    if module == "scaling":
        assert out.with_suffix(".png").stat().st_size > 10_000
