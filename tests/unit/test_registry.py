"""Registries: keys come from signatures, plug-ins from folders, and every error says what to do."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from cifar import registry
from cifar.config.resolve import collect_all_keys, resolve_config
from cifar.config.schema import Settings
from cifar.errors import UserError, did_you_mean
from cifar.registry import Registry
from helpers.plugins import KINDS, keep_registries

PACKAGE = Path(registry.__file__).parent
PLUGIN = """
from cifar.registry import models
@models.register("{name}", depth=2)
def build(*, depth: int = 1, {key}: {type} = {default}) -> object:
    "A plug-in."
    return (depth, {key})
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A plug-in folder; what its files register is forgotten afterwards."""

    def write(folder: str, name: str, text: str) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / f"{name}.py"
        path.write_text(text)
        return path

    with keep_registries():
        monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path))
        yield write


def test_keys_are_the_keyword_only_parameters_less_the_bound_ones() -> None:
    shelf = Registry("thing", "nowhere", "cifar.errors")

    @shelf.register("free")
    @shelf.register("bound", depth=7)
    def build(parameters: int, *, depth: int = 1, width: float = 0.5) -> tuple[int, int, float]:
        """First line.

        Second."""
        return parameters, depth, width

    assert {name: list(shelf[name].keys) for name in shelf.names()} == {"bound": ["width"], "free": ["depth", "width"]}
    assert (shelf["free"].keys["width"].type, shelf["free"].keys["width"].default) == (float, 0.5)
    assert shelf["bound"].build(3, width=2.0) == (3, 7, 2.0)
    assert shelf["free"].doc == "First line."


@pytest.mark.parametrize("bad", ["def build(*, depth: int): ...", "def build(*, depth=1): ..."])
def test_a_key_without_type_or_default_is_our_bug(bad: str) -> None:
    scope: dict[str, object] = {}
    exec(bad, scope)
    with pytest.raises(AssertionError, match="depth"):
        Registry("thing", "nowhere", "cifar.errors").register("x")(scope["build"])


def test_the_most_similar_names_come_first_at_most_three() -> None:
    assert did_you_mean("resnet2", ["vgg11", "resnet20"]) == "did you mean 'resnet20'? (known: resnet20, vgg11)"
    assert did_you_mean("zzz", ["a"]) == "known: a"
    known = ["resnet8", "resnet20", "resnet56", "resnet", "vgg11"]
    said = did_you_mean("resnet2", known)
    assert said.startswith("did you mean 'resnet20', 'resnet' or 'resnet8'? (known: resnet, "), said
    assert did_you_mean("ab", ["abc", "abd", "x"]) == "did you mean 'abd' or 'abc'? (known: abc, abd, x)"


@pytest.mark.parametrize("known", KINDS, ids=lambda known: known.kind)
def test_an_unknown_name_points_to_plugins(known: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"unknown {known.kind} 'x9'.*set CIFAR_PLUGINS to the folder that has {known.folder}/"
    ):
        known["x9"]
    (tmp_path / known.folder).mkdir()
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path))
    with pytest.raises(UserError, match=rf"no file that CIFAR_PLUGINS names in {tmp_path / known.folder} registers it"):
        known["x9"]


@pytest.mark.parametrize("known", KINDS, ids=lambda known: known.kind)
def test_every_registered_name_has_a_doc_and_typed_keys(known: Registry) -> None:
    assert known.names(), f"no {known.kind} is registered"
    for entry in known:
        assert entry.doc or getattr(entry.builder, "title", ""), f"{entry.file}: {entry.name} needs a docstring, or a title"
        assert all(isinstance(key.name, str) and key.type is not None for key in entry.keys.values())


def test_no_key_has_two_types_or_is_a_setting_too() -> None:
    assert set(collect_all_keys()).isdisjoint(Settings.model_fields)


def test_a_plugin_is_found_by_its_folder(plugins) -> None:
    plugins("models", "mine", PLUGIN.format(name="mine", key="flavour", type="str", default="'x'"))
    assert "mine" in registry.models.names()
    assert registry.models["mine"].build(flavour="y") == (2, "y")
    assert resolve_config({"model": "mine", "flavour": "z"}).to_dict()["flavour"] == "z"


def test_a_key_of_two_types_names_both_files(plugins) -> None:
    path = plugins("models", "odd", PLUGIN.format(name="odd", key="momentum", type="str", default="'x'"))
    with pytest.raises(UserError, match="momentum") as caught:
        collect_all_keys()
    assert str(path) in str(caught.value) and str(PACKAGE / "optim") in str(caught.value)


@pytest.mark.parametrize(
    ("key", "type_", "default", "said"),
    [
        ("act", "type", "dict", "a type or a default that no configuration file can hold"),
        ("act", "object", "object()", "a type or a default that no configuration file can hold"),
        ("act", "'collections.deque'", "1", "NameError"),
        ("copy", "int", "1", "'copy' is no name for a configuration key"),
        ("_hidden", "int", "1", "'_hidden' is no name for a configuration key"),
        ("kwargs_for", "int", "1", "'kwargs_for' is no name for a configuration key"),
    ],
)
def test_a_key_that_no_configuration_can_hold_names_the_file(plugins, key: str, type_: str, default: str, said: str) -> None:
    path = plugins("models", "odd", PLUGIN.format(name="odd", key=key, type=type_, default=default))
    with pytest.raises(UserError) as caught:
        resolve_config({"model": "odd"})
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["build", "'two words'", "'a,b'", "'a=b'", "''", "7", "'a\\x1b[2J'", "'../up'"])
def test_a_name_has_to_be_one_word(plugins, name: str) -> None:
    text = f"from cifar.registry import models\ndef build() -> object: ...\nmodels.register({name})\n"
    path = plugins("models", "odd", text)
    with pytest.raises(UserError, match=r'write @models.register\("name"\)'):
        registry.models.names()
    assert path.exists()


def test_a_key_that_is_a_setting_names_the_file(plugins) -> None:
    path = plugins("models", "seedy", PLUGIN.format(name="seedy", key="seed", type="int", default="0"))
    with pytest.raises(UserError, match="setting of every run") as caught:
        resolve_config({"model": "seedy"})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'", 1),
        ("x = 1\ndef broken(:\n", "SyntaxError: invalid syntax", 2),
        ("x = 1\n\nraise ValueError('later')\n", "ValueError: later", 3),
        ("import sys\nsys.exit(0)\n", "it ends the program, SystemExit: 0", 2),
        ("class Mine(BaseException):\n    pass\n\nraise Mine('of my own')\n", "Mine: of my own", 4),
        ("\u00e9 = '".encode("latin-1"), "SyntaxError", 0),
        (PLUGIN.format(name="two", key="a", type="int", default="1") * 2, "registered twice in", 0),
        (PLUGIN.format(name="resnet20", key="a", type="int", default="1"), "'resnet20' is registered twice", 0),
        (PLUGIN.format(name="untyped", key="a", type="Missing", default="1"), "NameError: name 'Missing'", 0),
    ],
    ids=["import", "syntax", "raise", "exit", "own class", "bytes", "twice", "built-in", "type"],
)
def test_a_plugin_that_cannot_be_imported_is_named_with_its_line(plugins, text: str | bytes, said: str, line: int) -> None:
    plugins("models", "good", PLUGIN.format(name="good", key="flavour", type="str", default="'x'"))
    path = plugins("models", "broken", "")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(2):  # a notebook may go on after the first one
        with pytest.raises(UserError) as caught:
            registry.models.names()
        assert said in str(caught.value) and f"{path}:{line}" * bool(line) in str(caught.value)
    assert registry.models["good"].build() == (2, "x"), "the others are there"
    assert registry.models["worksheet1"].builder, "and so are the package's own"
    path.write_text("x = 1\n")
    assert "good" in registry.models.names(), "mended"


def test_what_a_plugin_prints_does_not_get_into_a_document(plugins, capsys: pytest.CaptureFixture[str]) -> None:
    plugins("models", "loud", "print('hello')\n" + PLUGIN.format(name="loud", key="flavour", type="str", default="'x'"))
    assert "loud" in registry.models.names()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "hello\n")


def test_a_broken_figure_is_left_out_and_said(plugins) -> None:
    path = plugins("figures", "broken", "1 / 0\n")
    names = registry.figures.names()
    assert "curves" in names
    (problem,) = registry.figures.problems
    assert f"{path}:1" in problem and "ZeroDivisionError" in problem


def test_an_edited_plugin_is_imported_as_it_is_now_and_its_digest_is_that_of_the_text(plugins) -> None:
    """Python's own cache of compiled files misses an edit that leaves the size and comes within a second."""
    text = PLUGIN.format(name="mine", key="flavour", type="str", default="'a'")
    path = plugins("models", "mine", text)
    assert registry.models["mine"].build() == (2, "a")
    digest = registry.models["mine"].digest
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace("'a'", "'b'"))
    registry.models._plugins_loaded.discard(path)
    assert registry.models["mine"].build() == (2, "b") and registry.models["mine"].digest != digest
    assert not list(path.parent.glob("__pycache__"))
    assert registry.models["resnet20"].digest == "" and not registry.models["resnet20"].is_plugin


