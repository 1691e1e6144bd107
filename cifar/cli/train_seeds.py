"""`train --seeds`: one configuration with several seeds, each a run of its own; on a GPU with room for it side by side.

A sweep may not score the test set, as it chooses. Here nothing is chosen: this is how a configuration that has been chosen is
trained again, so that its test accuracy has a mean and a deviation.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar.agent.options import PathOptions
from cifar.cli.console import echo, set_quiet, spinner, warn_of_stand_in
from cifar.cli.run_steps import begin_ahead, create_run_dir, prepare_data, print_result, print_wandb_place
from cifar.errors import UserError
from cifar.system.redact import reject_secrets
from cifar.system.signals import StopSignals

if TYPE_CHECKING:
    from cifar.config.schema import Settings
    from cifar.integrations.wandb.settings import Mode
    from cifar.sidecar import SidecarHandle
    from cifar.tracking.run_dir import RunDir

MAX_SEEDS = 1000
Layers = Sequence[tuple[str, Mapping[str, Any]]]  # (where they came from, values); later ones win


@dataclass(frozen=True)
class SeedOptions:
    """How the runs of several seeds are trained and called."""

    seeds: Sequence[int]
    pack: str = "auto"  # as `sweep --pack`
    wandb: str = "auto"
    name: str = ""
    tags: Sequence[str] = ()


def parse_seeds(text: str) -> list[int]:
    """The seeds in a text: "0,1,2" -> [0, 1, 2]. Raises UserError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 20 for word in words) or len(words) > MAX_SEEDS:
        raise UserError(f"--seeds {text[:80]}: write whole numbers with commas between them, as in 0,1,2 ({MAX_SEEDS} at most)")
    seeds = [int(word) for word in words]
    if len({*seeds}) < len(seeds):
        raise UserError(f"--seeds {text[:80]}: a seed stands twice; it would train the same network again")
    return seeds


def check_layers(layers: Layers) -> None:
    """Raises UserError where the values name a seed too."""
    for origin, values in layers:
        if origin in ("command line", "--trial") and "seed" in values:
            raise UserError(f"the seed is given by --seeds and by seed={values['seed']}; give one of them")


def train_seeds(layers: Layers, options: SeedOptions, paths: PathOptions) -> int:
    """Train all seeds -> the exit code. The folders of a group of runs are made when the group begins."""
    from cifar.config.resolve import resolve_config
    from cifar.integrations.wandb.settings import mode_from_environment

    mode_from_environment(options.wandb)  # raises UserError now, before anything is made
    reject_secrets({"--name": options.name, "--tags": list(options.tags)})
    check_layers(layers)
    begin_ahead(layers, paths.data_dir)
    values = [values for _, values in layers]
    configs = [resolve_config(*values, {"seed": seed}) for seed in options.seeds]
    with spinner("importing PyTorch ..."):
        from cifar.agent.packing import best_pack_size, check_pack_option
        from cifar.training import run
        from cifar.training.distributed import init_distributed

        check_pack_option(options.pack)
    with init_distributed() as context:
        set_quiet(context.rank > 0)
        if context.world_size > 1:
            raise UserError("--seeds is for one process; start torchrun once for each seed, with seed=N")
        first, reason = run.resolve_dataset(configs[0], paths.data_dir)
        if reason:
            echo(f"dataset: {reason}")
        configs = [config.model_copy(update={"dataset": first.dataset}) for config in configs]
        run.check_plugins(first)
        prepare_data(first, paths.data_dir)
        with spinner("counting MACs ..."):
            size, why = best_pack_size(options.pack, first.to_dict())
        if why and len(configs) > 1:
            echo(f"the seeds are trained one after the other: {why}")
        return _train_groups([configs[n : n + size] for n in range(0, len(configs), size)], options, paths)


def _train_groups(groups: Sequence[Sequence[Settings]], options: SeedOptions, paths: PathOptions) -> int:
    """Train each group side by side, one group after the other, in one process that keeps its compiled and captured step."""
    from cifar.integrations.wandb.settings import mode_from_environment

    left = [config.seed for group in groups for config in group]
    if groups[0][0].dataset == "stand-in":
        warn_of_stand_in()
    mode = mode_from_environment(options.wandb)
    code, is_complete = 0, True
    done: list[RunDir] = []
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        mirror: SidecarHandle | None = None  # one for all: its pictures are drawn while the next seeds are trained
        try:
            for group in groups:
                with _create_records(group, options, paths) as records:
                    mirror = mirror or _start_mirror(mode, records[0])
                    for record in records:
                        mirror.follow_run(record.path)
                    done += records
                    states = _train_group(group, records, paths, stop, num_planned=len(left))
                left = left[len(group) :]
                code = max([code, *(stop.exit_code(state) for state in states)])
                if stop.state:
                    break
        finally:
            if mirror:
                with spinner("drawing pictures, sending what is left to W&B ..."):
                    is_complete = mirror.shut_down()
            for record in done:
                print_result(record, record.state)
                print_wandb_place(record, mode, record.state, is_complete=is_complete)
            _print_means(done)
    if left and stop.state:
        echo(f"not begun: --seeds {','.join(map(str, left))}")
    return code


def _start_mirror(mode: Mode, record: RunDir) -> SidecarHandle:
    from cifar.sidecar import SidecarHandle

    return SidecarHandle(mode, log=record.path / "mirror.log")


@contextlib.contextmanager
def _create_records(group: Sequence[Settings], options: SeedOptions, paths: PathOptions) -> Iterator[list[RunDir]]:
    """The folders of a group's runs, which this process owns while this is open."""
    runs = paths.resolve_runs_dir()
    records: list[RunDir] = []
    try:
        for config in group:
            record = create_run_dir(config, runs, [], _name_run(config, options), list(options.tags))
            records.append(record)
            cost = record.read_json("run")["cost"]
            echo(f"run {record.id}: {record.name}, {cost['macs'] / 1e6:.2f} MMACs, {cost['params']:,} parameters")
        yield records
    finally:
        for record in records:
            record.release()


def _train_group(
    group: Sequence[Settings], records: Sequence[RunDir], paths: PathOptions, stop: StopSignals, *, num_planned: int
) -> list[str]:
    """Train these runs side by side -> the states in which they ended. num_planned: runs of this process from now on."""
    from cifar.training import run
    from cifar.training.callbacks import LineCallback
    from cifar.training.loop import RunHooks, RunLoop

    loops = [
        RunLoop(config, record, RunHooks(callbacks=[LineCallback(prefix=f"seed {config.seed}  ")], poll_stop=stop))
        for config, record in zip(group, records, strict=True)
    ]
    run.train_runs(loops, data_dir=paths.data_dir, num_planned_runs=num_planned)
    return [loop.state for loop in loops]


def _name_run(config: Settings, options: SeedOptions) -> str:
    return f"{options.name or config.experiment or config.model} seed={config.seed}"


def _print_means(records: Sequence[RunDir]) -> None:
    """Mean and standard deviation of the accuracies of the finished runs."""
    summaries = [summary for record in records if record.state == "finished" and (summary := record.read_json("summary"))]
    for split in ("val", "test"):
        values = [100 * summary[f"{split}/acc"] for summary in summaries if f"{split}/acc" in summary]
        if len(values) > 1:
            echo(
                f"\n{split} {statistics.mean(values):.2f} % (std {statistics.stdev(values):.2f}, n = {len(values)}: "
                f"{' '.join(f'{value:.2f}' for value in values)})"
            )
