"""Commands about networks and images: `models`, `profile`, `data`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cifar.cli.completion import complete_model, complete_pretrained
from cifar.cli.console import (
    echo,
    ensure_dataset,
    print_json,
    print_sentence,
    print_table,
    redirect_messages,
    spinner,
    warn,
    warn_of_stand_in,
)
from cifar.cli.latency import describe_device, profile_latency, resolve_profiled
from cifar.cli.options import DataDir, Dataset, Experiment, Json, Pairs, RunsDir
from cifar.cli.train import format_cost, gather_layers
from cifar.errors import UserError
from cifar.system.durations import format_duration
from cifar.system.names import check_name
from cifar.system.terminal import Column, Short
from cifar.system.user_code import describe_error, pass_interrupt

if TYPE_CHECKING:
    from cifar.config.schema import Settings
    from cifar.flops import Cost
    from cifar.registry import Entry
    from cifar.training.step_profiler import StepTimes

MAX_KERNELS = 15  # named by `profile --time`
MAX_KERNEL_NAME = 90  # characters

# -- networks ----------------------------------------------------------------------------------------------------------


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="with --pretrained: show the card of this one", autocompletion=complete_pretrained
        ),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="the networks that come with their weights")] = False,
    time: Annotated[bool, typer.Option("--time/--no-time", help="measure a forward pass of each")] = True,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps")] = "auto",
    as_json: Json = False,
) -> int:
    """All networks: parameters, MACs, time an image, and whether two counters agree.

    With --pretrained, the networks that come with their weights: how accurate each is, and how it was made.
    """
    if name is not None:
        check_name(name, "the network")
    if pretrained:
        from cifar.cli.pretrained import show_pretrained

        return show_pretrained(name or "", as_json=as_json)
    if name:
        raise UserError(f"for one network: python -m cifar profile {name}; for a pretrained one: add --pretrained")
    with redirect_messages(as_json):
        with spinner("importing PyTorch ..."):
            from cifar import flops, registry
            from cifar.training import run, trainer
        torch_device = trainer.resolve_device(device)
        rows = []
        with spinner("counting ...") as status:
            for entry, aliases, keys in group_equal_networks(registry.models):
                status.update(f"counting {entry.name} ...")
                cost, microseconds, note = None, None, ""
                try:
                    model, cost = run.measure_network(entry, {})
                    note = cost.note
                    batch_size = max(1, min(256 if torch_device.type == "cuda" else 32, int(2e9 // max(cost.macs, 1))))
                    microseconds = flops.measure_microseconds_per_image(model, torch_device, batch_size) if time else None
                except UserError as error:  # the others are listed
                    note = str(error)
                except BaseException as error:
                    pass_interrupt(error)
                    note = f"a forward pass on {torch_device} fails: {describe_error(error)}"
                rows.append(NetworkRow(entry.name, aliases, keys, cost, microseconds, note))
        rows.sort(key=lambda row: (row.cost is None, row.cost.macs if row.cost else 0, row.name))
    if as_json:
        networks = [
            {
                "name": row.name,
                "aliases": row.aliases,
                "keys": row.keys,
                **_describe_cost(row.cost, row.note),
                "microseconds_per_image": row.microseconds,
            }
            for row in rows
        ]
        print_json({"device": str(torch_device), "models": networks})
        return 0
    columns = (
        Column("model", min_width=max(len(row.name) for row in rows)),  # names are whole, other names of the same are not
        Column("parameters", is_number=True),
        Column("MACs", is_number=True),
        Column("FLOPs", is_number=True, drop_order=1, is_extra=True),
        Column("µs an image", is_number=True),
        Column("MACs verified", drop_order=2, can_be_shared=True),
        Column("keys", min_width=20, wraps=True),
    )
    print_table("", columns, [row.format_cells() for row in rows])
    print_sentence(
        "\nMACs: multiply-adds of convolutions, linear and recurrent layers and other matrix products, one 3×32×32 image; "
        "FLOPs = 2 × MACs."
    )
    if time:
        print_sentence(f"Time of a forward pass on {torch_device}.")
    for row in rows:
        if row.note:
            print_sentence(f"{_join_names(row.name, row.aliases)}: {row.note}")
    return 0


@dataclass(frozen=True)
class NetworkRow:
    """What `models` says about a network. Without a cost, it cannot be counted, and `note` says why."""

    name: str
    aliases: Sequence[str]
    keys: Sequence[str]
    cost: Cost | None
    microseconds: float | None
    note: str

    def format_cells(self) -> tuple[Any, ...]:
        name, keys, cost = _join_names(self.name, self.aliases), ", ".join(self.keys), self.cost
        if cost is None:
            return (name, "-", "-", "-", "-", "FAILS", keys)
        return (
            name,
            _format_count(cost.params),
            _format_count(cost.macs),
            _format_count(cost.flops),
            f"{self.microseconds:,.0f}" if self.microseconds else "-",
            "yes" if cost.verified else "NO",
            keys,
        )


def group_equal_networks(entries: Iterable[Entry]) -> list[tuple[Entry, list[str], list[str]]]:
    """Entries that build the same network by default, as one: the one with the fewest keys, other names, the family's keys."""
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        values = {**{key.name: key.default for key in entry.keys.values()}, **entry.bound}
        groups.setdefault((entry.builder, repr(sorted(values.items()))), []).append(entry)
    found = []
    for group in groups.values():
        first, *others = sorted(group, key=lambda entry: (len(entry.keys), entry.name))
        found.append((first, [entry.name for entry in others], list([first, *others][-1].keys)))
    return found


