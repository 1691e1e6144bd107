"""Reads runs: names of sweeps, runs, folders or W&B projects -> `Run` objects. A damaged run is reported and left out."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from cifar.config.recorded import check_config, fill_config
from cifar.errors import UserError
from cifar.report.beside import map_beside, start_beside
from cifar.report.formatting import pluralize
from cifar.report.metric_rows import list_names
from cifar.report.run_cache import MIN_RUNS, SETTLE_SECONDS, CachedRun, RunCache
from cifar.report.run_files import Cleaner, RunFiles, RunReader, clean_document, stat_files
from cifar.system.files import read_text
from cifar.system.names import check_name
from cifar.system.redact import redact
from cifar.tracking.pretrained import is_pretrained
from cifar.tracking.records import UnknownSchemaError, is_text
from cifar.tracking.run_dir import RunDir, find_run_dir, list_folders, list_run_dirs, read_json

STAND_IN_BANNER = "STAND-IN DATA, not CIFAR-10"
UNOFFICIAL_BANNER = "NOT THE OFFICIAL CIFAR-10 FILES"
MIN_STATTED = 2000  # runs whose files another process looks at
_TRAIN = ["python", "-m", "cifar", "train"]
SPLIT_NAMES = {"val": "validation", "test": "test"}


@dataclass(frozen=True)
class Run:
    """One run, read from its folder. Accuracies are fractions; `macs` is for one view of one 3x32x32 image."""

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
    swept_keys: tuple[str, ...]  # that the sweep varies and that this run was given
    sweep_keys: tuple[str, ...]  # all that the sweep varied when the run was made; empty: not noted
    sweep: str
    cell: int | None
    created: float
    command: str
    rows: Sequence[dict[str, Any]]  # of metrics.jsonl; like a tuple
    summary: dict[str, Any]
    labels: dict[str, Any]
    environment: dict[str, Any]
    tags: tuple[str, ...] = ()
    is_rebuilt: bool = False  # its record was made from tables: its folder is no place to go back to

    @property
    def banner(self) -> str:
        """A warning about the data that must stand wherever this run appears; "" for the official CIFAR-10."""
        return find_banner(self.dataset, self.official)

    @property
    def subtitle(self) -> str:
        name = f"{self.name} ({self.id})" if self.name != self.id else self.id
        return " · ".join([name, *training_caveats([self.config])])

    @property
    def model(self) -> str:
        return str(self.config.get("model", "?"))

    @property
    def seconds(self) -> float | None:
        return self.summary.get("seconds")

    @property
    def own_command(self) -> str:
        """Of a rebuilt run, the command that trains it again without its folder, if its record has one; "" otherwise."""
        return self.command if self.is_rebuilt else ""

    @property
    def num_images(self) -> int | None:
        """Training images that it has seen, in all epochs."""
        steps, batch = self.rows[-1].get("step") if self.rows else None, self.config.get("batch_size")
        return int(steps * batch) if isinstance(steps, int) and isinstance(batch, int) else None

    @property
    def train_flops(self) -> float | None:
        """FLOPs of its training. Of a run of an earlier version: as if all weights had learned."""
        counted = self.summary.get("train_flops")
        return float(counted) if counted is not None else 6 * self.macs * self.num_images if self.num_images else None

    @property
    def pack_size(self) -> int:
        """The most runs that were trained side by side with it, itself included: they share its seconds and joules."""
        step = self.environment.get("step")
        together = step.get("together") if isinstance(step, dict) else 1
        return int(self.summary.get("pack_size") or (together if isinstance(together, int) else 1))

    def cost(self, name: str) -> float | None:
        """A cost by its name in summary.json: seconds, train_flops, joules, weights_bytes, latency_seconds, ..."""
        value = self.train_flops if name == "train_flops" else self.summary.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def accuracies_by_views(self, split: str) -> dict[int, float]:
        """Number of views of an image that were averaged -> accuracy of the last epoch. Validation uses one view."""
        if split == "val":
            last = self.rows[-1] if self.rows else {}
            found = {1: last.get("val/acc", self.summary.get("val/acc"))}
        else:
            views = int(self.summary.get("test/views") or 1)
            found = {1: self.summary.get("test/acc_one_view"), views: self.summary.get("test/acc")}
        return {n: float(acc) for n, acc in found.items() if isinstance(acc, int | float) and math.isfinite(acc)}

    def accuracy(self, split: str) -> float | None:
        """The accuracy of the last epoch with the largest number of views; None if the run was not scored."""
        by_views = self.accuracies_by_views(split)
        return by_views[max(by_views)] if by_views else None

    @cached_property
    def metric_keys(self) -> set[str]:
        """The keys of all rows of metrics.jsonl."""
        return set(list_names(self.rows))

    def layers_with(self, metric: str) -> list[str]:
        """The layers that have `metric` in some row, in the network's order."""
        last = tuple(self.rows[-1]) if self.rows else ()
        return list(_order_layers(metric, list_names(self.rows), last, tuple(self.labels.get("layers") or ())))

    # Old names, for plug-ins.
    accuracies, layers = accuracies_by_views, layers_with
    columns, swept = property(attrgetter("metric_keys")), property(attrgetter("swept_keys"))


