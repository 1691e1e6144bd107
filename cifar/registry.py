"""Names -> builders. A builder's keyword-only signature is its configuration: names, types and defaults are read from it.

    @models.register("resnet20", depth=20)          # `depth` is bound, `width` stays a key of this variant
    @models.register("resnet")                      # the family, with both knobs free
    def resnet(*, depth: int = 20, width: int = 16) -> nn.Module: ...

A registry finds its builders by importing every file of its own package, and of the folder of the same name in each
directory of CIFAR_PLUGINS (`DIR/models/*.py`, `DIR/optim/*.py`, ...), when a name is first asked for. A name of the package's
own is found without looking at plug-ins.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cifar.errors import UserError, did_you_mean
from cifar.system import user_code
from cifar.system.variables import read_words

Builder = TypeVar("Builder", bound=Callable[..., Any])
PLUGIN_FOLDERS = ("models", "optim", "schedules", "probes", "figures")  # of a plug-in directory; one of them has to be there
_PACKAGE = Path(__file__).parent


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
    digest: str = ""  # SHA-256 of the plug-in file as it was imported; "" for what is no plug-in file

    @property
    def is_plugin(self) -> bool:
        """Whether somebody else wrote it: it is not in this package."""
        return is_plugin_file(self.file)

    @property
    def doc(self) -> str:
        """The first line of the builder's docstring."""
        return (inspect.getdoc(self.builder) or "").partition("\n")[0]

    def build(self, *args: Any, **values: Any) -> Any:
        return self.builder(*args, **{**self.bound, **values})


@dataclass
class _PluginFile:
    """The plug-in file that is being imported, and the names that it has registered so far."""

    path: Path
    digest: str
    builders: dict[tuple[str, str], Any]  # (kind, name) -> builder


_importing: list[_PluginFile] = []  # the last one is being imported; a plug-in may import another


class UnknownNameError(UserError):
    """No part of that kind has this name."""

    def __init__(self, text: str, kind: str = "", name: str = "") -> None:
        super().__init__(text)
        self.kind, self.name = kind, name


@functools.cache  # asked for every part of every trial
def is_plugin_file(file: str) -> bool:
    """Whether a file is somebody's own, and not in this package."""
    return not Path(file).is_relative_to(_PACKAGE)


class Registry:
    """The names of one kind of part. They are found in `cifar.<folder>` and in `<plug-in directory>/<folder>`.

    With `skips_broken`, a plug-in file that cannot be imported is left out, and the sentence about it kept in `problems`.
    """

    def __init__(self, kind: str, folder: str, package: str | None = None, *, skips_broken: bool = False) -> None:
        self.kind, self.folder, self.package = kind, folder, package or f"cifar.{folder}"
        self.skips_broken, self.problems = skips_broken, list[str]()
        self._entries: dict[str, Entry] = {}
        self._builtin_loaded = False
        self._plugins_loaded: set[Path] = set()

    def register(self, name: str, **bound: Any) -> Callable[[Builder], Builder]:
        """Decorator. Registers a builder under `name`; keywords given here are bound and stop being keys."""
        if not isinstance(name, str) or not re.fullmatch(r"[^\s,=/\\]+", name) or not name.isprintable():
            example = f'@{self.folder.replace("optim", "optimizers")}.register("name")'
            raise UserError(f"{name!r} is no name of a {self.kind}; write {example}, without spaces, commas, '=' and slashes")
        caller = sys._getframe(1).f_globals.get("__file__", "")  # the builder itself may come from elsewhere

        def decorate(builder: Builder) -> Builder:
            file = caller or _find_source(builder)
            plugin = next((plugin for plugin in _importing if str(plugin.path) == file), None)
            known = self._entries.get(name)
            if known and known.file != file:
                raise UserError(f"{self.kind} '{name}' is registered twice: in {known.file} and in {file}; rename one")
            if plugin and plugin.builders.setdefault((self.kind, name), builder) is not builder:
                raise UserError(f"{self.kind} '{name}' is registered twice in {file}; rename one")
            digest = plugin.digest if plugin else ""
            if _importing and not plugin and is_plugin_file(file):  # a module of the user's that the plug-in imports
                user_code.note_plugin_file(Path(file))
                digest = _digest_file(Path(file))
            self._entries[name] = Entry(self.kind, name, builder, _read_keys(builder, bound, file), bound, file, digest)
            return builder

        return decorate

    def load(self) -> None:
        """Import the package's files, then the plug-in files. Repeated calls import only what is new.

        A plug-in file that cannot be imported does not keep the others from being. Raises UserError about it at the end.
        """
        self._load_own()
        errors = []
        for directory in self._find_plugin_directories():
            for path in sorted((directory / self.folder).glob("*.py")):
                if path in self._plugins_loaded:
                    continue
                try:
                    _import_file(path, f"cifar_plugins.{self.folder}.{path.stem}")
                except UserError as error:
                    errors.append(error)
                    if not self.skips_broken:
                        continue
                    self.problems.append(str(error))
                self._plugins_loaded.add(path)
        if errors and not self.skips_broken:
            raise errors[0]

    def _find_plugin_directories(self) -> list[Path]:
        try:
            return plugin_directories()
        except UserError as error:
            if not self.skips_broken:
                raise
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return []

    def _load_own(self) -> None:
        if not self._builtin_loaded:
            self._builtin_loaded = True
            module = importlib.import_module(self.package)
            for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
                importlib.import_module(f"{self.package}.{info.name}")

    def names(self) -> list[str]:
        self.load()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        self.load()
        return iter([self._entries[name] for name in sorted(self._entries)])

    def __getitem__(self, name: str) -> Entry:
        self._load_own()
        if name in self._entries and not self._entries[name].is_plugin:
            return self._entries[name]
        try:
            self.load()
        except UserError:
            if name not in self._entries:
                raise
        if name not in self._entries:
            text = f"unknown {self.kind} '{name}': {did_you_mean(name, self._entries)}; {self._hint_at_plugins()}"
            raise UnknownNameError(text, self.kind, name)
        return self._entries[name]

    def find(self, name: str) -> Entry | None:
        """The entry of that name, or None where there is none."""
        with contextlib.suppress(UserError):
            return self[name]
        return None

    def _hint_at_plugins(self) -> str:
        if folders := [str(directory / self.folder) for directory in plugin_directories()]:
            return f"no file that CIFAR_PLUGINS names in {' or '.join(folders)} registers it"
        return f"for one of your own, set CIFAR_PLUGINS to the folder that has {self.folder}/FILE.py"


