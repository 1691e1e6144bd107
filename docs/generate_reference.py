"""Writes docs/reference/commands.md and docs/reference/keys.md from the code: `python docs/generate_reference.py`.

With --check it writes nothing, and ends with 1 if a file is not as the code says.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
NOTICE = "<!-- Written by docs/generate_reference.py from the code. Do not edit: run it again. -->"


# -- commands ----------------------------------------------------------------------------------------------------------


def describe_commands() -> str:
    """The command line as Markdown, from Typer's own objects."""
    import typer  # noqa: TID251 (it describes the command line from outside)

    from cifar.cli.app import app

    root = typer.main.get_command(app)
    lines = [
        NOTICE,
        "",
        "# Commands",
        "",
        "`cifar` and `python -m cifar` are the same program. `cifar COMMAND -h` prints what is below.",
        "",
    ]
    lines += _describe_parameters(root)
    for name, command in _iterate_commands(root, "cifar"):
        lines += [f"## {name}", ""]
        text = (command.help or "").replace("python -m cifar", "cifar")
        lines += [*text.strip().splitlines(), ""]
        lines += _describe_parameters(command)
    return _join(lines)


def _iterate_commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if getattr(command, "commands", None):
            yield from _iterate_commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _describe_parameters(command: Any) -> list[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option" and not parameter.hidden]
    lines = []
    if arguments:
        rows = [(f"`{_metavar(a)}`", _cell(getattr(a, "help", "") or "")) for a in arguments]
        lines += _table(("argument", "meaning"), rows)
    if options:
        rows = [(_option_names(o), _option_values(o), _option_default(o), _cell(o.help or "")) for o in options]
        lines += _table(("option", "values", "default", "meaning"), rows)
    return lines


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper()) + (" ..." if argument.nargs == -1 else "")


def _option_names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])


def _option_values(option: Any) -> str:
    if option.is_flag or option.secondary_opts:
        return ""
    annotation = option.type_descriptor.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return _type_text(annotation)
    return _cell(f"`{option.metavar}`") if option.metavar else _type_text(annotation)


def _option_default(option: Any) -> str:
    default = option.default
    if default is None or default == "" or default is False or callable(default):
        return ""
    if default is True:
        return "yes"
    return f"`{default}`"


# -- keys --------------------------------------------------------------------------------------------------------------

# What the keys of registered parts mean. Their type and default are read from the code; a key without a meaning is an error.
MEANINGS = {
    "aux_momentum": "momentum of the parameters that Muon leaves to SGD",
    "aux_weight_decay": "weight decay of the parameters that Muon leaves to SGD",
    "beta1": "decay of the mean of gradients",
    "beta2": "decay of the mean of squared gradients",
    "bias_lr": "learning rate of norms and biases",
    "channel_divisor": "channels are rounded to multiples of it",
    "decay_norm_and_bias": "weight decay for norms, biases and embeddings too",
    "depth": "number of layers or blocks, as the network's description counts them",
    "depth_multiplier": "factor of each stage's number of blocks, which is rounded up",
    "dropout": "share of activations that are set to zero in training",
    "drop_path": "how often stochastic depth drops the last block's branch; earlier blocks less, by a linear rule; 0: never",
    "se": "squeeze-and-excitation: by how much the channels between its two layers are divided; 0: none",
    "eps": "added to the denominator",
    "final_lr": "where lr ends, as a share of lr",
    "gamma": "factor of lr at each milestone",
    "genotype": "the cells, by the name of what was found",
    "growth": "channels that each layer adds",
    "head_lr": "learning rate of stem and head",
    "kernel_size": "side of a depthwise convolution's kernel, in pixels",
    "lr": "learning rate, which the schedule multiplies",
    "milestones": "shares of the training at which lr falls, separated by commas",
    "momentum": "decay of the velocity",
    "nesterov": "look ahead along the velocity",
    "normalize_weights": "keep each filter matrix at a constant norm",
    "ns_steps": "Newton-Schulz iterations that make an update orthogonal",
    "ns_together": "on a GPU, filters of different shapes share a batch of Newton–Schulz iterations (filled up with zeros)",
    "patch_size": "side of a patch, in pixels",
    "peak_at": "share of the training at which lr is reached",
    "shortcut": "what joins blocks of different shape: a 1x1 convolution, or padding with zeros",
    "stem_stride": "stride of the first convolution; 2 halves the sides of all maps",
    "size": "which of the paper's two networks",
    "start_lr": "where lr begins, as a share of lr",
    "warmup": "share of the training in which lr rises in a line",
    "weight_decay": "pulls weights towards zero, in units of the optimizer",
    "whiten_until": "share of the training after which the whitening layer's bias no longer learns",
    "width": "channels of the first stage",
    "width_multiplier": "factor of all channels",
}


