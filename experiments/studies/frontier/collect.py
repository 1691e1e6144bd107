"""Compact records of a folder of runs, and a table of them.

    python experiments/studies/frontier/collect.py RUNS --name ablation [--add] [--out DIR]
    python experiments/studies/frontier/collect.py --table experiments/studies/frontier/ablation_runs.csv

The first writes four files of all runs in RUNS that have an epoch, then prints the table: NAME_runs.csv (a line a run: its
recipe, its result, what it cost), NAME_curves.csv.gz (a line an epoch), NAME.csv (a line a row) and NAME_commands.txt (the
command of each row). Runs that have not finished are in the first two, with their state, and not in the others. A row is the
runs that differ in their seeds only; "gain" is against the same network without the recipe, with a 95 % interval from the
standard deviation that is pooled over the rows shown. Accuracies are in percent. With --add the runs come to those that the
files have already.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import shlex
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

RECIPE = {  # key -> its value where it is off
    "mixup": "0.0", "cutmix": "0.0", "cutout": "0", "augment_policy": "none", "random_erasing": "0.0", "drop_path": "0.0",
    "se": "0", "dropout": "0.0", "ema": "0.0", "label_smoothing": "0.0", "keep": "1.0", "teacher": "",
    "contrast": "0.0", "brightness": "0.0",
}  # fmt: skip
NETWORK = (
    "model", "width", "depth", "width_multiplier", "depth_multiplier", "stem_stride", "channel_divisor", "genotype", "growth",
    "kernel_size", "patch_size", "shortcut",
)  # fmt: skip
IN_EACH = ("channel_divisor", "kernel_size", "patch_size", "shortcut")  # not shown: a network's MACs tell them apart
TRAINING = ("optimizer", "lr", "weight_decay", "epochs", "batch_size", "schedule", "flip", "crop", "crop_padding")
DETAILS = ("randaugment_num_ops", "randaugment_magnitude", "distill_weight", "distill_temperature", "head_lr")
RESULTS = (
    "seed", "macs", "params", "verified", "state", "epochs_done", "val_acc", "best_val_acc_seen", "best_epoch", "val_loss",
    "test_acc", "test_loss", "train_acc", "train_loss", "seconds_training", "seconds_wall", "images_per_second", "joules",
    "joules_missing", "train_flops", "teacher_flops", "teacher_train_flops", "weights_bytes", "latency_seconds",
    "latency_device", "together", "compiled", "gpu", "torch", "commit", "date", "val_size", "test", "experiment",
)  # fmt: skip
COLUMNS = ("run", *NETWORK, *TRAINING, *RECIPE, *DETAILS, *RESULTS)  # of NAME_runs.csv
# Of a line of NAME.csv: the means of what its finished runs have; and what they have in common, or else all values.
MEANS = (
    "best_val_acc_seen", "train_acc", "seconds_training", "joules", "train_flops", "teacher_flops", "latency_seconds",
)  # fmt: skip
COMMON = ("experiment", "weights_bytes", "together", "gpu", "torch", "commit", "date", "val_size", "joules_missing")
CURVES = ("run", "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds", "images_per_second")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a run. A last line that is not whole is left out."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def describe_run(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of NAME_runs.csv."""
    config, summary, about = (read_json(folder / f"{name}.json") for name in ("config", "summary", "run"))
    environment, status = read_json(folder / "environment.json"), read_json(folder / "status.json")
    cost, step, last = about.get("cost", {}), environment.get("step", {}), rows[-1]
    best = max(rows, key=lambda row: row.get("val/acc", 0.0))
    started, ended = environment.get("started"), status.get("time")
    found = {key: config.get(key, RECIPE.get(key, "")) for key in (*NETWORK, *TRAINING, *RECIPE, *DETAILS)}
    if found["augment_policy"] != "randaugment":
        found |= {"randaugment_num_ops": "", "randaugment_magnitude": ""}
    if not found["teacher"]:
        found |= {"distill_weight": "", "distill_temperature": ""}
    return found | {
        "run": folder.name,
        "seed": config.get("seed"),
        "macs": cost.get("macs"),
        "params": cost.get("params"),
        "verified": cost.get("verified"),
        "state": status.get("state"),
        "epochs_done": last["epoch"],
        "val_acc": as_percent(last.get("val/acc")),
        "best_val_acc_seen": as_percent(best.get("val/acc")),
        "best_epoch": best["epoch"] if "val/acc" in best else "",
        "val_loss": round(last["val/loss"], 4) if "val/loss" in last else "",
        "test_acc": as_percent(summary.get("test/acc")),
        "test_loss": round(summary["test/loss"], 4) if "test/loss" in summary else "",
        "train_acc": as_percent(last["train/acc"]),
        "train_loss": round(last["train/loss"], 4),
        "seconds_training": round(sum(row["system/seconds"] for row in rows), 1),
        "seconds_wall": round(ended - started, 1) if started and ended else "",
        "images_per_second": round(statistics.median(row["system/images_per_second"] for row in rows)),
        "joules": round(summary["joules"]) if summary.get("joules") else "",
        **{
            name: summary.get(name, "")
            for name in ("joules_missing", "train_flops", "teacher_flops", "teacher_train_flops", "weights_bytes")
        },
        **{name: summary.get(name, "") for name in ("latency_seconds", "latency_device")},
        "together": step.get("together"),
        "compiled": step.get("compiled"),
        "gpu": environment.get("device"),
        "torch": environment.get("versions", {}).get("torch"),
        "commit": environment.get("git", {}).get("commit", "")[:7],
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)) if started else "",
        "val_size": config.get("val_size"),
        "test": config.get("test"),
        "experiment": config.get("experiment", ""),
    }