def test_a_builder_from_elsewhere_belongs_to_the_file_that_registers_it(plugins) -> None:
    path = plugins(
        "models",
        "borrowed",
        "from cifar.models.resnet import resnet\nfrom cifar.registry import models\nmodels.register('r14', depth=14)(resnet)\n",
    )
    entry = registry.models["r14"]
    assert (entry.file, entry.is_plugin) == (str(path), True)
    assert {"width", "shortcut"} <= set(entry.keys) and "depth" not in entry.keys


@pytest.mark.parametrize("what", ["absent", "file", "empty", "models itself"])
def test_a_folder_that_is_no_plugin_folder_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "models"
    if what == "file":
        folder.write_text("")
    elif what != "absent":
        folder.mkdir()
        (folder / "notes.txt").write_text("")
    if what == "models itself":
        (folder / "mine.py").write_text("")
    monkeypatch.setenv("CIFAR_PLUGINS", str(folder))
    expected = {"empty": "none of the folders models, optim", "models itself": f"name its parent, {tmp_path}"}
    with pytest.raises(UserError, match=expected.get(what, "which is not a folder")):
        registry.models.names()
    with pytest.raises(UserError, match="CIFAR_PLUGINS"):
        resolve_config({"model": "worksheet1"})
    assert registry.models["worksheet1"].name == "worksheet1", "a run of a built-in network can still be read"


def test_a_name_taken_twice_names_both_files(plugins) -> None:
    plugins("models", "one", PLUGIN.format(name="same", key="a1", type="int", default="1"))
    plugins("models", "two", PLUGIN.format(name="same", key="a2", type="int", default="1"))
    with pytest.raises(UserError, match="registered twice"):
        registry.models.names()


def test_names_cost_no_torch() -> None:
    """The layer of names imports neither torch nor anything of ours above it."""
    code = "import sys, cifar, cifar.config.resolve, cifar.tracking.run_dir\n"
    code += "print([m for m in sys.modules if m in ('torch', 'wandb')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_our_own_plugin_text_is_python() -> None:
    ast.parse(PLUGIN.format(name="n", key="k", type="int", default="1"))
