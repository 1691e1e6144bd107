"""The configuration that a run's folder holds, checked and completed before it is compared with others.

That is lighter than `resolve_config`, and needs no PyTorch: a run of an earlier version may lack keys, or have keys that no
part takes any more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cifar.config.schema import Settings
from cifar.system.files import shorten_repr
from cifar.tracking.records import MAX_NAME, is_amount, is_column_right, is_count

_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number from 0", is_count),
    float: ("a finite number from 0", is_amount),
    bool: ("true or false", lambda value: isinstance(value, bool)),
}
_TEXT: tuple[str, Callable[[Any], bool]] = ("text", lambda value: isinstance(value, str | bool))  # `compile: false` was allowed

# Settings of many runs, which are checked once: (name, value), and the names and types of whole configurations.
MAX_RIGHT = 10_000
_right_items: set[tuple[str, Any]] = set()
_right_kinds: set[tuple[Any, ...]] = set()

# The settings of the first version: each record of a run has them. What came later is filled in where it is missing, by its
# default, which is what earlier versions did.
_FIRST_SETTINGS = frozenset((
    "experiment", "dataset", "val_size", "train_size", "test", "model", "optimizer", "schedule", "probes", "epochs",
    "max_steps", "batch_size", "seed", "flip", "crop", "crop_padding", "cutout", "normalize", "label_smoothing", "mixup",
    "cutmix", "ema", "tta", "precision", "channels_last", "deterministic", "compile", "device", "threads", "probe_every",
    "checkpoint_every", "max_macs",
))  # fmt: skip
LATER_SETTINGS = {name: field.default for name, field in Settings.model_fields.items() if name not in _FIRST_SETTINGS}

# The same for keys of parts: (key, what earlier versions did, the parts that take it and are older than the key).
_WITH_SQUEEZE = (
    "resnet", "resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "preact_resnet", "preact_resnet18", "wrn",
    "wrn_16_4", "wrn_28_10",
)  # fmt: skip
_LATER_PART_KEYS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("drop_path", 0.0, (*_WITH_SQUEEZE, "airbench", "airbench96")),
    ("se", 0, _WITH_SQUEEZE),
    ("ns_together", False, ("muon",)),
)


def fill_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a run of this version would have recorded it: with the keys that are newer than the run."""
    filled = {**values}
    for name, value in _list_later_keys(values.get("model"), values.get("optimizer")):
        filled.setdefault(name, value)
    for name in ("compile", "histograms"):
        if isinstance(value := filled.get(name), bool):
            filled[name] = "on" if value else "off"
    return filled


@functools.lru_cache(maxsize=256)
def _list_later_keys(*parts: Any) -> tuple[tuple[str, Any], ...]:
    later = ((key, value) for key, value, names in _LATER_PART_KEYS if not set(names).isdisjoint(parts))
    return (*LATER_SETTINGS.items(), *later)


@functools.cache
def _list_checks() -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """Setting -> what it has to be, in words, and the check."""
    return {name: _KINDS.get(field.annotation, _TEXT) for name, field in Settings.model_fields.items()}


def check_config(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of a wrong kind, and for a text that is too long to be one."""
    kinds = (*values, *map(type, values.values()))
    try:  # equal values of other types, as 1 and True, are told apart by `kinds`
        unknown = dict(values.items() - _right_items) if kinds in _right_kinds else values
        if not _find_problem(unknown):
            if len(_right_items) < MAX_RIGHT:
                _right_items.update(unknown.items())
                _right_kinds.add(kinds)
            return
    except TypeError:  # a list or a mapping among the values has no hash
        pass
    if problem := _find_problem(values):
        raise ValueError(problem)


def check_all_configs(configs: Sequence[Mapping[str, Any]]) -> None:
    """`check_config` of many: by columns, which is quicker. The error does not say of which."""
    checks = _list_checks()
    for name in dict.fromkeys(itertools.chain.from_iterable(configs)):
        values = [config.get(name) for config in configs]
        if not is_column_right(values, _is_short) or (name in checks and not is_column_right(values, checks[name][1])):
            raise ValueError(f"a {shorten_repr(name)} in config.json is not what it has to be")


def _is_short(value: Any) -> bool:
    return not isinstance(value, str) or len(value) <= MAX_NAME


def _find_problem(values: Mapping[str, Any]) -> str:
    """What is wrong with the first value that is wrong; "" if all are right."""
    checks = _list_checks()
    for name, value in values.items():
        if isinstance(value, str) and len(value) > MAX_NAME:
            return f"{shorten_repr(name)} in config.json has {len(value):,} characters"
        if value is not None and name in checks:
            what, check = checks[name]
            if not check(value):
                return f"{name} in config.json is {shorten_repr(value)}, not {what}"
    return ""
