"""What all benchmarks share: their options, their result with its JSON, and peers that run in processes of their own.

A benchmark is a module with `measure(result, options)`; `command` makes it a program.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import stats
from cifar.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Toy sizes, so that every command can be tried out in seconds on a CPU; its figures mean nothing.
SMOKE = {"train_size": 128, "batch_size": 32, "epochs": 2, "width": 4, "tta": "none"}


class Missing(Exception):
    """Something that this machine does not have, or that could not be run: it is skipped and named."""


# -- the result --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What one benchmark found. `about` is what it ran on."""

    row: str
    name: str
    what: str
    about: dict[str, Any]
    measured: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    claims: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, who: str, what: str, unit: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
        """Figures of one kind. `more` is written beside them."""
        found = {"who": who, "what": what, "unit": unit, **stats.describe(values), **more}
        self.measured.append(found)
        print(f"  {who}: {what} {shown(found)}", file=sys.stderr, flush=True)
        return found

    def claim(
        self,
        what: str,
        ours: dict[str, Any],
        peer: dict[str, Any] | None = None,
        *,
        of: str = "median",
        ratio: bool = True,
        inverse: bool = False,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """One line of the table. With `ratio` it is peer/ours (how many times less ours takes; `inverse`: ours/peer, for
        rates, and for what may cost a little more), without it ours is held against the bound as it is."""
        found: dict[str, Any] = {
            "what": what,
            "ours": shown(ours, of),
            "peer": f"{shown(peer, of)} ({peer['who']})" if peer else "",
        }
        value = ours[of]
        if peer and ratio:
            pair = (ours, peer) if inverse else (peer, ours)
            found |= stats.ratio(pair[0]["values"], pair[1]["values"])
            value = found["ratio"]
        bound = at_least if at_least is not None else at_most
        if bound is not None and not self.about["smoke"]:  # at toy sizes nothing is claimed
            found["wanted"] = (
                ("≥ " if at_least is not None else "≤ ") + f"{bound:g}" + ("" if "ratio" in found else unit_of(ours))
            )
            found["met"] = bool(value >= bound if at_least is not None else value <= bound)
        self.claims.append(found)

    def skip(self, who: str, why: str) -> None:
        self.skipped.append({"who": who, "why": why})
        print(f"  skipped: {who} ({why})", file=sys.stderr, flush=True)

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def save(self, path: Path) -> None:
        """Write what is there up to now: a benchmark of many minutes may be cut off."""
        path.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")

    def as_dict(self) -> dict[str, Any]:
        own = {"row": self.row, "name": self.name, "what": self.what}
        lists = {"measured": self.measured, "claims": self.claims, "skipped": self.skipped, "notes": self.notes}
        return {**own, **self.about, **lists}


def unit_of(measured: dict[str, Any]) -> str:
    return f" {measured['unit']}" if measured["unit"] else ""


def shown(measured: dict[str, Any], of: str = "median") -> str:
    """`1.50 s (1.48–1.53, n = 20)`: median and quartiles, or mean and standard deviation."""
    value, n = measured[of], measured["n"]
    if n == 1:
        return f"{number(value)}{unit_of(measured)} (n = 1)"
    spread = "–".join(number(v) for v in measured["spread"]) if of == "median" else f"± {number(measured['std'])}"
    return f"{number(value)}{unit_of(measured)} ({spread}, n = {n})"


def number(value: float) -> str:
    """Three significant digits, four from 10 to 100 (percents), no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, (3 if size == 1 else 2) - size)}f}"


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Device, versions and state of the code."""
    import importlib.metadata

    import torch

    from cifar.system import environment
    from cifar.training.trainer import resolve_device

    device = resolve_device(options.device)
    found: dict[str, Any] = {
        "device": environment.device_name(device),
        "device_type": device.type,
        "devices": torch.cuda.device_count() if device.type == "cuda" else 1,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),  # others on the same cores make it slower
        "platform": platform.platform(),
        "versions": dict(environment.installed_versions()),
        "git": environment.git_state(),
        "date": time.strftime("%Y-%m-%d"),
        "dataset": options.dataset,
        "official": options.dataset == "cifar10",
        "smoke": options.smoke,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["versions"]["torchvision"] = importlib.metadata.version("torchvision")
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found


# -- a benchmark as a program ------------------------------------------------------------------------------------------


def results_of(smoke: bool) -> Path:
    """Where the JSONs go: toy figures are kept away from real ones."""
    return RESULTS / "smoke" if smoke else RESULTS


def parser_of(name: str, what: str | None, *, n: int, what_n: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; `what` is its docstring, `n` how often it measures."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(what or "").splitlines()[0].rstrip("."))
    parser.add_argument("--n", type=int, default=n, help=f"{what_n} [default: {n}]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dataset", default="cifar10", choices=("cifar10", "stand-in"))
    parser.add_argument("--workers", type=int, default=14, help="worker processes of a peer's DataLoader [default: 14]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our trainings, as compile=on")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/NAME.json")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the stand-in images: does it run at all?")
    return parser


def command(
    parser: argparse.ArgumentParser,
    row: str,
    measure: Callable[[Result, argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Measure, write the JSON, print the lines of the table. `row` is the row's number in the table.

    A program of several rows has an argument `kind`, and `row` is "kind=row,kind=row".
    """
    options = parser.parse_args(arguments)
    os.environ.setdefault(HUGE_PAGES, "1")  # as our command line does; peers are left as they are
    if options.smoke:
        options.dataset, options.device, options.n, options.workers = "stand-in", "cpu", min(options.n, 2), 1
    name = parser.prog.rpartition(".")[2]
    if "=" in row:
        row, name = dict(pair.split("=") for pair in row.split(","))[options.kind], f"{name}-{options.kind}"
    out = options.out = options.out or results_of(options.smoke) / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _data_at_hand(options.dataset)
        result = Result(row, name, str(parser.description), about(options))
        begun = time.perf_counter()
        print(f"row {row}, {name}: {result.what}", file=sys.stderr)
        try:
            measure(result, options)
        except Missing as missing:
            result.skip(name, str(missing))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given = sys.argv[1:] if arguments is None else list(arguments)
    result.about |= {"command": " ".join([parser.prog, *given]), "seconds": round(time.perf_counter() - begun, 1)}
    result.save(out)
    from benchmarks.table import claim_lines

    for line in claim_lines(result.as_dict()):
        print(line)
    print(f"json  {out}")
    return 0


def _data_at_hand(dataset: str) -> None:
    from cifar import data

    if dataset == "cifar10" and data.find_cifar10(None) is None:
        raise UserError("the official images are not here; get them with `python -m cifar data`, or name them with CIFAR_DATA")


# -- clocks and processes ----------------------------------------------------------------------------------------------


def synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # PyTorch's


def child_environment(**more: str) -> dict[str, str]:
    """Of processes that a benchmark starts: our code on the path, no W&B account, no run of somebody else's sweep."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_") and key != HUGE_PAGES}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**inherited, "PYTHONPATH": path, "WANDB_MODE": "offline", "WANDB_SILENT": "true", **more}


class Peer:
    """A program beside ours in a process of its own, so that neither's settings touch the other: a line asks for one more
    measurement, a JSON line answers it. Between two answers it waits, so that pairs can be interleaved."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.name = module.rpartition(".")[2]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=child_environment(**(environment or {})),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self.about = self._answer()

    def ask(self, request: str = "go") -> dict[str, Any]:
        """One more measurement. Raises Missing with the last lines of what it said where the peer has died."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self._process.wait()
        self._errors.seek(0)
        said = [text for text in self._errors.read().decode(errors="replace").splitlines() if text.strip()]
        self._close()
        raise Missing(f"the peer {self.name} ended: {said[-1][:300] if said else 'it said nothing'}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                file.close()


def serve(measure: Callable[[str], dict[str, Any]], **about: Any) -> None:
    """The peer's side: answer every line of standard input. What else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write(json.dumps({"ready": True, **about}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(measure(line.strip())) + "\n")


def installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None
