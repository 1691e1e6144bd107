"""The report's pages of this study, made from its records: rows by test accuracy, all other parts by validation accuracy.

    python experiments/studies/frontier/make_page.py [--out DIR] [--parts rows recipes ...]

The run folders are gone. What is kept is a line a run (*_runs.csv), a line an epoch (*_curves.csv.gz) and the command of each
row (*_commands.txt). From these, run folders are made in a temporary folder, with the files that a report reads, and
`cifar report` is made of them: page/test.html and page/validation.html beside this file. Each is one file. It needs no network.

A folder says what the records say. Where they lack a value, the folder lacks it. The settings of a run are those of its row's
command, and what that does not name is at its default, as the command's own program writes it; a run whose row never finished
has no command, so it has the settings of its line only. A pilot's state `lost` is called `interrupted`, as the suite does.
"""

from __future__ import annotations

import argparse
import calendar
import csv
import functools
import gzip
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE)]

from collect import DETAILS, NETWORK, RECIPE, TRAINING  # noqa: E402

from cifar.config.resolve import load_experiment, parse_pairs, resolve_config  # noqa: E402
from cifar.report import ReportResult, write_report  # noqa: E402
from cifar.states import RUN_STATES  # noqa: E402
from cifar.tracking.run_dir import RunDir  # noqa: E402


@dataclass(frozen=True)
class Part:
    """A part of the study. What the README says of all its runs, and not each line: date, commit, whether that was changed."""

    file: str  # what the names of its records begin with
    split: str = "val"  # the images that its runs are scored on
    date: str = ""
    commit: str = ""
    is_changed: bool = False


PARTS = {
    "rows": Part("rows", split="test", is_changed=True),
    "baselines": Part("baseline", date="2026-11-28", commit="86a93d9"),
    "pilots": Part("pilot", date="2026-11-28"),
    "recipes": Part("recipes", is_changed=True),
    "ablation": Part("ablation", date="2026-11-28"),
}
PAGES = {  # split -> folder and id, title, what stands below it
    "test": (
        "test",
        "Frontier: rows",
        "Networks trained on all 50,000 images, with three seeds. The test images were scored once, after the last epoch. "
        "What was tried on validation to choose them is on another page: validation accuracies of 45,000 images do not "
        "compare with these.",
    ),
    "val": (
        "validation",
        "Frontier: what was tried",
        "Networks trained on 45,000 images, and scored on 5,000 others. Tags: the part of the study, and its grid. "
        "No run scored the test images; rows that did are on another page, and do not compare with these.",
    ),
}
CONFIG = (*NETWORK, *TRAINING, *RECIPE, *DETAILS, "seed", "val_size", "test", "experiment")  # columns that are settings
# Columns that are costs or scores -> their name in summary.json.
COSTS = {
    "epochs_done": "epochs", "seconds_training": "seconds", "images_per_second": "images_per_second", "macs": "macs",
    "params": "params", "joules": "joules", "train_flops": "train_flops", "teacher_flops": "teacher_flops",
    "teacher_train_flops": "teacher_train_flops", "weights_bytes": "weights_bytes", "latency_seconds": "latency_seconds",
}  # fmt: skip
SCORES = {"train_acc": "train/acc", "val_acc": "val/acc", "test_acc": "test/acc"}  # in percent
LOSSES = {"train_loss": "train/loss", "val_loss": "val/loss", "test_loss": "test/loss"}
TEXTS = ("joules_missing", "latency_device")
ROW = {
    "train_loss": "train/loss", "train_acc": "train/acc", "val_loss": "val/loss", "val_acc": "val/acc", "lr": "train/lr",
    "seconds": "system/seconds", "images_per_second": "system/images_per_second",
}  # fmt: skip
OFF = parse_pairs(f"{name}={value}" for name, value in RECIPE.items() if value) | {"teacher": ""}
SIZES = {"width": "width ", "width_multiplier": "x", "depth_multiplier": "x", "stem_stride": "stem "}
SHOWN = {  # of the settings, in a run's name
    "augment_policy": "", "cutmix": "CutMix ", "mixup": "mixup ", "cutout": "cutout ", "se": "se ", "ema": "ema ",
    "keep": "keep ", "teacher": "", "head_lr": "head_lr ", "lr": "lr ", "weight_decay": "weight_decay ",
}  # fmt: skip
USUAL = {name: (value,) for name, value in OFF.items()} | {"lr": (0.4,), "weight_decay": (0.0, 5e-4)}  # not in a run's name
COUNTS = {"epochs", "params", "weights_bytes"}  # whole numbers


