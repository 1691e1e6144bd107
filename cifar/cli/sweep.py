"""Commands about sweeps and their agents: `sweep`, `agent`, and the group `sweeps`."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cifar.agent.options import AgentOptions, PathOptions
from cifar.cli.completion import complete_sweep, complete_sweep_file
from cifar.cli.console import (
    console,
    echo,
    ensure_dataset,
    print_json,
    print_sentence,
    print_table,
    redirect_messages,
    spinner,
    warn_of_stand_in,
)
from cifar.cli.options import (
    Artifacts,
    CompileAhead,
    Count,
    DataDir,
    Dataset,
    Gpus,
    Json,
    Pack,
    PerGpu,
    RunsDir,
    SaveDiff,
    Set,
    Storage,
    SweepId,
    SweepOptions,
    TimeLimit,
    Wandb,
    Workers,
)
from cifar.errors import UserError, did_you_mean
from cifar.system.durations import format_duration, parse_duration
from cifar.system.memory import pause_garbage_collection
from cifar.system.names import check_id, check_name
from cifar.system.terminal import Column, Short
from cifar.system.variables import read_variable, read_whole_number
from cifar.tracking import run_dir

if TYPE_CHECKING:
    from cifar.sweeps.local import LocalBackend
    from cifar.sweeps.spec import Sweep

sweeps_app = typer.Typer(help="List, inspect, stop, retry and extend sweeps.")


def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="a sweep YAML as W&B takes it: a path, or a name of sweeps/",
            autocompletion=complete_sweep_file,
        ),
    ],
    set_: Set = None,
    dataset: Dataset = None,
    count: Count = None,
    workers: Workers = None,
    sweep_seed: Annotated[int, typer.Option("--sweep-seed", min=0, help="of random suggestions")] = 0,
    storage: Storage = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
    wandb: Wandb = "auto",
    artifacts: Artifacts = None,
    save_diff: SaveDiff = False,
    no_agent: Annotated[bool, typer.Option("--no-agent", help="create it, print its id, run nothing")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the trials, their MACs and an estimate of time")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="draw the report at the end")] = True,
    gpus: Gpus = "",
    per_gpu: PerGpu = 1,
    pack: Pack = "auto",
    compile_ahead: CompileAhead = "off",
    time_limit: TimeLimit = "",
) -> int:
    """Create a sweep, run its trials, draw the report. Logged in to W&B, the sweep is made there, unless --storage is given.

    Examples:

    `python -m cifar sweep quickstart`

    `python -m cifar sweep architectures --workers 2 --set epochs=10`

    `python -m cifar sweep worksheet1_tuning --no-agent`, then `python -m cifar agent ID` in any terminal
    """
    options = SweepOptions(dataset, set_ or (), sweep_seed, dry_run, draw=report)
    agent_options = AgentOptions(
        count, workers, gpus, per_gpu, pack, _parse_time_limit(time_limit), storage or "", compile_ahead, wandb
    )
    _check_agent_options(agent_options)
    paths = PathOptions(data_dir, runs_dir)
    with contextlib.ExitStack() as exit_stack:
        if not (no_agent or dry_run):
            _refuse_torchrun()
            from cifar.agent.worker_process import prestart_worker

            exit_stack.enter_context(prestart_worker())
        name = _create_sweep(file, options, agent_options, paths)
        if not name:  # --dry-run
            return 0
        if no_agent:
            echo(f"run it with: python -m cifar agent {name}")
            return 0
        return _run_and_draw(name, options, agent_options, paths)


def agent(
    sweep_id: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="its id; on W&B also project/id, entity/project/id or the URL of its page",
            autocompletion=complete_sweep,
        ),
    ],
    count: Count = None,
    workers: Workers = None,
    storage: Storage = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
    wandb: Wandb = "auto",
    artifacts: Artifacts = None,
    save_diff: SaveDiff = False,
    gpus: Gpus = "",
    per_gpu: PerGpu = 1,
    pack: Pack = "auto",
    compile_ahead: CompileAhead = "off",
    time_limit: TimeLimit = "",
) -> int:
    """Join a sweep from another terminal; ends when no trial is open.

    Examples:

    `python -m cifar agent 3k9x2m1p --workers 2`

    `python -m cifar agent https://wandb.ai/me/cifar/sweeps/3k9x2m1p`

    `python -m cifar agent 3k9x2m1p --gpus all --per-gpu 2 --time-limit 50m`
    """
    options = AgentOptions(
        count, workers, gpus, per_gpu, pack, _parse_time_limit(time_limit), storage or "", compile_ahead, wandb
    )
    _check_agent_options(options)
    _refuse_torchrun()
    check_name(sweep_id, "the sweep")
    return _run_agent(sweep_id, options, PathOptions(data_dir, runs_dir))


def _parse_time_limit(text: str) -> float:
    return parse_duration(text) if text else math.inf


def _check_agent_options(options: AgentOptions) -> None:
    """Refuse what is wrong before PyTorch is imported. Raises UserError."""
    from cifar.agent.compile_ahead import check_compile_ahead_option
    from cifar.agent.packing import check_pack_option

    if options.gpus and options.workers:
        raise UserError("--workers and --gpus both say how many workers there are; on GPUs give --gpus and --per-gpu")
    check_pack_option(options.pack)
    check_compile_ahead_option(options.compile_ahead)


def _refuse_torchrun() -> None:
    """An agent starts its own processes. Those of torchrun would each be one, and each of their trials wait for the others."""
    if (size := read_whole_number("WORLD_SIZE", 1, low=1, high=65536)) != 1:
        raise UserError(
            f"WORLD_SIZE is {size}: an agent starts its own processes, so start it once and without torchrun "
            "(--gpus all uses every GPU; one run on several GPUs: torchrun -m cifar train); else unset WORLD_SIZE"
        )


# -- creating and running ----------------------------------------------------------------------------------------------


def _create_sweep(file: Path, options: SweepOptions, agent_options: AgentOptions, paths: PathOptions) -> str:
    """Read and check a sweep file, and make the sweep, here or on W&B.

    Returns what `agent` takes: a local sweep's id, or the URL of one on W&B. Empty after a dry run, which makes nothing.
    """
    from cifar.config.resolve import parse_pairs
    from cifar.integrations.wandb.artifact_download import find_run
    from cifar.integrations.wandb.settings import mode_from_environment
    from cifar.sweeps import idle_settings, spec
    from cifar.sweeps.trial_checks import check_teachers, check_trials

    runs = paths.resolve_runs_dir()
    has_storage = bool(agent_options.storage or read_variable("CIFAR_STORAGE"))
    file = find_sweep_file(file)
    parsed = spec.read_sweep(file)
    fixed = {**parse_pairs(options.overrides), **({"dataset": options.dataset} if options.dataset else {})}
    # W&B's server hands out what its own rules say; trials that score the test set are handed out here
    is_hosted = mode_from_environment(agent_options.wandb) == "online" and not has_storage and not spec.is_final(fixed)
    overrides = dict(fixed)  # without the dataset that is found out now
    with spinner("checking every trial ...") as status:

        def show_progress(done: int, total: int) -> None:
            status.update(f"checking every trial: {done:,} of {total:,} ...")

        try:
            count = agent_options.count or (parsed.run_cap or 20 if is_hosted else None)
            trials = spec.bind_trials(parsed, fixed, options.seed, count, show_progress)
            fixed["dataset"] = trials[0][1].dataset
            notes = idle_settings.find_idle_settings(parsed, trials, fixed=fixed, count=count, is_hosted=is_hosted)
            configs = [config for _, config in trials]
            notes += check_trials(configs, on_gpu=options.dry_run)
            check_teachers(configs, lambda name: find_run(name, runs))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    if options.dry_run:
        _print_plan(parsed, fixed, options.seed, agent_options.count)
    _print_notes(notes)
    if options.dry_run:
        return ""
    with spinner("importing PyTorch ..."):
        import cifar.data  # noqa: F401 (PyTorch takes seconds)
        from cifar.sweeps import local
    fixed["dataset"] = _prepare_dataset(fixed["dataset"], paths.data_dir)
    if is_hosted:
        from cifar.integrations.wandb.backend import create_sweep
        from cifar.integrations.wandb.paths import parse_sweep_path

        with spinner("creating the sweep on W&B ..."):
            url = create_sweep(parsed, runs, fixed=overrides)
        echo(f"sweep {parse_sweep_path(url)[2]}: {parsed.name}, {parsed.method}, on W&B: {url}")
        return url
    sweep_id = local.create_checked_sweep(
        parsed,
        runs,
        fixed=fixed,
        storage_url=agent_options.storage,
        sweep_seed=options.seed,
        count=agent_options.count,
    )
    echo(f"sweep {sweep_id}: {parsed.name}, {parsed.method}, in {runs / 'sweeps' / sweep_id}")
    return sweep_id


def find_sweep_file(file: Path) -> Path:
    """A path stays a path; `quickstart`, and `sweeps/quickstart.yaml` in any folder, is the shipped file of that name."""
    from cifar.config.shipped import find_shipped, shipped_names, strip_to_name

    if file.exists() and not file.is_dir():
        return file
    if found := find_shipped("sweeps", str(file)):
        return found
    known = did_you_mean(strip_to_name("sweeps", str(file)), shipped_names("sweeps"))
    raise UserError(f"no sweep file '{file}'; give a path, or a name of sweeps/: {known}")


def _prepare_dataset(dataset: str, data_dir: Path | None) -> str:
    """Resolve `auto`, and have the images at hand before anything is made -> the dataset. Raises UserError."""
    from cifar import data

    if dataset == "auto":
        with spinner("looking for CIFAR-10 ..."):
            dataset, reason = data.resolve_auto(data_dir)
        echo(f"dataset: {reason}")
    if dataset == "cifar10":
        ensure_dataset(data_dir, [])
    else:
        warn_of_stand_in()
    with spinner(f"reading {dataset} ..."):
        data.load_dataset(dataset, data_dir)  # the stand-in is generated once
    return dataset


def _print_notes(notes: Sequence[str]) -> None:
    """Print what of a sweep file can never act."""
    for note in notes:
        print_sentence(f"note: {note}")


def _print_plan(parsed: Sweep, fixed: Mapping[str, Any], seed: int, count: int | None) -> None:
    from cifar.sweeps.plan import plan_sweep
    from cifar.sweeps.spec import format_values

    with spinner("timing a step of each network ..."):
        plan = plan_sweep(parsed, fixed, sweep_seed=seed, count=count)
    swept_keys = dict.fromkeys(key for trial in plan for key in trial.values)
    keys = [key for key in swept_keys if key not in ("model", "epochs")]  # they have columns of their own
    columns = (
        Column("cell", is_number=True),
        Column("model", min_width=8, can_be_shared=True),
        *(Column(key, min_width=6, can_be_shared=True, drop_order=1) for key in keys),
        Column("MMACs", is_number=True),
        Column("parameters", is_number=True, drop_order=3),
        Column("epochs", is_number=True, can_be_shared=True, drop_order=2),
        Column("time", is_number=True),
    )
    rows = []
    for trial in plan:
        values = format_values(trial.values, keys)
        seconds = Short("skipped: max_macs", "skipped") if trial.is_skipped else format_duration(trial.seconds)
        cost = f"{trial.macs / 1e6:.2f}", f"{trial.params:,}"
        rows.append((trial.cell, trial.model, *(values.get(key) for key in keys), *cost, trial.epochs, seconds))
    print_table("", columns, rows)
    total = format_duration(sum(trial.seconds for trial in plan))
    echo(f"\n{len(plan)} trials, very roughly {total} of training if one runs after the other")


def _run_agent(name: str, options: AgentOptions, paths: PathOptions) -> int:
    from cifar.agent.worker_process import prestart_worker

    with prestart_worker():
        from cifar.agent.agent import run_agent

        return run_agent(name, options, paths, console)


def _run_and_draw(name: str, options: SweepOptions, agent_options: AgentOptions, paths: PathOptions) -> int:
    """Run the trials, then draw the report, unless a signal ended the agent."""
    from cifar.cli.report import draw_report, print_report
    from cifar.config.resolve import parse_pairs
    from cifar.integrations.wandb.paths import parse_sweep_path
    from cifar.sweeps import spec

    code = _run_agent(name, agent_options, paths)
    if options.draw and code < 128:
        sweep_id = parse_sweep_path(name)[2] if "/" in name else name
        runs, split = paths.resolve_runs_dir(), "test" if spec.is_final(parse_pairs(options.overrides)) else "val"
        print_report(draw_report([sweep_id], runs=runs, split=split), runs)
    return code


# -- sweeps ------------------------------------------------------------------------------------------------------------


@sweeps_app.command("list")
def list_sweeps(runs_dir: RunsDir = None, as_json: Json = False) -> int:
    """All sweeps of a runs folder, oldest first."""
    from cifar.sweeps import local

    runs = run_dir.resolve_runs_dir(runs_dir)
    # JSON: {"sweeps": [one of these dictionaries, ...]}; `trials` counts trials by state
    sweeps: list[dict[str, Any]] = []
    with redirect_messages(as_json):
        damaged: list[tuple[str, str]] = []
        for info in local.list_sweeps(runs, damaged):
            about = {key: info[key] for key in ("id", "name", "method", "dataset")} | {"engine": "local", "wandb_path": None}
            try:
                counts = local.LocalBackend(info["id"], runs).count_states()
                sweeps.append({**about, "trials": counts, "error": ""})
            except UserError as error:
                sweeps.append({**about, "trials": {}, "error": str(error)})
        unknown: dict[str, Any] = {"name": "", "method": "", "dataset": "", "wandb_path": None, "trials": {}}
        sweeps += [{"id": name, **unknown, "engine": "local", "error": error} for name, error in damaged]
        for folder in run_dir.list_folders(runs / "sweeps"):
            if (folder / "wandb.json").exists() and not (folder / "sweep.json").exists():
                about = {**unknown, "id": folder.name, "engine": "wandb", "error": ""}
                try:
                    sweeps.append({**about, "wandb_path": _find_wandb_path(folder)})
                except UserError as error:
                    sweeps.append({**about, "error": str(error)})
    if as_json:
        print_json({"sweeps": sweeps})
        return 0
    rows = []
    for each in sweeps:
        counts_text = ", ".join(f"{n} {state}" for state, n in each["trials"].items())
        is_hosted = each["engine"] == "wandb"
        last = each["error"] or (each["wandb_path"] if is_hosted else counts_text)
        rows.append((each["id"], each["name"], "on W&B" if is_hosted else each["method"], each["dataset"], last))
    columns = (
        Column("sweep"),
        Column("name", min_width=10),
        Column("method", can_be_shared=True),
        Column("dataset", can_be_shared=True),
        Column("trials", min_width=20, wraps=True),
    )
    print_table("", columns, rows)
    if not rows:
        echo(f"no sweeps in {runs}; `python -m cifar sweep quickstart` makes one")
    return 0


@sweeps_app.command("status")
@pause_garbage_collection()
def show_status(sweep_id: SweepId, storage: Storage = None, runs_dir: RunsDir = None, as_json: Json = False) -> int:
    """The trials of a sweep and what became of them."""
    from cifar.agent.dashboard import advise_on_lost_folders, describe_lost_folders, format_metric
    from cifar.sweeps.spec import format_values, list_swept_values

    runs = run_dir.resolve_runs_dir(runs_dir)
    # JSON: {"id", "name", "method", "counts": {state: trials}, "without_folder": [runs that ended and whose folder is gone],
    # "metrics": [names], "trials": [one of these, ...]}
    trials: list[dict[str, Any]] = []
    with redirect_messages(as_json):
        backend = _open_local(sweep_id, storage, runs)
        gc.freeze()  # all that was imported stays; to look for cycles in it at the end would take a twentieth of the time
        names = [metric.name for metric in backend.sweep.metrics]
        cells, gone = backend.list_cells_and_lost()
        keys = backend.list_swept_keys(cells)
        swept_values = list_swept_values([cell["values"] for cell in cells], keys, backend.info["fixed"])
        for cell, values_of_cell in zip(cells, swept_values, strict=True):
            values = dict(zip(names, cell["objectives"], strict=False)) or {backend.sweep.metric.name: cell["value"]}
            trials.append(
                {
                    "cell": cell["cell"],
                    "run": cell["run_id"],
                    "values": values_of_cell,
                    "state": cell["state"],
                    "epoch": _read_epoch(f"{runs}/{cell['run_id']}") if cell["attempt"] else None,
                    "metrics": {name: values.get(name) for name in names},
                    "reason": cell["reason"],
                }
            )
        counts = backend.count_states(cells)
    if as_json:
        about = {"id": backend.id, "name": backend.sweep.name, "method": backend.sweep.method}
        without_folder = [cell["run_id"] for cell in gone]
        print_json({**about, "counts": counts, "without_folder": without_folder, "metrics": names, "trials": trials})
        return 0
    columns = (
        Column("cell", is_number=True, drop_order=2),  # a run's id ends in it
        Column("run"),
        *(Column(key, min_width=6, can_be_shared=True, drop_order=1) for key in keys),
        Column("state"),
        Column("epoch", is_number=True, drop_order=3),
        *(Column(name, is_number=True) for name in names),
        Column("reason", min_width=16, wraps=True),
    )
    rows = []
    for trial in trials:
        scores = ["" if value is None else format_metric(value, name) for name, value in trial["metrics"].items()]
        values = format_values(trial["values"], keys)
        row = (trial["cell"], trial["run"], *(values.get(key) for key in keys), trial["state"], trial["epoch"], *scores)
        rows.append((*row, trial["reason"]))
    print_table("", columns, rows)
    counts_text = ", ".join(f"{n} {state}" for state, n in counts.items())
    echo(f"\n{backend.id}: {counts_text}" + (f", {describe_lost_folders(gone)}" if gone else ""))
    if gone:
        print_sentence(advise_on_lost_folders(gone, backend.id))
    return 0


def _read_epoch(folder: str) -> int | None:
    """The epoch that a run has come to; None if that is not known, or if its folder is damaged."""
    with contextlib.suppress(UserError):
        epoch = run_dir.read_json(f"{folder}/status.json", "status").get("epoch")
        return None if epoch is None else int(epoch)
    return None


@sweeps_app.command("stop")
def stop_sweep(sweep_id: SweepId, storage: Storage = None, runs_dir: RunsDir = None) -> int:
    """Hand out no more trials; agents end after what they are doing."""
    backend = _open_local(sweep_id, storage, run_dir.resolve_runs_dir(runs_dir))
    backend.stop_sweep()
    running = backend.count_states().get("running", 0)
    echo(f"sweep {backend.id} hands out no more trials" + (f"; the {running} that run are let finish" if running else ""))
    return 0


@sweeps_app.command("retry")
def retry_trials(sweep_id: SweepId, storage: Storage = None, runs_dir: RunsDir = None) -> int:
    """Offer its failed, killed and diverged trials once more, and those that ended and whose folder is gone."""
    backend = _open_local(sweep_id, storage, run_dir.resolve_runs_dir(runs_dir))
    gone = backend.list_cells_without_folder()
    code = _print_change(backend.id, backend.retry_cells(), "to be tried again")
    if gone:
        listed = ", ".join(cell["run_id"] for cell in gone)
        print_sentence(f"of a finished trial without a folder the record is lost, so it is trained from the start: {listed}")
    return code


@sweeps_app.command("extend")
def extend_sweep(
    sweep_id: SweepId,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="a grid; its cells that are there already are kept", autocompletion=complete_sweep_file
        ),
    ],
    storage: Storage = None,
    runs_dir: RunsDir = None,
) -> int:
    """Add the cells of a larger grid; what is done stays done."""
    backend = _open_local(sweep_id, storage, run_dir.resolve_runs_dir(runs_dir))
    from cifar.agent.dashboard import advise_on_lost_folders, describe_lost_folders
    from cifar.sweeps import idle_settings, spec

    with spinner("checking every trial ..."):
        path, fixed = find_sweep_file(file), backend.info["fixed"]
        num_added = backend.extend_sweep(path)
        new = spec.read_sweep(path)
        notes = idle_settings.find_idle_settings(new, spec.bind_trials(new, fixed), fixed=fixed)
    code = _print_change(backend.id, num_added, "added")
    if gone := backend.list_cells_without_folder():  # they are the sweep's already, so they are not added once more
        print_sentence(f"{describe_lost_folders(gone, 'its cells')}; {advise_on_lost_folders(gone, backend.id)}")
    _print_notes(notes)
    return code


def _print_change(sweep_id: str, num_cells: int, what: str) -> int:
    echo(f"sweep {sweep_id}: {num_cells} cell{'s' * (num_cells != 1)} {what}")
    if num_cells:
        echo(f"run {'it' if num_cells == 1 else 'them'} with: python -m cifar agent {sweep_id}")
    return 0


def _open_local(name: str, storage: str | None, runs: Path) -> LocalBackend:
    """A sweep of this machine, by its id, its name or the start of its id."""
    from cifar.sweeps import local

    sweep_id = check_id(local.find_sweep_id(name, runs), "the sweep")
    folder = runs / "sweeps" / sweep_id
    if (folder / "wandb.json").exists() and not (folder / "sweep.json").exists():
        wandb_path = _find_wandb_path(folder)
        raise UserError(
            f"sweep {sweep_id} is W&B's: look at it and stop it there; `python -m cifar report {wandb_path}` reads it; "
            "to have a cell of a grid again, delete its run there and resume the sweep"
        )
    return local.LocalBackend(sweep_id, runs, storage or "")


def _find_wandb_path(folder: Path) -> str:
    """ENTITY/PROJECT/ID of the sweep on W&B that this folder belongs to."""
    notes = run_dir.read_json(folder / "wandb.json")
    return "/".join(str(notes.get(part, "")) for part in ("entity", "project", "id"))