@functools.lru_cache(maxsize=1024)  # many runs are of one network
def _order_layers(metric: str, names: tuple[str, ...], last_names: tuple[str, ...], layers: tuple[str, ...]) -> tuple[str, ...]:
    """`Run.layers_with`. names: of all rows; last_names: of the last row; layers: in the network's order."""
    present = [name.removeprefix(f"{metric}/") for name in names if name.startswith(f"{metric}/")]
    order = {name: i for i, name in enumerate(layers)}
    first_seen = {name.removeprefix(f"{metric}/"): i for i, name in enumerate(last_names)}
    return tuple(sorted(present, key=lambda name: (order.get(name, len(order)), first_seen.get(name, 0))))


def is_training_command(command: Any) -> bool:
    """Whether a record's command trains from settings and does nothing else: a record may come from anywhere."""
    with contextlib.suppress(ValueError):
        words = shlex.split(command) if isinstance(command, str) else []
        return words[:4] == _TRAIN and "--from" not in words and shlex.join(words) == command
    return False


def find_banner(dataset: str, official: bool) -> str:
    """The warning about data other than the official CIFAR-10 files, "" for those."""
    if dataset != "cifar10":
        return STAND_IN_BANNER
    return "" if official else UNOFFICIAL_BANNER


def training_caveats(configs: Iterable[dict[str, Any]]) -> list[str]:
    """What must stand beside the accuracies if epochs were not the whole training set: "512 training images only", ..."""
    configs = list(configs)
    sizes, steps = ({int(config.get(key) or 0) for config in configs} for key in ("train_size", "max_steps"))
    kept_fractions = {float(config.get("keep") or 1) for config in configs}
    caveats = []
    if sizes - {0}:
        caveats.append(
            f"{pluralize(max(sizes), 'training image')} only" if len(sizes) == 1 else "training sets of different size"
        )
    if steps - {0}:
        caveats.append(f"at most {pluralize(max(steps), 'step')} an epoch" if len(steps) == 1 else "some epochs cut short")
    if kept_fractions - {1.0}:
        hard_only = f"the hardest {100 * max(kept_fractions):.3g} % of the images an epoch"
        caveats.append(hard_only if len(kept_fractions) == 1 else "some epochs of hard images only")
    if teachers := {str(config.get("teacher") or "") for config in configs} - {""}:
        is_taught = all(config.get("teacher") for config in configs)
        caveats.append(
            ("taught by " + teachers.pop() if len(teachers) == 1 else "taught by other runs")
            if is_taught
            else "some taught by other runs"
        )
    return caveats


