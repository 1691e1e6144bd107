"""Commands about one run: `train`, `evaluate`, `config`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cifar.agent.options import PathOptions
from cifar.cli.completion import complete_run, complete_run_or_pretrained
from cifar.cli.console import (
    echo,
    print_json,
    print_table,
    set_quiet,
    spinner,
    warn,
    warn_of_stand_in,
)
from cifar.cli.options import (
    Artifacts,
    DataDir,
    Dataset,
    Experiment,
    Json,
    Pairs,
    RunsDir,
    SaveDiff,
    Wandb,
    refuse_empty,
)
from cifar.cli.run_steps import begin_ahead, create_run_dir, prepare_data, print_result, print_wandb_place
from cifar.errors import UserError, name_program
from cifar.states import CONCLUSIVE_STATES
from cifar.system.files import UnreadableFileError, parse_json, read_bytes
from cifar.system.names import check_id
from cifar.system.redact import reject_secrets
from cifar.system.terminal import Column, Short
from cifar.system.variables import read_variable
from cifar.tracking import run_dir
from cifar.tracking.pretrained import is_pretrained, read_card

if TYPE_CHECKING:
    from cifar.config.schema import Settings
    from cifar.tracking.run_dir import RunDir
    from cifar.training.distributed import DistributedContext

Layers = list[tuple[str, Mapping[str, Any]]]  # (where they came from, values); later ones win


def train(
    pairs: Pairs = None,
    experiment: Experiment = "",
    from_run: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="RUN",
            help="repeat a run: start from its values; also a pretrained network, or an artifact ENTITY/PROJECT/NAME:ALIAS",
            autocompletion=complete_run_or_pretrained,
            callback=refuse_empty,
        ),
    ] = "",
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="go on with an interrupted run",
            autocompletion=complete_run,
            callback=refuse_empty,
        ),
    ] = "",
    trial: Annotated[Path | None, typer.Option("--trial", metavar="FILE.json", help="values of a W&B trial, typed")] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
    wandb: Wandb = "auto",
    artifacts: Artifacts = None,
    save_diff: SaveDiff = False,
    name: Annotated[str, typer.Option("--name", help="what the run is called [default: made of its keys]")] = "",
    tags: Annotated[str, typer.Option("--tags", metavar="A,B", help="words to find it by")] = "",
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N,M", help="train it with each of these seeds", callback=refuse_empty)
    ] = "",
    pack: Annotated[
        str, typer.Option("--pack", metavar="auto|K|off", help="with --seeds: runs side by side [auto: on GPUs with room]")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the configuration and its cost, train nothing")] = False,
) -> int:
    """Train one network and write down everything about it.

    Examples:

    `python -m cifar train --experiment worksheet1`

    `python -m cifar train model=resnet20 optimizer=sgd lr=0.1 schedule=cosine epochs=5`

    `python -m cifar train --from a1b2c3d4 seed=1`

    `python -m cifar train --experiment resnet20 --seeds 0,1,2`
    """
    from cifar.cli.train_seeds import SeedOptions, parse_seeds, train_seeds
    from cifar.config.resolve import flatten_values

    layers = gather_layers(
        pairs or [], experiment=experiment, from_run=from_run, trial=trial, dataset=dataset, runs_dir=runs_dir
    )
    chosen = parse_seeds(seeds) if seeds else []
    if pack != "auto" and not seeds:
        raise UserError("--pack is for the runs of --seeds; a run without it is alone")
    if dry_run and not resume:
        reject_secrets({"--name": name, "--tags": tags})  # as the run would
        return _print_config(layers, with_cost=True)
    paths = PathOptions(data_dir, runs_dir)
    if resume:
        if seeds:
            raise UserError("--seeds is for new runs; resume each run by itself")
        if dry_run:
            raise UserError(f"--dry-run is for new runs; `python -m cifar config --from {resume}` shows what a run is made of")
        return resume_run(resume, paths, wandb, has_changes=bool(pairs or experiment or from_run or trial))
    words = [tag.strip() for tag in tags.split(",") if tag.strip()]
    if seeds:
        if trial:
            raise UserError("--trial is one run of a sweep on W&B; --seeds is for runs that belong to no sweep")
        return train_seeds(layers, SeedOptions(chosen, pack, wandb, name, words), paths)
    swept = [key for origin, values in layers if origin == "--trial" for key in flatten_values(values)]
    return start_run(layers, swept, paths, wandb, name, words)


def evaluate(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="a run or a pretrained network", autocompletion=complete_run_or_pretrained)
    ],
    split: Annotated[
        Literal["val", "test"] | None, typer.Option("--split", help="[default: val; of a pretrained network: test]")
    ] = None,
    tta: Annotated[Literal["none", "flip", "flip+shift"], typer.Option("--tta", help="views averaged: 1, 2 or 6")] = "none",
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
) -> int:
    """Score the weights of a finished run again, or those of a pretrained network; its record stays as it is."""
    from cifar.integrations.wandb.artifact_download import find_run

    record = find_run(run, run_dir.resolve_runs_dir(runs_dir))
    card = read_card(record.path) if is_pretrained(record.path) else {}
    split = split or ("test" if card else "val")
    with spinner("importing PyTorch ..."):
        from cifar.training.evaluation import VIEWS, compute_loss_and_accuracy
        from cifar.training.recorded import describe_changes, evaluation_settings, load_model
        from cifar.training.trainer import Trainer
    settings = evaluation_settings(record)
    if split == "val" and not settings.val_size:
        raise UserError(
            f"run {record.id} was trained on all images (val_size 0), so it has no validation split; add --split test"
        )
    model = load_model(record)
    for change in describe_changes(record, ("model",)):
        warn(f"{change}: this is the score of the network as the file has it now")
    prepare_data(settings, data_dir)
    with spinner(f"scoring {split} ..."):
        trainer = Trainer(settings, data_dir)
        trainer.eval_model.load_state_dict(model.state_dict())
        logits, labels = trainer.evaluate(split, tta)
    loss, accuracy = compute_loss_and_accuracy(logits, labels)
    echo(f"{record.id} {record.name}")
    echo(f"{split}: accuracy {100 * accuracy:.2f} %, loss {loss:.4f}, {len(labels):,} images, {VIEWS[tta][0]} view(s)")
    if card and split == "test" and tta == "none":
        echo(f"its card says: accuracy {100 * card['accuracy']:.2f} %")
        if trainer.fingerprint != (card.get("data") or {}).get("fingerprint", trainer.fingerprint):
            warn("the images here are not those that the card speaks of (their fingerprints differ)")
    if settings.dataset == "stand-in":
        warn_of_stand_in()
    return 0


def config(
    pairs: Pairs = None,
    experiment: Experiment = "",
    from_run: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="RUN",
            help="start from the values of a run or a pretrained network",
            autocompletion=complete_run_or_pretrained,
            callback=refuse_empty,
        ),
    ] = "",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> int:
    """Every key, its value, and where that came from.

    Example: `python -m cifar config --experiment worksheet1 optimizer=sgd`
    """
    layers = gather_layers(pairs or [], experiment=experiment, from_run=from_run, runs_dir=runs_dir)
    return _print_config(layers, with_cost=False, as_json=as_json)


# -- configuration -----------------------------------------------------------------------------------------------------


def gather_layers(
    pairs: Sequence[str],
    *,
    experiment: str = "",
    from_run: str = "",
    trial: Path | None = None,
    dataset: str | None = None,
    runs_dir: Path | None = None,
) -> Layers:
    """What the options say, first to last, each with its name. Values are checked when they are resolved."""
    from cifar.config.resolve import merge_layers, name_lost_plugin, parse_pairs

    layers: Layers = []
    if experiment:
        layers.append(("--experiment", {"experiment": experiment}))
    if trial:
        layers.append(("--trial", _read_trial(trial)))
    if dataset:
        layers.append(("--dataset", {"dataset": dataset}))
    layers.append(("command line", parse_pairs(pairs)))
    if from_run:
        if experiment:
            raise UserError("--from and --experiment both say where to start from; give one of them")
        from cifar.integrations.wandb.artifact_download import find_run

        run = find_run(from_run, run_dir.resolve_runs_dir(runs_dir))
        changes = merge_layers(*(values for _, values in layers))
        with name_lost_plugin(run.id, run.read_json("run").get("plugins")):
            layers.insert(0, (f"run {run.id}", _keep_valid_keys(run.read_json("config"), changes)))
    for _, values in layers:
        reject_secrets(values)
    return layers


def _keep_valid_keys(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The old run's values without the keys of parts that `changes` replace: `--from RUN optimizer=sgd` drops Adam's."""
    from cifar.config.resolve import keep_present_probes, resolve_config

    values = {**old, **changes}
    if "probes" not in changes:
        old = {**old, "probes": keep_present_probes(str(old.get("probes", "all")))[0]}
        values = {**old, **changes}
    parts: dict[str, Any] = {kind: values[kind] for kind in ("model", "optimizer", "schedule", "probes") if kind in values}
    valid = type(resolve_config(parts)).model_fields
    return {key: value for key, value in old.items() if key in valid}