def as_percent(fraction: float | None) -> float | str:
    return "" if fraction is None else round(100 * fraction, 2)


def describe_epoch(run: str, row: dict[str, Any]) -> list[Any]:
    """A line of NAME_curves.csv."""
    return [
        run,
        row["epoch"],
        f"{row['train/loss']:.5g}",
        f"{row['train/acc']:.5f}",
        f"{row['val/loss']:.5g}" if "val/loss" in row else "",
        f"{row['val/acc']:.4f}" if "val/acc" in row else "",
        f"{row['train/lr']:.4g}",
        f"{row['system/seconds']:.4f}",
        round(row["system/images_per_second"]),
    ]


def read_collected(name: str, out: Path) -> tuple[list[dict[str, Any]], list[list[Any]], dict[str, str]]:
    """What the files have already: lines of NAME_runs.csv, lines of NAME_curves.csv.gz, and of each run its row's command."""
    with open(out / f"{name}_runs.csv", newline="", encoding="utf-8") as file:
        columns = dict.fromkeys(COLUMNS, "") | RECIPE  # what an older file lacks was off
        lines: list[dict[str, Any]] = [columns | line for line in csv.DictReader(file)]
    with gzip.open(out / f"{name}_curves.csv.gz", "rt", newline="", encoding="utf-8") as file:
        curves: list[list[Any]] = list(csv.reader(file))[1:]
    texts = (out / f"{name}_commands.txt").read_text("utf-8").splitlines()[1:]
    commands = {
        run: command
        for about, command in zip(texts[::2], texts[1::2], strict=True)
        for run in about.partition(", runs ")[2].split()
    }
    return lines, curves, commands


def collect(runs_dir: Path, name: str, out: Path, *, add: bool = False) -> Path:
    """Write the files -> the path of NAME_runs.csv. add: beside the runs that they have already."""
    lines, curves, known = read_collected(name, out) if add else ([], [], {})
    first: dict[tuple[str, ...], tuple[int, dict[str, Any]]] = {}  # of each row: its smallest seed
    collected = {line["run"] for line in lines}
    commands = {_row_key(line): known[line["run"]] for line in lines if line["run"] in known}
    for path in sorted(runs_dir.glob("*/run.json")):
        if path.parent.name in collected:
            continue
        rows = read_rows(path.parent) if (path.parent / "metrics.jsonl").exists() else []
        if rows:
            lines.append(describe_run(path.parent, rows))
            config, key = read_json(path.parent / "config.json"), _row_key(lines[-1])
            first[key] = min(first.get(key, (config["seed"], config)), (config["seed"], config), key=lambda pair: pair[0])
            curves += [describe_epoch(path.parent.name, row) for row in rows]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}_runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([CURVES, *curves])
    (out / f"{name}_curves.csv.gz").write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    commands = {key: write_command(config) for key, (_, config) in first.items()} | commands
    write_table(lines, commands, out / f"{name}.csv", out / f"{name}_commands.txt")
    return out / f"{name}_runs.csv"


def _row_key(line: dict[str, Any]) -> tuple[str, ...]:
    """What the runs of a row have in common."""
    names = (*NETWORK, *TRAINING, *RECIPE, *DETAILS, "macs", "params", "val_size", "test")
    return tuple("" if line[name] is None else str(line[name]) for name in names)


def write_command(config: dict[str, Any]) -> str:
    """The command that trains this configuration again: all keys that are not as they are by default."""
    from cifar.config.resolve import resolve_config  # not for --table

    parts = {key: config[key] for key in ("model", "optimizer", "schedule", "probes") if key in config}
    default = resolve_config(parts).to_dict()
    changed = {key: value for key, value in config.items() if value != default.get(key)} | parts
    left_out = ("threads", "dataset") if config.get("dataset") == "cifar10" else ("threads",)
    words = [
        f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
        for key, value in changed.items()
        if key not in left_out
    ]
    return shlex.join(["python", "-m", "cifar", "train", *words])


