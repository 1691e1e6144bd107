"""What the commands about networks, images and this machine do. Each returns an exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cifar import registry
from cifar.cli.console import obtain, say, table, waiting, warn_of_stand_in
from cifar.cli.train import cost_line, layers
from cifar.config import resolve as configuration
from cifar.errors import UserError
from cifar.registry import Entry
from cifar.tracking import cleanup as tidy
from cifar.tracking import run_dir as records

KERNELS = 15  # that `profile --time` names

# -- networks ----------------------------------------------------------------------------------------------------------


def models(time: bool, device: str) -> int:
    """The table of all networks, by MACs."""
    with waiting("importing PyTorch ..."):
        from cifar import flops as cost
        from cifar.training import trainer as parts
    where = parts.device_of(device)
    rows = []
    with waiting("counting ...") as status:
        for entry, aliases, keys in families(registry.models):
            status.update(f"counting {entry.name} ...")
            model = entry.build()
            measured = cost.measure(model)
            batch = max(1, min(256 if where.type == "cuda" else 32, int(2e9 // max(measured.macs, 1))))
            micros = cost.microseconds_per_image(model, where, batch) if time else None
            rows.append((entry.name + aliases, ", ".join(keys), measured, micros))
    rows.sort(key=lambda row: (row[2].macs, row[0]))
    columns = ("model", "parameters", "MACs", "FLOPs", "µs an image", "MACs verified", "keys")
    table(
        "",
        columns,
        [
            (
                name,
                f"{c.params:,}",
                f"{c.macs:,}",
                f"{c.flops:,}",
                f"{micros:,.0f}" if micros else "-",
                _yes(c),
                keys,
            )
            for name, keys, c, micros in rows
        ],
        right=columns[1:5],
    )
    say("\nMACs: multiply-adds of convolutions, linear layers and attention, one 3×32×32 image; FLOPs = 2 × MACs.")
    if time:
        say(f"Time of a forward pass on {where}.")
    for name, _, measured, _ in rows:
        if not measured.verified:
            say(f"{name}: {measured.note}")
    return 0


def families(entries: Iterable[Entry]) -> list[tuple[Entry, str, list[str]]]:
    """Entries that build the same network by default as one: the most specific name, " (= family)", the family's keys."""
    same: dict[Any, list[Entry]] = {}
    for entry in entries:
        values = {**{key.name: key.default for key in entry.keys.values()}, **entry.bound}
        same.setdefault((entry.builder, repr(sorted(values.items()))), []).append(entry)
    found = []
    for group in same.values():
        first, *others = sorted(group, key=lambda entry: (len(entry.keys), entry.name))
        aliases = f" (= {', '.join(entry.name for entry in others)})" if others else ""
        found.append((first, aliases, list([first, *others][-1].keys)))
    return found


def _yes(cost: Any) -> str:
    return "yes" if cost.verified else "NO"


def profile(experiment: str, pairs: Sequence[str]) -> int:
    """The layers of one network."""
    config = _profiled(experiment, pairs)
    with waiting("counting ..."):
        from cifar.training import run

        cost = run.cost_of(config)
    columns = ("layer", "kind", "output", "parameters", "MACs", "share", "activations")
    table(
        "",
        columns,
        [
            (
                row.name,
                row.kind,
                "×".join(map(str, row.output_shape[1:])),
                f"{row.params:,}",
                f"{row.macs:,}",
                f"{100 * row.macs / max(cost.macs, 1):.1f} %",
                f"{row.activations:,}",
            )
            for row in cost.layers
        ],
        right=columns[3:],
    )
    say(f"\n{config.model}: {cost_line(cost)}, {cost.flops / 1e6:.2f} MFLOPs, {cost.activations:,} activations")
    return 0


