"""Runs the benchmarks that fit this machine, one process each, and prints the table: `python -m benchmarks`.

    python -m benchmarks                     # all rows that this device can run
    python -m benchmarks --only 4 5 10       # some of them
    python -m benchmarks --quick             # fewer repetitions, and no airbench96: a quarter of an hour on one H200
    python -m benchmarks --list              # what there is
    python -m benchmarks --smoke --out DIR   # toy sizes on the CPU: does everything run?

What needs minutes of compiling (airbench96) is left to the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT, child_environment, results_of
from benchmarks.table import markdown, read

LIMIT_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Row:
    number: str
    arguments: str  # of `python -m benchmarks.`
    device: str  # that it needs
    what: str
    quick: str | None = ""  # more arguments with --quick; None: left out


ROWS = (
    Row("10", "replay worksheet1", "cuda", "a step against replay of its graph"),
    Row("10", "replay resnet20", "cuda", "the same, ResNet-20 at batch 512"),
    Row("4", "worksheet1", "cuda", "worksheet 1 beside the notebooks' way", "--n 3 --peer-epochs 3"),
    Row("7", "throughput resnet20", "cuda", "images a second beside a good standard loop", "--n 3"),
    Row("7", "throughput resnet56", "cuda", "the same, ResNet-56", "--n 3"),
    Row("5", "instruments", "cuda", "what instruments and the W&B mirror cost", "--n 6 --watch-n 3"),
    Row(
        "6",
        "trials",
        "cuda",
        "64 trials: packed, side by side, in turn, and a process each",
        "--serial 4 --peer-n 2 --peer-epochs 3",
    ),
    Row("9", "many_gpus", "cuda", "trials an hour of two GPUs over one"),
    Row("9", "data_parallel", "cuda", "one run on two GPUs over one", "--n 1"),
    Row("1", "airbench 94", "cuda", "the 94 % network beside airbench94_muon.py", "--n 6"),
    Row("2", "airbench 95", "cuda", "the 95 % network beside airbench95.py", "--n 3"),
    Row("3", "cold_start", "cuda", "from the command to 94 %, empty and warm caches", "--n 1"),
    Row("11", "architectures", "cuda", "a sweep over architectures, empty caches over warm ones", None),
    Row("curves", "scaling", "any", "the cost of one more epoch, trial, run, ...", "--only epochs width"),
    Row("8", "cpu_epoch worksheet1", "cpu", "worksheet 1 on the CPU beside the notebooks' way", "--n 2"),
    Row("8", "cpu_epoch resnet20", "cpu", "ResNet-20 on the CPU beside a good standard loop", "--n 2"),
    Row("8", "make_sweep", "cpu", "make sweep"),
    Row("2", "airbench 96", "cuda", "the 96 % network beside airbench96_faster.py, which compiles for 6 minutes", None),
)


def run(row: Row, options: argparse.Namespace) -> str:
    """One benchmark in a process of its own -> what went wrong, if anything."""
    module, *arguments = shlex.split(row.arguments)
    name = "-".join([module, *arguments])
    out = ["--out", str(options.out / f"{name}.json")]
    more = [*(["--smoke"] if options.smoke else []), *(shlex.split(row.quick or "") if options.quick else [])]
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, *more, *out]
    try:
        code = subprocess.run(command, cwd=ROOT, env=child_environment(), timeout=LIMIT_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT_SECONDS // 60} minutes"
    return f"ended with {code}" if code else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", choices=sorted({row.number for row in ROWS}), help="rows of the table"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, to see where things stand")
    parser.add_argument("--list", action="store_true", help="say what there is, run nothing")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU: do they run at all?")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the JSONs [default: benchmarks/results]")
    options = parser.parse_args(arguments)
    options.out = (options.out or results_of(options.smoke)).resolve()
    if options.list:
        for row in ROWS:
            print(f"{row.number:>6}  python -m benchmarks.{row.arguments:<22} {row.device:<5} {row.what}")
        return 0
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = []
    for row in ROWS:
        if options.only and row.number not in options.only:
            continue
        if row.device not in (device, "any") and not options.smoke:
            print(f"skipped: row {row.number}, {row.arguments} (needs {row.device}; here is {device})", file=sys.stderr)
        elif options.quick and row.quick is None:
            print(f"skipped: row {row.number}, {row.arguments} (--quick)", file=sys.stderr)
        elif wrong := run(row, options):
            failed.append(f"row {row.number}, {row.arguments}: {wrong}")
    print(markdown(read(options.out)))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
