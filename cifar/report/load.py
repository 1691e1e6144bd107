"""Run folders -> runs: sweeps, runs and folders by name, and what W&B has, read whole; a damaged one is named and left out."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from cifar.errors import UserError
from cifar.tracking.run_dir import Record, all_records, find, read_json

STAND_IN = "STAND-IN DATA, not CIFAR-10"
UNOFFICIAL = "NOT THE OFFICIAL CIFAR-10 FILES"
SPLITS = {"val": "validation", "test": "test"}
LATER = {"keep": 1.0}  # settings that runs of earlier versions do not have, at what those did


@dataclass(frozen=True)
class Run:
    """One run, as its folder tells it. Accuracies are fractions; `macs` is per 3x32x32 image and one view."""

    id: str
    name: str
    path: Path
    config: dict[str, Any]
    macs: float
    params: int
    verified: bool
    cost_note: str
    dataset: str
    official: bool
    state: str
    reason: str
    epoch: int
    epochs: int
    swept: tuple[str, ...]
    sweep: str
    cell: int | None
    created: float
    command: str
    rows: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    labels: dict[str, Any]
    environment: dict[str, Any]

    @property
    def banner(self) -> str:
        """What has to be said wherever this run appears; empty on the official CIFAR-10."""
        return "" if self.dataset == "cifar10" and self.official else UNOFFICIAL if self.dataset == "cifar10" else STAND_IN

    @property
    def subtitle(self) -> str:
        name = f"{self.name} ({self.id})" if self.name != self.id else self.id
        return " · ".join([name, *cuts([self.config])])

    @property
    def model(self) -> str:
        return str(self.config.get("model", "?"))

    @property
    def seconds(self) -> float | None:
        return self.summary.get("seconds")

    def accuracies(self, split: str) -> dict[int, float]:
        """Of the last epoch, by the number of views of an image that were averaged. Validation has one view."""
        if split == "val":
            last = self.rows[-1] if self.rows else {}
            found = {1: last.get("val/acc", self.summary.get("val/acc"))}
        else:
            views = int(self.summary.get("test/views") or 1)
            found = {1: self.summary.get("test/acc_one_view"), views: self.summary.get("test/acc")}
        return {n: float(acc) for n, acc in found.items() if isinstance(acc, int | float) and math.isfinite(acc)}

    def accuracy(self, split: str) -> float | None:
        """Of the last epoch, as the run was scored: with all of its views."""
        found = self.accuracies(split)
        return found[max(found)] if found else None

    @cached_property
    def columns(self) -> set[str]:
        """The keys of all rows."""
        return set[str]().union(*self.rows)

    def layers(self, metric: str) -> list[str]:
        """Layers that have `metric`, in the network's order."""
        present = {key.removeprefix(f"{metric}/") for key in self.columns if key.startswith(f"{metric}/")}
        order = {name: i for i, name in enumerate(self.labels.get("layers", []))}
        first_seen = {key.removeprefix(f"{metric}/"): i for i, key in enumerate(self.rows[-1])} if self.rows else {}
        return sorted(present, key=lambda name: (order.get(name, len(order)), first_seen.get(name, 0)))


@dataclass(frozen=True)
class Apart:
    """A run that is not compared, and why."""

    id: str
    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """What was asked for: runs, those that could not be read, and the sweep if it is exactly one."""

    runs: tuple[Run, ...]
    damaged: tuple[Apart, ...] = ()
    sweep: str = ""
    title: str = "runs"
    question: str = ""
    cells: int = 0  # trials that the sweep will have; 0: not known
    place: str = ""  # entity/project[/sweep], where that is all that was asked for

    @property
    def alone(self) -> bool:
        """A single run, which is shown with figures of its own."""
        return len(self.runs) == 1 and not self.sweep and not self.damaged


# -- reading -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> Run:
    """One run folder. Raises UserError that says what is damaged."""
    record = Record(path)
    try:
        run, config, status = map(record.read, ("run", "config", "status"))
        if not run or not config:
            raise ValueError(f"{'config' if run else 'run'}.json is missing")
        cost = run.get("cost") or {}
        rows = _rows(path / "metrics.jsonl")
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("metrics.jsonl holds a line that is no row")
        dataset = str(run.get("dataset") or config.get("dataset"))
        return Run(
            id=path.name,
            name=str(run.get("name") or path.name),
            path=path,
            config={**LATER, **config, "dataset": dataset},
            macs=float(cost.get("macs", 0)),
            params=int(cost.get("params", 0)),
            verified=bool(cost.get("verified", False)) and float(cost.get("macs", 0)) > 0,
            cost_note=str(cost.get("note") or ("" if cost else "no MACs in its record")),
            dataset=dataset,
            official=bool(run.get("official", False)),
            state=str(status.get("state", "running")),
            reason=str(status.get("reason") or ""),
            epoch=int(status.get("epoch") or 0),
            epochs=int(status.get("epochs") or config.get("epochs") or 0),
            swept=tuple(map(str, run.get("swept") or ())),
            sweep=str(run.get("sweep") or ""),
            cell=run.get("cell"),
            created=float(run.get("created") or 0),
            command=str(run.get("command") or ""),
            rows=rows,
            summary=record.read("summary"),
            labels=record.read("labels"),
            environment=record.read("environment"),
        )
    except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the run {path.name} is damaged and left out ({what}); delete {path} or restore it") from None