def plugin_directories() -> list[Path]:
    """The directories of CIFAR_PLUGINS. Raises UserError for one that does not exist or is no plug-in folder."""
    parts = read_words("CIFAR_PLUGINS", os.pathsep)
    directories = [Path(os.path.realpath(os.path.expanduser(part))) for part in parts]
    for directory in directories:
        if not os.path.isdir(directory):  # False also for a name that is too long
            raise UserError(f"CIFAR_PLUGINS names '{directory}', which is not a folder; correct or unset the variable")
        if not any((directory / folder).is_dir() for folder in PLUGIN_FOLDERS):
            is_inside = directory.name in PLUGIN_FOLDERS and any(directory.glob("*.py"))
            advice = f"name its parent, {directory.parent}" if is_inside else "correct or unset the variable"
            raise UserError(
                f"CIFAR_PLUGINS names '{directory}', which has none of the folders {', '.join(PLUGIN_FOLDERS)}; {advice}"
            )
    return directories


def _import_file(path: Path, name: str) -> None:
    """Import a plug-in file. What it prints goes to stderr, as stdout may be a document. Raises UserError where it fails."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    module = importlib.util.module_from_spec(spec)
    user_code.note_plugin_file(path)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        source = path.read_bytes()
        _importing.append(_PluginFile(path, hashlib.sha256(source).hexdigest(), {}))
        try:
            with contextlib.redirect_stdout(sys.stderr):
                # Compiled here: the import system's cache on disk may miss an edit that comes within a second of the last.
                exec(compile(source, str(path), "exec"), module.__dict__)
        finally:
            _importing.pop()
    except UserError:
        sys.modules.pop(name)
        raise
    except BaseException as error:
        sys.modules.pop(name)
        user_code.pass_interrupt(error)
        ends = isinstance(error, SystemExit)
        said = f"it ends the program, {user_code.describe_error(error)}" if ends else user_code.describe_error(error)
        raise UserError(f"the plug-in {path} cannot be imported: {said}; correct the file") from error
    finally:
        if name not in sys.modules and before is not None:
            sys.modules[name] = before


def _digest_file(path: Path) -> str:
    with contextlib.suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return ""


def _find_source(builder: Callable[..., Any]) -> str:
    with contextlib.suppress(TypeError, OSError):
        return inspect.getsourcefile(builder) or "?"
    return "?"


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
figures = Registry("figure", "figures", "cifar.report.figures", skips_broken=True)