@dataclass(frozen=True)
class ExcludedRun:
    """A run that is not compared with the others. `kind` is the reason in a word or two, `reason` in a sentence."""

    id: str
    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class RunCollection:
    """The runs that were asked for, those that could not be read, and the sweep if exactly one was asked for."""

    runs: tuple[Run, ...]
    damaged: tuple[ExcludedRun, ...] = ()
    sweep: str = ""
    title: str = "runs"
    question: str = ""
    num_cells: int = 0  # trials that the sweep will have; 0 if that is not known
    wandb_name: str = ""  # entity/project[/sweep], if that is all that was asked for

    @property
    def is_single_run(self) -> bool:
        """Whether there is one run only. It is shown with the figures of a run."""
        return len(self.runs) == 1 and not self.sweep and not self.damaged


def load_run(path: Path) -> Run:
    """Read one run folder. Raises UserError that says what is damaged."""
    return RunLoader().load(path)


class RunLoader:
    """Reads the runs of a report. Those of a folder with many of them come from its cache, as far as that knows them.

    min_cached: the number of runs of a folder from which on its cache is used.
    """

    def __init__(self, *, min_cached: int = MIN_RUNS, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._min_cached, self._settle_seconds = min_cached, settle_seconds
        self._reader, self._cleaner = RunReader(), Cleaner()
        self._caches: dict[Path, RunCache] = {}

    def load(self, path: Path) -> Run:
        """Read one run folder. Raises UserError that says what is damaged."""
        with _name_damage(path):
            return self._make_run(path, self._reader.read(path))

    def load_all(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Run | UserError]]:
        """Read run folders, in this order; a damaged one gives an error that says what is damaged."""
        num_runs = Counter(path.parent for path in paths)
        many = [path for path in paths if num_runs[path.parent] >= self._min_cached]
        signatures = dict(zip(many, self._stat_all(many), strict=True))
        found: dict[Path, dict[str, CachedRun]] = {path.parent: {} for path in signatures}
        cached = {path: self._load_cached(path, signature) for path, signature in signatures.items()}
        fresh = self._read_many([path for path, run in cached.items() if run is None])
        for path in paths:
            known = cached.pop(path, None)
            if known:
                found[path.parent][path.name], run = known
                yield path, run
                continue
            try:
                if path not in signatures:
                    yield path, self.load(path)
                    continue
                with _name_damage(path):
                    read = fresh.pop(path)
                    if isinstance(read, Exception):
                        raise read
                    run = self._make_run(path, read)
                found[path.parent][path.name] = CachedRun(signatures[path], read)
                yield path, run
            except UserError as error:
                yield path, error
        for folder, runs in found.items():
            self._open_cache(folder).write(runs, self._cleaner)

    def _stat_all(self, paths: list[Path]) -> list[list[int]]:
        """`stat_files` of each. Of many, beside the reading of the caches, which takes as long."""
        if len(paths) < MIN_STATTED:
            return list(map(stat_files, paths))
        with start_beside(lambda: list(map(stat_files, paths))) as wait:
            for folder in {path.parent for path in paths}:
                self._open_cache(folder)
            return wait()

    def _read_many(self, paths: list[Path]) -> dict[Path, RunFiles | Exception]:
        """Read run folders, on all cores -> what is in them, or what is damaged."""

        def read(part: list[Path]) -> list[tuple[int, RunFiles | Exception]]:
            return [(os.getpid(), _try(functools.partial(self._reader.read, path))) for path in part]

        here = os.getpid()
        return {
            path: self._reader.share(files) if pid != here and isinstance(files, RunFiles) else files
            for path, (pid, files) in zip(paths, map_beside(read, paths), strict=True)
        }

    def read_sweep(self, path: Path, num_siblings: int) -> str:
        """The id of the sweep of a run, "" for none. `num_siblings`: runs in its folder."""
        if num_siblings >= self._min_cached:
            sweep = self._open_cache(path.parent).read_sweep(path)
            if sweep is not None:
                return sweep
        try:
            return str(RunDir(path).read_json("run")["sweep"] or "")
        except (UserError, KeyError):
            return path.name.rpartition("-")[0]  # the folder's name is SWEEP-CELL

    def _open_cache(self, folder: Path) -> RunCache:
        if folder not in self._caches:
            self._caches[folder] = RunCache(folder, settle_seconds=self._settle_seconds)
            self._caches[folder].read()
        return self._caches[folder]

    def _load_cached(self, path: Path, signature: list[int]) -> tuple[CachedRun, Run] | None:
        """A run from its folder's cache; None if it is not there as `stat_files` (`signature`) finds it now."""
        if cached := self._open_cache(path.parent).find_run(path, signature):
            with contextlib.suppress(ValueError, UserError):  # then it was no run's folder that this came from
                return cached, self._make_run(path, cached.files, is_checked=True)
        return None

    def _make_run(self, path: Path, files: RunFiles, *, is_checked: bool = False) -> Run:
        run, config, status = (self._cleaner.clean(files.documents[name]) for name in ("run", "config", "status"))
        cost = run.get("cost") or {}
        if not is_checked:
            check_config(config)
        dataset = str(run.get("dataset") or config.get("dataset"))
        return Run(
            id=path.name,
            name=str(run.get("name") or path.name),
            path=path,
            config={**fill_config(config), "dataset": dataset},
            macs=float(cost.get("macs") or 0),
            params=int(cost.get("params") or 0),
            verified=bool(cost.get("verified", False)) and float(cost.get("macs") or 0) > 0,
            cost_note=str(cost.get("note") or ("" if cost else "no MACs in its record")),
            dataset=dataset,
            official=bool(run.get("official", False)),
            state=str(status.get("state", "running")),
            reason=str(status.get("reason") or ""),
            epoch=int(status.get("epoch") or 0),
            epochs=int(status.get("epochs") or config.get("epochs") or 0),
            swept_keys=tuple(map(str, run.get("swept") or ())),
            sweep_keys=tuple(map(str, run.get("sweep_keys") or ())),
            sweep=str(run.get("sweep") or ""),
            cell=run.get("cell"),
            created=float(run.get("created") or 0),
            command=str(run.get("command") or ""),
            rows=files.rows,
            summary=files.documents["summary"],
            labels=files.documents["labels"],
            environment=files.documents["environment"],
            tags=tuple(map(str, run.get("tags") or ())),
            is_rebuilt=run.get("command") == "" or is_training_command(run.get("command")),
        )


