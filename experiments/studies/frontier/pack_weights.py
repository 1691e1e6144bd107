"""Finished runs of the frontier's rows -> pretrained networks: rounded weights, a card each, and a wheel for the large ones.

    python experiments/studies/frontier/pack_weights.py RUNS

A row is a file of experiments/frontier. Its runs are those in the folder RUNS that have its configuration, with any seed. Of
each row the network of the smallest seed is given away: this rule was fixed beforehand, and looks at no accuracy. Its weights
are rounded to half precision, or to 8 bits where half precision has more than 8 MiB. What is left after that is scored on the
test images, once, on the CPU and in fp32.

The smallest networks go to cifar/pretrained, up to 12 MiB of weights in all. Of the others, cifar/pretrained has the cards; the
weights themselves go to dist/frontier_weights and into a wheel in dist/.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import cifar  # noqa: E402
from cifar import data  # noqa: E402
from cifar.config.resolve import load_experiment, resolve_config  # noqa: E402
from cifar.errors import UserError  # noqa: E402
from cifar.tracking.predictions import name_classes  # noqa: E402
from cifar.tracking.pretrained import (  # noqa: E402
    CARD_FILE,
    CARD_SCHEMA,
    MAX_HALF_BYTES,
    MAX_TRACKED_BYTES,
    WEIGHTS_FILE,
    WEIGHTS_PACKAGE,
    read_card,
)
from cifar.tracking.run_dir import RunDir, list_run_dirs, write_atomic  # noqa: E402
from cifar.training.pixels import PixelNetwork, count_right  # noqa: E402
from cifar.training.recorded import load_model  # noqa: E402
from cifar.training.rounding import count_bytes, restore_weights, round_weights  # noqa: E402
from cifar.training.weights import read_tensors  # noqa: E402

# How a run is carried out or observed. Runs of a row may differ in it.
NOT_COMPARED = {
    "experiment", "dataset", "test", "probes", "probe_every", "histograms", "checkpoint_every", "device", "threads", "max_macs",
    "seed", "teacher", "compile", "capture", "cudnn_trials", "eval_batch_size",
}  # fmt: skip
SUMMARY_KEYS = (
    "epochs", "seconds", "images_per_second", "macs", "params", "macs_verified", "train_flops", "teacher_flops",
    "teacher_train_flops", "joules", "pack_size", "test/acc", "test/loss", "test/views",
)  # fmt: skip
CHOSEN = "the run of the smallest seed, a rule that looks at no accuracy"
DATA_LICENCE = (
    "The authors of CIFAR-10 name no licence and ask to cite Krizhevsky 2009, Learning Multiple Layers of Features from Tiny "
    "Images. Its images are a part of 80 Million Tiny Images, which its own authors withdrew in 2020."
)
LICENCE = "MIT, as this program: the weights were made by it, from CIFAR-10 alone"


@dataclass(frozen=True)
class Row:
    """A row of the frontier: its name, its configuration, and its finished runs, by seed."""

    name: str
    config: Mapping[str, Any]
    runs: Sequence[RunDir]

    @property
    def chosen(self) -> RunDir:
        return self.runs[0]


# -- which runs --------------------------------------------------------------------------------------------------------


def find_rows(runs_dir: Path, rows_dir: Path, only: Sequence[str]) -> list[Row]:
    """The rows that have finished runs with a test accuracy. Raises UserError where none has, or a name is unknown."""
    files = {file.stem: file for file in sorted(rows_dir.glob("*.yaml"))}
    if unknown := [name for name in only if name not in files]:
        raise UserError(f"no file {unknown[0]}.yaml in {rows_dir}; there are: {', '.join(files) or 'none'}")
    records = [record for record in list_run_dirs(runs_dir) if record.state == "finished" and _has_single_view_test(record)]
    rows = []
    for name, file in files.items():
        if only and name not in only:
            continue
        values = load_experiment(str(file))
        config = resolve_config(values, {"probes": "none"}).to_dict()
        by_seed = {record.read_json("config").get("seed", 0): record for record in records if _is_of_row(record, config)}
        if by_seed:
            rows.append(Row(name, resolve_config(values).to_dict(), [by_seed[seed] for seed in sorted(by_seed)]))
        else:
            print(f"{name}: {_describe_absence(name, config, records, runs_dir)}; left out", file=sys.stderr)
    if not rows:
        raise UserError(f"no row of {rows_dir} has a finished run with a test accuracy in {runs_dir}")
    return rows


def _describe_absence(name: str, row: Mapping[str, Any], records: Sequence[RunDir], runs_dir: Path) -> str:
    """Why no run is of this row, in words: which keys of those that say they are of it differ."""
    configs = [record.read_json("config") for record in records]
    mine = [config for config in configs if str(config.get("experiment", "")).endswith(name)]
    if not mine:
        return f"no finished run in {runs_dir} has its configuration"
    differing = sorted(key for key, value in row.items() if key not in NOT_COMPARED and mine[0].get(key) != value)
    return f"{len(mine)} runs say that they are of it, but their {', '.join(differing) or 'teacher'} is not the file's"


def _has_single_view_test(record: RunDir) -> bool:
    summary = record.read_json("summary")
    return "test/acc" in summary and summary.get("test/views", 1) == 1


def _is_of_row(record: RunDir, row: Mapping[str, Any]) -> bool:
    config = record.read_json("config")
    parts = {key: row[key] for key in ("model", "optimizer", "schedule", "probes")}
    defaults = resolve_config(parts).to_dict()  # what a run of an earlier version lacks counts as its default
    same = all(config.get(key, defaults[key]) == value for key, value in row.items() if key not in NOT_COMPARED)
    return same and bool(config.get("teacher")) == bool(row["teacher"])


# -- weights and their score -------------------------------------------------------------------------------------------


def pack_row(row: Row, target: Path, known_card: Mapping[str, Any] | None, data_dir: Path | None) -> dict[str, Any]:
    """Write a row's folder into `target` -> its card. Scores the test images, unless `known_card` is of the same weights."""
    run, folder = row.chosen, target / row.name
    folder.mkdir(parents=True)
    tensors = read_tensors(run.path / WEIGHTS_FILE)
    eight_bit = any(tensor.dtype == torch.int8 for tensor in tensors.values())
    state = restore_weights(tensors)
    rounded = round_weights(state, eight_bit=eight_bit)
    if not eight_bit and count_bytes(rounded) > MAX_HALF_BYTES:
        eight_bit, rounded = True, round_weights(state, eight_bit=True)
    buffer = io.BytesIO()
    torch.save(rounded, buffer)
    content = buffer.getvalue()
    weights = {
        "file": WEIGHTS_FILE,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "format": "int8" if eight_bit else "float16",
    }
    (folder / WEIGHTS_FILE).write_bytes(content)
    _write_record(row, folder)
    if known_card and known_card["weights"] == weights:
        scores = {key: known_card[key] for key in ("accuracy", "per_class", "data")}
    else:
        scores = score(folder, weights, data_dir)
    card = {**_describe_row(row), "weights": weights, **scores}
    _write_json(folder / CARD_FILE, card)
    read_card(folder)  # raises where it is not as a reader needs it
    return card