def _rows(file: Path) -> tuple[Any, ...]:
    """The whole lines, as record.rows() has them, read in one go."""
    if not file.exists():
        return ()
    lines = file.read_bytes().split(b"\n")[:-1]  # what follows the last newline is still being written
    try:
        return tuple(map(from_json, lines))  # in a quarter of json's time
    except ValueError:  # it takes less than json, which also says better where a file is damaged
        return tuple(json.loads(b"[" + b",".join(lines) + b"]"))


def collect(names: Sequence[str], runs: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Collection:
    """Sweeps, runs and folders by name, and places on W&B -> their runs. No name: the newest sweep, or else every run.

    A run that is in several of them counts once, by its id; the record on disk wins over what W&B has of it.
    `progress` hears of (runs read, runs in all) while W&B is read.
    """
    newest = "" if names else newest_sweep(runs)
    paths: dict[Path, None] = {} if names or newest else dict.fromkeys(_run_folders(runs))  # in order, each once
    remote: dict[Path, None] = {}
    sweeps, damaged, pulled = [], [], None
    for asked in [newest] if newest else names:
        name = sweep_of(asked, runs) or asked
        folder = Path(name)
        if _is_sweep(name, runs):
            home = folder.resolve().parent.parent if folder.name != name else runs
            sweeps.append((folder.name, home))
            paths.update(dict.fromkeys(_of_sweep(folder.name, home)))
        elif not (folder / "run.json").exists() and (inside := _run_folders(folder)):
            paths.update(dict.fromkeys(inside))
        elif wandb_files := _wandb_files(folder):
            from cifar.integrations.wandb import offline

            read, bad = offline.unpack(wandb_files)
            remote.update(dict.fromkeys(read))
            damaged += [Apart(run_id, called, "damaged", reason) for run_id, called, reason in bad]
        elif not folder.exists() and (place := _place(name)):
            from cifar.integrations.wandb import download as wandb_runs

            pulled = wandb_runs.pull(place, progress)
            remote.update(dict.fromkeys(pulled.folders))
            damaged += [Apart(run_id, called, "damaged", reason) for run_id, called, reason in pulled.damaged]
        else:
            paths[find(name, runs).path] = None
    if not (paths or remote or sweeps or damaged or pulled):
        raise UserError(
            f"no runs in {runs}; `python -m cifar sweep sweeps/quickstart.yaml` makes some, --runs-dir names a place"
        )
    found: dict[str, Run] = {}
    for path in [*paths, *remote]:
        if path.name in found:
            continue
        try:
            found[path.name] = load(path)
        except UserError as error:
            damaged.append(Apart(path.name, path.name, "damaged", str(error)))
    loaded = tuple(found.values())
    apart = tuple(run for run in damaged if run.id not in found)
    if len(sweeps) == 1 and len(names) < 2:
        title, question, cells = _describe(*sweeps[0])
        return Collection(loaded, apart, sweeps[0][0], title, question, cells)
    if pulled and len(names) == 1:
        return Collection(loaded, apart, "", pulled.title, pulled.question, pulled.cells, names[0])
    if len(loaded) == 1 and not apart:
        title = loaded[0].name
    else:
        title = ", ".join([*names[:3], "…"] if len(names) > 3 else names) or f"all runs in {runs.name}"
    return Collection(loaded, apart, title=title)


def _place(name: str) -> Any:
    """The place on W&B that `name` names, or None."""
    if "/" not in name:
        return None
    from cifar.integrations.wandb.download import place_of

    return place_of(name)


def _wandb_files(path: Path) -> list[Path]:
    """The .wandb files that `path` is or holds: of an offline run's folder, or of a folder of such."""
    if path.suffix == ".wandb" and path.is_file():
        return [path]
    patterns = ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb")
    return next((found for pattern in patterns if (found := sorted(path.glob(pattern)))), []) if path.is_dir() else []


def _run_folders(folder: Path) -> list[Path]:
    whole = [record.path for record in all_records(folder)]
    known = set(whole)
    return whole + sorted({p.parent for p in folder.glob("*/config.json")} - known)  # run.json lost: named as damaged


def _is_sweep(name: str, runs: Path) -> bool:
    path = Path(name)
    if path.name != name:  # a path: of a sweep's folder, or of anything else
        return path.parent.name == "sweeps" and path.is_dir()
    return bool(name) and ((runs / "sweeps" / name).is_dir() or any(_of_sweep(name, runs)))


def _of_sweep(sweep: str, runs: Path) -> list[Path]:
    chosen = []
    for path in _run_folders(runs):
        try:
            of = str(json.loads((path / "run.json").read_text()).get("sweep") or "")
        except (OSError, ValueError, AttributeError):
            of = path.name.rpartition("-")[0]  # SWEEP-CELL: the folder's name still tells
        if of == sweep:
            chosen.append(path)
    return sorted(chosen)


def sweep_of(name: str, runs: Path) -> str:
    """The id of the sweep that `name` means, as `agent` reads it: its name, or the start of its id. "" if it means none."""
    known = sorted(path.name for path in (runs / "sweeps").glob("*/"))
    if not name or Path(name).name != name or name in known or (runs / name).exists() or _run_folders(Path(name)):
        return ""  # an id, a run, or a folder: read as such
    named = [sweep for sweep in known if _info(sweep, runs).get("name") == name]
    fits = named or [sweep for sweep in known if sweep.startswith(name)]
    if len(fits) > 1:
        raise UserError(f"'{name}' fits {count(len(fits), 'sweep')} ({', '.join(fits[:6])}); give the id")
    runs_too = [path.name for path in runs.glob("*/") if path.name.startswith(name)] if fits and not named else []
    if others := [run for run in runs_too if run != "sweeps" and not run.startswith(f"{fits[0]}-")]:
        raise UserError(f"'{name}' fits the sweep {fits[0]} and the run {others[0]}; give more of the id")
    return fits[0] if fits else ""


def _info(sweep: str, runs: Path) -> dict[str, Any]:
    """A sweep's sweep.json and, over it, the name that its file gives; what is damaged counts as not said."""
    from cifar.config.resolve import parse_yaml

    info: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        info = read_json(runs / "sweeps" / sweep / "sweep.json")
    with contextlib.suppress(OSError, ValueError, UserError):
        text = (runs / "sweeps" / sweep / "sweep.yaml").read_text(encoding="utf-8")
        content = parse_yaml(text, "sweep.yaml")
        info |= {"text": text, **{key: content[key] for key in ("name", "description") if content.get(key)}}
    return info


def newest_sweep(runs: Path) -> str:
    """The id of the sweep that was created last, or ""."""
    files = [*(runs / "sweeps").glob("*/sweep.yaml")]
    return max(files, key=lambda path: path.stat().st_mtime).parent.name if files else ""


def _describe(sweep: str, runs: Path) -> tuple[str, str, int]:
    """A sweep's title, the question that its file asks (its description, or the comment it opens with), and its cells."""
    info = _info(sweep, runs)
    text, name, cells = info.get("text", ""), info.get("name"), info.get("cells")
    comment = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())]
    title = f"{name} ({sweep})" if name and name != sweep else sweep
    return title, str(info.get("description") or "\n".join(comment)).strip(), cells if isinstance(cells, int) else 0


