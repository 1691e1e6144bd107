"""The check of a configuration that a run's folder holds, before it is compared with others.

It is lighter than `resolve_config`: a run of an earlier version may lack keys, or have keys that no part takes any more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from cifar.config.schema import Settings
from cifar.system.files import shorten_repr
from cifar.tracking.records import MAX_NAME, is_amount, is_count

_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number from 0", is_count),
    float: ("a finite number from 0", is_amount),
    bool: ("true or false", lambda value: isinstance(value, bool)),
}
_TEXT: tuple[str, Callable[[Any], bool]] = ("text", lambda value: isinstance(value, str | bool))  # `compile: false` was allowed


@functools.cache
def _list_checks() -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """Setting -> what it has to be, in words, and the check."""
    return {name: _KINDS.get(field.annotation, _TEXT) for name, field in Settings.model_fields.items()}


def check_config(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of a wrong kind, and for a text that is too long to be one."""
    checks = _list_checks()
    for name, value in values.items():
        if isinstance(value, str) and len(value) > MAX_NAME:
            raise ValueError(f"{shorten_repr(name)} in config.json has {len(value):,} characters")
        if value is not None and name in checks:
            what, check = checks[name]
            if not check(value):
                raise ValueError(f"{name} in config.json is {shorten_repr(value)}, not {what}")