def score(folder: Path, weights: Mapping[str, Any], data_dir: Path | None) -> dict[str, Any]:
    """Accuracy on the test images, in all and for each class, and what data set it was. Raises UserError for another one."""
    record = RunDir(folder)
    config, environment = record.read_json("config"), record.read_json("environment")
    images = data.load_dataset(config["dataset"], data_dir)
    if environment["data_fingerprint"] != images.fingerprint:
        raise UserError(f"{folder.name} was trained on other images than those that are here; name theirs with --data-dir")
    network = PixelNetwork(load_model(record), config["normalize"]).eval()
    right, total = count_right(network, torch.tensor(images.test_images), torch.tensor(images.test_labels))
    names = name_classes(config["dataset"])
    return {
        "accuracy": int(right.sum()) / int(total.sum()),
        "per_class": {name: int(r) / int(t) for name, r, t in zip(names, right, total, strict=True)},
        "data": {
            "name": "CIFAR-10" if config["dataset"] == "cifar10" else config["dataset"],
            "fingerprint": images.fingerprint,
            "test_images": int(total.sum()),
            "licence": DATA_LICENCE if config["dataset"] == "cifar10" else "generated images",
        },
    }


def _write_record(row: Row, folder: Path) -> None:
    """The files of a run, without what names the machine, its user and its folders."""
    run, name = row.chosen, row.name
    about, environment, config = run.read_json("run"), run.read_json("environment"), run.read_json("config")
    step = environment.get("step") or {}
    _write_json(
        folder / "run.json",
        {
            "schema": about["schema"],
            "id": name,
            "name": name,
            "tags": ["pretrained"],
            "dataset": about["dataset"],
            "official": about.get("official", False),
            "cost": about["cost"],
            "created": about["created"],
            "command": _write_command(row),
        },
    )
    kept = {"seed": config.get("seed", 0), "dataset": config["dataset"], "experiment": f"frontier/{name}"}
    _write_json(folder / "config.json", {**row.config, **kept})
    _write_json(
        folder / "environment.json",
        {
            "versions": environment.get("versions", {}),
            "device": environment.get("device"),
            "device_type": environment.get("device_type"),
            "git": {"commit": (environment.get("git") or {}).get("commit")},
            "data_fingerprint": environment.get("data_fingerprint"),
            "step": {key: step[key] for key in ("channels_last", "captured", "compiled", "together") if key in step},
        },
    )
    summary = run.read_json("summary")
    _write_json(folder / "summary.json", {key: summary[key] for key in SUMMARY_KEYS if key in summary})
    epochs = summary.get("epochs", 0)
    status = {"state": "finished", "reason": "", "epoch": epochs, "epochs": epochs, "time": run.read_json("status").get("time")}
    _write_json(folder / "status.json", status)