def read_lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_curves(path: Path) -> dict[str, list[dict[str, str]]]:
    """Run -> its epochs. A table of an earlier version lacks the last columns."""
    found = defaultdict(list)
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            found[line["run"]].append(line)
    return found


def read_commands(path: Path) -> dict[str, list[str]]:
    """Run -> the words of its row's command, without the seed."""
    texts = path.read_text("utf-8").splitlines()[1:]
    found = {}
    for about, command in zip(texts[::2], texts[1::2], strict=True):
        words = [word for word in shlex.split(command) if not word.startswith("seed=")]
        found |= dict.fromkeys(about.partition(", runs ")[2].split(), words)
    return found


def find_row(line: Mapping[str, str]) -> tuple[str, ...]:
    """What runs that differ in their seed only have in common."""
    return (*(line.get(name, "") for name in CONFIG if name != "seed"), line["macs"])


def make_config(line: Mapping[str, str], words: Sequence[str]) -> dict[str, Any]:
    """The settings of a run: those of its line, and those of its row's command where that is known."""
    texts = tuple(f"{name}={line[name]}" for name in CONFIG if line.get(name, "") != "" and name != "seed")
    return {**_resolve(texts, tuple(words)), "seed": int(line["seed"])}


@functools.cache
def _resolve(texts: tuple[str, ...], words: tuple[str, ...]) -> dict[str, Any]:
    """`make_config` without the seed. texts: key=value of a line. words: of a command, or none."""
    own = parse_pairs(texts)
    named: dict[str, Any] = {}
    pairs = words[words.index("train") + 1 :] if words else ()
    if "--experiment" in pairs[:1]:
        named, pairs = load_experiment(pairs[1]) | {"experiment": pairs[1]}, pairs[2:]
    named |= parse_pairs(pairs)
    switched_on = {name: value for name, value in own.items() if value != OFF.get(name)}
    taken = resolve_config({**named, **switched_on}).to_dict()
    own = {name: value for name, value in own.items() if name in taken}  # a line says 0 of what a network does not take, too
    config = resolve_config({**named, **own}).to_dict()
    # Of a run without a command nothing is known but its line; of none, how many threads its machine had.
    return {name: value for name, value in config.items() if (words or name in (*own, "dataset")) and name != "threads"}


def name_run(config: Mapping[str, Any]) -> str:
    """Network, recipe, seed and epochs: "efficientnet x0.15 x0.5 stem 1, trivialaugment, seed 0, 200 epochs"."""
    sizes = [f"{word}{config[name]:g}" for name, word in SIZES.items() if name in config]
    network = " ".join([config["model"], *sizes, *([f"depth {config['depth']}"] if config["model"] == "wrn" else [])])
    shown = {name: config[name] for name in SHOWN if config.get(name) not in (None, *USUAL.get(name, ()))}
    recipe = [f"{SHOWN[name]}{value if isinstance(value, str) else f'{value:g}'}" for name, value in shown.items()]
    return ", ".join([network, *recipe, f"seed {config['seed']}", f"{config['epochs']} epochs"])


