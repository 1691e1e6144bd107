"""Pretrained networks by name. Each is a folder as a finished run leaves it, with a card, and with rounded weights.

    NAME/
      card.json       accuracy, cost, how it was made, and the SHA-256 of the weights
      weights.pt      rounded (training/rounding.py); missing where another package has it
      run.json, config.json, environment.json, summary.json, status.json    as a run's, without what names a machine

So a pretrained network can stand wherever a run can. Nothing is ever written to its folder. The folders are in the package
itself, in a second package for large networks, and in the folders that CIFAR_PRETRAINED names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar.errors import UserError, did_you_mean
from cifar.system.files import MIB, MissingFileError, UnreadableFileError, is_regular_file, parse_json, read_bytes, shorten_repr
from cifar.system.names import check_name, is_id
from cifar.system.variables import read_words
from cifar.tracking.records import is_amount, is_count, is_number, is_text, is_texts
from cifar.tracking.run_dir import CARD_FILE, RunDir, find_run_dir, list_folders

WEIGHTS_FILE = "weights.pt"
CARD_SCHEMA = 1
WEIGHTS_PACKAGE = "cifar_frontier_weights"  # the folders of the networks that are too large for this package
MAX_WEIGHTS_BYTES = 2**31  # of one network; more is not read
MAX_TRACKED_BYTES = 12 * MIB  # of all weights in this package
MAX_HALF_BYTES = 8 * MIB  # of a network's weights in half precision; a larger one is kept with 8 bits a weight
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1] / "pretrained"


@dataclass(frozen=True)
class Pretrained:
    """A pretrained network: its name, its folder, and what its card says."""

    name: str
    folder: Path
    card: Mapping[str, Any]

    @property
    def is_installed(self) -> bool:
        """Whether its weights are here."""
        return _has_weights(self.folder)


# -- finding -----------------------------------------------------------------------------------------------------------


def list_pretrained() -> tuple[list[Pretrained], list[str]]:
    """All pretrained networks, by MACs, also those whose weights are not here; and a sentence for each damaged card."""
    found, problems = list[Pretrained](), list[str]()
    for name, folder in _find_folders().items():
        try:
            found.append(Pretrained(name, folder, read_card(folder)))
        except UserError as error:
            problems.append(str(error))
    return sorted(found, key=lambda each: (each.card["macs"], each.name)), problems


def list_pretrained_names() -> list[str]:
    """Their names, sorted. No card is read."""
    return sorted(_find_folders())


def find_pretrained(name: str) -> Pretrained | None:
    """The pretrained network of exactly this name; its weights may be missing. None: no one has this name.

    Raises UserError for a damaged card.
    """
    folder = _find_folders().get(name)
    return None if folder is None else Pretrained(name, folder, read_card(folder))


def find_run_or_pretrained(name: str, runs_dir: Path) -> RunDir:
    """A run by its path or its id; a pretrained network by its name; a run by the start of its id or its name.

    Raises UserError.
    """
    check_name(name, "the run")
    is_path_or_id = is_regular_file(Path(name) / "run.json") or is_regular_file(runs_dir / name / "run.json")
    if not is_path_or_id and (found := find_pretrained(name)):
        return RunDir(found.folder)
    try:
        return find_run_dir(name, runs_dir)
    except UserError as error:
        known = list_pretrained_names()
        if not str(error).startswith("no run ") or not known:
            raise
        raise UserError(f"{error}; nor is it a pretrained network: {did_you_mean(name, known)}") from None


def describe_missing_weights(name: str) -> str:
    """What to do where only the card of a network is here."""
    package = WEIGHTS_PACKAGE.replace("_", "-")
    return (
        f"the weights of {name} are not installed: they are in the package {package}; install its wheel "
        f"(pip install {WEIGHTS_PACKAGE}-*.whl), or train the network: python -m cifar train --from {name}"
    )


def _find_folders() -> dict[str, Path]:
    """Name -> folder. Of several folders of one name, the first that has weights, else the first."""
    found: dict[str, Path] = {}
    for parent in _list_parents():
        for folder in list_folders(parent):
            if is_id(folder.name) and is_regular_file(folder / CARD_FILE):
                known = found.get(folder.name)
                if known is None or (not _has_weights(known) and _has_weights(folder)):
                    found[folder.name] = folder
    return found


def _has_weights(folder: Path) -> bool:
    return is_regular_file(folder / WEIGHTS_FILE)


def _list_parents() -> list[Path]:
    """Where networks are looked for. The second package is not imported: it has nothing to run."""
    try:
        spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    except (ImportError, ValueError):
        spec = None
    second = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    return [
        *(Path(os.path.expanduser(place)) for place in read_words("CIFAR_PRETRAINED", os.pathsep)),
        _PACKAGE_FOLDER,
        *second,
    ]


# -- cards -------------------------------------------------------------------------------------------------------------


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a pretrained network. Raises UserError where it is damaged, or of a version that is not known."""
    file = folder / CARD_FILE
    try:
        card = parse_json(read_bytes(file))
        _check_card(card)
    except (UnreadableFileError, ValueError) as error:
        reason = error.reason if isinstance(error, UnreadableFileError) else str(error)
        raise UserError(f"{file} is damaged ({reason}); install the package that it is of again, or restore the file") from None
    return dict(card)