def _write_command(row: Row) -> str:
    seed = row.chosen.read_json("config").get("seed", 0)
    return f"python -m cifar train --experiment frontier/{row.name} seed={seed}"


def _describe_row(row: Row) -> dict[str, Any]:
    """The part of a card that the records of the runs say."""
    run = row.chosen
    about, summary, environment = run.read_json("run"), run.read_json("summary"), run.read_json("environment")
    accuracies = [record.read_json("summary")["test/acc"] for record in row.runs]
    normalize = row.config["normalize"]
    mean, std = (data.MEAN, data.STD) if normalize == "dataset" else ((0.5,) * 3, (0.5,) * 3)
    known = {name: summary[name] for name in ("train_flops", "joules", "teacher_flops", "pack_size") if name in summary}
    return {
        "schema": CARD_SCHEMA,
        "name": row.name,
        "model": row.config["model"],
        "macs": about["cost"]["macs"],
        "params": about["cost"]["params"],
        "macs_verified": about["cost"]["verified"],
        "row": {
            "mean": statistics.mean(accuracies),
            "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "n": len(accuracies),
            "seeds": [record.read_json("config").get("seed", 0) for record in row.runs],
            "values": accuracies,
            "split": "test, scored once a run, after its last epoch, one view",
        },
        "chosen": CHOSEN,
        "accuracy_before_rounding": summary["test/acc"],
        "input": {
            "shape": ["batch", 3, 32, 32],
            "normalize": normalize,
            "mean": mean,
            "std": std,
            "description": (
                f"(B, 3, 32, 32), red, green, blue, normalised by cifar.data.normalize(uint8, {normalize!r}); an ONNX file "
                "of `export` takes the uint8 pixels"
            ),
        },
        "classes": list(name_classes(about["dataset"])),
        "training": {
            "command": _write_command(row),
            "run": run.id,
            "seed": run.read_json("config").get("seed", 0),
            "images": row.config["train_size"] or 50_000 - row.config["val_size"],
            "epochs": summary.get("epochs"),
            "seconds": summary.get("seconds"),
            **known,
            "device": environment.get("device"),
            "torch": (environment.get("versions") or {}).get("torch"),
            "commit": (environment.get("git") or {}).get("commit"),
            "teacher": row.config["teacher"],
        },
        "licence": LICENCE,
    }


