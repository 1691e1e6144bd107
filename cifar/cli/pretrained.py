"""`models --pretrained`: a table of the pretrained networks, and the card of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cifar.cli.console import echo, print_json, print_sentence, print_table, warn
from cifar.errors import UserError, did_you_mean
from cifar.system.amounts import format_joules, format_operations
from cifar.system.durations import format_duration
from cifar.system.terminal import Column
from cifar.tracking.pretrained import Pretrained, describe_missing_weights, list_pretrained


def show_pretrained(name: str, *, as_json: bool) -> int:
    """Print the card of one network, or without a name a table of all."""
    networks, problems = list_pretrained()
    for problem in problems:  # of one card; the others are shown
        warn(problem)
    if name:
        found = next((each for each in networks if each.name == name), None)
        if found is None:
            known = did_you_mean(name, [each.name for each in networks]) if networks else "there is none"
            raise UserError(f"no pretrained network '{name}'; {known}")
        if as_json:
            print_json(_describe(found))
        else:
            _print_card(found)
        return 0
    if as_json:
        print_json({"pretrained": [_describe(each) for each in networks]})
        return 0
    if not networks:
        print_sentence("There are no pretrained networks here.")
        return 0
    columns = (
        Column("name", min_width=max(len(each.name) for each in networks)),
        Column("MMACs", is_number=True),
        Column("parameters", is_number=True),
        Column("accuracy", is_number=True),
        Column("row's mean ± std (n)", is_number=True),
        Column("network", min_width=12, drop_order=2),
        Column("weights", drop_order=1),
        Column("here", drop_order=3, can_be_shared=True),
    )
    print_table("", columns, [_format_row(each) for each in networks])
    print_sentence(
        "\nAccuracy in % on the 10,000 test images, one view. The first is that of these very weights, after rounding; the "
        "second that of all seeds of the row. `python -m cifar models --pretrained NAME` shows a card, "
        '`cifar.load("NAME")` the network.'
    )
    return 0


def _describe(network: Pretrained) -> dict[str, Any]:
    """For JSON: the card, and whether the weights are here."""
    return {**network.card, "installed": network.is_installed, "folder": str(network.folder)}


def _format_row(network: Pretrained) -> tuple[str, ...]:
    card = network.card
    return (
        network.name,
        f"{card['macs'] / 1e6:.2f}",
        f"{card['params']:,}",
        f"{100 * card['accuracy']:.2f}",
        _format_accuracies(card["row"]),
        str(card.get("model", "")),
        _format_weights(card["weights"]),
        "yes" if network.is_installed else "no",
    )


def _format_accuracies(row: Mapping[str, Any]) -> str:
    """93.12 ± 0.11 (3)"""
    std = "" if row.get("std") is None else f" ± {100 * row['std']:.2f}"
    return f"{100 * row['mean']:.2f}{std} ({row['n']})"


def _format_weights(weights: Mapping[str, Any]) -> str:
    return f"{weights['format']}, {weights['bytes'] / 1e6:.2f} MB"


def _print_card(network: Pretrained) -> None:
    lines = list(_list_facts(network))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print_sentence(f"{name:{width}}  {text}")
    classes = network.card.get("per_class")
    if isinstance(classes, Mapping):
        echo()
        columns = (Column("class"), Column("accuracy", is_number=True))
        print_table("", columns, [(name, f"{100 * share:.1f} %") for name, share in classes.items()])


def _list_facts(network: Pretrained) -> Iterator[tuple[str, str]]:
    """What a card says, as pairs of a word and a sentence."""
    card = network.card
    row, training, image = card["row"], card.get("training") or {}, card.get("input") or {}
    yield "name", network.name
    yield "accuracy", f"{100 * card['accuracy']:.2f} % on the 10,000 test images, one view: these weights, after rounding"
    if (before := card.get("accuracy_before_rounding")) is not None:
        yield "before", f"{100 * before:.2f} %, as the run's record has it"
    yield "row", f"{_format_accuracies(row)}: mean, standard deviation and number of seeds; {card.get('chosen', '')}"
    yield "network", f"{card.get('model', '')}, {card['macs'] / 1e6:.2f} MMACs an image, {card['params']:,} parameters"
    yield "weights", f"{_format_weights(card['weights'])}, SHA-256 {card['weights']['sha256']}"
    yield "images", str(image.get("description", ""))
    yield "made by", str(training.get("command", ""))
    costs = [
        f"{training['epochs']} epochs" if training.get("epochs") else "",
        format_duration(training["seconds"]) if training.get("seconds") else "",
        str(training.get("device") or ""),
        format_joules(training["joules"]) if training.get("joules") else "",
        f"side by side with {training['pack_size'] - 1} more runs" if (training.get("pack_size") or 1) > 1 else "",
        format_operations(training["train_flops"]) if training.get("train_flops") else "",
        f"taught by {training['teacher']}" if training.get("teacher") else "",
    ]
    yield "training", ", ".join(text for text in costs if text)
    data = card.get("data") or {}
    yield "data", f"{data.get('name', '')}, fingerprint {data.get('fingerprint', '')}. {data.get('licence', '')}"
    yield "licence", str(card.get("licence", ""))
    yield "here", str(network.folder) if network.is_installed else describe_missing_weights(network.name)