def _join_names(name: str, aliases: Sequence[str]) -> str:
    return f"{name} (= {', '.join(aliases)})" if aliases else name


def _format_count(count: float) -> Short:
    """11,173,962; where there is little room, 11.2 M."""
    size, prefix = next(((s, p) for s, p in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if count >= 0.9995 * s), (1.0, ""))
    return Short(f"{count:,}", f"{count / size:.3g}{prefix}")


def _describe_cost(cost: Cost | None, note: str) -> dict[str, Any]:
    """The cost of one image, for JSON. Without one, the numbers are null, and `note` says why."""
    return {
        "params": cost and cost.params,
        "macs": cost and cost.macs,
        "flops": cost and cost.flops,
        "activations": cost and cost.activations,
        "macs_verified": cost is not None and cost.verified,
        "note": note,
    }


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help="a network's name [default: the experiment's]; with --latency also a finished run",
            autocompletion=complete_model,
        ),
    ] = "",
    pairs: Pairs = None,
    experiment: Experiment = "",
    time: Annotated[bool, typer.Option("--time", help="where the time of a training step goes, kernel by kernel")] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="how long one image takes, and a batch; of a run, its record gets it")
    ] = False,
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, metavar="N", help="images at once for --latency; repeatable [default: 1, 256]"),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="steps to time")] = 50,
    together: Annotated[int, typer.Option("--together", min=1, metavar="K", help="trials side by side, as in a pack")] = 1,
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> int:
    """The layers of a network and what each costs; with --time, what a training step spends its time on.

    With --latency, how long a forward pass takes.

    Examples:

    `python -m cifar profile resnet width=32`

    `python -m cifar profile --time --experiment worksheet1 batch_size=256`

    `python -m cifar profile --latency resnet20 device=cpu threads=1`
    """
    if latency:
        if time:
            raise UserError("--time is about training steps, --latency about forward passes; ask for one of them")
        return profile_latency(model, pairs or [], experiment, batches or [1, 256], runs_dir=runs_dir, as_json=as_json)
    words = [word for word in (model, *(pairs or [])) if word]
    names = [] if "=" in model else words[:1]  # KEY=VALUE comes first where the experiment names the network
    config = resolve_profiled(experiment, [*(f"model={name}" for name in names), *words[len(names) :]])
    if time:
        return _profile_time(config, steps, together, data_dir, as_json=as_json)
    return _profile_layers(config, as_json=as_json)