def _try(read: Callable[[], RunFiles]) -> RunFiles | Exception:
    """What is read, or an error that can be sent to another process."""
    try:
        return read()
    except UnknownSchemaError as error:
        return UnknownSchemaError(str(error))
    except (OSError, ValueError, UserError) as error:
        return ValueError(str(error) or type(error).__name__)


@contextlib.contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    """Say of which run a file is damaged."""
    try:
        yield
    except UnknownSchemaError as error:
        raise UserError(f"the run {path.name} is left out: {error}") from None
    except (OSError, ValueError, UserError) as error:
        damage = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the run {path.name} is damaged and left out ({damage}); delete {path} or restore it") from None


def collect_runs(
    names: Sequence[str],
    runs: Path,
    progress: Callable[[int, int], None] | None = None,
    loader: RunLoader | None = None,
) -> RunCollection:
    """Read the runs of the named sweeps, runs, folders and W&B projects. No name: the newest sweep, or else every run.

    A run (an id) that several names include counts once, and its folder on this machine wins over its copy on W&B.
    `progress` is called with (runs read, runs in all) while runs are read from W&B. `loader`: what reads them.
    """
    loader = loader or RunLoader()
    newest = "" if names else find_newest_sweep(runs)
    paths: dict[Path, None] = {} if names or newest else dict.fromkeys(_list_run_folders(runs))  # an ordered set
    remote: dict[Path, None] = {}
    sweeps, damaged, download = [], [], None
    for given in [newest] if newest else names:
        check_name(given, "the name of a run or sweep")
        name = find_sweep_id(given, runs) or given
        folder = Path(name)
        if _is_sweep(name, runs, loader):
            home = folder.resolve().parent.parent if folder.name != name else runs
            sweeps.append((folder.name, home))
            paths.update(dict.fromkeys(_list_sweep_folders(folder.name, home, loader)))
        elif not (folder / "run.json").exists() and (inside := _list_run_folders(folder)):
            paths.update(dict.fromkeys(inside))
        elif wandb_files := _find_wandb_files(folder):
            from cifar.integrations.wandb import offline

            folders, failed = offline.unpack_runs(wandb_files)
            remote.update(dict.fromkeys(folders))
            damaged += [ExcludedRun(run_id, run_name, "damaged", reason) for run_id, run_name, reason in failed]
        elif not folder.exists() and (wandb_path := _parse_wandb_name(name)):
            from cifar.integrations.wandb.download import download_runs

            download = download_runs(wandb_path, progress)
            remote.update(dict.fromkeys(download.folders))
            damaged += [ExcludedRun(run_id, run_name, "damaged", reason) for run_id, run_name, reason in download.damaged]
        else:
            record = find_run_dir(name, runs)
            if is_pretrained(record.path):
                raise UserError(
                    f"{record.id} is a pretrained network, which has no curves: python -m cifar models --pretrained {record.id}"
                )
            paths[record.path] = None
    if not (paths or remote or sweeps or damaged or download):
        raise UserError(f"no runs in {runs}; `python -m cifar sweep quickstart` makes some, --runs-dir names a place")
    found: dict[str, Run] = {}
    remaining = [*paths, *remote]
    while remaining:  # the second folder of an id counts where the first one is damaged
        first = {path.name: path for path in reversed(remaining)}
        for path, run in loader.load_all([path for path in remaining if first[path.name] is path]):
            if isinstance(run, UserError):
                damaged.append(ExcludedRun(path.name, path.name, "damaged", str(run)))
            else:
                found[path.name] = run
        remaining = [path for path in remaining if first[path.name] is not path and path.name not in found]
    loaded = tuple(found.values())
    excluded = tuple(run for run in damaged if run.id not in found)
    if len(sweeps) == 1 and len(names) < 2:
        title, question, num_cells = _describe_sweep(*sweeps[0])
        return RunCollection(loaded, excluded, sweeps[0][0], title, question, num_cells)
    if download and len(names) == 1:
        title, question = clean_document(download.title), redact(download.question)
        return RunCollection(loaded, excluded, "", title, question, download.num_cells, names[0])
    if len(loaded) == 1 and not excluded:
        title = loaded[0].name
    else:
        title = ", ".join([*names[:3], "…"] if len(names) > 3 else names) or f"all runs in {runs.name}"
    return RunCollection(loaded, excluded, title=title)


