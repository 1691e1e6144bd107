"""Plug-ins of a test: what it registers is forgotten after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cifar import registry
from cifar.config import resolve
from cifar.training.trainer_cache import clear_trainer_cache

KINDS = (registry.models, registry.optimizers, registry.schedules, registry.probes, registry.figures)


@contextlib.contextmanager
def keep_registries() -> Iterator[None]:
    """Names that are registered inside are unknown afterwards. To be entered while CIFAR_PLUGINS is not set."""
    for known in KINDS:
        known.names()  # the package's own stay
    before = [(known, dict(known._entries), set(known._plugins_loaded), list(known.problems)) for known in KINDS]
    try:
        yield
    finally:
        for known, entries, loaded, problems in before:
            known._entries, known._plugins_loaded, known.problems = entries, loaded, problems
        resolve._build_schema.cache_clear()
        clear_trainer_cache()


def forget_plugins() -> None:
    """Plug-in files are imported again when a name is next asked for, as in a new process."""
    for known in KINDS:
        known._entries = {name: entry for name, entry in known._entries.items() if not entry.digest}
        known._plugins_loaded.clear()
        known.problems = []
    resolve._build_schema.cache_clear()