def _read_trial(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_bytes(path))
    except (UnreadableFileError, ValueError) as error:
        why = error.reason if isinstance(error, UnreadableFileError) else error
        raise UserError(f"--trial: {path} is not a readable JSON file ({why}); W&B's ${{args_json_file}} names one") from None
    if not isinstance(values, dict):
        raise UserError(f"--trial: {path} has to hold one JSON object of keys and values")
    return values


def _print_config(layers: Layers, *, with_cost: bool, as_json: bool = False) -> int:
    """Print every key, its value, where that came from and what it means.

    JSON: {"config": {key: value}, "origins": {key: text}, "meanings": {key: text}}. `config` alone is what --trial reads.
    """
    from cifar.config.resolve import explain_config, resolve_config

    notes: Sequence[str] = ()
    if with_cost:
        with spinner("trying a step ..."):
            from cifar.training import run

            notes = run.check_plugins(resolve_config(*(values for _, values in layers)))
    rows = [(key, value, _shorten_path(origin), name_program(text)) for key, value, origin, text in explain_config(layers)]
    if as_json:
        print_json(
            {
                "config": {key: value for key, value, _, _ in rows},
                "origins": {key: origin for key, _, origin, _ in rows},
                "meanings": {key: meaning for key, _, _, meaning in rows},
            }
        )
        return 0
    print_table(
        "",
        (
            Column("key"),
            Column("value", min_width=12),
            Column("from", min_width=12),
            Column("meaning", min_width=24, wraps=True),
        ),
        [
            (key, "" if value is None else value, Short(origin, Path(origin).name), meaning)
            for key, value, origin, meaning in rows
        ],
    )
    if with_cost:
        with spinner("counting MACs ..."):
            from cifar.training import run

            settings = resolve_config(*(values for _, values in layers))
            cost = run.measure_cost(settings)
        for note in notes:
            echo(f"note: {note}")
        num_images = settings.images_per_epoch * settings.epochs
        pmacs = 3 * cost.macs * num_images / 1e15  # the backward pass costs twice the forward pass
        echo(f"\n{format_cost(cost)}; {pmacs:.3g} PMACs to train on {num_images:,} images")
    return 0