def _parse_wandb_name(name: str) -> Any:
    """The W&B project, sweep or run (`WandbPath`) that `name` may mean, or None."""
    if "/" not in name:
        return None
    from cifar.integrations.wandb.paths import parse_wandb_path

    return parse_wandb_path(name)


def _find_wandb_files(path: Path) -> list[Path]:
    """The .wandb files at `path`: a file, an offline run's folder, or a folder of such folders."""
    if path.suffix == ".wandb" and path.is_file():
        return [path]
    patterns = ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb")
    return next((found for pattern in patterns if (found := sorted(path.glob(pattern)))), []) if path.is_dir() else []


def _list_run_folders(folder: Path) -> list[Path]:
    intact = [run_dir.path for run_dir in list_run_dirs(folder)]
    known = {path.name for path in intact}
    others = [path for path in list_folders(folder) if path.name not in known]
    # without a run.json, or with a link to nothing in its place; reported as damaged
    return intact + [path for path in others if any(os.path.lexists(path / f"{name}.json") for name in ("run", "config"))]


def _has_run_folders(folder: Path) -> bool:
    """Whether `_list_run_folders` finds one."""
    return any(os.path.lexists(path / f"{name}.json") for path in list_folders(folder) for name in ("run", "config"))


def _is_sweep(name: str, runs: Path, loader: RunLoader) -> bool:
    path = Path(name)
    if path.name != name:  # a path, perhaps of a sweep's folder
        return path.parent.name == "sweeps" and path.is_dir()
    return bool(name) and ((runs / "sweeps" / name).is_dir() or any(_list_sweep_folders(name, runs, loader)))