def describe_files(
    part: str, line: Mapping[str, str], epochs: Sequence[Mapping[str, str]], words: Sequence[str]
) -> dict[str, Any]:
    """What the files of a run's folder hold, by name."""
    about, config = PARTS[part], make_config(line, words)
    date, commit = line.get("date") or about.date, line.get("commit") or about.commit
    state = line["state"] if line["state"] in RUN_STATES else "interrupted"
    is_finished = state == "finished"
    found: dict[str, Any] = {"config": config}
    found["run"] = {
        "created": calendar.timegm(time.strptime(date, "%Y-%m-%d")) if date else None,
        "name": f"{part}: {name_run(config)}",
        "group": part,
        "tags": [part, *filter(None, [line.get("sweep")])],
        "sweep": PAGES[about.split][0],
        "dataset": "cifar10",
        "official": True,
        "cost": {"macs": int(line["macs"]), "params": int(line["params"]), "verified": line["verified"] == "True"},
        "command": shlex.join([*words, f"seed={line['seed']}"]) if words else "",  # "": not known, and no folder to go back to
    }
    found["environment"] = {
        "versions": {"torch": line["torch"]},
        "device": line["gpu"],
        **({"git": {"commit": commit, "dirty": about.is_changed}} if commit else {}),
        "step": {"together": int(line["together"]), "compiled": line["compiled"] == "True"},
    }
    found["status"] = {
        "state": state,
        "reason": "" if is_finished else describe_loss(line),
        "epoch": int(line["epochs_done"]),
        "epochs": int(line["epochs"]),
    }
    if is_finished:
        known = {name: float(line[column]) for column, name in {**COSTS, **LOSSES}.items() if line.get(column)}
        known |= {name: round(float(line[column]) / 100, 6) for column, name in SCORES.items() if line.get(column)}
        found["summary"] = {name: int(value) if name in COUNTS else value for name, value in known.items()}
        found["summary"] |= {name: line[name] for name in TEXTS if line.get(name)}
    found["metrics"] = [
        {"epoch": int(row["epoch"]), **{name: float(row[column]) for column, name in ROW.items() if row.get(column)}}
        for row in epochs
    ]
    return found


def describe_loss(line: Mapping[str, str]) -> str:
    """How a run that did not finish ended, as far as it is known. The record of a run that was lost says `running`, too."""
    seen = f", validation accuracy {float(line['val_acc']):.2f} %" if line["val_acc"] else ""
    how = "lost" if line["state"] in ("lost", "running") else "ended"
    return f"{how} at epoch {line['epochs_done']} of {line['epochs']}{seen}"


def rebuild_runs(parts: Iterable[str], runs: Path, *, records: Path = HERE) -> list[RunDir]:
    """Make the folder of each run of these parts, and of the sweep that holds them."""
    made = []
    for part in parts:
        file = PARTS[part].file
        lines, curves = read_lines(records / f"{file}_runs.csv"), read_curves(records / f"{file}_curves.csv.gz")
        commands = read_commands(records / f"{file}_commands.txt")
        rows = {find_row(line): commands[line["run"]] for line in lines if line["run"] in commands}
        for line in lines:
            words = commands.get(line["run"]) or rows.get(find_row(line), [])
            if not words and line.get("experiment"):
                words = ["python", "-m", "cifar", "train", "--experiment", line["experiment"]]
            files = describe_files(part, line, curves[line["run"]], words)
            run_dir = RunDir.create(runs, line["run"], files.pop("run"), files.pop("config"))
            text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in files.pop("metrics"))
            run_dir.write_file("metrics.jsonl", text.encode())
            for name, content in files.items():
                run_dir.write_json(name, content)
            made.append(run_dir)
    return made


def make_page(split: str, parts: Sequence[str], out: Path) -> ReportResult:
    """Make the page of those parts that are scored on the images of `split`."""
    folder, title, question = PAGES[split]
    chosen = [part for part in parts if PARTS[part].split == split]
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary)
        rebuild_runs(chosen, runs)
        sweep = runs / "sweeps" / folder
        sweep.mkdir(parents=True)
        (sweep / "sweep.yaml").write_text(json.dumps({"name": title, "description": question}), encoding="utf-8")
        command = shlex.join(["python", f"experiments/studies/frontier/{Path(__file__).name}", "--parts", *chosen])
        result = write_report([folder], runs=runs, out=runs / "report", split=split, command=command)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result.page, out / f"{folder}.html")
        return result


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "page", metavar="DIR", help="[default: page/ beside this file]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="[default: all]")
    options = parser.parse_args(words)
    for split in PAGES:
        if any(PARTS[part].split == split for part in options.parts):
            result = make_page(split, options.parts, options.out)
            print(result.notes[0])
            page = options.out / f"{PAGES[split][0]}.html"
            print(f"{len(result.comparison.points)} points of {len(result.comparison.runs)} runs: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