def profile_time(experiment: str, pairs: Sequence[str], steps: int, together: int, data_dir: Path | None) -> int:
    """Where the time of a training step goes. Any images will do: times do not depend on what they show."""
    config = _profiled(experiment, pairs)
    with waiting("importing PyTorch ..."):
        from cifar import data
        from cifar.training import step_profiler as timing
    found = config.dataset != "stand-in" and data.locate(data_dir) is not None
    config = config.model_copy(update={"dataset": "cifar10" if found else "stand-in"})
    with waiting("timing ..."):
        configs = [config.model_copy(update={"seed": config.seed + index}) for index in range(together)]
        times = timing.measure(configs, data_dir, steps=steps)

    images, share = together * times.batch_size, 1 / config.probe_every if config.probe_every else 0.0
    bare, watched = times.steps * times.step, times.steps * share * (times.watched - times.step)
    how = ", ".join(word for word in ("captured", "compiled") if times.how[word]) or "step by step"
    beside, images_of = f", {together} trials side by side" if together > 1 else "", "" if found else ", stand-in images"
    say(f"{config.model}, batch size {times.batch_size}{images_of}, {where_of(times.device)}, {how}{beside}")
    rows = [
        ("a step", _ms(times.step), f"{images / times.step:,.0f} images a second"),
        ("replay of its graph", _ms(times.replay), f"the host adds {100 * (times.step / times.replay - 1):.1f} %")
        if times.replay
        else ("", "", ""),
        ("a step the probes see", _ms(times.watched), f"1 of {config.probe_every}" if share else "none is"),
        ("an epoch's beginning", _ms(times.epoch), "order, draws and, on a GPU, all augmented images"),
        ("evaluation", _ms(times.evaluation), "of the validation images" if config.val_size else "none: val_size is 0"),
        ("an epoch in all", _ms(times.epoch + bare + watched + times.evaluation), f"{times.steps} steps"),
    ]
    table("", ("what", "ms", ""), [row for row in rows if row[0]], right=("ms",))

    said = "kernel" if times.device.type == "cuda" else "operation"
    total, shown = sum(kernel[2] for kernel in times.kernels), times.kernels[:KERNELS]
    rest = times.kernels[KERNELS:]
    listed = [(_short(name), f"{calls}", _ms(seconds), f"{100 * seconds / total:.1f} %") for name, calls, seconds in shown]
    if rest:
        others = sum(kernel[2] for kernel in rest)
        listed.append((f"{len(rest)} others", str(sum(k[1] for k in rest)), _ms(others), f"{100 * others / total:.1f} %"))
    listed.append(("in all", str(sum(kernel[1] for kernel in times.kernels)), _ms(total), "100 %"))
    say()
    table("", (said, "calls", "ms a step", "share"), listed, right=("calls", "ms a step", "share"))
    return 0


def where_of(device: Any) -> str:
    """A device in words."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"


def _profiled(experiment: str, pairs: Sequence[str]) -> Any:
    found = layers("", experiment, None, None, pairs, None)
    if not experiment and not any(pair.startswith("model=") for pair in pairs):
        raise UserError("name a network, as in: python -m cifar profile resnet20; or an experiment: --experiment worksheet1")
    return configuration.resolve(*(values for _, values in found))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"


def _short(name: str, most: int = 90) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."


# -- data and the machine ----------------------------------------------------------------------------------------------


def data(
    pairs: Sequence[str],
    show: bool,
    out: Path,
    verify: bool,
    mirrors: Sequence[str],
    experiment: str,
    dataset: str | None,
    data_dir: Path | None,
) -> int:
    """Find or fetch the images, check them, show them."""
    config = configuration.resolve(*(values for _, values in layers("", experiment, None, dataset, pairs, None)))
    with waiting("importing PyTorch ..."):
        from cifar import data
        from cifar.cli import preview as look
        from cifar.training import run
    config, reason = run.resolve_dataset(config, data_dir)
    if reason:
        say(f"dataset: {reason}")
    if config.dataset == "cifar10":
        say(f"found at    {obtain(data_dir, mirrors)}")
    else:
        warn_of_stand_in()
    with waiting(f"reading {config.dataset} ..."):
        images = data.load(config.dataset, data_dir)
    checked = ", every file's MD5 is the published one" if images.official else ""
    say(f"{images.name}: {len(images.train_labels):,} training and {len(images.test_labels):,} test images{checked}")
    say(f"fingerprint {images.fingerprint}")
    wrong = look.problems(images) if verify else []
    for problem in wrong:
        say(f"WRONG: {problem}")
    if verify and not wrong:
        say("mean, std and class counts are as they have to be")
    if show:
        say(f"picture     {look.draw(images, config, out)}")
    return 1 if wrong else 0


def gc(dry_run: bool, days: float, finished: bool, runs_dir: Path | None) -> int:
    """Delete, or only name, what nothing needs any more."""
    runs = records.runs_dir(runs_dir)
    found = tidy.leftovers(runs, days=days, finished=finished)
    for leftover in found:
        say(
            f"{'would remove' if dry_run else 'removed'}  {leftover.path}  ({leftover.reason}, {leftover.size / 2**20:.1f} MiB)"
        )
        if not dry_run:
            tidy.remove(leftover)
    total = sum(leftover.size for leftover in found) / 2**20
    things = "1 thing" if len(found) == 1 else f"{len(found)} things"
    say(f"{things}, {total:.1f} MiB {'could be freed' if dry_run else 'freed'} in {runs}")
    return 0


def doctor(data_dir: Path | None, runs_dir: Path | None) -> int:
    """What is here, and what to do about what is not."""
    from cifar.cli.doctor import examine

    rows = []
    with waiting("looking ..."):
        for check in examine(records.runs_dir(runs_dir), data_dir):
            rows.append((check.name, {"ok": "ok", "note": "-", "bad": "BAD"}[check.state], check.found, check.advice))
    table("", ("what", "", "found", "what to do"), rows)
    return 1 if any(row[1] == "BAD" for row in rows) else 0