def _profile_layers(config: Settings, *, as_json: bool) -> int:
    with redirect_messages(as_json), spinner("counting ..."):
        from cifar.training import run

        notes = run.check_plugins(config)
        cost = run.measure_cost(config)
    for note in notes:
        warn(note)
    if as_json:
        layers = [
            {
                "name": layer.name,
                "kind": layer.kind,
                "output_shape": list(layer.output_shape[1:]),
                "params": layer.params,
                "macs": layer.macs,
                "activations": layer.activations,
            }
            for layer in cost.layers
        ]
        print_json({"model": config.model, **_describe_cost(cost, cost.note), "layers": layers})
        return 0
    columns = (
        Column("layer", min_width=16),
        Column("kind"),
        Column("output"),
        Column("parameters", is_number=True),
        Column("MACs", is_number=True),
        Column("share", is_number=True),
        Column("activations", is_number=True, drop_order=1),
    )
    print_table(
        "",
        columns,
        [
            (
                layer.name,
                layer.kind,
                "×".join(map(str, layer.output_shape[1:])),
                _format_count(layer.params),
                _format_count(layer.macs),
                f"{100 * layer.macs / max(cost.macs, 1):.1f} %",
                _format_count(layer.activations),
            )
            for layer in cost.layers
        ],
    )
    print_sentence(f"\n{config.model}: {format_cost(cost)}, {cost.flops / 1e6:.2f} MFLOPs, {cost.activations:,} activations")
    return 0


def _profile_time(config: Settings, steps: int, together: int, data_dir: Path | None, *, as_json: bool) -> int:
    """Where the time of a training step goes. Any images will do: times do not depend on what they show."""
    with redirect_messages(as_json):
        with spinner("importing PyTorch ..."):
            from cifar import data
            from cifar.training import step_profiler
            from cifar.training.run import check_plugins
        has_cifar10 = config.dataset != "stand-in" and data.find_cifar10(data_dir) is not None
        config = config.model_copy(update={"dataset": "cifar10" if has_cifar10 else "stand-in"})
        for note in check_plugins(config):
            warn(note)
        with spinner("timing ..."):
            configs = [config.model_copy(update={"seed": config.seed + index}) for index in range(together)]
            times = step_profiler.profile_steps(configs, data_dir, steps=steps)
    epoch_seconds = _estimate_epoch(times, config.probe_every)
    if as_json:
        print_json(_describe_times(config, times, together, epoch_seconds))
    else:
        _print_times(config, times, together, epoch_seconds)
        _print_kernels(times)
    return 0


def _estimate_epoch(times: StepTimes, probe_every: int) -> float:
    """Seconds of an epoch: its beginning, its steps, of which 1 of `probe_every` is seen by the probes, and the evaluation."""
    probed_share = 1 / probe_every if probe_every else 0.0
    steps = times.steps_per_epoch * times.step + times.steps_per_epoch * probed_share * (times.probed_step - times.step)
    return times.epoch + steps + times.evaluation


def _describe_times(config: Settings, times: StepTimes, together: int, epoch_seconds: float) -> dict[str, Any]:
    """For JSON. All times are in seconds; `kernels` are sums of one step."""
    return {
        "model": config.model,
        "dataset": config.dataset,
        "batch_size": times.batch_size,
        "trials": together,
        "device": str(times.device),
        "device_name": describe_device(times.device),
        "captured": bool(times.step_description["captured"]),
        "compiled": bool(times.step_description["compiled"]),
        "steps_per_epoch": times.steps_per_epoch,
        "probe_every": config.probe_every,
        "images_per_second": together * times.batch_size / times.step,
        "seconds": {
            "step": times.step,
            "graph_replay": times.replay or None,
            "step_with_probes": times.probed_step,
            "epoch_start": times.epoch,
            "evaluation": times.evaluation,
            "epoch": epoch_seconds,
        },
        "kernels": [{"name": name, "calls": calls, "seconds": seconds} for name, calls, seconds in times.kernels],
    }