# -- printing ----------------------------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A configuration value or a cell, as short as it can be read."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def seconds_text(seconds: float | None) -> str:
    """Whole seconds, below ten with a decimal."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:,.0f}"


def cuts(configs: Iterable[dict[str, Any]]) -> list[str]:
    """What has to be said beside every accuracy of runs whose epochs were not all of the training set."""
    configs = list(configs)
    sizes, steps = ({int(config.get(key) or 0) for config in configs} for key in ("train_size", "max_steps"))
    kept = {float(config.get("keep") or 1) for config in configs}
    said = []
    if sizes - {0}:
        said.append(f"{count(max(sizes), 'training image')} only" if len(sizes) == 1 else "training sets of different size")
    if steps - {0}:
        said.append(f"at most {count(max(steps), 'step')} an epoch" if len(steps) == 1 else "some epochs cut short")
    if kept - {1.0}:
        hard = f"the hardest {100 * max(kept):.3g} % of the images an epoch"
        said.append(hard if len(kept) == 1 else "some epochs of hard images only")
    return said


def macs_text(macs: float) -> str:
    """4.08e7 -> "40.8 MMACs"."""
    size, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if macs >= s), (1.0, ""))
    return f"{macs / size:.3g} {prefix}MACs"


def amount(text: str) -> float:
    """ "50M" -> 5e7; k, M, G and plain numbers (`5e7`) are read."""
    scale = {"k": 1e3, "m": 1e6, "g": 1e9}.get(text.strip()[-1:].lower())
    try:
        value = float(text.strip()[:-1]) * scale if scale else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"'{text}' is not a number of multiply-adds; write 50M, 1.2G or 5e7")
    return value
