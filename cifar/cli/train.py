"""What the commands about one run do. Each returns an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cifar.cli.console import hush, obtain, say, table, waiting, warn_of_stand_in
from cifar.config import resolve as configuration
from cifar.config.resolve import Settings
from cifar.errors import UserError
from cifar.integrations.wandb.settings import mode_from_environment
from cifar.tracking import cleanup as tidy
from cifar.tracking import run_dir as records
from cifar.tracking.run_dir import Record

if TYPE_CHECKING:
    from cifar.training.distributed import Team

Layers = list[tuple[str, Mapping[str, Any]]]  # (where they came from, values); later ones win

# -- configuration -----------------------------------------------------------------------------------------------------


def layers(
    from_run: str, experiment: str, trial: Path | None, dataset: str | None, pairs: Sequence[str], runs_dir: Path | None
) -> Layers:
    """What the options say, first to last, each with its name. Values are checked when they are resolved."""
    found: Layers = []
    if experiment:
        found.append(("--experiment", {"experiment": experiment}))
    if trial:
        found.append(("--trial", _trial(trial)))
    if dataset:
        found.append(("--dataset", {"dataset": dataset}))
    found.append(("command line", configuration.parse_pairs(pairs)))
    if from_run:
        if experiment:
            raise UserError("--from and --experiment both say where to start from; give one of them")
        run = records.find(from_run, records.runs_dir(runs_dir))
        found.insert(0, (f"run {run.id}", _still_taken(run.read("config"), configuration.merge(*(v for _, v in found)))))
    return found


def layer_named(found: Layers, name: str) -> Mapping[str, Any]:
    return next((configuration.flatten(values) for origin, values in found if origin == name), {})


def _still_taken(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The old run's values without the keys of parts that `changes` replace: `--from RUN optimizer=sgd` drops Adam's."""
    values = {**old, **changes}
    chosen: dict[str, Any] = {kind: values[kind] for kind in ("model", "optimizer", "schedule", "probes") if kind in values}
    taken = type(configuration.resolve(chosen)).model_fields
    return {key: value for key, value in old.items() if key in taken}