def write_table(lines: list[dict[str, Any]], commands: dict[tuple[str, ...], str], table: Path, file: Path) -> None:
    """Write NAME.csv and NAME_commands.txt: rows by MACs, each of the finished runs that differ in their seeds only."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["state"] == "finished":
            rows[_row_key(line)].append(line)
    written, texts = [], ["# The command of each row of the table beside it, of its first seed."]
    for key, runs in sorted(rows.items(), key=lambda item: (float(item[1][0]["macs"] or 0), item[0])):
        runs = sorted(runs, key=lambda line: int(line["seed"] or 0))
        split = "test" if runs[0]["test_acc"] != "" else "val"  # a run on all images has no validation accuracy
        known = [float(line[f"{split}_acc"]) for line in runs if line[f"{split}_acc"] != ""]
        shown = {name: runs[0][name] for name in (*NETWORK, *TRAINING, *RECIPE, *DETAILS, "macs", "params")}
        shown |= {
            "n": len(runs),
            "split": split,
            "val_acc_mean": round(statistics.mean(known), 3) if known and split == "val" else "",
            "val_acc_std": round(statistics.stdev(known), 3) if len(known) > 1 and split == "val" else "",
            "test_acc_mean": round(statistics.mean(known), 3) if known and split == "test" else "",
            "test_acc_std": round(statistics.stdev(known), 3) if len(known) > 1 and split == "test" else "",
            "values": " ".join(f"{value:.2f}" for value in known),
            "seeds": " ".join(str(line["seed"]) for line in runs),
        }
        for name in MEANS:
            values = [float(line[name]) for line in runs if line[name] != ""]
            shown[f"{name}_mean"] = f"{statistics.mean(values):.6g}" if values else ""
        shown |= {name: " ".join(dict.fromkeys(str(line[name]) for line in runs)).strip() for name in COMMON}
        written.append(shown)
        ids = " ".join(line["run"] for line in runs)
        texts += [f"# {float(runs[0]['macs'] or 0) / 1e6:.2f} MMACs, seeds {shown['seeds']}, runs {ids}", commands[key]]
    if written:
        with open(table, "w", newline="", encoding="utf-8") as text:
            writer = csv.DictWriter(text, list(written[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(written)
        file.write_text("\n".join(texts) + "\n", encoding="utf-8")


def describe_recipe(line: dict[str, str]) -> str:
    """What is on, in words; "plain" for nothing."""
    words = [line[key] if key == "augment_policy" else f"{key} {line[key]}" for key, off in RECIPE.items() if line[key] != off]
    level = "/".join(line[key] for key in DETAILS[:2] if line[key])
    return ", ".join(f"{word} {level}".strip() if word == "randaugment" else word for word in words) or "plain"


def print_table(path: Path) -> None:
    from scipy import stats  # the records are made without it

    with open(path, newline="", encoding="utf-8") as file:
        lines = [
            {**line, "acc": line.get("test_acc") or line["val_acc"]}  # a run on all images has no validation accuracy
            for line in csv.DictReader(file)
            if line["state"] == "finished" and (line.get("test_acc") or line["val_acc"])
        ]
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for line in lines:
        network = " ".join(line[name] for name in NETWORK if line.get(name) and name not in IN_EACH)
        key = (network, line["macs"], *(line[name] for name in TRAINING), describe_recipe(line))
        groups[key].append(float(line["acc"]))
        seconds[key].append(float(line["seconds_training"]))
    repeated = [values for values in groups.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    pooled = (sum((len(v) - 1) * statistics.variance(v) for v in repeated) / freedom) ** 0.5 if freedom else 0.0
    print(f"{len(lines)} finished runs; pooled standard deviation {pooled:.2f} ({freedom} degrees of freedom)")
    print(f"{'MMACs':>7}  {'network':28} {'epochs':>6}  {'recipe':34} {'mean':>6} {'n':>2}  {'gain':>6} {'95 %':>6}  s a run")
    for key, values in sorted(groups.items(), key=lambda item: (float(item[0][1]), item[0][:-1], item[0][-1] != "plain")):
        plain = groups.get((*key[:-1], "plain"), [])
        gain = half = ""
        if plain and key[-1] != "plain" and freedom:
            gain = f"{statistics.mean(values) - statistics.mean(plain):+.2f}"
            half = f"{stats.t.ppf(0.975, freedom) * pooled * (1 / len(values) + 1 / len(plain)) ** 0.5:.2f}"
        epochs = key[2 + TRAINING.index("epochs")]
        print(
            f"{float(key[1]) / 1e6:7.2f}  {key[0]:28} {epochs:>6}  {key[-1]:34} "
            f"{statistics.mean(values):6.2f} {len(values):2}  {gain:>6} {half:>6}  "
            f"{statistics.mean(seconds[key]):.0f}"
        )


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, help="a folder of runs")
    parser.add_argument("--name", default="runs", help="what the files' names begin with")
    parser.add_argument("--add", action="store_true", help="keep the runs that the files have already")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where they go")
    parser.add_argument("--table", type=Path, metavar="CSV", help="only print the table of such a file")
    options = parser.parse_args(words)
    if options.table is None and options.runs is None:
        parser.error("name a folder of runs, or --table CSV")
    print_table(options.table or collect(options.runs, options.name, options.out, add=options.add))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
