"""Registries: keys come from signatures, plug-ins from folders, and every error says what to do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cifar import registry
from cifar.config.resolve import collect_all_keys, resolve_config
from cifar.config.schema import Settings
from cifar.errors import UserError, did_you_mean
from cifar.registry import Registry

KINDS = [registry.models, registry.optimizers, registry.schedules, registry.probes, registry.figures]
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
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path))
    before = [(known, dict(known._entries), set(known._plugins_loaded)) for known in KINDS]

    def write(folder: str, name: str, text: str) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / f"{name}.py"
        path.write_text(text)
        return path

    yield write
    for known, entries, loaded in before:
        known._entries, known._plugins_loaded = entries, loaded


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
        Registry("thing", "nowhere", "cifar.errors").register("x")(scope["build"])  # type: ignore[type-var]


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


def test_a_key_that_is_a_setting_names_the_file(plugins) -> None:
    path = plugins("models", "seedy", PLUGIN.format(name="seedy", key="seed", type="int", default="0"))
    with pytest.raises(UserError, match="setting of every run") as caught:
        resolve_config({"model": "seedy"})
    assert str(path) in str(caught.value)


def test_a_plugin_that_does_not_import_is_named(plugins) -> None:
    path = plugins("models", "broken", "import nothing_of_this_name\n")
    with pytest.raises(UserError, match="nothing_of_this_name") as caught:
        registry.models.names()
    assert str(path) in str(caught.value)


def test_a_name_taken_twice_names_both_files(plugins) -> None:
    plugins("models", "one", PLUGIN.format(name="same", key="a1", type="int", default="1"))
    plugins("models", "two", PLUGIN.format(name="same", key="a2", type="int", default="1"))
    with pytest.raises(UserError, match="registered twice"):
        registry.models.names()


def test_a_missing_plugin_folder_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CIFAR_PLUGINS", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="CIFAR_PLUGINS"):
        registry.models.names()


def test_names_cost_no_torch() -> None:
    """The layer of names imports neither torch nor anything of ours above it."""
    code = "import sys, cifar, cifar.config.resolve, cifar.tracking.run_dir\n"
    code += "print([m for m in sys.modules if m in ('torch', 'wandb')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_our_own_plugin_text_is_python() -> None:
    ast.parse(PLUGIN.format(name="n", key="k", type="int", default="1"))