def _list_sweep_folders(sweep: str, runs: Path, loader: RunLoader) -> list[Path]:
    """The folders of the runs of this sweep."""
    folders = _list_run_folders(runs)
    return sorted(path for path in folders if loader.read_sweep(path, len(folders)) == sweep)


def find_sweep_id(name: str, runs: Path) -> str:
    """The id of the sweep with this name or this start of its id, by the same rules as `agent`. "" if there is none."""
    known = [path.name for path in list_folders(runs / "sweeps")]
    if not name or Path(name).name != name or name in known or (runs / name).exists() or _has_run_folders(Path(name)):
        return ""  # an id, a run or a folder
    named = [sweep for sweep in known if _read_sweep_info(sweep, runs).get("name") == name]
    matches = named or [sweep for sweep in known if sweep.startswith(name)]
    if len(matches) > 1:
        raise UserError(f"'{name}' fits {pluralize(len(matches), 'sweep')} ({', '.join(matches[:6])}); give the id")
    run_ids = [path.name for path in list_folders(runs) if path.name.startswith(name)] if matches and not named else []
    if others := [run_id for run_id in run_ids if run_id != "sweeps" and not run_id.startswith(f"{matches[0]}-")]:
        raise UserError(f"'{name}' fits the sweep {matches[0]} and the run {others[0]}; give more of the id")
    return matches[0] if matches else ""


def _read_sweep_info(sweep: str, runs: Path) -> dict[str, Any]:
    """A sweep's sweep.json, with the text, name and description of its sweep.yaml. A damaged file counts as empty."""
    from cifar.config.yaml_loader import parse_yaml

    info: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        info = read_json(runs / "sweeps" / sweep / "sweep.json", "sweep")
    with contextlib.suppress(UserError):
        text = read_text(runs / "sweeps" / sweep / "sweep.yaml")
        content = parse_yaml(text, "sweep.yaml")
        known = content if isinstance(content, dict) else {}
        info |= {"text": text, **{key: known[key] for key in ("name", "description") if is_text(known.get(key)) and known[key]}}
    return info


def find_newest_sweep(runs: Path) -> str:
    """The id of the sweep that was created last, or ""."""
    times = []
    for folder in list_folders(runs / "sweeps"):
        with contextlib.suppress(OSError):
            times.append(((folder / "sweep.yaml").stat().st_mtime, folder.name))
    return max(times, default=(0.0, ""))[1]


def _describe_sweep(sweep: str, runs: Path) -> tuple[str, str, int]:
    """A sweep's title, its question (the file's description, or the comment at its beginning), and its number of cells."""
    info = _read_sweep_info(sweep, runs)
    text, name, num_cells = info.get("text", ""), info.get("name"), info.get("cells")
    comment = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())]
    title = clean_document(f"{name} ({sweep})" if name and name != sweep else sweep)
    question = redact(str(info.get("description") or "\n".join(comment)).strip())
    return title, question, num_cells if isinstance(num_cells, int) else 0