def _trial(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--trial: {path} is not a readable JSON file ({error}); W&B's ${{args_json_file}} names one") from None
    if not isinstance(values, dict):
        raise UserError(f"--trial: {path} has to hold one JSON object of keys and values")
    return values


def show_config(found: Layers, *, with_cost: bool) -> int:
    """Every key, its value, where that came from and what it means."""
    rows = configuration.explain(found)
    table(
        "",
        ("key", "value", "from", "meaning"),
        [(k, "" if v is None else v, _short(origin), doc) for k, v, origin, doc in rows],
    )
    if with_cost:
        with waiting("counting MACs ..."):
            from cifar.training import run

            config = configuration.resolve(*(values for _, values in found))
            cost = run.cost_of(config)
        images = config.images * config.epochs
        pmacs = 3 * cost.macs * images / 1e15  # the backward pass costs twice the forward pass
        say(f"\n{cost_line(cost)}; {pmacs:.3g} PMACs to train on {images:,} images")
    return 0


def _short(origin: str) -> str:
    path = Path(origin)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else origin


def cost_line(cost: Any) -> str:
    checked = "both counters agree" if cost.verified else f"UNVERIFIED: {cost.note}"
    return f"{cost.macs / 1e6:.2f} MMACs an image, {cost.params:,} parameters ({checked})"


# -- one run -----------------------------------------------------------------------------------------------------------


class Stop:
    """Ctrl-C, SIGTERM and SIGUSR1 ask the run to end after its step; a second Ctrl-C does not wait.

    `foreign`: W&B's plain agent started us. It tells by SIGTERM that a person stopped the run, which is then not to be run
    again, unless CIFAR_PREEMPTIBLE=1 says that here a SIGTERM is the machine's.
    """

    def __init__(self, foreign: bool = False) -> None:
        self.wish: str | None = None
        self.number = 0
        stopped = foreign and os.environ.get("CIFAR_PREEMPTIBLE", "") in ("", "0")
        self.states = {signal.SIGINT: "interrupted", signal.SIGUSR1: "preempted"}
        self.states[signal.SIGTERM] = "stopped" if stopped else "preempted"

    def __call__(self) -> str | None:
        return self.wish

    def __enter__(self) -> Stop:
        self.before = {number: signal.signal(number, self._heard) for number in self.states}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.wish and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.wish:
            self.wish, self.number = self.states[signal.Signals(number)], number

    def code(self, state: str) -> int:
        """Of the process: 130, 143 or 138 after a signal that gave the run back; 0 where a person stopped it."""
        return {"diverged": 1, "failed": 1, "killed": 1, "interrupted": 130, "preempted": 128 + self.number}.get(state, 0)


def train(
    found: Layers, swept: list[str], data_dir: Path | None, runs_dir: Path | None, wandb: str, name: str, tags: list[str]
) -> int:
    """A new run, from its values to its pictures."""
    mode_from_environment(wandb)  # says now what is wrong with it
    config = configuration.resolve(*(values for _, values in found))
    runs = records.runs_dir(runs_dir)
    with waiting("importing PyTorch ..."):
        from cifar.training import distributed as ranks
        from cifar.training import run
    with ranks.joined() as team:
        hush(team.rank > 0)
        config, reason = run.resolve_dataset(config, data_dir)
        if reason:
            say(f"dataset: {reason}")
        team.check(config.flat())
        prepare(config, data_dir)
        record = team.first(lambda: _created(config, runs, swept, name, tags))
        return _train(config, record, data_dir, wandb, team)


def _created(config: Settings, runs: Path, swept: list[str], name: str, tags: list[str]) -> Record:
    from cifar.training import run

    sweep, run_id = (os.environ.get(f"WANDB_{kind}_ID", "") if swept else "" for kind in ("SWEEP", "RUN"))
    engine = "wandb" if sweep else ""  # the plain `wandb agent` started us
    return run.create(config, runs, run_id=run_id, name=name, swept=swept, sweep=sweep, engine=engine, tags=tags)


def resume(name: str, changed: bool, data_dir: Path | None, runs_dir: Path | None, wandb: str) -> int:
    """Go on with a run where its checkpoint is."""
    with waiting("importing PyTorch ..."):
        from cifar.training import distributed as ranks
    with ranks.joined() as team:
        hush(team.rank > 0)
        record, values = team.first(lambda: _resumable(name, changed, records.runs_dir(runs_dir)))
        config = configuration.resolve(values)
        team.check(config.flat())
        prepare(config, data_dir)
        return _train(config, record, data_dir, wandb, team)


def _resumable(name: str, changed: bool, runs: Path) -> tuple[Record, dict[str, Any]]:
    """The run to go on with, and its values. Raises UserError where it cannot."""
    record = records.find(name, runs)
    if changed:
        raise UserError(f"a resumed run keeps its values; for other ones: python -m cifar train --from {record.id} KEY=VALUE")
    if record.state in tidy.OVER:
        raise UserError(f"run {record.id} is {record.state}; to repeat it: python -m cifar train --from {record.id}")
    if tidy.alive(record):
        raise UserError(f"run {record.id} is being trained by process {record.read('status').get('pid')}; stop that one first")
    return record, record.read("config")


def prepare(config: Settings, data_dir: Path | None) -> None:
    """Everything that can be wrong about device and data, before a folder is made; downloads with a bar."""
    with waiting("importing PyTorch ..."):
        from cifar import data
        from cifar.training import trainer as parts
    device = parts.device_of(config.device)
    if config.dataset == "cifar10" and data.locate(data_dir) is None:
        obtain(data_dir, [])
    with waiting(f"reading {config.dataset} ..."):
        parts.splits(config.dataset, data_dir, config.val_size, config.train_size, device)


def _train(config: Settings, record: Record, data_dir: Path | None, wandb: str, team: Team) -> int:
    from cifar import sidecar as follow
    from cifar.training import callbacks as track
    from cifar.training import run

    foreign = "WANDB_SWEEP_ID" in os.environ and team.first(lambda: record.read("run")["sweep"] != "")
    if team.rank:
        with team.own(record) as own, Stop(foreign) as stop:
            return max(team.gather(stop.code(run.train(config, own, data_dir=data_dir, stop=stop, team=team))))
    if config.dataset == "stand-in":
        warn_of_stand_in()
    described = record.read("run")
    cost = described["cost"]
    say(f"run {record.id}: {described['name']}, {cost['macs'] / 1e6:.2f} MMACs, {cost['params']:,} parameters")
    if not cost["verified"]:
        say(f"MACs UNVERIFIED: {cost['note']}")
    sink = track.Terminal() if sys.stdout.isatty() else track.Lines()
    mode, whole = mode_from_environment(wandb), True
    follower = follow.Follower(mode, log=record.path / "mirror.log")
    try:
        follower.follow(record.path)
        with team.own(record), Stop(foreign) as stop:
            state = run.train(config, record, data_dir=data_dir, sinks=[sink], stop=stop, team=team)
            code = max(team.gather(stop.code(state)))  # a signal may have reached some ranks only
    finally:
        sink.close()
        with waiting("drawing pictures, sending what is left to W&B ..."):
            whole = follower.end()
    _result(record, state)
    if mode == "online" and not whole and state in records.END_STATES:
        say(f"W&B has not got all of it; send the rest with: python -m cifar push {record.id}")
    return code


def _result(record: Record, state: str) -> None:
    summary, status = record.read("summary"), record.read("status")
    if state == "finished":
        scores = [f"{k.split('/')[0]} {100 * summary[k]:.2f} %" for k in ("train/acc", "val/acc", "test/acc") if k in summary]
        views = f" ({summary['test/views']} views)" if summary.get("test/views", 1) > 1 else ""
        say(f"\n{', '.join(scores)}{views} after {summary['epochs']} epochs, {summary['seconds']:.1f} s of training")
    else:
        say(f"\n{state}: {status.get('reason', '')}")
    say(f"folder    {record.path}")
    for picture in sorted((record.path / "pictures").glob("*.png")):
        say(f"picture   {picture}")
    if state in records.OPEN_STATES:
        say(f"go on     python -m cifar train --resume {record.id}")
    say(f"repeat    {record.read('run')['command']}")
    if record.read("run")["dataset"] == "stand-in":
        warn_of_stand_in()


def evaluate(name: str, split: str, tta: str, data_dir: Path | None, runs_dir: Path | None) -> int:
    """Score a finished run's weights on a split, once more."""
    import cifar

    record = records.find(name, records.runs_dir(runs_dir))
    config = configuration.resolve(record.read("config"))
    if split == "val" and not config.val_size:
        raise UserError(
            f"run {record.id} was trained on all images (val_size 0), so it has no validation split; add --split test"
        )
    with waiting("importing PyTorch ..."):
        model = cifar.load(record.path)
        from cifar.training import step as train
        from cifar.training import trainer as parts
    prepare(config, data_dir)
    with waiting(f"scoring {split} ..."):
        training = parts.Training(config, data_dir)
        training.evaluated.load_state_dict(model.state_dict())
        logits, labels = training.evaluate(split, tta)
    loss, accuracy = train.score(logits, labels)
    say(f"{record.id} {record.read('run')['name']}")
    say(f"{split}: accuracy {100 * accuracy:.2f} %, loss {loss:.4f}, {len(labels):,} images, {train.VIEWS[tta][0]} view(s)")
    if config.dataset == "stand-in":
        warn_of_stand_in()
    return 0