def _shorten_path(origin: str) -> str:
    path = Path(origin)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else origin


def format_cost(cost: Any) -> str:
    """The cost of a model in words. `cost`: a `flops.Cost`."""
    verification = "both counters agree" if cost.verified else f"UNVERIFIED: {cost.note}"
    return f"{cost.macs / 1e6:.2f} MMACs an image, {cost.params:,} parameters ({verification})"


# -- one run -----------------------------------------------------------------------------------------------------------


def start_run(layers: Layers, swept: list[str], paths: PathOptions, wandb: str, name: str, tags: list[str]) -> int:
    """A new run, from its values to its pictures. `swept`: the keys that a W&B trial gave."""
    from cifar.config.resolve import resolve_config
    from cifar.integrations.wandb.settings import mode_from_environment

    mode_from_environment(wandb)  # raises UserError now, before anything is made
    reject_secrets({"--name": name, "--tags": tags})
    for kind in ("SWEEP", "RUN"):
        if swept and (given := read_variable(f"WANDB_{kind}_ID")):
            check_id(given, f"WANDB_{kind}_ID")
    begin_ahead(layers, paths.data_dir)
    settings = resolve_config(*(values for _, values in layers))  # imports PyTorch, to know the keys of the parts
    runs = paths.resolve_runs_dir()
    with spinner("importing PyTorch ..."):
        from cifar.training import run
        from cifar.training.distributed import init_distributed
    with init_distributed() as context:
        set_quiet(context.rank > 0)
        settings, reason = run.resolve_dataset(settings, paths.data_dir)
        if reason:
            echo(f"dataset: {reason}")
        context.validate_config(settings.to_dict())
        run.check_plugins(settings)  # on every rank, as a network may talk to the others
        prepare_data(settings, paths.data_dir)
        record = context.rank_zero_call(lambda: create_run_dir(settings, runs, swept, name, tags))
        try:
            return _train_run(settings, record, paths.data_dir, wandb, context)
        finally:
            record.release()