def _check_card(card: Any) -> None:
    """Raise ValueError where a card lacks what every reader of one needs."""
    if not isinstance(card, dict):
        raise ValueError("not a JSON object")
    if card.get("schema") != CARD_SCHEMA:
        raise ValueError(f"its schema is {shorten_repr(card.get('schema'))}, and this version reads schema {CARD_SCHEMA}")
    row, weights = card.get("row"), card.get("weights")
    if not isinstance(row, dict) or not isinstance(weights, dict):
        raise ValueError("row or weights is missing")
    checks = {
        "macs": is_amount(card.get("macs")),
        "params": is_count(card.get("params")),
        "accuracy": _is_share(card.get("accuracy")),
        "row.mean": _is_share(row.get("mean")),
        "row.std": row.get("std") is None or _is_share(row["std"]),
        "row.n": is_count(row.get("n")),
        "weights.format": is_text(weights.get("format")),
        "weights.bytes": is_count(weights.get("bytes")),
        "weights.sha256": bool(re.fullmatch("[0-9a-f]{64}", str(weights.get("sha256")))),
    }
    for name, check in _OPTIONAL.items():
        checks[name] = card.get(name) is None or check(card[name])
    if wrong := [name for name, is_right in checks.items() if not is_right]:
        raise ValueError(f"{wrong[0]} is missing or wrong")


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_training(value: Any) -> bool:
    """What a training has cost: amounts, or null; texts of any kind."""
    amounts = ("epochs", "seconds", "joules", "train_flops", "pack_size")
    return isinstance(value, dict) and all(value.get(name) is None or is_amount(value[name]) for name in amounts)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


_OPTIONAL = {
    "model": is_text,
    "chosen": is_text,
    "licence": is_text,
    "classes": is_texts,
    "accuracy_before_rounding": _is_share,
    "per_class": lambda value: isinstance(value, dict) and all(map(_is_share, value.values())),
    "input": _is_mapping,
    "data": _is_mapping,
    "training": _is_training,
}  # field -> whether a value is of its kind; what is missing or null is allowed


def is_pretrained(folder: Path) -> bool:
    """Whether a run's folder is that of a pretrained network: nothing may be written to it."""
    return os.path.lexists(folder / CARD_FILE)


def check_weights(path: Path) -> None:
    """Raise UserError where the weights of a pretrained network are not those that its card names. A run's have no card."""
    if not is_pretrained(path.parent):
        return
    wanted = read_card(path.parent)["weights"]["sha256"]
    try:
        content = read_bytes(path, MAX_WEIGHTS_BYTES)
    except MissingFileError:
        raise UserError(describe_missing_weights(path.parent.name)) from None
    if (digest := hashlib.sha256(content).hexdigest()) != wanted:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {digest[:12]}…, and {CARD_FILE} beside it says {wanted[:12]}…; "
            "install the package that it is of again, or restore the file"
        )