def _print_times(config: Settings, times: StepTimes, together: int, epoch_seconds: float) -> None:
    how = ", ".join(word for word in ("captured", "compiled") if times.step_description[word]) or "step by step"
    stand_in = ", stand-in images" if config.dataset == "stand-in" else ""
    side_by_side = f", {together} trials side by side" if together > 1 else ""
    print_sentence(
        f"{config.model}, batch size {times.batch_size}{stand_in}, {describe_device(times.device)}, {how}{side_by_side}"
    )
    num_images = together * times.batch_size
    rows = [("a step", _format_ms(times.step), f"{num_images / times.step:,.0f} images a second")]
    if times.replay:
        overhead = f"the host adds {100 * (times.step / times.replay - 1):.1f} %"
        rows.append(("replay of its graph", _format_ms(times.replay), overhead))
    rows += [
        (
            "a step the probes see",
            _format_ms(times.probed_step),
            f"1 of {config.probe_every}" if config.probe_every else "none is",
        ),
        ("an epoch's beginning", _format_ms(times.epoch), "order, draws and, on a GPU, all augmented images"),
        (
            "evaluation",
            _format_ms(times.evaluation),
            "of the validation images" if config.val_size else "none: val_size is 0",
        ),
        ("an epoch in all", _format_ms(epoch_seconds), f"{times.steps_per_epoch} steps, {format_duration(epoch_seconds)}"),
    ]
    print_table("", (Column("what"), Column("ms", is_number=True), Column("", min_width=20, wraps=True)), rows)


def _print_kernels(times: StepTimes) -> None:
    """The kernels of a step that cost most, and the sum of all others."""
    total = sum(seconds for _, _, seconds in times.kernels)
    shown, others = times.kernels[:MAX_KERNELS], times.kernels[MAX_KERNELS:]
    rows = [
        (_truncate_text(name, MAX_KERNEL_NAME), str(calls), _format_ms(seconds), f"{100 * seconds / total:.1f} %")
        for name, calls, seconds in shown
    ]
    if others:
        seconds = sum(kernel[2] for kernel in others)
        calls = str(sum(kernel[1] for kernel in others))
        rows.append((f"{len(others)} others", calls, _format_ms(seconds), f"{100 * seconds / total:.1f} %"))
    rows.append(("in all", str(sum(kernel[1] for kernel in times.kernels)), _format_ms(total), "100 %"))
    echo()
    kind = "kernel" if times.device.type == "cuda" else "operation"
    numbers = [Column(name, is_number=True) for name in ("calls", "ms a step", "share")]
    print_table("", (Column(kind, min_width=20), *numbers), rows)


def _format_ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"


def _truncate_text(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


# -- images ------------------------------------------------------------------------------------------------------------


def data(
    pairs: Pairs = None,
    show: Annotated[bool, typer.Option("--show", help="write a picture of augmented training images")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png", help="where --show writes")] = Path("augmented.png"),
    verify: Annotated[
        bool, typer.Option("--verify", help="compare mean, std and class counts with what they have to be")
    ] = False,
    mirror: Annotated[
        list[str] | None, typer.Option("--mirror", metavar="URL", help="try this address first; repeatable")
    ] = None,
    experiment: Experiment = "",
    dataset: Dataset = None,
    data_dir: DataDir = None,
) -> int:
    """Find CIFAR-10, or download it, and check its bytes.

    Example: `python -m cifar data --show flip=alternating cutout=8`
    """
    from cifar.config.resolve import resolve_config

    layers = gather_layers(pairs or [], experiment=experiment, dataset=dataset)
    config = resolve_config(*(values for _, values in layers))
    with spinner("importing PyTorch ..."):
        from cifar import data
        from cifar.cli import preview
        from cifar.training import run
    config, reason = run.resolve_dataset(config, data_dir)
    if reason:
        echo(f"dataset: {reason}")
    if config.dataset == "cifar10":
        echo(f"found at    {ensure_dataset(data_dir, mirror or [])}")
    else:
        warn_of_stand_in()
    with spinner(f"reading {config.dataset} ..."):
        images = data.load_dataset(config.dataset, data_dir)
    checked = ", every file's MD5 is the published one" if images.official else ""
    echo(f"{images.name}: {len(images.train_labels):,} training and {len(images.test_labels):,} test images{checked}")
    echo(f"fingerprint {images.fingerprint}")
    problems = preview.find_problems(images) if verify else []
    for problem in problems:
        echo(f"WRONG: {problem}")
    if verify and not problems:
        echo("mean, std and class counts are as they have to be")
    if show:
        echo(f"picture     {preview.draw_preview(images, config, out)}")
    return 1 if problems else 0