def describe_keys() -> str:
    """Every configuration key as Markdown, from `Settings` and the registries."""
    from cifar import registry
    from cifar.config.schema import Settings

    lines = [
        NOTICE,
        "",
        "# Configuration keys",
        "",
        "A key is given on the command line (`lr=0.1`), in an experiment file, or as a parameter of a sweep.",
        "`cifar config` prints the keys of a configuration with their values and where these come from.",
        "",
        "## Keys of every run",
        "",
    ]
    rows = []
    for name, field in Settings.model_fields.items():
        values = _type_text(field.annotation) + _limits_text(field.metadata)
        rows.append(
            (
                f"`{name}`",
                values,
                _value_text(field.default),
                _cell((field.description or "").replace("python -m cifar", "cifar")),
            )
        )
    lines += _table(("key", "values", "default", "meaning"), rows)
    described: set[str] = set()
    for title, key, known in (
        ("Networks", "model", registry.models),
        ("Optimizers", "optimizer", registry.optimizers),
        ("Schedules", "schedule", registry.schedules),
        ("Probes", "probes", registry.probes),
    ):
        lines += [f"## {title}", "", f"Values of the key `{key}`, and the keys that each of them adds.", ""]
        lines += _table(
            (key, "what it is", "keys"),
            [(f"`{entry.name}`", _cell(entry.doc), ", ".join(f"`{name}`" for name in entry.keys) or "–") for entry in known],
        )
        rows = list(_describe_owned_keys(known))
        described |= {row[0].strip("`") for row in rows}
        if rows:
            lines += [f"### Keys of {title.lower()}", ""]
            lines += _table(("key", "values", "default", "meaning", "taken by"), rows)
    assert described == set(MEANINGS), f"MEANINGS has {sorted(set(MEANINGS) - described)}, which no part takes"
    return _join(lines)


def _describe_owned_keys(known: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    """(key, values, defaults, owners). A key whose default differs from owner to owner has a row for each default."""
    owners: dict[tuple[str, str, str], list[str]] = {}
    for entry in known:
        for key in entry.keys.values():
            form = _type_text(key.type)
            owners.setdefault((key.name, form, _value_text(key.default)), []).append(entry.name)
    for (name, form, default), names in sorted(owners.items()):
        yield f"`{name}`", form, default, _meaning_of(name), ", ".join(f"`{owner}`" for owner in names)


def _meaning_of(name: str) -> str:
    assert name in MEANINGS, f"docs/generate_reference.py: add what '{name}' means to MEANINGS"
    return MEANINGS[name]


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_WORDS = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}


def _type_text(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(arguments[0]) + _limits_text(annotation.__metadata__)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(each) for each in arguments if each is not type(None))
    return _WORDS.get(annotation, f"`{getattr(annotation, '__name__', annotation)}`")


def _limits_text(metadata: Iterable[Any]) -> str:
    found = []
    for each in metadata:
        for inner in getattr(each, "metadata", None) or [each]:
            found += [f"{sign} {_number_text(getattr(inner, name))}" for name, sign in _SIGNS.items() if hasattr(inner, name)]
    return f", {', '.join(found)}" if found else ""


def _number_text(value: float) -> str:
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value > 10**9 else f"{value:g}"


def _value_text(value: Any) -> str:
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# -- Markdown ----------------------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _join(lines: list[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def generate() -> dict[Path, str]:
    """File -> its content as the code says. Plug-ins are left out."""
    return {REFERENCE / "commands.md": describe_commands(), REFERENCE / "keys.md": describe_keys()}


def main(arguments: list[str]) -> int:
    import os

    os.environ.pop("CIFAR_PLUGINS", None)
    sys.path.insert(0, str(ROOT))
    stale = [path for path, text in generate().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{'not current' if arguments == ['--check'] else 'written'}: {path.relative_to(ROOT)}")
        if arguments != ["--check"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generate()[path], "utf-8")
    return int(bool(stale) and arguments == ["--check"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
