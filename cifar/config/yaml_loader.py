"""YAML as people write it: PyYAML's `safe_load` with 1.2's scalars, no duplicate keys, bounded, errors that name the place.

Like PyYAML: merge keys (`<<`), anchors and aliases, `1_000`, `0x40`, `0b11`, dates. Unlike it: `1e-5` is a number, and `on`,
`yes`, `1:30` and `010` are text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer, ComposerError
from yaml.constructor import ConstructorError

from cifar.errors import UserError
from cifar.system.files import UnreadableFileError, check_text, check_values, read_text, shorten_repr

# libyaml reads a megabyte in a second; PyYAML's own parser takes twenty times as long.
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BASES: Any = (_PARSER,) if issubclass(_PARSER, Composer) else (Composer, _PARSER)  # libyaml's has a composer of its own
MAX_CHARACTERS = 2**21 if yaml.__with_libyaml__ else 2**17
MAX_NODES = 150_000  # lists, mappings and scalars, each alias counted as often as it stands there
MAX_OTHER_KEYS = 1000  # of a mapping that are not text: whole numbers can be chosen so that looking each up takes long
MAX_DIGITS = 300  # of a whole number: no float holds one of 309

_PREFIX = "tag:yaml.org,2002:"


class _Yaml12Loader(*_BASES):  # type: ignore[misc]
    """PyYAML's safe loader with YAML 1.2's scalars: PyYAML reads `1e-5` as a string and `on`, `yes` as booleans."""

    def __init__(self, text: str) -> None:
        _PARSER.__init__(self, text)
        Composer.__init__(self)
        self._num_nodes, self._sizes = 0, dict[str, int]()  # sizes: of the anchored nodes, by anchor
        self._flattened: set[int] = set()

    # -- bounds --

    def compose_node(self, parent: Any, index: Any) -> Any:
        num_before = self._num_nodes
        event: Any = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias:
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise ComposerError(None, None, f"'*{event.anchor}' stands inside of what it names", event.start_mark)
            self._num_nodes += self._sizes.get(event.anchor, 0)
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise ComposerError(None, None, f"more than {MAX_NODES:,} values, aliases counted", event.start_mark)
        node = super().compose_node(parent, index)
        if not is_alias and event.anchor is not None:
            self._sizes[event.anchor] = self._num_nodes - num_before
        return node

    # -- values --

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError, IndexError, OverflowError):  # a date without such a day, ...
            kind = node.tag.removeprefix(_PREFIX)
            shown = shorten_repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            raise ConstructorError(None, None, f"{shown} is not a value of the kind '{kind}'", node.start_mark) from None

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MAX_DIGITS:
            raise ConstructorError(None, None, f"a whole number of {len(node.value):,} digits", node.start_mark)
        return int(super().construct_yaml_int(node))

    def flatten_mapping(self, node: Any) -> None:
        """Put the entries of merge keys in their place, after a check that no key stands twice. PyYAML would take the last."""
        if id(node) in self._flattened:  # by another mapping that merges it
            return
        self._flattened.add(id(node))
        seen: set[Any] = set()
        num_others = 0
        for key_node, _ in node.value:
            if key_node.tag == f"{_PREFIX}merge":
                continue
            key = key_node.value if key_node.tag == f"{_PREFIX}value" else self.construct_object(key_node, deep=True)
            try:
                is_known = key in seen
            except TypeError:
                raise ConstructorError(None, None, f"a {key_node.id} cannot be a key", key_node.start_mark) from None
            if is_known:
                raise ConstructorError(None, None, f"the key {_show_key(key)} stands twice", key_node.start_mark)
            seen.add(key)
            num_others += not isinstance(key, str)
            if num_others > MAX_OTHER_KEYS:
                raise ConstructorError(None, None, "too many keys that are not text", key_node.start_mark)
        super().flatten_mapping(node)


def _show_key(key: Any) -> str:
    return f"'{key}'" if len(str(key)) < 60 else shorten_repr(str(key))


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.removeprefix(_PREFIX) not in ("bool", "float", "int")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12Loader.add_implicit_resolver(
    f"{_PREFIX}int", re.compile(r"^[-+]?(?:0|[1-9][\d_]*|0b[01_]+|0x[\da-fA-F_]+)$", re.ASCII), list("-+0123456789")
)
_Yaml12Loader.add_implicit_resolver(f"{_PREFIX}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml12Loader.add_implicit_resolver(
    f"{_PREFIX}float",
    re.compile(
        r"^(?:[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|[-+]?\.(?:nan|NaN|NAN))$",
        re.ASCII,
    ),
    list("-+0123456789."),
)
_Yaml12Loader.add_constructor(f"{_PREFIX}int", _Yaml12Loader.construct_yaml_int)
_Yaml12Loader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, lambda loader, node: loader.construct_mapping(node, deep=True)
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text -> Python values. `where` names the source in errors. Raises UserError."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: {len(text):,} characters are more than the {MAX_CHARACTERS:,} that are read; write less")
    try:
        check_text(text)
        value = yaml.load(text, Loader=_Yaml12Loader)  # noqa: S506 (a safe loader)
        check_values(value)
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{where}{at}: not valid YAML ({' '.join(str(problem).split())}); correct the file") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML (nested too deeply); correct the file") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid YAML ({error}); correct the file") from None


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file. Raises UserError where it cannot be read."""
    try:
        return read_text(path)
    except UnreadableFileError as error:
        raise UserError(f"cannot read {path} ({error.reason}); check the path") from None


def read_yaml(path: Path) -> Any:
    """A YAML file's content. Raises UserError where it cannot be read or parsed."""
    return parse_yaml(read_yaml_text(path), str(path))