# -- where they go -----------------------------------------------------------------------------------------------------


def place(packed: Path, names: Iterable[str], out: Path, rest: Path) -> list[str]:
    """Move packed folders to `out`, smallest weights first and 12 MiB in all -> the names whose weights are in `rest`.

    Networks that are in `out` already, and are not among `names`, keep their place and count.
    """
    sizes = {name: (packed / name / WEIGHTS_FILE).stat().st_size for name in names}
    kept = [folder / WEIGHTS_FILE for folder in out.glob("*/") if folder.name not in sizes]
    total, large = sum(file.stat().st_size for file in kept if file.exists()), []
    for name, size in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.rmtree(rest / name, ignore_errors=True)
        if total + size > MAX_TRACKED_BYTES:
            shutil.copytree(packed / name, rest / name)
            (packed / name / WEIGHTS_FILE).unlink()
            large.append(name)
        else:
            total += size
        shutil.copytree(packed / name, out / name)
    return large


def build_wheel(folders: Path, dist: Path) -> Path:
    """A wheel of nothing but the folders of networks -> its file. `cifar` finds it where it is installed."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        shutil.copytree(folders, source / WEIGHTS_PACKAGE)
        (source / WEIGHTS_PACKAGE / "__init__.py").write_text('"""Weights of pretrained networks of `cifar`. No code."""\n')
        (source / "pyproject.toml").write_text(
            f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{WEIGHTS_PACKAGE.replace("_", "-")}"
version = "{cifar.__version__}"
description = "Weights of the larger pretrained networks of cifar"
license = "MIT"
requires-python = ">=3.11"

[tool.hatch.build.targets.wheel]
only-include = ["{WEIGHTS_PACKAGE}"]
"""
        )
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(dist.resolve())]
        done = subprocess.run(command, cwd=source, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise UserError(f"the wheel cannot be built: {done.stdout.strip()[-500:]}; pip install 'cifar[dev]' brings hatchling")
    return max(dist.glob(f"{WEIGHTS_PACKAGE}-*.whl"), key=lambda file: file.stat().st_mtime)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_atomic(file, (json.dumps(value, indent=1) + "\n").encode())


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, help="a folder of runs")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this row; repeatable")
    parser.add_argument("--rows", type=Path, default=ROOT / "experiments" / "frontier", help="the folder of the rows' files")
    parser.add_argument("--out", type=Path, default=ROOT / "cifar" / "pretrained", help="where cards and small weights go")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where large weights and their wheel go")
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 is; else $CIFAR_DATA, else the cache")
    options = parser.parse_args(words)
    rest = options.dist / "frontier_weights"
    try:
        rows = find_rows(options.runs, options.rows, options.only)
        with tempfile.TemporaryDirectory() as scratch:
            for row in rows:
                known = options.out / row.name
                card = pack_row(row, Path(scratch), read_card(known) if known.exists() else None, options.data_dir)
                before, mean = 100 * card["accuracy_before_rounding"], 100 * card["row"]["mean"]
                print(
                    f"{row.name:16} seed {card['training']['seed']} {card['weights']['format']:8} "
                    f"{card['weights']['bytes']:>9,} bytes  {100 * card['accuracy']:.2f} % (before rounding {before:.2f} %; "
                    f"row {mean:.2f} %, n = {card['row']['n']})"
                )
            large = place(Path(scratch), [row.name for row in rows], options.out, rest)
        if large:
            print(f"in a wheel of their own: {', '.join(large)}\n{build_wheel(rest, options.dist)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
