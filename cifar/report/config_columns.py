"""The settings of many configurations side by side: what differs, what they are called, which are the same."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from cifar.report.formatting import format_value

# They say how a run is observed and named, and change no weight: runs that differ in them only are of one configuration.
OBSERVING_KEYS = frozenset(
    ("experiment", "test", "probes", "probe_every", "histograms", "checkpoint_every", "max_macs", "eval_batch_size")
)


def describe_config(config: dict[str, Any], swept: Sequence[str] = ()) -> tuple[str, ...]:
    """What a configuration is, without its seed and how it is observed, to the last bit and the types of its values.

    swept: what the run's sweep varied on purpose; that is always a part of it.
    """
    kept = OBSERVING_KEYS.intersection(swept)
    order = _find_order(tuple(config), kept)
    values = [config[name] for name in order]
    if not set(map(type, values)) <= _PLAIN_TYPES:
        return ("", json.dumps(dict(zip(order, values, strict=True)), sort_keys=True, default=str))
    return (*order, repr(values))


_PLAIN_TYPES = {str, int, float, bool, type(None)}


@functools.lru_cache(maxsize=1024)  # many runs have the same names
def _find_order(names: tuple[str, ...], kept: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if name != "seed" and (name not in OBSERVING_KEYS or name in kept)))


def count_labels(parts: dict[str, list[str]], keys: Sequence[str]) -> int:
    """How many different labels there are by these keys. parts: what each key gives to the label of each point."""
    return len(set(join_parts(parts, keys))) if keys else len(next(iter(parts.values()), [])[:1])


def join_parts(parts: dict[str, list[str]], keys: Sequence[str]) -> list[str]:
    """The labels by these keys; none where there is no key."""
    return [", ".join(filter(None, texts)) for texts in zip(*(parts[key] for key in keys), strict=True)]


def list_columns(configs: Sequence[dict[str, Any]]) -> dict[str, Sequence[Any]]:
    """The values of each setting in many configurations, None where it is missing."""
    names = tuple(configs[0]) if configs else ()
    if all(tuple(config) == names for config in configs):  # most often, and quicker
        return dict(zip(names, zip(*(config.values() for config in configs), strict=True), strict=True))
    every = dict.fromkeys(itertools.chain.from_iterable(configs))
    return {name: [config.get(name) for config in configs] for name in every}


def has_several(values: Sequence[Any]) -> bool:
    """Whether the values are not all the same as JSON writes them."""
    first_value = values[0] if values else None
    is_plain = (
        first_value is None or isinstance(first_value, str | int) or (isinstance(first_value, float) and first_value != 0)
    )
    if is_plain and len(set(map(type, values))) <= 1 and len(set(values)) <= 1:
        return False  # most often; 0.0 and -0.0 are equal, and written differently
    distinct = {repr(value): value for value in values}.values()
    first = next((json.dumps(value, default=str) for value in distinct), "")
    return any(json.dumps(value, default=str) != first for value in distinct)


def format_label(config: dict[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(filter(None, (format_part(key, config.get(key)) for key in keys)))


def format_part(key: str, value: Any) -> str:
    """What a setting gives to a label; "" where it is missing."""
    if value is None:
        return ""
    return format_value(value) if key == "model" else f"{key}={format_value(value)}"


def drop_needless(keys: Sequence[str], kept: Sequence[str], parts: dict[str, list[str]]) -> list[str]:
    """The keys without those, but for the kept ones, that as many different labels do not need. The last ones go first."""
    needed, num_different = list(keys), count_labels(parts, keys)
    for key in reversed(keys):
        fewer = [other for other in needed if other != key]
        if key not in kept and count_labels(parts, fewer) == num_different:
            needed = fewer
    return needed


def shorten_labels(
    labels: list[str],
    configs: Sequence[dict[str, Any]],
    needed: Sequence[str],
    swept: Sequence[frozenset[str]],
    observed: Collection[str],
) -> list[str]:
    """Labels by the needed keys -> without what their reader does not need: runs of several sweeps differ in many keys.

    What a point's sweep varies stays (swept: of each point). Of the rest goes, as long as no two labels become the same: what
    all points of the network have (but not what is on, and off in most points), what is off, and the observed keys, which say
    how a run was carried out.
    """
    if all(own.issuperset(needed) for own in {own | {"model"} for own in set(swept)}):
        return labels  # most often: one sweep
    columns = {key: [config.get(key) for config in configs] for key in needed}
    is_mostly_off = {key: 2 * sum(map(_is_off, values)) > len(values) for key, values in columns.items()}
    models: dict[Any, list[int]] = {}
    for index, config in enumerate(configs):
        models.setdefault(config.get("model"), []).append(index)
    differing = {
        model: {key for key in needed if has_several([columns[key][index] for index in own])} for model, own in models.items()
    }

    def is_common(config: dict[str, Any], key: str) -> bool:
        return key not in differing[config.get("model")] and (_is_off(config.get(key)) or not is_mostly_off[key])

    def is_switched_off(config: dict[str, Any], key: str) -> bool:
        return _is_off(config.get(key))

    def write(shown: Sequence[Sequence[str]]) -> list[str]:
        return [format_label(config, keys) for config, keys in zip(configs, shown, strict=True)]

    shown: list[list[str]] = [list(needed) for _ in configs]
    kept = [own | {"model"} for own in swept]
    for may_go in (is_common, is_switched_off):
        fewer = [
            [key for key in keys if key in own or not may_go(config, key)]
            for config, keys, own in zip(configs, shown, kept, strict=True)
        ]
        shorter = write(fewer)
        if len(set(shorter)) == len(set(labels)):
            labels, shown = shorter, fewer
    short = write([[key for key in keys if key in own or key not in observed] for keys, own in zip(shown, kept, strict=True)])
    counts = Counter(short)
    return [brief if counts[brief] == 1 else label for brief, label in zip(short, labels, strict=True)]


def _is_off(value: Any) -> bool:
    return value is None or value in ("", "none", 0)