def resume_run(name: str, paths: PathOptions, wandb: str, *, has_changes: bool) -> int:
    """Go on with a run from its checkpoint."""
    from cifar.config.resolve import name_lost_plugin, resolve_resumed
    from cifar.integrations.wandb.artifact_download import find_run

    with spinner("importing PyTorch ..."):
        from cifar.training.distributed import init_distributed
        from cifar.training.recorded import add_notes, describe_changes
        from cifar.training.run import describe_parts_again
    with init_distributed() as context:
        set_quiet(context.rank > 0)
        record, values = context.rank_zero_call(
            lambda: _acquire_resumable(name, paths.resolve_runs_dir(), has_changes=has_changes)
        )
        try:
            with name_lost_plugin(record.id, record.read_json("run").get("plugins")):
                settings, notes = resolve_resumed(values)
            notes += [f"{change}: the run goes on with the file as it is now" for change in describe_changes(record)]
            context.rank_zero_call(lambda: describe_parts_again(settings, record, record.path.parent, find_run))
            if not context.rank:
                add_notes(record, notes)
            context.validate_config(settings.to_dict())
            prepare_data(settings, paths.data_dir)
            return _train_run(settings, record, paths.data_dir, wandb, context)
        finally:
            record.release()


def _acquire_resumable(name: str, runs: Path, *, has_changes: bool) -> tuple[RunDir, dict[str, Any]]:
    """The run to go on with, which this process owns from now on, and its values. Raises UserError where it cannot."""
    from cifar.tracking.cleanup import is_being_written

    record = run_dir.find_run_dir(name, runs)
    record.check_resumable()
    if has_changes:
        raise UserError(f"a resumed run keeps its values; for other ones: python -m cifar train --from {record.id} KEY=VALUE")
    _check_resumable(record)
    if is_being_written(record):
        raise UserError(
            f"run {record.id} is being trained by process {record.read_json('status').get('pid')}; stop that one first"
        )
    record.acquire(on_wait=echo)
    try:
        _check_resumable(record)  # another process may have finished it before it let go
        return record, record.read_json("config")
    except BaseException:
        record.release()
        raise


def _check_resumable(record: RunDir) -> None:
    if (state := record.state) in CONCLUSIVE_STATES:
        raise UserError(f"run {record.id} is {state}; to repeat it: python -m cifar train --from {record.id}")


def _train_run(settings: Settings, record: RunDir, data_dir: Path | None, wandb: str, context: DistributedContext) -> int:
    """Train, and mirror to W&B meanwhile -> the exit code. Of several ranks, rank 0 prints and mirrors."""
    from cifar.integrations.wandb.settings import mode_from_environment
    from cifar.sidecar import SidecarHandle
    from cifar.system.signals import StopSignals
    from cifar.training import callbacks, run
    from cifar.training.loop import RunHooks
    from cifar.training.recorded import read_notes

    is_in_sweep = context.rank_zero_call(lambda: bool(record.read_json("run").get("sweep")))
    started_by_wandb = is_in_sweep and read_variable("WANDB_SWEEP_ID") != ""
    if context.rank:
        with context.rank_run_dir(record) as scratch, StopSignals(started_by_wandb) as stop:
            hooks = RunHooks(poll_stop=stop)
            state = run.train_run(settings, scratch, data_dir=data_dir, hooks=hooks, context=context)
            return max(context.all_gather(stop.exit_code(state)))
    if settings.dataset == "stand-in":
        warn_of_stand_in()
    about = record.read_json("run")
    cost = about["cost"]
    echo(f"run {record.id}: {record.name}, {cost['macs'] / 1e6:.2f} MMACs, {cost['params']:,} parameters")
    if not cost["verified"]:
        echo(f"MACs UNVERIFIED: {cost.get('note', '')}")
    for note in read_notes(record):
        echo(f"note: {note}")
    callback = callbacks.ProgressBarCallback() if sys.stdout.isatty() else callbacks.LineCallback()
    mode, is_complete = mode_from_environment(wandb), True
    sidecar = SidecarHandle(mode, log=record.path / "mirror.log")
    try:
        sidecar.follow_run(record.path)
        with context.rank_run_dir(record), StopSignals(started_by_wandb) as stop:
            hooks = RunHooks(callbacks=[callback], poll_stop=stop)
            state = run.train_run(settings, record, data_dir=data_dir, hooks=hooks, context=context)
            code = max(context.all_gather(stop.exit_code(state)))  # a signal may have reached some ranks only
    finally:
        callback.close()
        with spinner("drawing pictures, sending what is left to W&B ..."):
            is_complete = sidecar.shut_down()
    print_result(record, state)
    print_wandb_place(record, mode, state, is_complete=is_complete)
    return code
