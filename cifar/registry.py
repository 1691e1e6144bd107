"""Names -> builders. A builder's keyword-only signature is its configuration: names, types and defaults are read from it.

    @models.register("resnet20", depth=20)          # `depth` is bound, `width` stays a key of this variant
    @models.register("resnet")                      # the family, with both knobs free
    def resnet(*, depth: int = 20, width: int = 16) -> nn.Module: ...

A registry finds its builders by importing every file of its own package, and of the folder of the same name in each
directory of CIFAR_PLUGINS (`DIR/models/*.py`, `DIR/optim/*.py`, ...), when a name is first asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cifar.errors import UserError, did_you_mean
from cifar.system.variables import read_words

Builder = TypeVar("Builder", bound=Callable[..., Any])


@dataclass(frozen=True)
class Key:
    """One configuration key: its type, its default, and the file that owns it."""

    name: str
    type: Any
    default: Any
    file: str
    doc: str = ""


@dataclass(frozen=True)
class Entry:
    """One registered name. `keys` are free to configure; `bound` were fixed by `register`."""

    kind: str
    name: str
    builder: Callable[..., Any]
    keys: dict[str, Key]
    bound: dict[str, Any]
    file: str

    @property
    def doc(self) -> str:
        """The first line of the builder's docstring."""
        return (inspect.getdoc(self.builder) or "").partition("\n")[0]

    def build(self, *args: Any, **values: Any) -> Any:
        return self.builder(*args, **{**self.bound, **values})


class Registry:
    """The names of one kind of part. They are found in `cifar.<folder>` and in `<plug-in directory>/<folder>`."""

    def __init__(self, kind: str, folder: str, package: str | None = None) -> None:
        self.kind, self.folder, self.package = kind, folder, package or f"cifar.{folder}"
        self._entries: dict[str, Entry] = {}
        self._builtin_loaded = False
        self._plugins_loaded: set[Path] = set()

    def register(self, name: str, **bound: Any) -> Callable[[Builder], Builder]:
        """Decorator. Registers a builder under `name`; keywords given here are bound and stop being keys."""

        def decorate(builder: Builder) -> Builder:
            file = inspect.getsourcefile(builder) or "?"
            known = self._entries.get(name)
            if known and known.file != file:
                raise UserError(f"{self.kind} '{name}' is registered twice: in {known.file} and in {file}; rename one")
            self._entries[name] = Entry(self.kind, name, builder, _read_keys(builder, bound, file), bound, file)
            return builder

        return decorate

    def load(self) -> None:
        """Import the package's files, then the plug-in files. Repeated calls import only what is new."""
        if not self._builtin_loaded:
            self._builtin_loaded = True
            module = importlib.import_module(self.package)
            for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
                importlib.import_module(f"{self.package}.{info.name}")
        for directory in plugin_directories():
            for path in sorted((directory / self.folder).glob("*.py")):
                if path not in self._plugins_loaded:
                    self._plugins_loaded.add(path)
                    _import_file(path, f"cifar_plugins.{self.folder}.{path.stem}")

    def names(self) -> list[str]:
        self.load()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        self.load()
        return iter([self._entries[name] for name in sorted(self._entries)])

    def __getitem__(self, name: str) -> Entry:
        self.load()
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} '{name}': {did_you_mean(name, self._entries)}; {self._hint_at_plugins()}")
        return self._entries[name]

    def _hint_at_plugins(self) -> str:
        if folders := [str(directory / self.folder) for directory in plugin_directories()]:
            return f"no file that CIFAR_PLUGINS names in {' or '.join(folders)} registers it"
        return f"for one of your own, set CIFAR_PLUGINS to the folder that has {self.folder}/FILE.py"


def plugin_directories() -> list[Path]:
    """The directories of CIFAR_PLUGINS, each of which has to exist."""
    directories = [Path(os.path.realpath(part)) for part in read_words("CIFAR_PLUGINS", os.pathsep)]
    for directory in directories:
        if not os.path.isdir(directory):  # False also for a name that is too long
            raise UserError(f"CIFAR_PLUGINS names '{directory}', which is not a folder; correct or unset the variable")
    return directories


def _import_file(path: Path, name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the plug-in {path} cannot be imported ({type(error).__name__}: {error}); correct the file") from error


def _read_keys(builder: Callable[..., Any], bound: dict[str, Any], file: str) -> dict[str, Key]:
    hints = typing.get_type_hints(builder.__init__ if inspect.isclass(builder) else builder, include_extras=True)
    parameters = inspect.signature(builder).parameters.values()
    free = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in bound]
    for parameter in free:
        assert parameter.default is not inspect.Parameter.empty, f"{file}: '{parameter.name}' needs a default"
        assert parameter.name in hints, f"{file}: '{parameter.name}' needs a type"
    return {p.name: Key(p.name, hints[p.name], p.default, file) for p in free}


models = Registry("model", "models")
optimizers = Registry("optimizer", "optim")
schedules = Registry("schedule", "schedules", "cifar.optim.schedules")
probes = Registry("probe", "probes")
figures = Registry("figure", "figures", "cifar.report.figures")
